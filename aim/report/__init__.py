"""Reports on importance files: summary, text, figure, upload to the hub. Nothing is measured here."""
