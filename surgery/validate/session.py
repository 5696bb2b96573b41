"""What a validation runs with: its settings checked, its prompts, sides and metrics opened."""

import datetime
import hashlib
import importlib.util
import json
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from surgery.artifact import Manifest, verify_artifact
from surgery.artifact.fetch import model_folder
from surgery.artifact.manifest import MANIFEST
from surgery.artifact.scores import SCHEMA_VERSION, PromptsRecord, ReferenceRecord
from surgery.errors import InputError, SurgeryError
from surgery.hub.base import read_index
from surgery.machine import best_device, versions
from surgery.models.videos import draws_videos
from surgery.recipe.metric_names import DISTANCE_METRICS, FIDELITY_METRICS
from surgery.recipe.plan import Planned
from surgery.recipe.schema import Validate
from surgery.runtime.worker import WorkerConfig

from .frames import RULE
from .jobs import SEEDS, Drawing, DrawnImages, Job, Side, draw_sides, environment, jobs_of
from .prompts import EMPTY, NAMES, SHAPES, PromptSet, open_prompts
from .reference import ReferenceSet, open_reference
from .scoring import Scorer, check_metrics, prepare_scorers
from .store import is_flagged

# By prompt set; clip_score for any other.
_USUAL = {
    "geneval": ("geneval",),
    "geneval2": ("soft_tifa_gm",),
    "dpg-bench": ("dpg_bench",),
    EMPTY: ("fid",),
    **dict.fromkeys(SHAPES, ("shape_alignment",)),
}


@dataclass(frozen=True)
class Settings:
    """Prompts, seeds, metrics, and which of these the surgery is meant to better."""

    prompts: PromptSet
    images_per_prompt: int
    seed: int
    metrics: tuple[str, ...]
    purpose: tuple[str, ...]
    reference: ReferenceSet | None

    @property
    def key(self) -> str:
        """A hash of what is measured, by which reports are kept apart."""
        reference = self.reference.sha256 if self.reference else None
        content = [self.prompts.sha256, self.images_per_prompt, self.seed, self.metrics, reference]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def open_settings(
    section: Validate, given: Mapping[str, Any], recipe_folder: Path | None = None, for_sweep: bool = False
) -> Settings:
    """The Settings of a recipe's section and what was given by hand; prompts and reference are read.

    given: {prompts, limit, images_per_prompt, seed, metrics, reference}, None for what is not. recipe_folder: where the
    recipe's own file names start; those given by hand start at the working folder. for_sweep: add ssim where no metric
    compares with the base's images, and refuse where there is nothing else. Raises InputError for no prompts, unknown
    sets or metrics, files that cannot be read, numbers under 1.
    """
    given = {key: value for key, value in given.items() if value not in (None, [], ())}
    said = {"prompts": section.prompts, "limit": section.limit, "images_per_prompt": section.images_per_prompt}
    said |= {"seed": section.seed, "metrics": section.metrics, "reference": section.reference}
    values = {**said, **given}
    for name in ("limit", "images_per_prompt"):
        if values[name] is not None and values[name] < 1:
            raise InputError(f"--{name.replace('_', '-')} must be at least 1, not {values[name]}")
    if not values["prompts"]:
        raise InputError(
            "the recipe names no prompts under `validate`, so give some: --prompts and a set's name (drawbench, hpd, "
            "pick-a-pic, coco, geneval, geneval2, dpg-bench, shapes) or a file"
        )
    here = Path()
    if "prompts" not in given and isinstance(values["prompts"], str) and values["prompts"] not in NAMES:
        _check_recipe_folder(recipe_folder, values["prompts"], "--prompts")
    folder = here if "prompts" in given else recipe_folder or here
    prompts = open_prompts(values["prompts"], folder, limit=values["limit"])
    metrics = tuple(values["metrics"] or _USUAL.get(prompts.name, ("clip_score",)))
    if for_sweep and set(metrics) <= set(FIDELITY_METRICS):
        raise InputError("a sweep needs a metric with a value for each side, such as clip_score, beside the fidelity")
    if for_sweep and not set(metrics) & set(FIDELITY_METRICS):
        metrics = (*metrics, "ssim")
    reference = None
    if values["reference"] is not None and set(metrics) & set(DISTANCE_METRICS):
        if "reference" not in given:
            _check_recipe_folder(recipe_folder, values["reference"], "--reference")
        folder = here if "reference" in given else recipe_folder or here
        reference = open_reference(folder / Path(values["reference"]).expanduser())
    purpose = tuple(name for name in section.purpose if name in metrics)
    if not section.purpose:
        purpose = tuple(name for name in metrics if name not in FIDELITY_METRICS)
    return Settings(prompts, values["images_per_prompt"], values["seed"], metrics, purpose, reference)


