"""Recipe and base become a Plan: what is replaced and what is not and why, and every file of the artifact with its
size and origin. A plan needs config files only; no weights are read."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.compat import lora_reader
from surgery.errors import BaseError, InputError, RecipeError, SurgeryError, UnsupportedModelError
from surgery.hub import open_base
from surgery.hub.base import read_index
from surgery.hub.listing import index_of
from surgery.models.anatomy import AttentionSite, attention_sites, build_on_meta, refusal_of_class
from surgery.models.denoisers import denoisers_of, own_operations
from surgery.models.parts import LONGEST_SELECTOR
from surgery.models.selection import DESTROYS, REPLACED, STREAMS, recipe_problems
from surgery.models.videos import draws_videos
from surgery.nn.backbones import backbone_of
from surgery.nn.operators import OPERATIONS, OPERATORS, standing

from .document import read_document
from .files import Base, PlannedFile, PlannedFiles
from .guidance_scale import ScaleRange
from .places import places_of, present
from .reading import RecipeFile, find_recipe, schema_problems
from .schedulers import scheduler_problems
from .schema import MOST

if TYPE_CHECKING:
    from surgery.hub.deferred import Conversion


@dataclass(frozen=True)
class Plan:
    """Everything that applying a recipe will do. `to_json()` prints it; `hash` identifies it."""

    name: str
    recipe_hash: str
    base: dict  # pipeline, revision (the commit), variant, license, pipeline_class
    component: str  # "unet"
    model_class: str  # "UNet2DConditionModel"
    operations: tuple[dict, ...]  # operator, its hyperparameters, unit, replace and schedule (if any), layers (paths
    # in the pipeline, as surgery/models/denoisers.py has them)
    sites: tuple[AttentionSite, ...]
    skipped: dict  # path -> why
    scheduler: dict | None  # class and overrides
    files: tuple[PlannedFile, ...]
    evaluations: int  # of the denoiser for one image, at each step
    guidance: dict | None = None  # the recipe's, beside CFG, with the commit of another checkpoint that it names
    further: dict | None = None  # {component: model class} of the denoisers beside the first

    def to_json(self) -> dict:
        """The plan as plain data, with its hash and totals."""
        return {
            "schema_version": 1,
            "plan_hash": self.hash,
            **asdict(self),
            "totals": self.totals,
            "warnings": self.warnings,
        }

    @cached_property
    def hash(self) -> str:
        """sha256 over all that the plan decides."""
        decided = asdict(self)
        del decided["evaluations"]  # follows from the recipe
        for key in ("guidance", "further"):  # a plan without one keeps the hash that it had before there was the key
            if decided[key] is None:
                del decided[key]
        return hashlib.sha256(json.dumps(decided, sort_keys=True).encode()).hexdigest()

    @property
    def carried(self) -> list[dict]:
        """The operations as the model's config has them: with dense attention beneath additions without an operator."""
        return standing(self.operations)

    @property
    def denoisers(self) -> dict[str, str]:
        """{component: model class}, the first of them first."""
        return {self.component: self.model_class, **(self.further or {})}

    @property
    def patched(self) -> dict[str, list[dict]]:
        """{component: what its config has of `carried`} of the denoisers that are patched."""
        own = {component: own_operations(self.carried, component) for component in self.denoisers}
        return {component: operations for component, operations in own.items() if operations}

    @property
    def code(self) -> dict[str, str]:
        """{component: where in the artifact the code of its patched class lies}."""
        return {name: f"{name}/{backbone_of(self.denoisers[name]).patched.__module__}.py" for name in self.patched}

    @property
    def warnings(self) -> list[str]:
        """What is wrong with carrying it out, a sentence each."""
        return [f"operations[{i}]: {DESTROYS}" for i, op in enumerate(self.operations) if "replace" in op]

    @property
    def totals(self) -> dict[str, int]:
        """Counts of modules and bytes."""
        return {
            "attention_modules": len(self.sites),
            "replaced": len({path for operation in self.operations for path in operation["layers"]}),
            "weight_bytes": sum(f.size or 0 for f in self.files if f.weights),
            "rewritten_bytes": sum(
                f.size or 0 for f in self.files if f.weights and f.origin.kind in ("converted", "fused")
            ),
        }


