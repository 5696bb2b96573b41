"""Blind votes on the page, in the files of `surgery study`: a key, and a file of votes for each sitting."""

import random
import secrets
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from surgery.analysis.study import Key, StudyResult, analyse, read_key, read_votes
from surgery.analysis.study.key import SCHEMA_VERSION as KEY_VERSION
from surgery.analysis.study.key import numbered_item, token
from surgery.analysis.study.votes import QUESTIONS, SCHEMA_VERSION, VoteLine, VotesFile
from surgery.artifact.manifest import json_text
from surgery.artifact.staging import unwritten, write_file
from surgery.errors import InputError

from .session import SIDES

PLACES = ("left", "right")
SAME = "no difference"
_TITLE, _SEED = "Votes on the page of `surgery studio`", 0
_LONGEST_NAME = 40


@dataclass(frozen=True)
class Pair:
    """Two images in the order in which they are shown. shown: their ids from left to right, which tell nothing."""

    item: str
    shown: tuple[str, ...]
    images: tuple[Any, ...]
    since: float = field(default_factory=time.monotonic)


class Ballot:
    """The votes in one folder: study-key.json, votes-*.json for each session, images/ by their ids.

    A folder that has them already is gone on with. One process at a time writes there: InputError where another does.
    """

    def __init__(self, folder: str | Path) -> None:
        from filelock import FileLock, Timeout

        self.folder = Path(folder)
        self.key_path = self.folder / "study-key.json"
        self._writing = threading.Lock()
        self._sessions: dict[str, list[VoteLine]] = {}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(self.folder / ".study.lock")
            self._lock.acquire(timeout=0)
        except Timeout:
            raise InputError(f"another studio writes its votes to {self.folder}; name another folder: --out") from None
        except OSError as error:
            raise unwritten(f"to {self.folder}", error, "make room, or name another folder: --out") from error
        self.key = read_key(self.key_path) if self.key_path.exists() else None
        if self.key and (self.key.title, self.key.seed, tuple(self.key.sides)) != (_TITLE, _SEED, SIDES):
            raise InputError(f"{self.key_path} is of a study that no studio began; name another folder: --out")

    @property
    def command(self) -> str:
        """What says what the votes amount to, outside of the page."""
        return f"surgery study {self.folder} --out {self.folder}/study.html --votes {self.folder}/votes-*.json"

    def pair(self, prompt: str, seed: int, images: Mapping[str, Any], model: str, origin: str) -> Pair:
        """A new item of the study, written to the key, its sides in an order that chance decides.

        images: a PIL image for each of the sides. model: what was compared, as the analysis calls it; origin: where
        that comes from.
        """
        with self._writing:
            before = self.key
            salt, items = (before.salt, before.items) if before else (secrets.token_hex(16), {})
            number = len(items)
            name, item = numbered_item(salt, _SEED, number, SIDES, prompt=prompt, seed=seed, model=model)
            ids = item.images
            for side, image in ids.items():
                self._write(self.folder / "images" / f"{image}.png", _png(images[side]))
            key = Key(
                schema_version=KEY_VERSION,
                study=token(salt, _SEED, "study"),
                title=_TITLE,
                salt=salt,
                seed=_SEED,
                sides=list(SIDES),
                models={**(before.models if before else {}), model: origin},
                items=dict(sorted({**items, name: item}.items())),
            )
            self._write(self.key_path, json_text(key.model_dump()).encode())
            self.key = key
        order = random.SystemRandom().sample(SIDES, len(SIDES))
        return Pair(name, tuple(ids[side] for side in order), tuple(images[side] for side in order))

    def vote(self, pair: Pair, session: str, rater: str, answers: Mapping[str, object]) -> Path:
        """The file to which a sitting's answers on a pair were added, "left", "right" or "no difference" to each
        question.

        session: 32 hex digits, as `new_session` gives. Raises InputError for an answer that is lacking or none of
        these, a pair that was voted on, and a name that is too long.
        """
        if len(rater) > _LONGEST_NAME:
            raise InputError(f"a name has at most {_LONGEST_NAME} characters, not {len(rater)}")
        taken = round(1000 * (time.monotonic() - pair.since))
        lines = []
        for question in QUESTIONS:
            answer = answers.get(question)
            if answer not in (*PLACES, SAME):
                raise InputError(f"{question}: answer {', '.join(PLACES)} or {SAME}, not {answer!r}")
            chosen = None if answer == SAME else pair.shown[PLACES.index(str(answer))]
            lines.append(VoteLine(item=pair.item, shown=list(pair.shown), question=question, chosen=chosen, ms=taken))
        with self._writing:
            assert self.key is not None
            before = self._sessions.get(session, [])
            if any(line.item == pair.item for line in before):
                raise InputError("this pair was voted on already; go on to the next one")
            votes = [*before, *lines]
            file = VotesFile(
                schema_version=SCHEMA_VERSION, study=self.key.study, session=session, rater=rater, votes=votes
            )
            path = self.folder / f"votes-{session[:12]}.json"
            self._write(path, json_text(file.model_dump()).encode())
            self._sessions[session] = votes
        return path

    def result(self) -> StudyResult:
        """What all votes in the folder amount to; InputError where there are none."""
        if self.key is None:
            raise InputError("there are no votes; vote on a pair first")
        return analyse(read_votes(sorted(self.folder.glob("votes-*.json")), self.key), self.key)

    def close(self) -> None:
        """Let another process write there."""
        self._lock.release()

    def _write(self, path, data):
        write_file(path, data, "this vote is not kept")


def new_session() -> str:
    """The id of one rater's sitting."""
    return secrets.token_hex(16)


def _png(image):
    from surgery.runtime.sheet import png_of

    return png_of(image.convert("RGB"))
