"""The key of a blind study: which image of each pair is the base's and which the patched one's."""

import hashlib
import hmac
import json
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from surgery.errors import InputError
from surgery.hub import bounded

SCHEMA_VERSION = 1

Token = Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Item(_Part):
    """One pair: what it was drawn from, and the ids of its two images."""

    prompt: str
    seed: int
    base: Token
    patched: Token

    @property
    def images(self):
        """The ids of both images in the order in which the page holds them, which is that of the ids themselves."""
        return tuple(sorted((self.base, self.patched)))

    @property
    def first(self):
        """Which side the first of `images` is: "base" or "patched"."""
        return "base" if self.base < self.patched else "patched"


class Key(_Part):
    """The content of a key file. items: {item id: Item}, in the order in which the page holds them.

    salt: the secret that all ids come from, with `seed`; without it nobody can tell a base's id from a patched one's.
    """

    schema_version: int
    study: Token
    artifact_hash: str
    title: str
    salt: str
    seed: int
    items: Annotated[dict[Token, Item], Field(min_length=1)]

    @model_validator(mode="after")
    def _has_every_image_once(self):
        images = [image for item in self.items.values() for image in item.images]
        if len(set(images)) != len(images):
            raise ValueError("an image stands in it twice")
        return self


def token(salt, seed, *what):
    """An id of 16 hex digits: HMAC-SHA256 under the secret salt, so it says nothing about what it was made from."""
    message = json.dumps([seed, *what]).encode()
    return hmac.new(salt.encode(), message, hashlib.sha256).hexdigest()[:16]


def read_key(path):
    """The Key in a file that write_study wrote; InputError where it is missing, damaged, or of another schema."""
    path = Path(path)
    data = read_json(path, "give the key that `write_study` wrote beside the page")
    if data.get("schema_version") != SCHEMA_VERSION:
        raise InputError(
            f"{path} has schema_version {data.get('schema_version')!r}; this version of pladis-surgery reads "
            f"{SCHEMA_VERSION} in the key of a study. If it is newer, update: pip install -U pladis-surgery"
        )
    try:
        return Key.model_validate(data)
    except ValidationError as error:
        raise InputError(f"{path} is no key of a study: {first_problem(error)}") from error


def read_json(path, hint):
    """The mapping in a JSON file; InputError, which ends in `hint`, where there is none."""
    try:
        return bounded.read_json(path)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"{path} cannot be read: {reason or error}; {hint}") from error


def first_problem(error):
    """ "votes.3.choice: input should be ..." for pydantic's ValidationError."""
    first = error.errors()[0]
    where = ".".join(map(str, first["loc"]))
    message = first["msg"].removeprefix("Value error, ")
    return f"{where}: {message[:1].lower()}{message[1:]}" if where else message
