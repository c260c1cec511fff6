"""What merging and evaluation both need and that knows no models: bounded reading of foreign files, text for terminals.

Nothing here imports another package of this project.
"""
