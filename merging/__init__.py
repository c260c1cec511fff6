"""Merging of checkpoints: recipes, plans, and their execution; it knows nothing of activations, which are `aim`'s.

The public API, loaded when it is first used: `merge`, `plan_merge` (the room of plans is `merging.plan`),
`MergeRecipe`, `OutputConfig`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from merging.pipeline import merge
    from merging.plan.merge_plan import OutputConfig
    from merging.planning import plan_merge
    from merging.recipe import MergeRecipe

__all__ = ["MergeRecipe", "OutputConfig", "merge", "plan_merge"]
HOMES = {
    "merge": "merging.pipeline", "plan_merge": "merging.planning", "MergeRecipe": "merging.recipe",
    "OutputConfig": "merging.plan.merge_plan",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    """Load a name of the public API."""
    if name not in HOMES:
        raise AttributeError(f"module 'merging' has no attribute {name!r}")
    return getattr(import_module(HOMES[name]), name)
