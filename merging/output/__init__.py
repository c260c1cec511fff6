"""Writing of results: shards, digests, checks, companion files. No planning and no computing."""
