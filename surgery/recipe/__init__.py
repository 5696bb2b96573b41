"""YAML to a validated Recipe; every problem reported at once, with its file, line, key and nearest valid spelling."""

from .reading import RecipeFile, find_recipe, read_recipe, schema_problems, shipped_recipes
from .schema import Recipe

__all__ = ["Recipe", "RecipeFile", "find_recipe", "read_recipe", "schema_problems", "shipped_recipes"]
