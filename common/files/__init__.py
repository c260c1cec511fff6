"""Files: atomic writes, bounded reading, locks, work folders, temporary folders. Nothing about checkpoints' tensors."""
