"""What drawing a table takes: images, files to fetch, and GPU hours where a step was measured."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from surgery.guidance.methods import guidance_of
from surgery.recipe.plan import evaluations_per_step
from surgery.recipe.schema import Recipe
from surgery.validate.metrics import metric_class
from surgery.validate.metrics.info import HubFiles
from surgery.validate.prompts.hub_sets import SETS

from .entries import Entry, On, entries_of, sets_of
from .manifest import Manifest, PromptsOf, rates

_WAYS = {"inversion": 2}  # how often a kind goes through the steps for an image; once unless named


@dataclass(frozen=True)
class Fetched:
    """A repository, or a file on the web, that is fetched unless it is in the cache.

    revision: the commit, None for the newest; of a file on the web its sha256.
    """

    repo: str
    revision: str | None
    what: str


@dataclass(frozen=True)
class Cost:
    """images: to draw, those of a shared base once. hours: of a GPU, over the images whose model has a measured rate.

    unmeasured: the images of models without one.
    """

    images: int
    hours: float
    unmeasured: int

    @property
    def hours_text(self) -> str:
        """ "12.3", "12.3 and 600 images not measured", "not measured"."""
        if self.unmeasured and self.unmeasured == self.images:
            return "not measured"
        measured = f"{self.hours:.1f}"
        return f"{measured}, and {self.unmeasured:,} images not measured" if self.unmeasured else measured


def cost_of(table: Manifest, on: On | None = None, limit: int | None = None) -> Cost:
    """The Cost of a table; limit: of the prompts of each of its sets.

    Hours are the denoiser's own: its evaluations of all steps, each at the share of a measured call of several rows.
    """
    entries = entries_of(table, on)
    per_side = sum(count_of(part, name, limit) for name, part in sets_of(table, on).items())
    per_side = per_side or (1 if table.kind == "time" else limit or 0)
    sides = sides_of(entries, table.against)
    measured = [rate for rate in (_seconds(entry) for entry in sides) if rate is not None]
    hours = sum(measured) * per_side * _WAYS.get(table.kind, 1) / 3600
    return Cost(per_side * len(sides), hours, per_side * (len(sides) - len(measured)))


def count_of(part: PromptsOf, name: str, limit: int | None) -> int:
    """How many images of a prompt set each side draws."""
    there = part.prompts or (SETS[name].size if name in SETS else limit or 1)
    return min(there, limit or there) * part.images_per_prompt


def sides_of(entries: Sequence[Entry], against: str | None) -> list[Entry]:
    """The Entries whose images differ, with the untouched bases that patched rows are compared with."""
    wanted = list(entries)
    if against is None:
        wanted += [Entry(e.name, e.model, e.recipe, e.overrides, False, None, {}) for e in entries if e.patched]
    return list({_identity(entry): entry for entry in wanted}.values())


def fetched_for(entries: Sequence[Entry], sets: Mapping[str, PromptsOf]) -> list[Fetched]:
    """What the Entries and prompt sets take from the Hub and the web, without asking there."""
    found: list[Fetched] = []
    for entry in entries:
        base = entry.recipe_file.recipe.base
        if base.pipeline and not base.pipeline.startswith("."):
            found.append(Fetched(base.pipeline, base.revision, "pipeline"))
        for part in (base.single_file, *(file for _, file in base.components), *base.loras):
            if part is not None and part.repo:
                found.append(Fetched(part.repo, part.revision, part.file))
    for metric in dict.fromkeys(metric for part in sets.values() for metric in part.metrics):
        info = metric_class(metric).info
        for source in info.checkpoints.values():
            if isinstance(source, HubFiles):
                found.append(Fetched(source.repo, source.revision, f"for {info.title}"))
            else:
                found.append(Fetched(source.url, source.sha256, f"for {info.title}"))
    found += [Fetched(SETS[name].address, SETS[name].revision, f"prompts {name}") for name in sets if name in SETS]
    return list(dict.fromkeys(found))


def _identity(entry: Entry) -> str:
    """What an Entry's images depend on, of its recipe."""
    recipe = entry.recipe_file.recipe.model_dump(mode="json", by_alias=True)
    keys = ("base", "sampling", "guidance", *(("operations",) if entry.patched else ()))
    return json.dumps({key: recipe.get(key) for key in keys}, sort_keys=True)


def _seconds(entry: Entry) -> float | None:
    """Seconds of a GPU that the denoiser takes for one image; None where its step was not measured."""
    recipe = entry.recipe_file.recipe
    found = next((rate for rate in rates()["steps"] if _is_of(rate, recipe)), None)
    milliseconds = found["ms"].get(entry.operator or "none") if found else None
    if found is None or milliseconds is None:
        return None
    steps = recipe.sampling.steps or len(recipe.sampling.timesteps or ())
    guidance = guidance_of(recipe.guidance.model_dump()) if recipe.guidance else None
    evaluations = evaluations_per_step(found["model_class"], found["pipeline_class"], recipe.sampling, guidance)
    return steps * evaluations * milliseconds / found["batch"] / 1000 if steps else None


def _is_of(rate: dict[str, Any], recipe: Recipe) -> bool:
    return recipe.base.pipeline == rate["pipeline"] and all(
        getattr(recipe.sampling, side) == rate[side] for side in ("height", "width")
    )
