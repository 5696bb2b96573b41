"""`surgery recipes`: the recipes that ship."""

from surgery.recipe import read_recipe, shipped_recipes

from .show import print_json, table


def run(arguments):
    """List name, base and summary of every shipped recipe."""
    recipes = {name: read_recipe(name).recipe for name in shipped_recipes()}
    if arguments.json:
        print_json({name: recipe.model_dump(mode="json", by_alias=True) for name, recipe in recipes.items()})
        return
    rows = [[name, recipe.base.pipeline, recipe.summary] for name, recipe in recipes.items()]
    table("surgery apply NAME", ["name", "base", "summary"], rows)
