"""Maths answers read as values and compared; extraction from generations and scoring belong to eval/tasks."""
