"""Recipe and base become a Plan: what is replaced and what is not and why, and every file of the artifact with its
size and origin. A plan needs config files only; no weights are read."""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from surgery.errors import BaseError, InputError, RecipeError, SurgeryError, UnsupportedModelError
from surgery.hub import HubBase, LocalBase, open_base, open_weight_file, select_files
from surgery.hub.listing import Origin, components_of
from surgery.models.anatomy import AttentionSite, attention_sites, build_on_meta, denoiser_of, refusal_of_class
from surgery.models.parts import LONGEST_SELECTOR
from surgery.models.selection import DESTROYS, STREAMS, recipe_problems
from surgery.models.videos import draws_videos
from surgery.nn.backbones import backbone_of

from .document import read_document
from .guidance_scale import ScaleRange
from .reading import RecipeFile, find_recipe, schema_problems
from .schedulers import scheduler_problems
from .schema import MOST

Base = LocalBase | HubBase


@dataclass(frozen=True)
class PlannedFile:
    """One file of the artifact. size and sha256 are None where they are known only once it is written."""

    path: str
    size: int | None
    sha256: str | None
    origin: Origin
    weights: bool  # weights of the model, as against configs, code and text


@dataclass(frozen=True)
class Plan:
    """Everything that applying a recipe will do. `to_json()` prints it; `hash` identifies it."""

    name: str
    recipe_hash: str
    base: dict  # pipeline, revision (the commit), variant, license, pipeline_class
    component: str  # "unet"
    model_class: str  # "UNet2DConditionModel"
    operations: tuple[dict, ...]  # operator, its hyperparameters, unit, replace and schedule (if any), layers (paths)
    sites: tuple[AttentionSite, ...]
    skipped: dict  # path -> why
    scheduler: dict | None  # class and overrides
    files: tuple[PlannedFile, ...]
    evaluations: int  # of the denoiser for one image, at each step
    guidance: dict | None = None  # the recipe's, beside CFG, with the commit of another checkpoint that it names

    def to_json(self) -> dict:
        """The plan as plain data, with its hash and totals."""
        return {
            "schema_version": 1,
            "hash": self.hash,
            **asdict(self),
            "totals": self.totals,
            "warnings": self.warnings,
        }

    @cached_property
    def hash(self) -> str:
        """sha256 over all that the plan decides."""
        decided = asdict(self)
        del decided["evaluations"]  # follows from the recipe
        if self.guidance is None:  # a plan without one keeps the hash that it had before there was the key
            del decided["guidance"]
        return hashlib.sha256(json.dumps(decided, sort_keys=True).encode()).hexdigest()

    @property
    def warnings(self) -> list[str]:
        """What is wrong with carrying it out, a sentence each."""
        return [f"operations[{i}]: {DESTROYS}" for i, op in enumerate(self.operations) if "replace" in op]

    @property
    def totals(self) -> dict[str, int]:
        """Counts of modules and bytes."""
        return {
            "attention_modules": len(self.sites),
            "replaced": sum(len(operation["layers"]) for operation in self.operations),
            "weight_bytes": sum(f.size or 0 for f in self.files if f.weights),
            "rewritten_bytes": sum(
                f.size or 0 for f in self.files if f.weights and f.origin.kind in ("converted", "fused")
            ),
        }


@dataclass(frozen=True)
class Planned:
    """A Plan with what it takes to carry it out: the recipe, the open base and the sources of other weights.

    shapes: {tensor name: shape} of the denoiser, which its weight files must have.
    """

    plan: Plan
    recipe_file: RecipeFile
    base: Base
    replacement: tuple[Base, str] | None  # the file of another denoiser's weights
    loras: tuple[tuple[Base, str, float], ...]  # (base, file, scale)
    shapes: dict

    @property
    def sampling(self) -> dict[str, Any]:
        """As a manifest records it: the recipe's `sampling`, and the planned guidance as one of its keys."""
        said = self.recipe_file.recipe.sampling.model_dump(exclude_none=True)
        return {**said, "guidance": self.plan.guidance} if self.plan.guidance else said


