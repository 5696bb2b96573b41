"""What is on the screen: the fields of the page as one recipe, checked by what checks recipes and in its words."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from surgery.errors import InputError
from surgery.guidance.methods import METHODS, guidance_of
from surgery.hub.bounded import parse_yaml
from surgery.nn.operators import HYPERPARAMETERS, LARGEST, OPERATIONS, UNITS, later_defaults
from surgery.recipe.document import Document
from surgery.recipe.guidance_scale import is_range
from surgery.recipe.reading import schema_problems
from surgery.recipe.schema import Recipe, sampling_with

from .opening import Opened

NONE = "none"  # of operators and methods
MOST_SETTINGS = max(len(own.defaults) for own in OPERATIONS.values())
MOST_IMAGES = 16
NUMBERS = ("steps", "guidance_scale", "height", "width")  # of the sampling, left empty as the recipe has them
_SLOTS = 3  # operations at least
_LONGEST_PROMPT = 10_000
_REACH = 4.0  # how far a slider goes where the table has no end: so many times the default
_LEAST = 0.01  # of what must be above 0
_FARTHEST = 1e4  # a value beyond it is no place on a slider
_MORE = ("with", "schedule", "blocks", "replace")


@dataclass(frozen=True)
class Slider:
    """One hyperparameter on the page: what of its range in the operators' table a hand can reach, and its value."""

    name: str
    low: float
    high: float
    step: float
    value: float
    meaning: str


@dataclass(frozen=True)
class Screen:
    """A prompt with its seeds, and everything else as a recipe. data: of that recipe, as YAML would have it."""

    prompt: str
    seeds: tuple[int, ...]
    recipe: Recipe
    data: dict[str, Any]

    @property
    def sampling(self) -> dict[str, Any]:
        """As `surgery.runtime.draw.draw` takes it."""
        sampling = self.recipe.sampling.model_dump(exclude_none=True)
        return {**sampling, "guidance": self.data["guidance"]} if "guidance" in self.data else sampling

    @property
    def operations(self) -> list[dict[str, Any]]:
        """As the recipe has them."""
        return self.data["operations"]

    def key(self, *parts: str) -> str:
        """A text that is the same for screens that are the same in these keys of the recipe, and in the prompt."""
        return json.dumps([self.prompt, {part: self.data.get(part) for part in parts}], sort_keys=True, default=str)


def slots_of(opened: Opened) -> int:
    """How many operations the page has room for."""
    return max(_SLOTS, len(opened.operations) + 1)


def sliders_of(operator: str, setting: Mapping[str, Any] | None = None) -> list[Slider]:
    """The Sliders of an operator or addition, at its defaults but for what a setting says; [] of none."""
    if operator not in OPERATIONS:
        return []
    found = []
    for name, default in OPERATIONS[operator].defaults.items():
        limits, value = HYPERPARAMETERS[name], float((setting or {}).get(name, default))
        low, high = _window(limits, default)
        if abs(value) <= _FARTHEST:
            low, high = min(low, value), max(high, value)
        meaning = f"{limits.meaning}; must {limits.must}"
        found.append(Slider(name, low, high, 0.01 if high - low <= 10 else 0.1, min(value, high), meaning))
    return found


def _window(limits, default):
    """(low, high) that a slider shows: the table's range, and where that has no end what lies about the default."""
    reach = max(1.0, abs(default))
    low = -reach if limits.low < 0 else max(limits.low, _LEAST) if limits.low else 0.0
    return low, min(limits.high, _REACH * reach)


def first_values(opened: Opened) -> dict[str, Any]:
    """{field: value} of a page on a model, which say what its recipe says."""
    sampling, guidance = opened.sampling, dict(opened.guidance or {})
    method = guidance.pop("method", NONE)
    values: dict[str, Any] = {
        "prompt": "",
        "negative_prompt": sampling.get("negative_prompt") or "",
        "seed": 0,
        "images": 2,
        **{name: sampling.get(name) for name in NUMBERS},
        "method": method,
        "guidance": guidance_text(method, guidance),
        "regions": "",
    }
    if is_range(sampling):
        values["guidance_scale"] = None
    for slot in range(slots_of(opened)):
        operation = opened.operations[slot] if slot < len(opened.operations) else None
        values |= _slot_values(slot, operation)
    return values


