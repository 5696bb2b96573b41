"""The rows of a table as recipes with overrides, those of `over` spelt out; and the same rows on the shapes model."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from surgery.errors import InputError
from surgery.recipe.reading import RecipeFile, read_recipe

from .manifest import Manifest, Model, PromptsOf, TableRow, models

On = Literal["shapes"]
SHAPES = "shapes"
_FEW = 100  # prompts of the shapes model, unless --limit names another number
_PIXELS = "ssim"  # what can be measured of images that have no prompt


@dataclass(frozen=True)
class Entry:
    """One row to draw: a recipe that ships, with overrides as `--set` takes them. patched: else its untouched base.

    reported: {prompt set: {column: the paper's figure}}. model: what the manifest calls it. series, value: the row of
    the manifest, and the value of its `over`; None for a row without one.
    """

    name: str
    model: str
    recipe: str
    overrides: tuple[str, ...]
    patched: bool
    operator: str | None
    reported: Mapping[str, Mapping[str, float]]
    series: str = ""
    value: float | None = None

    @property
    def recipe_file(self) -> RecipeFile:
        """The recipe with its overrides; RecipeError where they do not fit it."""
        return _read(self.recipe, self.overrides)


def entries_of(table: Manifest, on: On | None = None) -> tuple[Entry, ...]:
    """The Entries of a table, in its order; on "shapes": of the model that ships, sampled as its own recipe says.

    Raises InputError for a table that cannot be drawn with its own models.
    """
    if on is None and table.cannot:
        raise InputError(f"{table.place} cannot be drawn: {table.cannot}; --on {SHAPES} draws its rows in small")
    return tuple(_entry(given.name, *spelt, on) for given in table.rows for spelt in _spelt_out(given))


def sets_of(table: Manifest, on: On | None = None) -> dict[str, PromptsOf]:
    """{prompt set: PromptsOf} of a table; on "shapes": the shapes prompts, judged by shape_alignment.

    What is drawn without a prompt stays so, and is compared pixel by pixel: nothing there can be misread.
    """
    if on is None:
        return dict(table.sets)
    most = max((part.prompts or _FEW for part in table.sets.values()), default=_FEW)
    metrics = ("shape_alignment",) if any(part.metrics for part in table.sets.values()) else ()
    name = "empty" if set(table.sets) == {"empty"} else SHAPES
    if name == "empty" or {_PIXELS, "lpips"} & {metric for part in table.sets.values() for metric in part.metrics}:
        metrics = (_PIXELS,) if name == "empty" else (*metrics, _PIXELS)
    return {name: PromptsOf(prompts=min(most, _FEW), metrics=list(metrics))}


def _spelt_out(row: TableRow) -> Iterator[tuple[TableRow, dict[str, Any], float | None]]:
    """(row, overrides beyond its own, value) for each value of `over`, which the row's name says."""
    if not row.over:
        yield row, {}, None
        return
    ((key, values),) = row.over.items()
    group, _, setting = key.partition(".")
    for value in values:
        number = float(value) if isinstance(value, float | int) else None
        shown = "infinite" if value == float("inf") else f"{value:g}" if isinstance(value, float) else value
        name = f"{row.name}, {key.rpartition('.')[2].replace('_', ' ')} {shown}"
        if group == "operator":
            operator = {**(row.operator or {}), setting: value}
            yield row.model_copy(update={"name": name, "operator": operator}), {}, number
        else:
            yield row.model_copy(update={"name": name}), {key: value}, number


def _entry(series: str, row: TableRow, further: dict[str, Any], value: float | None, on: On | None) -> Entry:
    known = models()
    if row.model not in known:
        raise InputError(f"{row.name}: recipes/papers/models.yaml has no {row.model}")
    model = known[row.model]
    keys = {**(_shapes_keys(model) if on else model.set), **further}
    operator = None
    if row.operator is not None:
        operator = str(row.operator.get("operator"))
        keys["operations.0.with"] = row.operator
        keys |= {"operations.0.replace": row.replace} if row.replace else {}
        keys |= {"operations.0.layers": row.layers} if row.layers else {}
    overrides = tuple(f"{key}={_text(value)}" for key, value in keys.items())
    recipe = SHAPES if on else model.recipe or SHAPES
    patched = row.operator is not None
    return Entry(row.name, row.model, recipe, overrides, patched, operator, row.reported, series, value)


def _shapes_keys(model: Model) -> dict[str, Any]:
    """What of a model's settings the shapes model takes: its guidance, and whether it is sampled with CFG.

    Its own scale is what it was trained for, so a number in its place would measure something else; a range is taken.
    """
    if model.recipe is None:
        return dict(model.set)
    sampling = _read(model.recipe, tuple(f"{key}={_text(value)}" for key, value in model.set.items())).recipe.sampling
    scale = sampling.true_cfg_scale if sampling.true_cfg_scale is not None else sampling.guidance_scale
    keys = {key: value for key, value in model.set.items() if key == "guidance"}
    if scale is not None and not isinstance(scale, float):
        keys["sampling.guidance_scale"] = model.set["sampling.guidance_scale"]
    elif scale is not None and scale <= 1:
        keys["sampling.guidance_scale"] = 1.0
    return keys


@cache
def _read(recipe: str, overrides: tuple[str, ...]) -> RecipeFile:
    return read_recipe(recipe, overrides)


def _text(value: object) -> str:
    """A value as YAML reads it: JSON, whose infinity YAML writes otherwise."""
    return json.dumps(value).replace("Infinity", ".inf")
