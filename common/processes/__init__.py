"""Processes: child interpreters, signals, standard streams, time and memory limits. Ranks are in common/launcher.py."""
