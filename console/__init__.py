"""What the user meets at the shell: errors as one sentence, flags, progress. Imports nothing else of the project."""
