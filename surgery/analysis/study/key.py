"""The key of a blind study: whose each image is."""

import hashlib
import hmac
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from surgery.errors import InputError
from surgery.hub import bounded

SCHEMA_VERSION = 2  # 1 had base and patched alone, and one artifact's hash

Token = Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]


class Strict(BaseModel):
    """A part of a study's files, in which nothing else may stand."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class StudyItem(Strict):
    """What raters see at once: what it was drawn from, and the ids of its images by side."""

    prompt: str
    seed: int
    model: str
    images: Annotated[dict[str, Token], Field(min_length=2)]

    @property
    def shown(self) -> tuple[str, ...]:
        """The ids of its images in the order in which the page holds them, which is that of the ids themselves."""
        return tuple(sorted(self.images.values()))

    def side_of(self, image: str) -> str:
        """The side that an image is of."""
        return next(side for side, of_side in self.images.items() if of_side == image)


class Key(Strict):
    """The content of a key file. items: {item id: StudyItem}, in the order in which the page holds them.

    sides: in their order, the base first. models: {model: the hash or folder that its images came from}.
    salt: the secret that all ids come from, with `seed`; without it nobody can tell one side's id from another's.
    """

    schema_version: int
    study: Token
    title: str
    salt: str
    seed: int
    sides: Annotated[list[str], Field(min_length=2)]
    models: Annotated[dict[str, str], Field(min_length=1)]
    items: Annotated[dict[Token, StudyItem], Field(min_length=1)]

    @model_validator(mode="after")
    def _fits_together(self):
        images = [image for item in self.items.values() for image in item.shown]
        if len(set(images)) != len(images):
            raise ValueError("an image stands in it twice")
        for name, item in self.items.items():
            if item.model not in self.models or not set(item.images) <= set(self.sides):
                raise ValueError(f"item {name} is of a model or side that it does not list")
        return self


def token(salt: str, seed: int, *what: object) -> str:
    """An id of 16 hex digits: HMAC-SHA256 under the secret salt, so it says nothing about what it was made from."""
    message = json.dumps([seed, *what]).encode()
    return hmac.new(salt.encode(), message, hashlib.sha256).hexdigest()[:16]


def numbered_item(salt: str, key_seed: int, number: int, sides: Iterable[str], **about: Any) -> tuple[str, StudyItem]:
    """(its id, the StudyItem) of a study's item by number, with an id for the image of each side; about: prompt, seed
    and model."""
    images = {side: token(salt, key_seed, "image", number, side) for side in sides}
    return token(salt, key_seed, "item", number), StudyItem(**about, images=images)


def read_key(path: str | Path) -> Key:
    """The Key in a file that write_study wrote; InputError where it is missing, damaged, or of another schema."""
    path = Path(path)
    data = read_json(path, "give the key that `surgery study` wrote beside the page")
    if data.get("schema_version") not in (1, SCHEMA_VERSION):
        raise InputError(
            f"{path} has schema_version {data.get('schema_version')!r}; this version of pladis-surgery reads 1 to "
            f"{SCHEMA_VERSION} in the key of a study. If it is newer, update: pip install -U pladis-surgery"
        )
    try:
        return Key.model_validate(_from_first(data) if data["schema_version"] == 1 else data)
    except ValidationError as error:
        raise InputError(f"{path} is no key of a study: {first_problem(error)}") from error


def _from_first(data: dict[str, Any]) -> dict[str, Any]:
    """A key of schema 1 as one of today's; what is wrong with it stays wrong."""
    items = data.get("items")
    rest = {key: value for key, value in data.items() if key not in ("artifact_hash", "items")}
    if isinstance(items, dict):
        rest["items"] = {
            name: {
                "model": "",
                "images": {side: item[side] for side in ("base", "patched") if side in item},
                **{key: value for key, value in item.items() if key not in ("base", "patched")},
            }
            for name, item in items.items()
            if isinstance(item, dict)
        }
    return {**rest, "sides": ["base", "patched"], "models": {"": data.get("artifact_hash")}}


def read_json(path: Path, hint: str) -> dict[str, Any]:
    """The mapping in a JSON file; InputError, which ends in `hint`, where there is none."""
    try:
        return bounded.read_json(path)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"{path} cannot be read: {reason or error}; {hint}") from error


def first_problem(error: ValidationError) -> str:
    """ "votes.3.choice: input should be ..." for pydantic's ValidationError."""
    first = error.errors()[0]
    where = ".".join(map(str, first["loc"]))
    message = first["msg"].removeprefix("Value error, ")
    return f"{where}: {message[:1].lower()}{message[1:]}" if where else message
