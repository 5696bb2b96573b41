"""From a path or a shipped recipe's name to a RecipeFile: the validated recipe and where its values stand."""

import hashlib
import json
import re
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path

from pydantic import BaseModel, ValidationError

from surgery.errors import InputError, Problem, RecipeError, nearest
from surgery.guidance.base import WINDOWS as GUIDANCE_WINDOWS
from surgery.guidance.methods import BRANCHES as GUIDANCE_BRANCHES
from surgery.nn.operators import OPERATIONS, has_no

from .document import Document, key_text, read_document
from .schema import BRANCHES as OPERATOR_BRANCHES
from .schema import SCALE_BRANCHES, AnyOperator, Recipe

SCHEMA_LINE = "# yaml-language-server: $schema=schema.json\n"  # of the recipes that ship
BRANCHES = {**OPERATOR_BRANCHES, **GUIDANCE_BRANCHES, **SCALE_BRANCHES}


@dataclass(frozen=True)
class RecipeFile:
    """A recipe that is valid in itself. Whether its layers exist is for the plan, which knows the model, to say."""

    recipe: Recipe
    document: Document

    @property
    def folder(self) -> Path:
        """The folder that the recipe's relative paths start from."""
        return self.document.path.parent

    @property
    def applied_text(self) -> str:
        """The recipe as it was applied: its own text, or, with overrides, its values with the overrides named above."""
        import yaml

        document = self.document
        if not document.overrides:  # the schema of the first line lies beside the recipe alone
            return document.text.removeprefix(SCHEMA_LINE)
        changes = "".join(f"#   --set {override}\n" for override in document.overrides.values())
        return f"# {document.path.name}, with\n{changes}" + yaml.safe_dump(document.data, sort_keys=False)

    @cached_property
    def hash(self) -> str:
        """sha256 of what the recipe says: of its values with the defaults filled in, not of its spelling."""
        values = self.recipe.model_dump(mode="json", by_alias=True)
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def shipped_recipes() -> dict[str, Path]:
    """{name: path} of the recipes that come with the package."""
    folder = resources.files("surgery.recipes")
    paths = [Path(str(entry)) for entry in folder.iterdir() if entry.name.endswith(".yaml")]
    return {path.stem: path for path in sorted(paths)}


def find_recipe(name_or_path: str | Path) -> Path:
    """The path of a recipe given by path or by a shipped recipe's name; InputError with the nearest names else."""
    path = Path(name_or_path)
    if path.suffix in (".yaml", ".yml"):
        try:
            if path.exists():  # what is no file is refused when it is read
                return path
        except (OSError, ValueError) as error:  # a name too long, a zero byte
            reason = getattr(error, "strerror", None) or error
            raise InputError(f"{str(path)[:100]!r} is no recipe: {reason}") from error
        raise InputError(f"there is no file {str(path)[:200]}; `surgery recipes` lists the recipes that ship")
    return shipped_recipe(str(name_or_path))


def shipped_recipe(name: str) -> Path:
    """The path of the recipe that ships under a name; InputError with the nearest names else."""
    shipped = shipped_recipes()
    if name in shipped:
        return shipped[name]
    name = name[:100]
    near = nearest(name, shipped, 0.6)
    hint = f'did you mean "{near}"?' if near else f"there are {', '.join(shipped)}."
    raise InputError(f"no recipe {name!r} ships; {hint} A recipe of your own is given by its path, x.yaml")


def read_recipe(name_or_path: str | Path, overrides: Sequence[str] = ()) -> RecipeFile:
    """The RecipeFile of a path or shipped name, with `--set` overrides; RecipeError carrying every problem else."""
    document = read_document(find_recipe(name_or_path), overrides)
    recipe, problems = schema_problems(document)
    if problems:
        raise RecipeError(problems)
    assert recipe is not None
    return RecipeFile(recipe, document)


def schema_problems(document: Document) -> tuple[Recipe | None, list[Problem]]:
    """(Recipe, []) of a Document, or (None, every Problem that the schema finds)."""
    problems = [*_schedule_problems(document), *_window_problems(document)]
    recipe = None
    try:
        recipe = Recipe.model_validate(document.data)
    except ValidationError as error:
        problems = [*(_problem(document, details) for details in error.errors(include_url=False)), *problems]
    return (None, problems) if problems else (recipe, [])


# what to write, of keys that a recipe has to have
_EXAMPLES = {
    "schema": "schema: 1",
    "name": "name: my-model-pladis",
    "base": "base: {pipeline: OWNER/NAME}",
    "pipeline": "pipeline: OWNER/NAME, or ./folder",
    "operations": "operations: [{replace: cross-attention, with: {operator: pladis}}]",
    "replace": "replace: cross-attention",
    "with": "with: {operator: pladis}",
    "operator": "operator: pladis",
    "class": "class: EulerDiscreteScheduler",
    "method": "method: pag",
    "target": "target: inductor",
    "file": "file: weights.safetensors",
}


def _example(location):
    example = _EXAMPLES.get(str(location[-1]))
    return f"write `{example}`" if example else ""


