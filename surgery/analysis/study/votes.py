"""The votes that raters send back: one JSON file a session, checked against the key before any of it counts."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, ValidationError

from surgery.errors import InputError

from .key import Key, Strict, Token, first_problem, read_json

SCHEMA_VERSION = 2  # 1 had two images, left and right
Question = Literal["quality", "alignment"]
QUESTIONS: tuple[Question, ...] = get_args(Question)

_HINT = "ask the rater to save it again and send the file itself"


@dataclass(frozen=True)
class Vote:
    """One answer to one question. shown: the image ids from left to right; chosen: one of them, None: no difference."""

    session: str  # one rater, or one sitting of one
    rater: str  # the name that was given, if any
    item: str
    question: str
    shown: tuple[str, ...]
    chosen: str | None
    ms: int  # how long it took


class VoteLine(Strict):
    """A vote in a file."""

    item: Token
    shown: Annotated[list[Token], Field(min_length=2)]
    question: Question
    chosen: Token | None
    ms: Annotated[int, Field(ge=0)]


class VotesFile(Strict):
    """The content of a file of votes."""

    schema_version: int
    study: Token
    session: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
    rater: Annotated[str, Field(max_length=40)]
    votes: list[VoteLine]


def read_votes(paths: Iterable[str | Path], key: Key) -> list[Vote]:
    """The Votes in files that the page saved, a file a rater, in the files' order; half a session counts as it is.

    key: the study's Key. Raises InputError for a file that is damaged, empty, of another study, or of another schema;
    for one that names items or images that the key does not have, or answers a question twice; and for a session that
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
        for line in file.votes:
            shown = tuple(line.shown)
            votes.append(Vote(file.session, file.rater, line.item, line.question, shown, line.chosen, line.ms))
    if not votes:
        raise InputError("there are no votes; give the files that the raters saved from the page")
    return votes


def _read(path, key):
    data = read_json(path, _HINT)
    version = data.get("schema_version")
    if version not in (1, SCHEMA_VERSION):
        raise InputError(
            f"{path} has schema_version {version!r}; this version of pladis-surgery reads 1 to {SCHEMA_VERSION} in a "
            "file of votes. If it is newer, update: pip install -U pladis-surgery"
        )
    if "study" in data and data["study"] != key.study:
        raise InputError(
            f"{path} holds votes on another study ({str(data['study'])[:16]}; this key is of {key.study}); give the "
            "key of that study, or leave the file out"
        )
    try:
        file = VotesFile.model_validate(_from_first(data) if version == 1 else data)
    except ValidationError as error:
        raise InputError(f"{path} is damaged at {first_problem(error)}; {_HINT}") from error
    if not file.votes:
        raise InputError(f"{path} holds no votes; leave it out")
    return file


def _from_first(data: dict[str, Any]) -> dict[str, Any]:
    """A file of schema 1 as one of today's; what is wrong with it stays wrong."""

    def line(old):
        if not isinstance(old, dict) or old.get("choice") not in ("left", "right", "same"):
            return old
        kept = {name: value for name, value in old.items() if name not in ("left", "right", "choice")}
        return {**kept, "shown": [old.get("left"), old.get("right")], "chosen": old.get(old["choice"])}

    votes = data.get("votes")
    return {**data, "votes": [line(old) for old in votes] if isinstance(votes, list) else votes}


def _check(path, file, key):
    """Refuse what the page never writes: other items or images than the key's, and two answers to one question."""
    orders, answered = {}, set()
    for number, vote in enumerate(file.votes):
        where = f"{path} votes.{number}"
        if vote.item not in key.items:
            raise InputError(f"{where}: the key has no item {vote.item}; {_HINT}")
        if sorted(vote.shown) != list(key.items[vote.item].shown):
            raise InputError(f"{where}: {', '.join(vote.shown)} are not the images of {vote.item}; {_HINT}")
        if vote.chosen is not None and vote.chosen not in vote.shown:
            raise InputError(f"{where}: {vote.chosen} is not among the images that were shown; {_HINT}")
        if orders.setdefault(vote.item, vote.shown) != vote.shown:
            raise InputError(f"{where}: the images of {vote.item} stand in another order than before; {_HINT}")
        if (vote.item, vote.question) in answered:
            raise InputError(f"{where}: the {vote.question} of {vote.item} is answered twice; {_HINT}")
        answered.add((vote.item, vote.question))
