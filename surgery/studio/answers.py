"""What the page answers to each of its events: {output: what it shows now}, what is left out staying as it is.

Gradio is not known here. What is wrong is an answer, too, in the command line's words, and the page lives on.
"""

import random
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from surgery.artifact.staging import write_file
from surgery.console import settings_text
from surgery.errors import InputError, SurgeryError

from . import shown
from .ballot import PLACES, Ballot, Pair, new_session
from .screen import Screen, recipe_text, screen_of
from .session import SIDES, Session

Answer = dict[str, Any]
Values = Mapping[str, Any]  # of the screen's fields

_OFTEN = 0.1  # seconds between two answers that tell how far a run is


@dataclass
class _Sitting:
    """One rater's, on one page."""

    id: str = field(default_factory=new_session)
    pairs: int = 0
    pair: Pair | None = None  # which is to be voted on


class Answers:
    """A session's answers. ballot: where blind votes go; saves: the folder for recipes; None for a page without.

    page: a name of whoever asks, which `stop` is given too.
    """

    def __init__(self, session: Session, ballot: Ballot | None = None, saves: Path | None = None) -> None:
        self.session, self.opened, self.ballot, self.saves = session, session.opened, ballot, saves
        self._sittings: dict[str, _Sitting] = {}  # of each page
        self._folder = tempfile.TemporaryDirectory(prefix="surgery-studio-")  # of videos, while the page is served

    def screen(self, values: Values) -> Screen:
        """The Screen of the fields; InputError as `screen_of`."""
        return screen_of(values, self.opened)

    def draw(self, page: str, values: Values) -> Iterator[Answer]:
        """{status, base, patched, recipe} while both sides are drawn."""
        return self._guarded(lambda: self._drawing(page, values))

    def redraw(self, page: str, live: bool, values: Values) -> Iterator[Answer]:
        """The same after a setting was changed; nothing where that is not wanted, or nothing was drawn yet."""
        if live and str(values.get("prompt") or "").strip():
            yield from self.draw(page, values)

    def _drawing(self, page, values):
        screen, seen, looked = self.screen(values), {}, 0.0
        text = recipe_text(screen, self.opened)
        for told in self.session.draw(screen, page):
            now = {side: len(images) for side, images in told.drawn.items()}
            if now == seen and not told.done and time.monotonic() - looked < _OFTEN:
                continue
            looked, answer = time.monotonic(), Answer(status=shown.status(told))
            for side in SIDES:
                # Where the base is as it was, the images of the setting before stay until there are new ones. The last
                # answer has all, for those who ask for nothing else.
                if side in now and (told.done or (now.get(side) != seen.get(side) and (now[side] or not now["base"]))):
                    answer[side] = shown.pictures(told.drawn.get(side, {}), Path(self._folder.name))
            seen = now
            yield {**answer, "recipe": text} if told.done else answer

    def word(self, page: str, word: object, values: Values) -> Iterator[Answer]:
        """{status, map}: the maps of a word of the prompt; drawn once for all of its words."""
        return self._guarded(lambda: self._mapping(page, word, values))

    def _mapping(self, page, word, values):
        if not word:
            raise InputError("choose a word of the prompt")
        for told in self.session.maps(self.screen(values), page):
            picture = {"map": shown.word_sheet(told.maps, str(word))} if told.maps else {}
            yield {"status": shown.status(told), **picture}

    def stop(self, page: str) -> None:
        """End what a page has drawn; its own answers say so."""
        self.session.stop(page)

    def recipe(self, values: Values) -> Answer:
        """{status, recipe}: the text of what is on the screen."""
        return self._once(lambda: {"status": shown.note(""), "recipe": recipe_text(self._checked(values), self.opened)})

    def save(self, values: Values) -> Answer:
        """The same, written to a file of the machine that draws."""
        return self._once(lambda: self._saved(values))

    def _saved(self, values):
        assert self.saves is not None
        screen = self._checked(values)
        text = recipe_text(screen, self.opened)
        path = _free(self.saves / f"{screen.data['name']}.yaml")
        write_file(path, text.encode(), "make room and save it again; the settings stay as they are")
        return {"status": shown.note(f"recipe: {path}; next: surgery plan {path}"), "recipe": text}

    def _checked(self, values):
        screen = self.screen(values)
        self.session.check(screen)
        return screen

    def next_pair(self, page: str, prompts: object, values: Values) -> Iterator[Answer]:
        """{status, shown, asked, quality, alignment}: a pair that nobody has seen, sides unsaid.

        prompts: a line each, in turn; the page's own where there is none.
        """
        return self._guarded(lambda: self._pairing(page, prompts, values))

    def _pairing(self, page, prompts, values):
        assert self.ballot is not None
        sitting = self._sittings.setdefault(page, _Sitting())
        lines = [line for line in str(prompts or "").splitlines() if line.strip()]
        prompt = lines[sitting.pairs % len(lines)] if lines else values.get("prompt")
        seed = random.SystemRandom().randrange(2**31)
        screen, found = self.screen({**values, "prompt": prompt, "seed": seed, "images": 1}), {}
        for told in self.session.draw(screen, page):
            found = told.drawn
            yield {"status": shown.status(told)}
            if told.note:  # it was stopped
                return
        images = {side: found[side][seed] for side in SIDES}
        if not all(hasattr(image, "convert") for image in images.values()):
            raise InputError("blind votes are on images; of videos `surgery study` makes a page")
        sitting.pair = self.ballot.pair(screen.prompt, seed, images, self._compared(screen), self.opened.hash or "")
        sitting.pairs += 1
        pair = [(shown.enlarged(image), place) for image, place in zip(sitting.pair.images, PLACES, strict=True)]
        asked = f"{sitting.pairs}. {screen.prompt}"
        yield {"status": shown.note(""), "shown": pair, "asked": asked, "quality": None, "alignment": None}

    def _compared(self, screen):
        """What a pair compares, as the analysis of the votes calls it."""
        texts = [
            f"{one['with']['operator']} ({settings_text(one['with'])}) on {' '.join(one['layers'])}"
            for one in screen.operations
        ]
        return f"{self.opened.name}: {'; '.join(texts)}"

    def vote(
        self, page: str, rater: object, answers: Mapping[str, Any], prompts: object, values: Values
    ) -> Iterator[Answer]:
        """The answers on the page's pair kept, and then as `next_pair`."""

        def voting():
            assert self.ballot is not None
            sitting = self._sittings.get(page)
            if sitting is None or sitting.pair is None:
                raise InputError("ask for a pair first")
            self.ballot.vote(sitting.pair, sitting.id, str(rater or "").strip(), answers)
            sitting.pair = None
            yield from self._pairing(page, prompts, values)

        return self._guarded(voting)

    def result(self) -> Answer:
        """{status, result}: what all votes say, which ends the blindness."""
        return self._once(self._counted)

    def _counted(self):
        from surgery.analysis.study import render

        assert self.ballot is not None
        found = render(self.ballot.result())
        return {"status": shown.note(""), "result": f"{found}\n\nthe same again: {self.ballot.command}"}

    def _guarded(self, answers: Callable[[], Iterator[Answer]]) -> Iterator[Answer]:
        try:
            yield from answers()
        except Exception as error:
            yield {"status": _said(error)}

    def _once(self, answer: Callable[[], Answer]) -> Answer:
        try:
            return answer()
        except Exception as error:
            return {"status": _said(error)}


def _said(error):
    if isinstance(error, SurgeryError):
        return shown.problem(error)
    traceback.print_exception(error, file=sys.stderr)
    text = (
        f"{type(error).__name__}: {error}\nThis is not an error that surgery knows; the terminal shows where it arose"
    )
    return shown.problem(text)


def _free(path: Path) -> Path:
    """The path, numbered where there is a file of that name."""
    number, free = 1, path
    while free.exists():
        number += 1
        free = path.with_stem(f"{path.stem}-{number}")
    return free
