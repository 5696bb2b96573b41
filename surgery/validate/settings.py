"""What is to be scored and by what: the recipe's `validate` section, with what the command line says instead."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from surgery.artifact.manifest import MANIFEST
from surgery.errors import InputError
from surgery.metric_names import DISTANCE_METRICS, FIDELITY_METRICS

from .prompts.opening import NAMES, SHAPES, open_prompts
from .prompts.prompt import PromptSet
from .reference import Reference, open_reference

# By prompt set; clip_score for any other.
_USUAL = {"geneval": ("geneval",), **dict.fromkeys(SHAPES, ("shape_alignment",))}


@dataclass(frozen=True)
class Settings:
    """Prompts, seeds, metrics, and which of these the surgery is meant to better."""

    prompts: PromptSet
    images_per_prompt: int
    seed: int
    metrics: tuple[str, ...]
    purpose: tuple[str, ...]
    reference: Reference | None

    @property
    def key(self):
        """A hash of what is measured, by which reports are kept apart."""
        reference = self.reference.sha256 if self.reference else None
        content = [self.prompts.sha256, self.images_per_prompt, self.seed, self.metrics, reference]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def open_settings(section, given, recipe_folder=None, with_fidelity=False):
    """The Settings of a recipe's section and what was given by hand; prompts and reference are read.

    given: {prompts, limit, images_per_prompt, seed, metrics, reference}, None for what is not. recipe_folder: where the
    recipe's own file names start; those given by hand start at the working folder. with_fidelity: add ssim where no
    metric compares with the base's images. Raises InputError for no prompts,
    unknown sets or metrics, files that cannot be read, numbers under 1.
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
            "pick-a-pic, coco, geneval, shapes) or a file"
        )
    here = Path()
    if "prompts" not in given and isinstance(values["prompts"], str) and values["prompts"] not in NAMES:
        _check_recipe_folder(recipe_folder, values["prompts"], "--prompts")
    folder = here if "prompts" in given else recipe_folder or here
    prompts = open_prompts(values["prompts"], folder, limit=values["limit"])
    metrics = tuple(values["metrics"] or _USUAL.get(prompts.name, ("clip_score",)))
    if with_fidelity and not set(metrics) & set(FIDELITY_METRICS):
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


def work_folder(model, out=None):
    """Where images, values and the report go: beside the artifact's folder, under out/ for a Hub repository."""
    if out is not None:
        return Path(out)
    if (Path(model) / MANIFEST).is_file():
        folder = Path(model).absolute()
        return folder.with_name(f"{folder.name}-validation")  # not in it: what is there may be published
    return Path("out") / f"{str(model).replace('/', '--')}-validation"


def report_folder(work, artifact_hash, settings):
    """Where in a work folder the report on an artifact is, measured by these Settings."""
    return Path(work) / f"report-{artifact_hash[:12]}-{settings.key[:8]}"
