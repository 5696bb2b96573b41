"""The votes that raters send back: one JSON file a session, checked against the key before any of it counts."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from surgery.errors import InputError

from .key import Token, first_problem, read_json

SCHEMA_VERSION = 1
QUESTIONS = ("quality", "alignment")

_HINT = "ask the rater to save it again and send the file itself"


@dataclass(frozen=True)
class Vote:
    """One answer to one question on one pair. left, right: the image ids shown there; ms: how long it took."""

    session: str  # one rater, or one sitting of one
    rater: str  # the name that was given, if any
    item: str
    question: str
    left: str
    right: str
    choice: str  # "left", "right", or "same": no difference
    ms: int


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class _VoteLine(_Part):
    item: Token
    left: Token
    right: Token
    question: Literal[QUESTIONS]
    choice: Literal["left", "right", "same"]
    ms: Annotated[int, Field(ge=0)]


class _VotesFile(_Part):
    schema_version: int
    study: Token
    session: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
    rater: Annotated[str, Field(max_length=40)]
    votes: list[_VoteLine]


def read_votes(paths, key):
    """The Votes in files that the page saved, a file a rater, in the files' order; half a session counts as it is.

    key: the study's Key. Raises InputError for a file that is damaged, empty, of another study, or of another schema;
    for one that names pairs or images that the key does not have, or answers a question twice; and for a session that
    comes twice, as when a rater saved half-way and again at the end.
    """
    votes, seen = [], {}
    for path in map(Path, paths):
        file = _read(path, key)
        if file.session in seen:
            other, count = seen[file.session]
            raise InputError(
                f"{path} ({len(file.votes)} votes) and {other} ({count} votes) are of the same session; give the one "
                "that was saved last"
            )
        seen[file.session] = path, len(file.votes)
        _check(path, file, key)
        votes += [Vote(session=file.session, rater=file.rater, **line.model_dump()) for line in file.votes]
    if not votes:
        raise InputError("there are no votes; give the files that the raters saved from the page")
    return votes


def _read(path, key):
    data = read_json(path, _HINT)
    if data.get("schema_version") != SCHEMA_VERSION:
        raise InputError(
            f"{path} has schema_version {data.get('schema_version')!r}; this version of pladis-surgery reads "
            f"{SCHEMA_VERSION} in a file of votes. If it is newer, update: pip install -U pladis-surgery"
        )
    if "study" in data and data["study"] != key.study:
        raise InputError(
            f"{path} holds votes on another study ({str(data['study'])[:16]}; this key is of {key.study}); give the "
            "key of that study, or leave the file out"
        )
    try:
        file = _VotesFile.model_validate(data)
    except ValidationError as error:
        raise InputError(f"{path} is damaged at {first_problem(error)}; {_HINT}") from error
    if not file.votes:
        raise InputError(f"{path} holds no votes; leave it out")
    return file


def _check(path, file, key):
    """Refuse what the page never writes: other pairs or images than the key's, and two answers to one question."""
    sides, answered = {}, set()
    for number, vote in enumerate(file.votes):
        where = f"{path} votes.{number}"
        if vote.item not in key.items:
            raise InputError(f"{where}: the key has no pair {vote.item}; {_HINT}")
        if {vote.left, vote.right} != set(key.items[vote.item].images):
            raise InputError(f"{where}: {vote.left} and {vote.right} are not the images of {vote.item}; {_HINT}")
        if sides.setdefault(vote.item, vote.left) != vote.left:
            raise InputError(f"{where}: the images of {vote.item} stand on other sides than before; {_HINT}")
        if (vote.item, vote.question) in answered:
            raise InputError(f"{where}: the {vote.question} of {vote.item} is answered twice; {_HINT}")
        answered.add((vote.item, vote.question))
