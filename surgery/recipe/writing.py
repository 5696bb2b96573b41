"""A recipe for a model, written to be read: what has to be said, and what else may be as comments beside it."""

import os
import re
from pathlib import Path

import yaml

from surgery.errors import InputError, UnsupportedModelError
from surgery.models.denoisers import further_of
from surgery.models.inspecting import inspect_model
from surgery.nn.operators import HYPERPARAMETERS, OPERATORS, UNITS, unknown_name

_TEXT = """\
# {title}. `surgery plan {file}` says what it does, `surgery apply {file}` does it.
schema: 1
name: {name}
summary: ""
base:
  pipeline: {pipeline}
{revision}\
  # variant: fp16            # the weight files that have it in their names
  # loras: [{{repo: OWNER/NAME, file: lora.safetensors, scale: 1.0}}]
  # scheduler: {{class: DPMSolverMultistepScheduler}}
operations:
  - replace: {replace}
    layers: all              # or of {groups}; or patterns over module paths, "*.{pattern}"
    with:
      operator: {operator}
{settings}
    # schedule: {{fraction: [0.0, 0.8]}}   # the share of the steps at which it acts
# What is left out is the pipeline's own default.
sampling: {{}}
  # steps: 25
  # guidance_scale: 5.0
  # height: 1024
  # width: 1024
# guidance: {{method: pag, scale: 3.0}}
# validate: {{prompts: drawbench, metrics: [clip_score, image_reward]}}
publish: {{license: inherit, tags: []}}
"""


def recipe_text(model: str, revision: str | None = None, operator: str = "pladis", file: Path | None = None) -> str:
    """The text of a recipe that does an operator's surgery, with the papers' defaults, on all of a model's attention.

    model: a pipeline folder, written as seen from the recipe's, or a Hub repository, whose commit it names. file: where
    it will lie. Raises InputError for an operator that there is none of and a model that is patched, and
    UnsupportedModelError for a model without surgery.
    """
    if problem := unknown_name("operator", operator, OPERATORS):
        raise InputError(problem)
    found = inspect_model(model, revision)
    if not found["fits"]:
        raise UnsupportedModelError(f"{found['model_class']}: {found['refusal']}")
    sites = [site for site in found["sites"] if site.kind in ("cross", "joint") and not site.refusal]
    folder = Path(model).expanduser()
    pipeline = model
    if folder.is_dir():
        pipeline = Path(os.path.relpath(folder, (file or Path("recipe.yaml")).absolute().parent)).as_posix()
        pipeline = pipeline if pipeline.startswith("..") else f"./{pipeline}"
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", folder.resolve().name if folder.is_dir() else model.rpartition("/")[2])
    groups = list(dict.fromkeys(name for site in sites for name in (site.block, further_of(site.path)) if name))
    return _TEXT.format(
        title=f"{operator} in the attention to text of {' '.join(model.split())}",
        file=file or "FILE",
        name=f"{stem.strip('.-_') or 'model'}-{operator.replace('_', '-')}"[:120],
        pipeline=_scalar(pipeline),
        revision=f"  revision: {found['revision']}\n" if found["revision"] else "",
        replace=f"{sites[0].kind}-attention",
        groups=", ".join(groups),
        pattern=sites[0].path.rpartition(".")[2],
        operator=operator,
        settings="\n".join(_settings(operator)),
    )


def _settings(operator):
    for name, value in OPERATORS[operator].defaults.items():
        yield f"      {f'{name}: {value}':<24} # {HYPERPARAMETERS[name].meaning}"
    if OPERATORS[operator].projects:
        yield f"      {f'unit: {UNITS[0]}':<24} # over what it projects or solves: {', '.join(UNITS)}"


def _scalar(text):
    """A text as YAML writes it in one line."""
    return yaml.safe_dump(text, width=10_000).removesuffix("\n...\n").strip()
