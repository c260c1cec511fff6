"""The command line of evaluate_model.py: flags to settings, and their execution. No model and no grading."""
