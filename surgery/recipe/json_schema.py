"""The JSON schema of a recipe, by which editors complete keys and mark mistakes: recipes/schema.json."""

import json
from typing import Any

from surgery.guidance.methods import METHODS

from .schema import Recipe


def schema_text() -> str:
    """The schema (draft 2020-12) of `surgery.recipe.schema.Recipe`, as it ships."""
    schema = Recipe.model_json_schema(by_alias=True)
    schema["$defs"] = {name: part for name, part in schema["$defs"].items() if not _is_catch_all(name)}
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **_plain(schema)}
    schema["properties"]["guidance"]["anyOf"].insert(0, {"enum": list(METHODS)})  # a method's name alone will do
    schema["title"] = "A recipe of pladis-surgery"
    return json.dumps(schema, indent=1, ensure_ascii=False) + "\n"


def _is_catch_all(name):
    """Whether a part only collects the mistakes of a mapping that names no operator or method."""
    return name.startswith("Any")


def _plain(part: Any) -> Any:
    """The schema without titles that repeat a key, and without the branches of `_is_catch_all`."""
    if isinstance(part, list):
        return [_plain(one) for one in part if not (isinstance(one, dict) and _is_catch_all(_named(one)))]
    if not isinstance(part, dict):
        return part
    return {key: _plain(value) for key, value in part.items() if key != "title" or not isinstance(value, str)}


def _named(part):
    return part.get("$ref", "").rpartition("/")[2]
