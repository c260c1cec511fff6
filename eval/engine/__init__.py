"""Models that answer requests: transformers in this process, vLLM, a server. No tasks, no scores."""