def make_plan(recipe: str | Path, overrides: Sequence[str] = ()) -> Planned:
    """The Planned of a recipe path or shipped name with `--set` overrides.

    Raises RecipeError carrying every problem of the schema and of the selectors together, BaseError where the base
    cannot be read, UnsupportedModelError where there is no surgery for it.
    """
    document = read_document(find_recipe(recipe), overrides)
    validated, problems = schema_problems(document)
    if problems:
        raise RecipeError([*problems, *_selector_problems_despite(document)])
    assert validated is not None
    recipe_file = RecipeFile(validated, document)
    wanted, sampling, guidance = validated.base, validated.sampling, validated.guidance
    base = open_base(wanted.pipeline, wanted.revision, recipe_file.folder)
    model_index = base.read_json("model_index.json")
    component, class_name, model = _anatomy(base, model_index)
    sites = attention_sites(model)
    _check_pipeline_class(base, model_index)
    wanted_sites = [(op.layers, op.blocks, op.replace) for op in recipe_file.recipe.operations]
    assigned, problems = recipe_problems(sites, wanted_sites, document, attention_sites(model, self_attention=True))
    problems += scheduler_problems(base, model_index, recipe_file.recipe, document)
    problems += _component_problems(wanted, component, document)
    try:
        guidance = guidance.pinned(model, recipe_file.folder) if guidance else None
    except InputError as error:
        problems.append(document.problem(("guidance", "weak"), str(error), ""))
    problems += _video_problems(model_index.get("_class_name"), sampling, document)
    if problems:
        raise RecipeError(problems)
    weights = getattr(wanted.components, component)
    replacement = open_weight_file(**weights.model_dump(), folder=recipe_file.folder) if weights else None
    loras = tuple(
        (*open_weight_file(lora.repo, lora.file, lora.revision, recipe_file.folder), lora.scale)
        for lora in wanted.loras
    )
    operations = tuple(
        {
            **op.settings.model_dump(),
            **({"replace": op.replace} if op.replace == "self-attention" else {}),
            **({"schedule": op.schedule} if op.schedule else {}),
            "layers": [path for path, number in assigned.items() if number == index],
        }
        for index, op in enumerate(recipe_file.recipe.operations)
    )
    plan = Plan(
        name=recipe_file.recipe.name,
        recipe_hash=recipe_file.hash,
        base={
            "pipeline": wanted.pipeline,
            "revision": base.commit,
            "variant": wanted.variant,
            "license": base.license,
            **({"license_link": base.license_link} if base.license_link else {}),
            "pipeline_class": model_index.get("_class_name"),
        },
        component=component,
        model_class=class_name,
        operations=operations,
        sites=tuple(sites),
        skipped={site.path: site.refusal or "no operation selects it" for site in sites if site.path not in assigned},
        scheduler={"class": wanted.scheduler.class_name, **wanted.scheduler.overrides()} if wanted.scheduler else None,
        files=tuple(_planned_files(base, model_index, wanted, component, replacement, loras)),
        evaluations=evaluations_per_step(class_name, model_index.get("_class_name"), sampling, guidance),
        guidance=guidance.model_dump() if guidance else None,
    )
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    return Planned(plan, recipe_file, base, replacement, loras, shapes)


def _video_problems(pipeline_class, sampling, document):
    """Settings of videos for a pipeline that draws images."""
    given = [name for name in ("num_frames", "fps") if getattr(sampling, name) is not None]
    if not given or draws_videos(pipeline_class):
        return []
    message = f"{pipeline_class} draws images, not videos"
    return [document.problem(("sampling", name), message, "leave it out") for name in given]


def _component_problems(wanted, component, document):
    """Weights that a recipe names for another denoiser than the base has."""
    others = [name for name, file in wanted.components if file and name != component]
    problems = [
        document.problem(("base", "components", name), f"the base's denoiser is its {component}", "") for name in others
    ]
    if wanted.loras and component != "unet":
        message = "a LoRA is fused into a UNet's weights only"
        hint = "leave it out, and use load_lora_weights on what surgery.load gives"
        problems.append(document.problem(("base", "loras"), message, hint))
    return problems


def source_of(planned: Planned, file: PlannedFile) -> tuple[Base, str]:
    """(base, name in it) of what a PlannedFile is made from."""
    if planned.replacement and file.weights and file.path.startswith(f"{planned.plan.component}/"):
        return planned.replacement
    return planned.base, file.origin.path  # pyright: ignore[reportReturnType]


def needs_weights(planned: Planned) -> str | None:
    """Why a Planned cannot be carried out without its weights at hand, or None."""
    otherwise = "; apply it without --remote"
    for file in planned.plan.files:
        if not file.weights:
            continue
        base, name = source_of(planned, file)
        if file.origin.loras:
            return f"{file.path} gets a LoRA fused in, for which the weights are needed{otherwise}"
        if file.origin.kind == "converted":
            return (
                f"{file.path} is converted from {file.origin.path}, for which the weights are needed{otherwise}, or "
                "name a .safetensors file in its place"
            )
        if base.kind != "hub":
            return f"{file.path} comes from {base.name} on this machine, not from the Hub{otherwise}"
        if not base.listed:  # pyright: ignore[reportAttributeAccessIssue]
            return (
                f"{base.name} cannot be listed just now, and its weights are not to be fetched: connect, and run again"
            )
        if base.files[name].sha256 is None:
            return f"{base.name} has {name} outside large file storage, so the Hub lists no sha256 of it{otherwise}"
    return None


def _check_pipeline_class(base, model_index):
    import diffusers

    name = model_index.get("_class_name")
    if name not in dir(diffusers):  # not hasattr, which would import the pipeline and all that it needs
        raise BaseError(f"{base.name}/model_index.json names the pipeline class {name}, which diffusers does not have")