def _schedule_problems(document):
    """What is wrong with the schedules of operations whose operator is known, each at the line of its key."""
    operations = document.data.get("operations")
    problems = []
    for number, operation in enumerate(operations if isinstance(operations, list) else []):
        schedule = operation.get("schedule") if isinstance(operation, dict) else None
        settings = operation.get("with") if isinstance(operation, dict) else None
        if not isinstance(schedule, dict) or not isinstance(settings, dict):
            continue
        from surgery.nn.schedule import WINDOWS, schedule_problems

        operator = settings.get("operator")
        if operator not in tuple(OPERATIONS):
            continue
        valid = (*WINDOWS, *OPERATIONS[operator].defaults)
        for key, message in schedule_problems(schedule, operator):
            near = nearest(key, valid) if key is not None and key not in valid else None
            hint = f'did you mean "{near}"?' if near else ""
            location = ("operations", number, "schedule", *([] if key is None else [key]))
            problems.append(document.problem(location, message, hint))
    return problems


def _window_problems(document):
    """What is wrong with the windows of `guidance`."""
    guidance = document.data.get("guidance")
    given = [key for key in GUIDANCE_WINDOWS if isinstance(guidance, dict) and isinstance(guidance.get(key), list)]
    if not given:
        return []
    from surgery.nn.schedule import window_problems

    return [
        document.problem(("guidance", key), message, "")
        for key in given
        for message in window_problems(key, guidance[key])  # pyright: ignore[reportArgumentType]
    ]


def _problem(document, details):
    raw_location, kind, context = details["loc"], details["type"], details.get("ctx", {})
    location = tuple(part for part in raw_location if not _is_union_branch(part))
    given = details.get("input")
    if kind == "extra_forbidden":
        valid = _keys_at(raw_location[:-1])
        branch, name = raw_location[-2:] if len(raw_location) > 1 else (None, None)
        if branch in OPERATOR_BRANCHES and name in AnyOperator.model_fields:
            return _setting_of_another_operator(document, location, branch.removeprefix("operator "))
        near = nearest(location[-1], valid)
        hint = f'did you mean "{near}"?' if near else f"keys here: {', '.join(valid)}"
        return document.problem(location, "unknown key", hint)
    if kind == "missing":
        return document.problem(location, "this key is required", _example(location))
    if kind == "literal_error":
        expected = context["expected"].replace("'", '"')
        near = nearest(given, [choice.strip(' "') for choice in expected.replace(" or ", ",").split(",")])
        hint = f'did you mean "{near}"?' if near and f'"{near}"' != expected else ""
        return document.problem(location, f"is {json.dumps(given, default=str)} but must be {expected}", hint)
    if kind == "string_pattern_mismatch":
        return document.problem(location, f"is {json.dumps(given)} but may hold letters, digits, - . and _ alone")
    message = details["msg"][0].lower() + details["msg"][1:]
    message = message.removeprefix("value error, ").replace("input should", "should").replace("strings", "text")
    message = re.sub(r"a valid dictionary( or instance of \w+)?", "a mapping of keys", message)
    if not isinstance(given, (dict, list)):
        message = f"is {json.dumps(given, default=str)} but {message}"
    return document.problem(location, message, _number_hint(kind, given))


def _setting_of_another_operator(document, location, operator):
    changed = (*location[:-1], "operator") in document.overrides
    hint = f"--set '{key_text(location[:-1])}={{operator: {operator}}}' takes its defaults" if changed else ""
    return document.problem(location, has_no(operator, location[-1]), hint)


def _number_hint(kind, given):
    if kind != "float_type" or not isinstance(given, str):
        return ""
    try:
        number = float(given)
    except ValueError:
        return ""
    plain = re.sub(r"^(-?\d+)e", r"\1.0e", repr(number))
    return f"that is text in YAML; write {plain} without quotes, an exponent as 1.0e-3"


def _is_union_branch(part):
    # pydantic names the branch of a union in the location: "str", "list[constrained-str]", a tag of ours.
    return part in ("str", "constrained-str", *BRANCHES) or (isinstance(part, str) and part.startswith("list["))


def _keys_at(location):
    """The valid keys of the mapping at a key path with its union branches, by the schema."""
    part = Recipe
    for step in location:
        if step in BRANCHES:
            part = BRANCHES[step]
            continue
        if isinstance(step, int):
            part = _unwrap(typing.get_args(part)[0])
            continue
        field = next(f for name, f in part.model_fields.items() if step in (name, f.alias))
        part = _unwrap(field.annotation)
    return [field.alias or name for name, field in part.model_fields.items()]


def _unwrap(annotation):
    """The model or list inside `X | None` and Annotated."""
    if typing.get_origin(annotation) is typing.Annotated:
        return _unwrap(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        branches = [_unwrap(branch) for branch in typing.get_args(annotation) if branch is not type(None)]
        return next((b for b in branches if typing.get_origin(b) is list or _is_model(b)), branches[0])
    return annotation


def _is_model(annotation):
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)