def _slot_values(slot, operation):
    setting = dict(operation["with"]) if operation else {"operator": NONE}
    operator = setting.get("operator", NONE)
    sliders = sliders_of(operator, setting)
    beyond = {one.name: setting[one.name] for one in sliders if setting.get(one.name, one.value) != one.value}
    more: dict[str, Any] = {"with": beyond} if beyond else {}
    usual = {"blocks": "all", "replace": "cross-attention", "schedule": None}
    kept = {key: (operation or {}).get(key, value) for key, value in usual.items()}
    more |= {key: value for key, value in kept.items() if value != usual[key]}
    layers = operation.get("layers", "all") if operation else "all"
    values: dict[str, Any] = {
        f"operator.{slot}": operator,
        f"layers.{slot}": [layers] if isinstance(layers, str) else list(layers),
        f"unit.{slot}": setting.get("unit", UNITS[0]),
        f"more.{slot}": _yaml(more) if more else "",
    }
    for place in range(MOST_SETTINGS):
        values[f"value.{slot}.{place}"] = sliders[place].value if place < len(sliders) else 0.0
    return values


def guidance_text(method: str, settings: Mapping[str, Any] | None = None) -> str:
    """The settings of a method as YAML, its defaults but for what is given; "" of none."""
    if method not in METHODS:
        return ""
    said = {**guidance_of(method).model_dump(), **(settings or {})}
    infinite = [key for key, value in said.items() if isinstance(value, float) and value >= LARGEST]
    said |= dict.fromkeys(infinite, float("inf"))
    del said["method"]
    return _yaml(said) if said else ""


def screen_of(values: Mapping[str, Any], opened: Opened) -> Screen:
    """The Screen of {field: value}; fields that are left out have what `first_values` has.

    Raises InputError with all that a recipe of it would be refused for, and for a prompt or seeds that are none.
    """
    values = {**first_values(opened), **values}
    prompt = prompt_of(values["prompt"])
    seed, images = (_whole(values[name], name) for name in ("seed", "images"))
    if not 1 <= images <= MOST_IMAGES:
        raise InputError(f"images must be 1 to {MOST_IMAGES}, not {images}")
    operations = [one for slot in range(slots_of(opened)) if (one := _operation(values, slot))]
    if not operations:
        raise InputError("operations: every one is none, which is the base; choose an operator")
    data: dict[str, Any] = {"schema": 1, "name": _name(opened, operations[0])}
    data |= {"summary": opened.rest["summary"]} if "summary" in opened.rest else {}
    data |= {"base": dict(opened.base) or {"pipeline": opened.name}, "operations": operations}
    data["sampling"] = sampling_with(opened.sampling, _sampling(values))
    if not values["negative_prompt"]:
        data["sampling"].pop("negative_prompt", None)
    if guidance := _guidance(values, opened):
        data["guidance"] = guidance
    data |= {key: value for key, value in opened.rest.items() if key not in data}
    document = Document(Path("page"), "", data, {})
    recipe, problems = schema_problems(document)
    if problems:
        raise InputError("\n".join(told(problems)))
    assert recipe is not None
    return Screen(prompt, tuple(range(seed, seed + images)), recipe, data)


def prompt_of(text: object) -> str:
    """A prompt that can be drawn; InputError for none."""
    text = text.strip() if isinstance(text, str) else ""
    if not text:
        raise InputError("prompt must be text: write what to draw")
    if len(text) > _LONGEST_PROMPT:
        raise InputError(f"{len(text):,} characters are too long for a prompt (at most {_LONGEST_PROMPT:,})")
    return text


def told(problems: Sequence[Any]) -> list[str]:
    """The recipe's Problems without a file and its line, which the page has not."""
    return [
        f"{one.key}: {one.message}{f'; {one.hint}' if one.hint else ''}".removeprefix(": ")
        for one in dict.fromkeys(problems)
    ]


def recipe_text(screen: Screen, opened: Opened) -> str:
    """The recipe of a Screen, which `surgery plan` and `apply` take from anywhere on this machine."""
    lines = [f"# what `surgery studio` drew of {' '.join(opened.name.split())}"]
    lines += [f"# {opened.note}"] if opened.note else []
    return "\n".join([*lines, _yaml(screen.data)])