def _check_recipe_folder(folder, name, option):
    """The recipe in an artifact names files from where the recipe lay that it was made with, which nobody knows now."""
    if folder is None:
        raise InputError(
            f"the artifact's recipe names {name}, which lies beside the recipe that it was made with: give it as "
            f"{option}"
        )


def work_folder(model: Path | str, out: Path | str | None = None) -> Path:
    """Where images, values and the report go: beside the artifact's folder, under out/ for a Hub repository."""
    if out is not None:
        return Path(out)
    if (Path(model) / MANIFEST).is_file():
        folder = Path(model).absolute()
        return folder.with_name(f"{folder.name}-validation")  # not in it: what is there may be published
    return Path("out") / f"{str(model).replace('/', '--')}-validation"


def report_folder(work: Path, artifact_hash: str, settings: Settings) -> Path:
    """Where in a work folder the report on an artifact is, measured by these Settings."""
    return Path(work) / f"report-{artifact_hash[:12]}-{settings.key[:8]}"


@dataclass(frozen=True)
class Session:
    """An artifact, found whole, with what it is to be scored on and by."""

    folder: Path  # where its files are; of a thin artifact they are put together elsewhere
    home: Path | None  # the user's own folder, where scores.json goes; None for a Hub repository
    manifest: Manifest
    settings: Settings
    scorers: list[Scorer]
    jobs: list[Job]
    config: WorkerConfig
    drawing: Drawing
    is_video: bool = False

    @property
    def environment(self) -> dict[str, Any]:
        """What of this machine the images depend on."""
        return environment(self.drawing.device or best_device(), self.drawing.dtype, self.config.threads)

    def draw(
        self, work: Path, sides: Sequence[Side], announce: Callable[[int, int, int], object] | None = None
    ) -> DrawnImages:
        """The DrawnImages of the Jobs of which a safety checker blackened no side's image."""
        drawn = draw_sides(work, sides, self.jobs, self.config, self.drawing, announce)
        flagged = {job.key for job in drawn.jobs if any(is_flagged(drawn.paths[side.name][job.key]) for side in sides)}
        kept = tuple(job for job in drawn.jobs if job.key not in flagged)
        if len(kept) < 2:
            raise SurgeryError(
                f"of {len(self.jobs)} pairs {len(kept)} can be scored, and it takes 2; give more prompts"
            )
        return replace(drawn, jobs=kept)

    def facts(self, drawn: DrawnImages) -> dict[str, Any]:
        """{field: value} of Scores: how the images were made, and where."""
        device, settings = self.drawing.device or best_device(), self.settings
        prompts, reference = settings.prompts, settings.reference
        named = {key: getattr(prompts, key) for key in ("name", "sha256", "source", "revision")}
        drawing = {"device": str(device), "dtype": self.drawing.dtype or "the model's default"}
        drawing |= {"threads": self.config.threads} if self.config.threads else {}
        drawing |= {"frames": RULE} if self.is_video else {}
        compared = any(scorer.info.kind == "distance" for scorer in self.scorers)
        return {
            "schema_version": SCHEMA_VERSION,
            "artifact_hash": self.manifest.hash,
            "date": datetime.datetime.now(datetime.UTC).replace(microsecond=0).isoformat(),
            "hardware": hardware(device),
            "versions": versions(),
            "prompts": [PromptsRecord(count=len(prompts.prompts), **named)],
            "images_per_prompt": settings.images_per_prompt,
            "seeds": f"{SEEDS}; seed {settings.seed}",
            "sampling": self.manifest.sampling,
            "drawing": drawing | {"batch": ", ".join(map(str, drawn.batch_sizes))},
            "excluded": len(self.jobs) - len(drawn.jobs),
            "reference": ReferenceRecord(name=reference.name, count=reference.count, sha256=reference.sha256)
            if compared and reference
            else None,
            "purpose": list(settings.purpose),
        }


