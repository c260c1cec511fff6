"""The project's own lm-eval tasks: YAML files, and the prompt and answer functions they name. No generation."""
