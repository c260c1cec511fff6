"""Staging of results: work folder, journal, rank shares, check, publication. No contents of files."""