@dataclass(frozen=True)
class SessionConfig:
    """What a Session is opened with: an artifact, a folder or a Hub repository, and what is chosen for it.

    work: where images and values are to go. section: of its recipe; given, recipe_folder: as `open_settings`
    takes them; settings: those that it gave already; checkpoints: as `prepare_scorers` takes them.
    """

    model: Path | str
    work: Path
    given: Mapping[str, Any] = field(default_factory=dict)
    section: Validate | None = None
    revision: str | None = None
    drawing: Drawing | None = None
    checkpoints: Mapping[str, Path | str] | None = None
    recipe_folder: Path | None = None
    settings: Settings | None = None


def open_session(opened: SessionConfig) -> Session:
    """The Session of a SessionConfig.

    Raises InputError for what is no artifact and for whatever is wrong with prompts, metrics and reference,
    ArtifactError where the artifact was altered, SurgeryError where a checkpoint cannot be fetched.
    """
    model, drawing = opened.model, opened.drawing or Drawing()
    _require_libraries()
    folder = model_folder(model, opened.revision)
    if not (folder / MANIFEST).is_file():
        raise InputError(f"{model} is no artifact, so there is no other side to it; `surgery apply` writes one")
    manifest = verify_artifact(folder, weights=True)
    home = Path(model).expanduser().resolve() if Path(model).expanduser().is_dir() else None
    settings = opened.settings or open_settings(
        opened.section or _section_of(home or folder), opened.given, opened.recipe_folder
    )
    is_video = draws_videos(read_index(folder).get("_class_name"))
    if is_video:
        _refuse_distances(settings.metrics)
    check_metrics(settings, manifest.sampling)
    scorers = prepare_scorers(settings.metrics, drawing.device, opened.checkpoints, settings.reference)
    config = WorkerConfig(
        model=str(home or model),
        revision=opened.revision,
        hash=manifest.hash,
        sampling=manifest.sampling,
        device=drawing.device,
        dtype=drawing.dtype,
        threads=(drawing.threads or 1) if str(drawing.device or best_device()).startswith("cpu") else None,
    )
    _check_work_folder(opened.work, home)
    jobs = jobs_of(settings.prompts, settings.images_per_prompt, settings.seed)
    if len(jobs) < 2:
        raise InputError("one image of one prompt says nothing; give more prompts, or more --images-per-prompt")
    return Session(folder, home, manifest, settings, scorers, jobs, config, drawing, is_video)


def _refuse_distances(metrics):
    for name in metrics:
        if name in DISTANCE_METRICS:
            raise InputError(
                f"{name} compares images, and this model draws videos: leave it out, or write the videos for the tools "
                "that measure FVD and VBench with --videos"
            )


def check_recipe(planned: Planned) -> Settings:
    """The Settings of a Planned recipe's `validate` section; InputError for what is wrong with it, before anything is
    written.
    """
    _require_libraries()
    settings = open_settings(planned.recipe_file.recipe.validation or Validate(), {}, planned.recipe_file.folder)
    check_metrics(settings, planned.recipe_file.recipe.sampling.model_dump())
    return settings


def hardware(device: Any) -> str:
    """What the images were drawn on, in words."""
    import torch

    if str(device).startswith("cuda"):
        return torch.cuda.get_device_name(device)
    system = f"{platform.system()} {platform.machine()}"
    return f"{os.cpu_count()} CPU cores, {system}" if str(device) == "cpu" else f"{device}, {system}"


def _check_work_folder(work, home):
    """Refuse to work in the artifact itself: what is added to its folder may be published."""
    if home is not None and Path(work).expanduser().resolve().is_relative_to(home):
        raise InputError(f"--out {work} lies in the artifact {home}; give a folder outside of it")


def _require_libraries():
    missing = [name for name in ("scipy", "matplotlib", "torchmetrics") if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"scoring needs {', '.join(missing)}: pip install 'pladis-surgery[validate]'")


def _section_of(folder):
    from surgery.recipe.reading import read_recipe

    path = folder / "recipe.yaml"
    recipe = read_recipe(path).recipe if path.is_file() else None
    return (recipe and recipe.validation) or Validate()