def _anatomy(base, model_index):
    component, class_name = denoiser_of(model_index)
    reason = refusal_of_class(class_name, str(model_index.get("_class_name")), components_of(model_index))
    if reason:
        raise UnsupportedModelError(f"{base.name} ({class_name}): {reason}")
    return component, class_name, build_on_meta(class_name, base.read_json(f"{component}/config.json"))


def _selector_problems_despite(document):
    """What is wrong with the selectors of a recipe that the schema refuses, as far as its base can be read here."""
    base_part = document.data.get("base")
    operations = document.data.get("operations")
    if not isinstance(base_part, dict) or not isinstance(operations, list):
        return []
    if not isinstance(base_part.get("pipeline"), str) or not isinstance(base_part.get("revision"), (str, type(None))):
        return []
    layers: list[Any] = [op.get("layers", ["all"]) if isinstance(op, dict) else None for op in operations]
    blocks = [op.get("blocks", "all") if isinstance(op, dict) else None for op in operations]
    layers = [[one] if isinstance(one, str) else one for one in layers]
    if not all(isinstance(one, list) and all(isinstance(s, str) for s in one) for one in layers):
        return []
    if sum(map(len, layers)) > MOST or any(len(selector) > LONGEST_SELECTOR for one in layers for selector in one):
        return []
    if not all(one in ("all", *STREAMS) for one in blocks):
        return []
    replace = [op.get("replace") for op in operations]
    try:
        folder = document.path.parent
        base = open_base(base_part["pipeline"], base_part.get("revision"), folder, local_files_only=True)
        model = _anatomy(base, base.read_json("model_index.json"))[2]
        sites, self_sites = attention_sites(model), attention_sites(model, self_attention=True)
    except SurgeryError:
        return []  # the base is reported on once the recipe itself is right
    return recipe_problems(sites, list(zip(layers, blocks, replace, strict=True)), document, self_sites)[1]


def _planned_files(base, model_index, wanted, component, replacement, loras):
    selected = select_files(base.files, model_index, wanted.variant)
    denoiser = selected[component]
    if not denoiser.weights and replacement is None:
        raise BaseError(f"{base.name} has no weights for {component}")
    for name, files in selected.items():
        rewritten = {f"{component}/config.json"} | ({"scheduler/scheduler_config.json"} if wanted.scheduler else set())
        for path in files.config:
            origin = Origin("surgery") if path in rewritten else Origin("base", base.name, base.commit, path)
            entry = base.files[path]
            known = path not in rewritten
            yield PlannedFile(path, entry.size if known else None, entry.sha256 if known else None, origin, False)
        if name != component:
            for path in (*files.weights, *([files.index] if files.index else [])):
                entry = base.files[path]
                origin = Origin("base", base.name, base.commit, path)
                yield PlannedFile(path, entry.size, entry.sha256, origin, path != files.index)
    yield PlannedFile("model_index.json", None, None, Origin("surgery"), False)
    yield from _denoiser_weights(base, denoiser, wanted, component, replacement, loras)


def _denoiser_weights(base, denoiser, wanted, component, replacement, loras):
    fused = tuple({"source": b.name, "revision": b.commit, "path": f, "scale": scale} for b, f, scale in loras)
    variant = f".{wanted.variant}" if wanted.variant else ""
    if replacement is not None:
        sources, kind = [replacement], "component"
        names = [f"{component}/diffusion_pytorch_model{variant}.safetensors"]
    else:
        sources, kind = [(base, path) for path in denoiser.weights], "base"
        names = [re.sub(r"\.bin$", ".safetensors", path) for path in denoiser.weights]
    for (source, path), name in zip(sources, names, strict=True):
        entry = source.files[path]
        as_it_is = path.endswith(".safetensors")
        origin_kind = "fused" if fused else kind if as_it_is else "converted"
        origin = Origin(origin_kind, source.name, source.commit, path, fused)
        yield PlannedFile(name, entry.size, entry.sha256 if origin_kind == kind else None, origin, True)


def evaluations_per_step(model_class: str, pipeline_class: str | None, sampling: Any, guidance: Any = None) -> int:
    """Evaluations of the denoiser for one image at a step in which guidance acts.

    sampling, guidance: a recipe's, the latter None for CFG. What the sampling does not say is the pipeline's default,
    which guides wherever there is CFG.
    """
    backbone = backbone_of(model_class)
    if backbone.embeds_guidance and pipeline_class not in backbone.guided_pipelines:
        weight = sampling.true_cfg_scale if sampling.negative_prompt is not None else None
        is_guided = weight is not None and weight > 1
    else:
        weight = sampling.guidance_scale
        weight = max(weight.uniform) if isinstance(weight, ScaleRange) else weight
        is_guided = weight is None or weight > 1
    return guidance.evaluations(is_guided) if guidance is not None else 1 + is_guided