@dataclass(frozen=True)
class Planned:
    """A Plan with what it takes to carry it out: the recipe, the open base and where each file comes from.

    shapes: {tensor name: shape} of each denoiser, which its weight files must have. index: of the base's pipeline, what
    the recipe leaves of it. sources: {artifact path: (base, name in it)} of all that is not written anew. conversions:
    {artifact path: Conversion} of what is taken out of a single-file checkpoint.
    """

    plan: Plan
    recipe_file: RecipeFile
    base: Base
    loras: dict[str, tuple[tuple[Base, str, float], ...]]  # {denoiser: (base, file, scale) each}
    shapes: dict
    index: dict
    sources: dict[str, tuple[Base, str]]
    conversions: dict[str, "Conversion"]

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
    single = _single_file(wanted.single_file, recipe_file.folder) if wanted.single_file else None
    pipeline = wanted.pipeline or wanted.config or single.default_config  # pyright: ignore[reportOptionalMemberAccess]
    base = open_base(pipeline, wanted.revision, recipe_file.folder)
    model_index = present(base, read_index(base))
    places = places_of(base, model_index)
    denoisers, models = denoisers_of(model_index), _anatomy(base, model_index)
    for component in denoisers:
        if places.source_of(own := f"{component}/config.json", base) != (base, own):
            place, folder = places.sources[own]
            raise BaseError(
                f"{base.name} takes its {component} from {folder} of {place.name}; name that as base.pipeline"
            )
    (component, class_name), *further = denoisers.items()
    sites = attention_sites(models)
    _check_pipeline_class(base, model_index)
    said = recipe_file.recipe.operations
    self_sites = attention_sites(models, self_attention=True)
    chosen, problems = recipe_problems(sites, [one.selected for one in said], document, self_sites)
    problems += scheduler_problems(base, model_index, recipe_file.recipe, document)
    problems += _component_problems(wanted, list(denoisers), model_index.get("_class_name"), document)
    try:
        guidance = guidance.pinned(models[component], recipe_file.folder) if guidance else None
    except InputError as error:
        problems.append(document.problem(("guidance", "weak"), str(error), ""))
    problems += _video_problems(model_index.get("_class_name"), sampling, document)
    operations = tuple(one.carried(paths) for one, paths in zip(said, chosen, strict=True))
    problems += _addition_problems(denoisers, sites, operations, document)
    if problems:
        raise RecipeError(problems)
    patched = [name for name in denoisers if own_operations(operations, name)]
    files = PlannedFiles(recipe_file, base, places, model_index, list(denoisers), patched, single)
    replaced = {path for layers in chosen for path in layers}
    plan = Plan(
        name=recipe_file.recipe.name,
        recipe_hash=recipe_file.hash,
        base={
            "pipeline": pipeline,
            "revision": base.commit,
            "variant": wanted.variant,
            "license": base.license,
            **({"license_link": base.license_link} if base.license_link else {}),
            "pipeline_class": model_index.get("_class_name"),
            **(single.record() if single else {}),
        },
        component=component,
        model_class=class_name,
        operations=operations,
        sites=tuple(sites),
        skipped={site.path: site.refusal or "no operation selects it" for site in sites if site.path not in replaced},
        scheduler={"class": wanted.scheduler.class_name, **wanted.scheduler.overrides()} if wanted.scheduler else None,
        files=tuple(files.planned),
        evaluations=evaluations_per_step(class_name, model_index.get("_class_name"), sampling, guidance),
        guidance=guidance.model_dump() if guidance else None,
        further=dict(further) or None,
    )
    shapes = {
        component: {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        for component, model in models.items()
    }
    sources, conversions = files.sources, files.conversions
    return Planned(plan, recipe_file, base, files.loras, shapes, files.index, sources, conversions)


def _single_file(wanted, folder):
    from .single_file import SingleFileCheckpoint  # of torch, which no other plan's refusal waits for

    return SingleFileCheckpoint(wanted, folder)


def _role(name):
    return OPERATIONS[name].role if name in OPERATIONS else None


def _addition_problems(denoisers, sites, operations, document):
    """What is wrong with additions for these models, each at the line of its settings."""
    if all(operation["operator"] in OPERATORS for operation in operations):
        return []
    from surgery.nn.configs import addition_problems

    kinds = {site.path: site.kind for site in sites if site.kind in REPLACED and not site.refusal}
    classes, carried = {backbone_of(kind).patched: None for kind in denoisers.values()}, standing(operations)
    found = dict.fromkeys(problem for patched in classes for problem in addition_problems(patched, carried, kinds))
    return [document.problem(("operations", index, "with", "operator"), message, "") for index, message in found]


def _video_problems(pipeline_class, sampling, document):
    """Settings of videos for a pipeline that draws images."""
    given = [name for name in ("num_frames", "fps") if getattr(sampling, name) is not None]
    if not given or draws_videos(pipeline_class):
        return []
    message = f"{pipeline_class} draws images, not videos"
    return [document.problem(("sampling", name), message, "leave it out") for name in given]


def _component_problems(wanted, denoisers, pipeline_class, document):
    """Weights that a recipe names for another denoiser than the base has."""
    own = f"the base's denoiser is its {' and its '.join(denoisers)}"
    others = [("base", "components", name) for name, file in wanted.components if file and name not in denoisers]
    others += [
        ("base", "loras", at, "component")
        for at, lora in enumerate(wanted.loras)
        if lora.component not in (None, *denoisers)
    ]
    problems = [document.problem(place, own, "") for place in others]
    if wanted.loras and lora_reader(pipeline_class) is None:
        message = f"diffusers reads no LoRA for {pipeline_class}"
        problems.append(document.problem(("base", "loras"), message, "leave it out"))
    return problems


def needs_weights(planned: Planned) -> str | None:
    """Why a Planned cannot be carried out without its weights at hand, or None."""
    otherwise = "; apply it without --remote"
    for file in planned.plan.files:
        if not file.weights:
            continue
        if file.path in planned.conversions:
            return f"{file.path} is taken out of {file.origin.path}, for which the weights are needed{otherwise}"
        base, name = planned.sources[file.path]
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

    index = index_of(base.files)
    for what, key in (("pipeline class", "_class_name"), ("blocks", "_blocks_class_name")):
        name = model_index.get(key)
        if (name or key == "_class_name") and name not in dir(diffusers):  # hasattr would import all that it needs
            raise BaseError(f"{base.name}/{index} names the {what} {name}, which diffusers does not have")


def _anatomy(base, model_index):
    """{component: model} of the base's denoisers, on the meta device."""
    return {
        component: _on_meta(base, component, class_name, str(model_index.get("_class_name")))
        for component, class_name in denoisers_of(model_index).items()
    }


def _on_meta(base, component, class_name, pipeline_class):
    reason = refusal_of_class(class_name, pipeline_class)
    if reason:
        raise UnsupportedModelError(f"{base.name} ({class_name}): {reason}")
    config = base.read_json(f"{component}/config.json")
    if quantised := config.get("quantization_config"):
        kind = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        raise UnsupportedModelError(
            f"{base.name}: its {component} is quantised already ({kind}), and an artifact's files are checked by name "
            "and shape as the model has them; apply the recipe to the unquantised base, and give "
            "surgery.load(..., quantization_config=...)"
        )
    return build_on_meta(class_name, config)


def _selector_problems_despite(document):
    """What is wrong with the selectors of a recipe that the schema refuses, as far as its base can be read here."""
    base_part = document.data.get("base")
    if isinstance(base_part, dict) and "single_file" in base_part:
        base_part = {"pipeline": base_part.get("config"), "revision": base_part.get("revision")}
    operations = document.data.get("operations")
    if not isinstance(base_part, dict) or not isinstance(operations, list):
        return []
    pipeline, revision = base_part.get("pipeline"), base_part.get("revision")
    if not isinstance(pipeline, str) or not isinstance(revision, (str, type(None))):
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
    settings = [op.get("with") for op in operations]
    roles = [_role(str(own.get("operator"))) if isinstance(own, dict) else None for own in settings]
    try:
        folder = document.path.parent
        base = open_base(pipeline, revision, folder, local_files_only=True)
        models = _anatomy(base, read_index(base))
        sites, self_sites = attention_sites(models), attention_sites(models, self_attention=True)
    except SurgeryError:
        return []  # the base is reported on once the recipe itself is right
    return recipe_problems(sites, list(zip(layers, blocks, replace, roles, strict=True)), document, self_sites)[1]


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
        is_guided = weight is None or weight + backbone.adds_to_cond > 1
    return guidance.evaluations(is_guided) if guidance is not None else 1 + is_guided
