"""Records of a result: model card, lock file, run record, closing message. No weights."""
