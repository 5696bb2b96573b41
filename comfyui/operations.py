"""What a node asks for: one of the operators or additions with its numbers, for some layers and a part of the steps."""

import difflib
import fnmatch
import json
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from .layouts import Site
from .operators import LARGEST, OPERATIONS, OPERATORS, schedule_problems, setting_problems, stored_schedule

_GROUPS = ("down", "mid", "up", "double", "single")


class Operation(NamedTuple):
    """One operation of a chain of nodes.

    operator: one of OPERATORS or ADDITIONS. numbers: its hyperparameters; what is left out takes its default. layers:
    selectors, as a recipe has them. schedule: as a recipe's, or None. prompt: a negative prompt's tokens, (1, tokens,
    channels) as the text encoder gives them, where the addition wants one.
    """

    operator: str
    numbers: dict[str, float]
    layers: tuple[str, ...] = ("all",)
    unit: str = "head"
    schedule: dict[str, list] | None = None
    prompt: Any = None

    def __str__(self) -> str:
        said = [f"{name} {value:g}" for name, value in self.numbers.items()]
        for name, values in (self.schedule or {}).items():
            shown = ["no end" if value in (None, LARGEST) else f"{value:g}" for value in values]
            said.append(f"{name} [{', '.join(shown)}]")
        return ", ".join([self.operator, *said])


def operation(
    operator: str,
    numbers: dict[str, float],
    layers: str = "all",
    unit: str = "head",
    schedule: dict[str, Any] | None = None,
    prompt: Any = None,
) -> Operation:
    """A checked Operation; layers: selectors with commas between. ValueError says what is wrong with it."""
    setting = {"operator": operator, **numbers, **({"unit": unit} if OPERATIONS[operator].projects else {})}
    problems = setting_problems(setting)
    if schedule is not None:
        problems += [f"schedule.{key} {message}" for key, message in schedule_problems(schedule, operator)]
    if problems:
        raise ValueError("; ".join(problems))
    stored = None if schedule is None else stored_schedule(schedule)
    return Operation(operator, dict(numbers), selectors_of(layers), unit, stored, prompt)


def selectors_of(layers: str) -> tuple[str, ...]:
    """The selectors of a line or list of them, with commas or line breaks between; "all" where it is empty."""
    return tuple(part.strip() for part in layers.replace("\n", ",").split(",") if part.strip()) or ("all",)


def selects(layers: Sequence[str], site: Site) -> bool:
    """Whether selectors name a site: "all", its block's group, or a glob pattern over its path in diffusers."""
    return any(one == "all" or one == site.block or fnmatch.fnmatchcase(str(site.path), one) for one in layers)


def missed(layers: Sequence[str], sites: Sequence[Site]) -> list[str]:
    """A sentence for each selector that names none of the sites, with the nearest that would."""
    said = []
    for one in layers:
        if not any(selects((one,), site) for site in sites):
            groups = [group for group in _GROUPS if any(site.block == group for site in sites)]
            near = difflib.get_close_matches(one, ["all", *groups, *(str(site.path) for site in sites)], 1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(['all', *groups])}"
            said.append(f"layers {one!r} matches nothing here; {hint}")
    return said


def operations_of(path: str) -> tuple[list[Operation], str]:
    """(operations, what they were made for) of an artifact's folder or its surgery.json.

    ValueError names the file and what is wrong with it. Operations with a negative prompt have none yet.
    """
    file = pathlib.Path(path.strip().strip('"')).expanduser()
    file = file / "surgery.json" if file.is_dir() else file
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{file} is not there; name an artifact's folder, or its surgery.json") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read as JSON: {error}; fetch the artifact again") from None
    if not isinstance(manifest, dict) or not isinstance(manifest.get("operations"), list) or not manifest["operations"]:
        raise ValueError(f"{file}: `operations` is missing; it is not the surgery.json of an artifact")
    found = [_from_manifest(file, index, one) for index, one in enumerate(manifest["operations"])]
    base = manifest.get("base")
    base = base.get("pipeline") if isinstance(base, dict) else None
    return found, f"{manifest.get('name')} for {base}"


def _from_manifest(file, index, one):
    where = f"{file}: operations[{index}]"
    try:
        operator, layers = one["operator"], tuple(one["layers"])
        if operator not in OPERATIONS:
            raise ValueError(f"operator {operator!r} is none of {', '.join(OPERATIONS)}; update this node pack")
        if "replace" in one:
            raise ValueError("it replaces self-attention, an experiment that is not for use")
        numbers = {name: float(one[name]) for name in OPERATIONS[operator].defaults if name in one}
        made = operation(operator, numbers, "all", one.get("unit", "head"), one.get("schedule"))
    except (KeyError, TypeError) as error:
        raise ValueError(f"{where} lacks or misspells {error}; fetch the artifact again") from None
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    return made._replace(layers=layers)


def is_negative(operator: str) -> bool:
    """Whether an addition wants a negative prompt."""
    return operator in ("nag", "vsf")


def combined(operations: Sequence[Operation], holds: Sequence[bool]) -> tuple[int | None, tuple[int, ...]]:
    """(place of the operator, places of additions) that are at work where some operations hold, in the chain's order.

    The last operator, and the last addition of each role.
    """
    operator, additions = None, {}
    for index, (one, is_held) in enumerate(zip(operations, holds, strict=True)):
        if is_held and one.operator in OPERATORS:
            operator = index
        elif is_held:
            additions[OPERATIONS[one.operator].role] = index
    return operator, tuple(sorted(additions.values()))
