"""The experiment runner behind scripts/run_experiment.py: schema, plan, state, execution, results; no merging here."""
