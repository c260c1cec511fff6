"""Writing of results: staging, journals, companion files, checks before publishing. No planning or computing."""
