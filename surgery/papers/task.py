"""What a kind of table is given to draw, and what it gives back."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.applying import kept_artifact
from surgery.artifact.manifest import replace_file
from surgery.errors import InputError
from surgery.recipe.plan import make_plan
from surgery.runtime.sheet import png_of
from surgery.validate.jobs import Drawing
from surgery.validate.prompts import PromptSet, open_prompts

from .entries import Entry, On
from .manifest import Manifest, PromptsOf
from .results import Measured

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Given:
    """How a table is to be drawn. limit: prompts of each set. out: the folder of all tables, out/papers unless given.

    reference: real images for FID. prompts: a file, in place of the table's sets. images: a .jsonl of {file, prompt},
    or image files, to invert. The rest as `surgery.validate` takes them.
    """

    on: On | None = None
    limit: int | None = None
    out: Path | str | None = None
    reference: Path | str | None = None
    prompts: Path | str | None = None
    images: Path | str | None = None
    drawing: Drawing = field(default_factory=Drawing)
    checkpoints: Mapping[str, Path | str] = field(default_factory=dict)
    announce: Callable[[int, int, int], object] | None = None


@dataclass(frozen=True)
class Task:
    """A table to draw. folder: of its results; work: of the images, which tables share."""

    table: Manifest
    entries: tuple[Entry, ...]
    sets: Mapping[str, PromptsOf]
    given: Given
    folder: Path
    work: Path

    @property
    def patched(self) -> Entry:
        """The last row with an operator: what a diagnosis, a map or an inversion is of."""
        return [entry for entry in self.entries if entry.patched][-1]

    def prompts(self) -> PromptSet:
        """The prompts of the table's one set, or those that were given."""
        ((name, part),) = self.sets.items() if self.sets else [("", PromptsOf())]
        if not (self.given.prompts or name):
            raise InputError(
                f"{self.table.place} is drawn from prompts that come from elsewhere; give them as --prompts FILE"
            )
        return open_prompts(self.given.prompts or name, limit=self.limit(part))

    def limit(self, part: PromptsOf) -> int | None:
        """How many prompts of a set are drawn: the table's, or fewer where that was asked; None for all."""
        return min((count for count in (part.prompts, self.given.limit) if count is not None), default=None)

    def checkpoints(self, metrics: Iterable[str]) -> dict[str, str]:
        """{"metric.part": path} of those checkpoints that were given for some metrics."""
        named = set(metrics)
        return {part: str(path) for part, path in self.given.checkpoints.items() if part.rpartition(".")[0] in named}

    def texts(self) -> list[str]:
        """The texts of `prompts`."""
        return [prompt.text for prompt in self.prompts().prompts]


@dataclass(frozen=True)
class Drawn:
    """What was drawn and measured. measured: {row: {(prompts, column): Measured}}; files: {what: path}."""

    measured: Mapping[str, Mapping[tuple[str, str], Measured]] = field(default_factory=dict)
    files: Mapping[str, Path] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)


def artifact_of(entry: Entry, work: Path) -> Path:
    """The folder of an entry's artifact in the work folder, written unless it is there."""
    return kept_artifact(make_plan(entry.recipe, entry.overrides), work)


def save_png(image: "Image", path: Path) -> None:
    """Write a PIL image as a PNG, whole or not at all."""
    replace_file(path, png_of(image))
