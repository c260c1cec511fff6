"""Reader and writer of mergekit's YAML recipes, and its command line; no other recipe format belongs here."""
