"""Benchmark data: lm-eval's tasks, local or downloaded files, pinned revisions, few-shot examples. No model."""
