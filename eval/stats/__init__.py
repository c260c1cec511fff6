"""Statistics over results: significance tests, intervals, bootstrap and hypervolume gains; no text or figures."""
