"""The verbs around recipes: `surgery recipes` shows those that ship, `new` writes one, `schema` describes them all."""

import argparse
import json
import sys
from pathlib import Path

from surgery.errors import InputError

from .files import write
from .show import print_json, relative, table


def run_recipes(arguments: argparse.Namespace) -> None:
    """List the shipped recipes, or print or copy one of them."""
    from surgery.recipe.reading import read_recipe, shipped_recipe, shipped_recipes

    if arguments.name is not None:
        path = shipped_recipe(arguments.name)
        if arguments.json:
            print_json({"schema_version": 1, "name": arguments.name, "path": path, "recipe": _plain(read_recipe(path))})
        elif arguments.out:
            print(f"recipe: {relative(_written(arguments.out, path.read_text(encoding='utf-8')))}")
        else:
            print(path.read_text(encoding="utf-8"), end="")
        return
    if arguments.out:
        raise InputError("--out copies one recipe; name it: surgery recipes NAME --out FILE")
    recipes = {name: read_recipe(name) for name in shipped_recipes()}
    if arguments.json:
        print_json({"schema_version": 1, "recipes": {name: _plain(recipe) for name, recipe in recipes.items()}})
        return
    rows = [[name, file.recipe.base.name, file.recipe.summary] for name, file in recipes.items()]
    table("surgery apply NAME; surgery recipes NAME prints one", ["name", "base", "summary"], rows)


def _plain(file):
    return file.recipe.model_dump(mode="json", by_alias=True)


def run_schema(arguments: argparse.Namespace) -> None:
    """Print the JSON schema of recipes, or write it to a file."""
    from surgery.recipe.json_schema import schema_text

    if arguments.out:
        path = _written(arguments.out, schema_text())
        print(json.dumps({"schema_version": 1, "file": str(path)}) if arguments.json else f"schema: {relative(path)}")
    else:
        print(schema_text(), end="")


def run_new(arguments: argparse.Namespace) -> None:
    """Write a recipe for a model, which plans as it stands."""
    from surgery.recipe.plan import make_plan
    from surgery.recipe.writing import recipe_text

    name = Path(arguments.model.rstrip("/")).name or "recipe"
    if arguments.out == "-":
        print(recipe_text(arguments.model, arguments.revision, arguments.operator), end="")
        return
    file = Path(arguments.out or f"{name}-{arguments.operator.replace('_', '-')}.yaml")
    if file.suffix not in (".yaml", ".yml"):
        raise InputError(f"--out must name a .yaml file, not {file}")
    path = _written(file, recipe_text(arguments.model, arguments.revision, arguments.operator, file))
    try:
        plan = make_plan(path).plan
    except BaseException:
        path.unlink()
        raise
    replaced = plan.totals["replaced"]
    if arguments.json:
        print_json({"schema_version": 1, "file": path, "plan_hash": plan.hash, "replaced": replaced})
        return
    print(f"recipe: {relative(path)}; it replaces {replaced} attention modules")
    print(f"next: surgery plan {relative(path)}", file=sys.stderr)


def _written(out, text):
    """The absolute path of a new text file; InputError where it cannot be made, or is there already."""
    path = Path(out).absolute()
    if path.exists():
        raise InputError(f"{out} is there already; name another file with --out, or remove it")
    write(path, text.encode())
    return path
