"""Utilities that know no models: command line, errors, tables, figures, hardware. No merging, no evaluation."""
