"""Child interpreters, signals, standard streams, time and memory limits; ranks are in common/distributed.py."""
