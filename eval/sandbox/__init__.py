"""Contained execution of model-written programs; extraction of code from answers and scoring belong to eval/tasks."""