def _whole(value, name):
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != int(value):
        raise InputError(f"{name} must be a whole number, not {value!r}")
    return int(value)


def _operation(values, slot):
    operator = values[f"operator.{slot}"]
    if operator in (None, "", NONE):
        return None
    names = list(OPERATIONS[operator].defaults) if operator in OPERATIONS else []
    usual = later_defaults(operator) if names else {}
    given = {name: _number(values[f"value.{slot}.{place}"]) for place, name in enumerate(names)}
    given = {name: value for name, value in given.items() if value is not None}  # which is the default
    more = _mapping(values[f"more.{slot}"], f"operation {slot + 1}")
    if unknown := sorted(more.keys() - set(_MORE)):
        raise InputError(f"operation {slot + 1}: there is no {unknown[0]}; there are {', '.join(_MORE)}")
    more.setdefault("replace", "cross-attention")
    layers = values[f"layers.{slot}"]
    own = more.pop("with", {})
    setting = {"operator": operator, **{key: value for key, value in given.items() if value != usual.get(key)}}
    if names and OPERATIONS[operator].projects and values[f"unit.{slot}"] != UNITS[0]:
        setting["unit"] = values[f"unit.{slot}"]
    setting |= own if isinstance(own, dict) else {"with": own}
    return {"replace": more.pop("replace"), "layers": layers, **more, "with": setting}


def _number(value):
    """A slider's number, 2 rather than 2.0000000001."""
    return round(float(value), 6) if isinstance(value, (int, float)) and not isinstance(value, bool) else value


def _sampling(values):
    given = {}
    for name in NUMBERS:
        value = values[name]
        if value is not None and value != "":
            is_whole = name != "guidance_scale" and isinstance(value, float) and value.is_integer()
            given[name] = int(value) if is_whole else value
    if negative := values["negative_prompt"]:
        given["negative_prompt"] = negative
    if lines := [line for line in (values["regions"] or "").splitlines() if line.strip()]:
        from surgery.models.regions import region_of_text

        given["regions"] = [region_of_text(line) for line in lines]
        if any("mask" in one for one in given["regions"]):  # which would be a file of the machine that draws
            raise InputError("regions: the page takes boxes, LEFT,TOP,RIGHT,BOTTOM=PROMPT with parts of 1, a line each")
    return given


def _guidance(values, opened):
    method = values["method"]
    if method in (None, "", NONE):
        return None
    given = {"method": method, **_mapping(values["guidance"], "guidance")}
    weak = given.get("weak")
    if weak is not None and weak != (opened.guidance or {}).get("weak"):
        raise InputError("guidance.weak: the page loads no other checkpoint; name it in a recipe and open that")
    return given


def _mapping(text, where):
    """The mapping that a field of the page holds as YAML."""
    try:
        data = parse_yaml(text or "")
    except (ValueError, yaml.YAMLError) as error:
        raise InputError(f"{where}: {' '.join(str(error).split())[:300]}") from error
    if data is None:
        return {}
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise InputError(f"{where}: write NAME: VALUE, a line each, not {str(text)[:100]!r}")
    return data


def _name(opened, operation):
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", opened.name.rpartition("/")[2]).strip(".-_") or "model"
    return f"{stem}-{operation['with']['operator'].replace('_', '-')}-studio"[:120]


def _yaml(data) -> str:
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


class _Dumper(yaml.SafeDumper):
    """Short lists and settings in one line, as recipes are written by hand."""

    _whole: Any = None

    def represent(self, data):
        self._whole = data
        return super().represent(data)

    def ignore_aliases(self, data):
        return True

    def represent_sequence(self, tag, sequence, flow_style=None):
        flat = all(not isinstance(one, (dict, list)) for one in sequence)
        return super().represent_sequence(tag, sequence, flow_style=flat)

    def represent_mapping(self, tag, mapping: Any, flow_style=None):
        flat = mapping is not self._whole and all(not isinstance(one, (dict, list)) for one in mapping.values())
        return super().represent_mapping(tag, mapping, flow_style=flat and len(str(mapping)) < 100)
