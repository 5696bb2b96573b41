"""One model behind a page: base and patched images, maps of words, each step of it told of, and stopped when asked."""

import json
import queue
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.errors import InputError, UnsupportedModelError
from surgery.guidance.methods import guidance_of
from surgery.models.anatomy import attention_sites, refusal_of_class
from surgery.models.patching import denoiser, denoisers, operate, operations_of, tune
from surgery.models.selection import recipe_problems
from surgery.nn.operators import OPERATIONS, standing
from surgery.recipe.document import Document
from surgery.runtime.draw import base_sampling, draw, number_of_steps

from .opening import Opened
from .screen import Screen, told

if TYPE_CHECKING:
    from surgery.analysis.attention_maps import Comparison

SIDES = ("base", "patched")
_LOOK = 0.1  # seconds between two looks at whether one who waits should stop
_KEPT = 64  # base images, and as many comparisons' maps, in memory


class Stopped(Exception):
    """Somebody asked for the end of what is being drawn."""


@dataclass(frozen=True)
class Told:
    """What a run tells while it goes. drawn: {side: {seed: PIL image or Video}} of what is done; step of steps, in all.

    done: the last one, with `note` where it ended early; maps: of a run for maps, at its end.
    """

    text: str
    step: int
    steps: int
    drawn: dict[str, dict[int, Any]]
    done: bool = False
    note: str = ""
    maps: "Comparison | None" = None


class Session:
    """Draws with one pipeline for however many pages are open: one run at a time, in the order in which they come.

    A run is an iterator of Told; when it is closed early, or `stop` is called for its page, the drawing ends at its
    next step. What a run raises, bad input first of all, leaves the pipeline ready for the next one.
    """

    def __init__(self, opened: Opened) -> None:
        self.opened = opened
        self._running = threading.Lock()
        self._runs: dict[str, set[_Run]] = {}
        self._bases: OrderedDict[str, Any] = OrderedDict()
        self._maps: OrderedDict[str, Comparison] = OrderedDict()

    def draw(self, screen: Screen, page: str = "") -> Iterator[Told]:
        """Base and patched images of a Screen's prompt with its seeds; a base that was drawn already is not again.

        page: who asks, for `stop`. Raises InputError, UnsupportedModelError and SurgeryError in the command line's
        words.
        """
        return self._told(page, lambda run: self._draw(screen, run))

    def maps(self, screen: Screen, page: str = "") -> Iterator[Told]:
        """The same of a run for the attention maps of the words of its prompt, with its first seed; guidance aside."""
        return self._told(page, lambda run: self._map(screen, run))

    def stop(self, page: str = "") -> bool:
        """End what a page has drawing or waiting; whether there was any."""
        runs = list(self._runs.get(page, ()))
        for run in runs:
            run.stop.set()
        return bool(runs)

    def check(self, screen: Screen) -> list[dict[str, Any]]:
        """The operations of a Screen with the paths of the modules that they are for, as a config has them.

        InputError with every selector that hits nothing or what another has; UnsupportedModelError for a model without
        surgery.
        """
        pipeline = self.opened.pipeline
        models = denoisers(pipeline)
        for model in models.values():
            base = type(model).__name__.removeprefix("Pladis")
            if reason := refusal_of_class(base, type(pipeline).__name__):
                raise UnsupportedModelError(f"{base}: {reason}")
        operations = screen.recipe.operations
        wanted = [one.selected for one in operations]
        sites, all_sites = attention_sites(models), attention_sites(models, self_attention=True)
        document = Document(Path("page"), "", screen.data, {})
        chosen, problems = recipe_problems(sites, wanted, document, all_sites)
        if problems:
            raise InputError("\n".join(told(problems)))
        return standing(one.carried(paths) for one, paths in zip(operations, chosen, strict=True))

    def _told(self, page, work: "Callable[[_Run], Told]") -> Iterator[Told]:
        """What `work` tells from a thread of its own, while this side is free to show it."""
        run = _Run()

        def working():
            try:
                with self._alone(run):
                    run.tell(work(run))
            except Stopped:
                run.tell(replace(run.last, text="stopped", note=run.where(), done=True))
            except BaseException as error:  # it is raised where the run is looked at
                run.told.put(error)

        runs = self._runs.setdefault(page, set())
        runs.add(run)
        thread = threading.Thread(target=working, name="surgery-studio", daemon=True)
        thread.start()
        try:
            while True:
                found = run.told.get()
                if isinstance(found, BaseException):
                    raise found
                yield found
                if found.done:
                    return
        finally:
            run.stop.set()
            thread.join()
            runs.discard(run)
            if not runs:
                self._runs.pop(page, None)

    @contextmanager
    def _alone(self, run) -> Iterator[None]:
        """While it lasts no other run has the pipeline."""
        if not self._running.acquire(blocking=False):
            run.tell(Told("waiting for what is drawn already", 0, 0, {}))
            while not self._running.acquire(timeout=_LOOK):
                run.check()
        try:
            run.check()
            yield
        finally:
            self._running.release()

    def _draw(self, screen, run):
        sampling = self._sampling(screen)
        operations, pipeline = self.check(screen), self.opened.pipeline
        steps = number_of_steps(sampling)
        keys = {seed: f"{seed} {screen.key('sampling', 'guidance')}" for seed in screen.seeds}
        missing = [seed for seed, key in keys.items() if key not in self._bases]
        run.steps = steps * (len(missing) + len(screen.seeds))
        run.drawn = {side: {} for side in SIDES}
        run.drawn["base"] = {seed: self._bases[key] for seed, key in keys.items() if key in self._bases}
        # The patched side last: a slider that is moved then finds the modules patched, and tunes them.
        for side, seeds in (("base", missing), ("patched", screen.seeds)):
            if seeds:
                self._operated(operations if side == "patched" else None)
            for seed in seeds:
                run.begin(f"{side}, seed {seed}", steps)
                given = base_sampling(pipeline, sampling) if side == "base" else sampling
                image = draw(pipeline, [(screen.prompt, seed)], given, run.advance)[0]
                run.drawn[side][seed] = image
                if side == "base":
                    _keep(self._bases, keys[seed], image)
                run.end()
        return Told("", run.steps, run.steps, run.drawn, done=True)

    def _operated(self, operations):
        """Put operations in place of the pipeline's own: by `tune` where only numbers differ, so that nothing is
        compiled or patched again."""
        pipeline = self.opened.pipeline
        try:
            changes = _changes(operations_of(pipeline), operations or [])
            if changes is None:
                operate(pipeline, operations)
            for layers, numbers in changes or ():
                tune(pipeline, layers=layers, **numbers)
        except ValueError as error:
            raise InputError(str(error)) from error

    def _sampling(self, screen):
        """As `draw` takes it, with the checkpoint that a guidance names pinned."""
        sampling = screen.sampling
        if sampling.get("guidance"):
            method = guidance_of(sampling["guidance"])
            sampling["guidance"] = method.pinned(denoiser(self.opened.pipeline)).model_dump()
        return sampling

    def _map(self, screen, run):
        from surgery.analysis.attention_maps import compare_attention, heat_colours

        heat_colours()  # the error that it is not installed comes before the work
        key = f"{screen.seeds[0]} {screen.key('sampling', 'operations')}"
        if key not in self._maps:
            self._operated(self.check(screen))
            steps = number_of_steps(screen.sampling)
            run.steps = 3 * steps
            run.begin("attention", run.steps)
            seed, sampling = screen.seeds[0], screen.sampling
            with warnings.catch_warnings(action="ignore"):
                found = compare_attention(
                    self.opened.pipeline, screen.prompt, seed=seed, sampling=sampling, on_step=run.advance
                )
            _keep(self._maps, key, found)
        return Told("", run.steps, run.steps, {}, done=True, maps=self._maps[key])


