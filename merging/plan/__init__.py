"""Planning from headers and configs alone: tensors of the result, checks, dry-run report. No weights are read."""
