"""The axes of a sweep: the settings that its cells have, and the overrides of the recipe that make them.

An axis is a hyperparameter of the operator or its unit (of every operation of the recipe), one of the names below, or
any key of a recipe: operations.0.with.zeta, guidance.scale, sampling.height.

operator          by its name: with the recipe's settings where it is the recipe's operator, else with its defaults; or
                  a whole setting, {operator: gag, scale: 3}
layers            a selector, several with commas between or as a list
guidance          a method's name or its whole setting, {method: seg, scale: 2}; null for none
guidance_scale, steps     of sampling
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from surgery.errors import InputError, nearest
from surgery.hub.bounded import parse_yaml
from surgery.nn.operators import OPERATIONS
from surgery.recipe.plan import Plan

SETTINGS = tuple(dict.fromkeys(name for operator in OPERATIONS.values() for name in operator.settings))
_SAMPLING = ("guidance_scale", "steps")
NAMES = (*SETTINGS, "operator", "layers", "guidance", *_SAMPLING)
_MOST = 1000  # cells


@dataclass(frozen=True)
class CellPlan:
    """One cell: its settings by axis; the `--set` overrides that make it, and those of them that make its base."""

    settings: dict[str, Any]
    overrides: tuple[str, ...]
    base_settings: dict[str, Any]
    base_overrides: tuple[str, ...]

    @property
    def name(self) -> str:
        """ "alpha 1.5, scale 2"."""
        return settings_name(self.settings)


def settings_name(settings: Mapping[str, Any]) -> str:
    """ "alpha 1.5, layers up,down, guidance seg (scale 2)"."""
    return ", ".join(f"{axis.removeprefix('operations.0.with.')} {_text(value)}" for axis, value in settings.items())


def _text(value):
    if isinstance(value, Mapping):
        first, *others = value.items()
        rest = ", ".join(f"{name} {_text(each)}" for name, each in others)
        return _text(first[1]) + (f" ({rest})" if rest else "")
    if isinstance(value, list):
        return ",".join(map(_text, value))
    if isinstance(value, bool) or value is None:
        return "none" if value is None else str(value).lower()
    return f"{value:g}" if isinstance(value, (int, float)) else str(value)


def parse_axis(text: str) -> tuple[str, list[Any]]:
    """(axis, values) of "KEY=V1,V2,...", each value as YAML writes it; InputError for what is none."""
    key, equals, values = text.partition("=")
    try:
        parsed = parse_yaml(f"[{values}]")
    except (yaml.YAMLError, ValueError) as error:
        raise InputError(f"--axis {text}: the values are not YAML: {str(error).splitlines()[0]}") from error
    if not equals or not key.strip() or not parsed:
        raise InputError(f"--axis {text}: write KEY=V1,V2,..., for example --axis zeta=0,0.5,1")
    return key.strip(), parsed


def cells_of(plan: Plan, axes: Mapping[str, Sequence[Any]]) -> list[CellPlan]:
    """The cells of every combination of the axes' values, over the Plan of the recipe as it is.

    Where `operator` is an axis, an operator takes of the other axes those that it has, and combinations that then come
    to the same are one cell. Raises InputError for no axes, unknown ones, and hyperparameters that no operator has.
    """
    chosen = {axis: [_plain(value) for value in values] for axis, values in axes.items() if len(values)}
    if not chosen:
        raise InputError("give at least one axis with one or more values: --scale 1 2, --axis zeta=0,1")
    for axis in chosen:
        if axis not in NAMES and "." not in axis:
            near = nearest(axis, NAMES)
            hint = f"did you mean {near}?" if near else f"there are {', '.join(NAMES)}, and a recipe's keys"
            raise InputError(f"--axis {axis}: there is no such axis; {hint}")
    if len(list(itertools.islice(itertools.product(*chosen.values()), _MOST + 1))) > _MOST:
        raise InputError(f"the axes span more than {_MOST} cells; give fewer values")
    # The operator comes first, since what it has is known by its name.
    order = sorted(chosen, key=lambda axis: axis != "operator")
    cells, used = {}, set()
    for values in itertools.product(*(chosen[axis] for axis in order)):
        cell = _cell(plan, dict(zip(order, values, strict=True)))
        used |= cell.settings.keys()
        cells.setdefault(repr(cell.settings), cell)
    if unused := [axis for axis in chosen if axis not in used]:
        raise InputError(f"--{unused[0]}: none of the operators has {unused[0]}")
    return list(cells.values())


def _plain(value):
    return value.item() if hasattr(value, "item") else list(value) if isinstance(value, tuple) else value


def _cell(plan, settings):
    operators = [operation["operator"] for operation in plan.operations]
    if "operator" in settings:
        given = settings["operator"]
        name = given.get("operator") if isinstance(given, Mapping) else given
        if name not in OPERATIONS:
            raise InputError(f"--axis operator: unknown operator {name!r}; there are {', '.join(OPERATIONS)}")
        operators = [name] * len(operators)
        has = OPERATIONS[name].settings
        settings = {axis: value for axis, value in settings.items() if axis not in SETTINGS or axis in has}
    overrides, base_overrides, base_settings = [], [], {}
    for axis, value in settings.items():
        made = _overrides(plan, operators, axis, value)
        overrides += made
        if axis in ("guidance", *_SAMPLING) or ("." in axis and not axis.startswith("operations")):
            base_overrides += made
            base_settings[axis] = value
    return CellPlan(settings, tuple(overrides), base_settings, tuple(base_overrides))


def _overrides(plan, operators, axis, value):
    numbered = list(enumerate(operators))
    if axis == "operator":
        own = [operation["operator"] for operation in plan.operations]
        whole = value if isinstance(value, Mapping) else {"operator": value}
        return [f"operations.{at}.with={_yaml(whole)}" for at, _ in numbered if value != own[at]]
    if axis in SETTINGS:
        for at, operator in numbered:
            if axis not in OPERATIONS[operator].settings:
                raise InputError(f"--{axis}: the recipe's operator {operator} has no {axis}")
            if axis in plan.operations[at].get("schedule", {}):
                raise InputError(f"--{axis}: the recipe's schedule sets {axis} over the steps; take that out first")
        return [f"operations.{at}.with.{axis}={_yaml(value)}" for at, _ in numbered]
    if axis == "layers":
        if len(operators) > 1:
            raise InputError(f"--layers is for recipes of one operation; this one has {len(operators)}")
        return [f"operations.0.layers={_yaml(value.split(',') if isinstance(value, str) else value)}"]
    if axis == "guidance":
        return [f"guidance={_yaml({'method': value} if isinstance(value, str) else value)}"]
    return [f"{'sampling.' if axis in _SAMPLING else ''}{axis}={_yaml(value)}"]


def _yaml(value):
    """A value in one line of YAML."""
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=1 << 20)
    return text.removesuffix("...\n").strip()
