"""Evaluation: benchmarks by lm-eval, tables, hypervolume gain, plots.

Write `from eval.x import y`: `import eval` hides the builtin.
"""