class _Run:
    """What a run has told so far."""

    def __init__(self) -> None:
        self.stop, self.told = threading.Event(), queue.SimpleQueue[Any]()
        self.step, self.steps, self.drawn = 0, 0, {}
        self.last = Told("waiting", 0, 0, {})
        self._text, self._first, self._of = "", 0, 0

    def tell(self, told: Told) -> None:
        self.last = told
        self.told.put(told)

    def check(self) -> None:
        if self.stop.is_set():
            raise Stopped

    def begin(self, text: str, steps: int) -> None:
        self.check()
        self._text, self._first, self._of = text, self.step, steps
        self._say()

    def advance(self) -> None:
        self.check()
        self.step += 1
        self._say()

    def end(self) -> None:
        """An image is done, in however many steps."""
        self.step = self._first + self._of
        self._say()

    def where(self) -> str:
        if not self.steps:
            return "stopped before it began"
        return f"stopped at step {self.step} of {self.steps}; what was drawn is shown"

    def _say(self):
        text = f"{self._text}: step {min(self.step - self._first, self._of)} of {self._of}"
        drawn = {side: dict(images) for side, images in self.drawn.items()}
        self.tell(Told(text, self.step, self.steps, drawn))


def _keep(kept, key, value):
    kept[key] = value
    while len(kept) > _KEPT:
        kept.popitem(last=False)


def _changes(now, wanted) -> "list[tuple[list[str], dict[str, float]]] | None":
    """[(layers, {hyperparameter: number})] that make operations others by numbers alone; None where more differs."""

    def split(operations):
        found = {}
        for one in operations:
            own = OPERATIONS[one["operator"]].defaults
            rest = {key: value for key, value in one.items() if key not in own and key != "layers"}
            rest.setdefault("unit", "head") if OPERATIONS[one["operator"]].projects else None
            found[json.dumps([rest, sorted(one["layers"])], sort_keys=True)] = one
        return found

    before, after = split(now), split(wanted)
    if before.keys() != after.keys() or len(before) != len(now) or not after:
        return [] if not now and not wanted else None
    changed = []
    for key, one in after.items():
        own = OPERATIONS[one["operator"]].defaults
        numbers = {name: one[name] for name in own if one.get(name) != before[key].get(name)}
        if numbers:
            changed.append((one["layers"], numbers))
    return changed
