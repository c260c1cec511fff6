"""One paper per file; `configs/methods/NAME.yaml` beside it holds the parameters, defaults and sources."""
