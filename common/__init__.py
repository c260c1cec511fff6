"""Utilities of merging and evaluation that know no models: atomic files, locks, signals, streams,
bounded reading of foreign files, text for terminals."""
