"""Merge recipes: flags and YAML files read, checked and written again; no checkpoint is opened here."""

from merging.recipe.checks import remarks
from merging.recipe.merge_recipe import MergeRecipe
from merging.recipe.reading import make_recipe, read_config, recipe_as_yaml
from merging.recipe.schedules import DTYPES

__all__ = ["DTYPES", "MergeRecipe", "make_recipe", "read_config", "recipe_as_yaml", "remarks"]
