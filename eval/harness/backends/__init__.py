"""lm-eval's models behind an evaluation's requests: transformers in this process, vLLM, a server."""
