"""All that a validation or a sweep is about to do, checked before the first image: artifact, prompts, metrics, jobs."""

import datetime
import importlib.util
import os
import platform
from dataclasses import dataclass
from pathlib import Path

from surgery.artifact import Manifest, verify_artifact
from surgery.artifact.manifest import MANIFEST
from surgery.artifact.scores import SCHEMA_VERSION, PromptsRecord, ReferenceRecord
from surgery.devices import best_device
from surgery.dtypes import DTYPES
from surgery.errors import InputError, SurgeryError
from surgery.fetching import model_folder
from surgery.versions import versions

from .drawing import draw_sides, environment, jobs_of
from .drawing.jobs import SEEDS
from .drawing.painter import Order
from .images import is_flagged
from .scoring import check_metrics, prepare_scorers
from .settings import Settings, open_settings

_MOST = 4096  # of workers, threads and images at once


@dataclass(frozen=True)
class Drawing:
    """How the images are drawn. None: chosen by the model and the machine; address: of a Ray cluster.

    threads: of each worker on a CPU, 1 unless given: the last bit of a result may depend on their number, and images
    must not depend on the number of workers.
    """

    batch: int | None = None
    workers: int = 1
    address: str | None = None
    device: str | None = None
    dtype: str | None = None
    threads: int | None = None

    def __post_init__(self):
        for name in ("batch", "workers", "threads"):
            if getattr(self, name) is not None and not 1 <= getattr(self, name) <= _MOST:
                raise InputError(f"--{name} must be from 1 to {_MOST}, not {getattr(self, name)}")
        if self.dtype not in (None, *DTYPES):
            raise InputError(f"--dtype must be one of {', '.join(DTYPES)}, not {self.dtype}")


@dataclass(frozen=True)
class Session:
    """An artifact, found whole, with what it is to be scored on and by."""

    folder: Path  # where its files are; of a thin artifact they are put together elsewhere
    home: Path | None  # the user's own folder, where scores.json goes; None for a Hub repository
    manifest: Manifest
    settings: Settings
    scorers: list
    jobs: list
    order: Order
    drawing: Drawing

    @property
    def environment(self):
        """What of this machine the images depend on."""
        return environment(self.drawing.device or best_device(), self.drawing.dtype, self.order.threads)

    def draw(self, work, sides, announce=None):
        """(images, the Jobs none of whose images a safety checker blackened, batch sizes): as draw_sides gives them."""
        drawing = {name: getattr(self.drawing, name) for name in ("batch", "workers", "address")}
        images, sizes = draw_sides(work, sides, self.jobs, self.order, **drawing, announce=announce)
        kept = [job for job in self.jobs if not any(is_flagged(images[side.name][job.key]) for side in sides)]
        if len(kept) < 2:
            raise SurgeryError(
                f"of {len(self.jobs)} pairs {len(kept)} can be scored, and it takes 2; give more prompts"
            )
        return images, kept, sizes

    def facts(self, kept, batches):
        """{field: value} of Scores: how the images were made, and where."""
        device, settings = self.drawing.device or best_device(), self.settings
        prompts, reference = settings.prompts, settings.reference
        named = {key: getattr(prompts, key) for key in ("name", "sha256", "source", "revision")}
        drawing = {"device": str(device), "dtype": self.drawing.dtype or "the model's default"}
        drawing |= {"threads": self.order.threads} if self.order.threads else {}
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
            "drawing": drawing | {"batch": ", ".join(map(str, batches))},
            "excluded": len(self.jobs) - len(kept),
            "reference": ReferenceRecord(name=reference.name, count=reference.count, sha256=reference.sha256)
            if compared
            else None,
            "purpose": list(settings.purpose),
        }


def open_session(
    model,
    section,
    given,
    work,
    *,
    revision=None,
    drawing=None,
    checkpoints=None,
    recipe_folder=None,
    with_fidelity=False,
    settings=None,
):
    """The Session of an artifact, a folder or a Hub repository.

    work: where images and values are to go. section: of its recipe; given, recipe_folder, with_fidelity: as
    `open_settings` takes them; settings: those that it gave already; checkpoints: as `prepare_scorers` takes them.
    Raises InputError for what is no artifact and for whatever is wrong with prompts, metrics and reference,
    ArtifactError where the artifact was altered, SurgeryError where a checkpoint cannot be fetched.
    """
    drawing = drawing or Drawing()
    _require_libraries()
    folder = model_folder(model, revision)
    if not (folder / MANIFEST).is_file():
        raise InputError(f"{model} is no artifact, so there is no other side to it; `surgery apply` writes one")
    manifest = verify_artifact(folder, weights=True)
    home = Path(model).expanduser().resolve() if Path(model).expanduser().is_dir() else None
    settings = settings or open_settings(section or _section_of(home or folder), given, recipe_folder, with_fidelity)
    check_metrics(settings, manifest.sampling)
    scorers = prepare_scorers(settings.metrics, drawing.device, checkpoints, settings.reference)
    order = Order(
        model=str(home or model),
        revision=revision,
        hash=manifest.hash,
        sampling=manifest.sampling,
        device=drawing.device,
        dtype=drawing.dtype,
        threads=(drawing.threads or 1) if str(drawing.device or best_device()).startswith("cpu") else None,
    )
    _check_work_folder(work, home)
    jobs = jobs_of(settings.prompts, settings.images_per_prompt, settings.seed)
    if len(jobs) < 2:
        raise InputError("one image of one prompt says nothing; give more prompts, or more --images-per-prompt")
    return Session(folder, home, manifest, settings, scorers, jobs, order, drawing)


def check_recipe(planned):
    """The Settings of a Planned recipe's `validate` section; InputError for what is wrong with it, before anything is
    written.
    """
    _require_libraries()
    settings = open_settings(planned.recipe_file.recipe.validation, {}, planned.recipe_file.folder)
    check_metrics(settings, planned.recipe_file.recipe.sampling.model_dump())
    return settings


def hardware(device):
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
    from surgery.recipe.schema import Validate

    path = folder / "recipe.yaml"
    recipe = read_recipe(path).recipe if path.is_file() else None
    return (recipe and recipe.validation) or Validate()
