"""What is to be scored and by what: the recipe's `validate` section, with what the command line says instead."""

from dataclasses import dataclass
from pathlib import Path

from surgery.artifact.manifest import NAME
from surgery.errors import InputError
from surgery.metric_names import FIDELITY_METRICS

from .prompts.opening import open_prompts
from .prompts.prompt import PromptSet
from .reference import Reference, open_reference

_USUAL = {"shapes": ("shape_alignment",), "geneval": ("geneval",)}  # by prompt set; clip_score for any other


@dataclass(frozen=True)
class Settings:
    """Prompts, seeds, metrics, and which of these the surgery is meant to better."""

    prompts: PromptSet
    images_per_prompt: int
    seed: int
    metrics: tuple[str, ...]
    purpose: tuple[str, ...]
    reference: Reference | None


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
    try:
        folder = here if "prompts" in given else recipe_folder or here
        prompts = open_prompts(values["prompts"], folder, limit=values["limit"])
    except InputError as error:
        if "prompts" in given or recipe_folder is not None:
            raise
        raise InputError(
            f"{error}. The recipe in the artifact names its prompts from the folder of the recipe that it was made "
            "with: give them as --prompts"
        ) from error
    metrics = tuple(values["metrics"] or _USUAL.get(prompts.name, ("clip_score",)))
    if with_fidelity and not set(metrics) & set(FIDELITY_METRICS):
        metrics = (*metrics, "ssim")
    reference = None
    if values["reference"] is not None:
        folder = here if "reference" in given else recipe_folder or here
        reference = open_reference(folder / Path(values["reference"]).expanduser())
    purpose = tuple(name for name in section.purpose if name in metrics)
    if not section.purpose:
        purpose = tuple(name for name in metrics if name not in FIDELITY_METRICS)
    return Settings(prompts, values["images_per_prompt"], values["seed"], metrics, purpose, reference)


def work_folder(model, out=None):
    """Where images, values and the report go: beside the artifact's folder, under out/ for a Hub repository."""
    if out is not None:
        return Path(out)
    if (Path(model) / NAME).is_file():
        folder = Path(model).absolute()
        return folder.with_name(f"{folder.name}-validation")
    return Path("out") / f"{str(model).replace('/', '--')}-validation"


def report_folder(work, artifact_hash):
    """Where in a work folder the report on an artifact is."""
    return Path(work) / f"report-{artifact_hash[:12]}"
