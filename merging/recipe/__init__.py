"""Merge recipes: flags and YAML files read, checked and written again; no checkpoint is opened here."""

from merging.recipe.merge_recipe import DTYPES, MergeRecipe, make_recipe, read_config, remarks

__all__ = ["DTYPES", "MergeRecipe", "make_recipe", "read_config", "remarks"]
