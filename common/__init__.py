"""What merging and evaluation both need and that knows no models: files that appear whole, locks, signals, streams,
bounded reading of foreign files, text for terminals."""
