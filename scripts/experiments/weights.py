"""Deletion of merged weights whose scores are known; their locks stay and rebuild them."""

from __future__ import annotations

import shutil

from scripts.experiments.plan import Cell, Plan
from scripts.experiments.state import State


def delete_scored(plan: Plan, state: State, finished: Cell) -> None:
    """Delete the weights that a finished cell needed, where every cell that needs them is done."""
    for name in finished.needs:
        cell = plan.find(name)
        users = plan.users(name)
        if cell.weights is None or not all(state.status(user).state == "done" for user in users):
            continue
        while cell.weights.is_dir():
            try:
                shutil.rmtree(cell.weights)
            except FileNotFoundError:
                continue  # another runner, whose cell ended at the same time, deletes them as well
