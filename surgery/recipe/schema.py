"""What a recipe may say: the pydantic models behind `recipes/*.yaml`. Unknown keys and loose types are refused."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Union

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    JsonValue,
    Tag,
    ValidationError,
    create_model,
    field_validator,
    model_serializer,
    model_validator,
)

from surgery.guidance.methods import Guidance
from surgery.models.parts import Name, Part, Selector, Text, as_list, finite
from surgery.nn import operators
from surgery.nn.operators import HYPERPARAMETERS, LARGEST, UNITS

from .guidance_scale import SCALE_BRANCHES, GuidanceScale
from .metric_names import FIDELITY_METRICS, MetricName

SCHEMA_VERSION = 1
MOST = 1000  # operations, and selectors of one: no model has as many attention modules

# Pixels; the latents of every UNet family are at most 1/8 of them.
Side = Annotated[int, Field(ge=8, le=1 << 16, multiple_of=8)]


def _is_known_schema(version):
    if version != SCHEMA_VERSION:
        raise ValueError(f"must be {SCHEMA_VERSION}")
    return version


def _number(limits):
    """The type of a hyperparameter, from its line in the table."""
    if limits.high == float("inf"):
        return Annotated[float, Field(ge=limits.low, allow_inf_nan=True), AfterValidator(finite)]
    if not limits.positive:
        return Annotated[float, Field(ge=limits.low, le=limits.high)]

    def is_no_underflow(value: float) -> float:
        if value < limits.low:
            raise ValueError(f"must be at least {limits.low:g}")
        return value

    return Annotated[float, Field(gt=0, le=limits.high), AfterValidator(is_no_underflow)]


class WeightFile(Part):
    """One weight file: in a Hub repository, or, without `repo`, on disk beside the recipe."""

    repo: Text | None = None
    file: Text
    revision: Text | None = None


class Lora(WeightFile):
    """A LoRA to fuse into the weights of a denoiser, UNet or transformer: W + scale * (alpha / rank) * up @ down.

    component: which, of a base with two; the first unless given.
    """

    scale: float = 1.0
    component: Name | None = None

    @model_serializer(mode="wrap")
    def _without_what_is_not_said(self, handler):
        # A recipe without one keeps the hash that it had before there was the key.
        return {key: value for key, value in handler(self).items() if (key, value) != ("component", None)}


class Components(Part):
    """Weights that replace the base's own for its denoiser, or for each of two."""

    unet: WeightFile | None = None
    transformer: WeightFile | None = None
    transformer_2: WeightFile | None = None

    @model_serializer(mode="wrap")
    def _without_what_is_not_said(self, handler):
        # A recipe without these keeps the hash that it had before there were the keys.
        return {key: value for key, value in handler(self).items() if key == "unet" or value is not None}


class Scheduler(Part):
    """Another scheduler, made from the base's scheduler config; every further key overrides one of its settings."""

    model_config = ConfigDict(extra="allow", frozen=True)
    __pydantic_extra__: dict[str, JsonValue]
    class_name: Annotated[Text, Field(alias="class")]

    def overrides(self) -> dict[str, Any]:
        """The settings besides `class`, as from_config takes them."""
        return dict(self.model_extra or {})


class Vae(Part):
    """A VAE in place of the base's: a repository, or a folder beside the recipe, or a folder in one of them."""

    repo: Text
    subfolder: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]*$")] | None = None
    revision: Text | None = None
    variant: Name | None = None


def _as_file(value):
    return {"file": value} if isinstance(value, str) else value


class Base(Part):
    """The pipeline that is operated on.

    pipeline: a repository or a folder in diffusers' layout. Or single_file: a checkpoint of all its parts in one file;
    what it does not hold, and the configs, are those of `config`, a repository or a folder (by default the repository
    that diffusers reads such a checkpoint with). revision, variant: of pipeline or config.
    """

    pipeline: Text | None = None
    single_file: Annotated[WeightFile | None, BeforeValidator(_as_file)] = None
    config: Text | None = None
    revision: Text | None = None
    variant: Name | None = None
    components: Components = Components()
    loras: list[Lora] = []
    scheduler: Scheduler | None = None
    vae: Vae | None = None

    @model_validator(mode="after")
    def _is_one_of_both(self):
        if (self.pipeline is None) == (self.single_file is None):
            raise ValueError("needs a pipeline, or a single_file in its place")
        if self.config is not None and self.single_file is None:
            raise ValueError("config belongs to single_file; leave it out")
        return self

    @property
    def name(self) -> str:
        """Of the pipeline or the single file."""
        if self.single_file is None:
            return self.pipeline or ""
        return "/".join(filter(None, [self.single_file.repo, self.single_file.file]))

    @model_serializer(mode="wrap")
    def _without_what_is_not_said(self, handler):
        # A recipe that says nothing of these keeps the hash that it had before there were any.
        later = ("single_file", "config", "vae")
        return {key: value for key, value in handler(self).items() if key not in later or value is not None}


def _settings_of(name, operator):
    """The model of an operator's or addition's settings: its hyperparameters in their order, and any unit."""
    fields: dict[str, Any] = {"operator": (Literal[name], ...)}
    fields |= {key: (_number(HYPERPARAMETERS[key]), default) for key, default in operator.defaults.items()}
    fields |= {"unit": (Literal[UNITS], UNITS[0])} if operator.projects else {}
    kind = "Addition" if operator.role else ""  # a method of guidance is called Nag too
    return create_model(f"{name.capitalize()}{kind}", __base__=Part, **fields)


OPERATORS = {name: _settings_of(name, operator) for name, operator in operators.OPERATIONS.items()}

# What a mapping is held to that names none of them, so that its other mistakes are reported beside that one.
_settings = {name: field for part in OPERATORS.values() for name, field in part.model_fields.items()}
_settings = {name: (field.rebuild_annotation(), None) for name, field in _settings.items()}
AnyOperator = create_model("AnyOperator", __base__=Part, **{**_settings, "operator": (Literal[tuple(OPERATORS)], ...)})

# The branches of the union by their tags. pydantic puts a tag into an error's location; none of these could be a key.
BRANCHES = {"any operator": AnyOperator, **{f"operator {name}": part for name, part in OPERATORS.items()}}


def _branch_of(settings):
    name = settings.get("operator") if isinstance(settings, dict) else getattr(settings, "operator", None)
    return f"operator {name}" if f"operator {name}" in BRANCHES else "any operator"


_BRANCHES = tuple(Annotated[part, Tag(tag)] for tag, part in BRANCHES.items())
Settings = Annotated[Union[_BRANCHES], Discriminator(_branch_of)]  # noqa: UP007  of a tuple


def _with_finite_sigma(schedule):
    if not isinstance(schedule, dict) or not isinstance(schedule.get("sigma"), list):
        return schedule
    return {**schedule, "sigma": [LARGEST if value == float("inf") else value for value in schedule["sigma"]]}


class Operation(Part):
    """One operation: which modules, and what takes their place."""

    # Where image queries meet text keys: cross-attention modules or that block of joint ones; joint ones alone; or
    # self-attention, which is an experiment that destroys images (PLADIS, Fig. 3).
    replace: Literal["cross-attention", "joint-attention", "self-attention"]
    # "all", or any of down, mid, up, double, single, transformer_2, and glob patterns over module paths
    layers: Annotated[
        list[Selector],
        BeforeValidator(as_list, json_schema_input_type=Selector | list[Selector]),
        Field(min_length=1, max_length=MOST),
    ] = ["all"]
    # Of joint attention: of the selected modules those in blocks of two streams, of one, or both
    blocks: Literal["all", "double", "single"] = "all"
    settings: Annotated[Settings, Field(alias="with")]  # pyright: ignore[reportInvalidTypeForm]
    # How the settings change over the denoising steps (surgery/nn/schedule.py); its content is checked by
    # reading.py, which knows the operator.
    schedule: Annotated[dict[str, Any] | None, BeforeValidator(_with_finite_sigma)] = None

    @model_serializer(mode="wrap")
    def _without_what_is_not_said(self, handler):
        # A recipe that says nothing of these keeps the hash that it had before there were any.
        unsaid = {"schedule": None, "blocks": "all"}
        said = {key: value for key, value in handler(self).items() if key not in unsaid or value != unsaid[key]}
        later = operators.later_defaults(self.settings.operator)
        for key in {"with", "settings"} & said.keys():
            kept = said[key].items()
            said[key] = {name: value for name, value in kept if name not in later or value != later[name]}
        return said

    @property
    def selected(self) -> tuple[list[str], str, str, str | None]:
        """(selectors, blocks, replace, role), as `recipe_problems` matches them against a model."""
        return self.layers, self.blocks, self.replace, operators.OPERATIONS[self.settings.operator].role

    def carried(self, paths: list[str]) -> dict[str, Any]:
        """As a model's config has it, for the modules at these paths."""
        return {
            **self.settings.model_dump(),
            **({"replace": self.replace} if self.replace == "self-attention" else {}),
            **({"schedule": self.schedule} if self.schedule else {}),
            "layers": paths,
        }


class Region(Part):
    """A part of the image with a prompt of its own: [left, top, right, bottom] as parts of it, from 0 to 1."""

    prompt: Annotated[str, Field(min_length=1)]
    box: Annotated[list[Annotated[float, Field(ge=0, le=1)]], Field(min_length=4, max_length=4)]

    @model_validator(mode="after")
    def _holds_something(self):
        left, top, right, bottom = self.box
        if not (left < right and top < bottom):
            raise ValueError(f"box {self.box} must be [left, top, right, bottom], each first below its second")
        return self


USUAL_STEPS = 50  # diffusers' own, where nothing says how many


class Sampling(Part):
    """How the model is meant to be sampled; the default of `surgery generate`.

    guidance_scale: w in U + w (C - U), which is one more than the w of the PLADIS and GAG papers, C + w (C - U).
    """

    steps: Annotated[int, Field(ge=1, le=10_000)] | None = None
    guidance_scale: GuidanceScale | None = None
    timesteps: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1, max_length=10_000)] | None = None
    height: Side | None = None
    width: Side | None = None
    num_frames: Annotated[int, Field(ge=1)] | None = None  # of a video
    fps: Annotated[int, Field(ge=1, le=240)] | None = None  # frames a second of it
    guidance_scale_2: Annotated[float, Field(ge=1)] | None = None  # of a second denoiser, guidance_scale unless given
    true_cfg_scale: Annotated[float, Field(ge=0)] | None = None  # guidance of models that also take a distilled one
    max_sequence_length: Annotated[int, Field(ge=1)] | None = None  # of the text encoder
    negative_prompt: str | None = None
    regions: Annotated[list[Region], Field(min_length=1, max_length=64)] | None = None  # of the operation `regions`

    @model_serializer(mode="wrap")
    def _without_what_is_not_said(self, handler):
        # A recipe that says nothing of these keeps the hash that it had before there were any.
        later = ("num_frames", "fps", "guidance_scale_2", "true_cfg_scale", "max_sequence_length", "negative_prompt")
        later += ("regions",)
        return {key: value for key, value in handler(self).items() if key not in later or value is not None}

    @model_validator(mode="after")
    def _steps_count_the_timesteps(self):
        if self.timesteps and self.steps not in (None, len(self.timesteps)):
            raise ValueError(f"steps is {self.steps} but there are {len(self.timesteps)} timesteps; leave steps out")
        return self


def sampling_problems(values: object) -> list[str]:
    """What is wrong with sampling values that did not come from a recipe: ["steps: ... greater than or equal to 1"]."""
    try:
        Sampling.model_validate(values)
    except ValidationError as error:
        found = error.errors(include_url=False)
        places = [".".join(str(part) for part in error["loc"] if part not in SCALE_BRANCHES) for error in found]
        texts = [f"{error['msg'][0].lower()}{error['msg'][1:]}, not {error['input']}" for error in found]
        return [f"{place}: {text}" for place, text in zip(places, texts, strict=True)]
    return []


def sampling_with(recorded: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """A model's own sampling with what was given in its place; its timesteps go where steps were given."""
    kept = {name: value for name, value in recorded.items() if name != "timesteps" or "steps" not in given}
    return {**kept, **given}


class Validate(Part):
    """How `surgery validate` scores the patched pipeline against its base.

    prompts: a named set, a file beside the recipe, or a list of prompts; limit: how many of them, evenly spaced.
    metrics: what is measured; purpose: those that the surgery is meant to better, all unless named: where one of them
    comes out significantly worse, the artifact is not published unasked. reference: a folder of images for FID and KID.
    """

    prompts: Text | Annotated[list[Text], Field(min_length=1)] | None = None
    limit: Annotated[int, Field(ge=1)] | None = None
    images_per_prompt: Annotated[int, Field(ge=1)] = 1
    seed: int = 0
    metrics: list[MetricName] = []
    purpose: list[MetricName] = []
    reference: Text | None = None

    @field_validator("prompts", "reference")
    @classmethod
    def _is_no_path_of_this_machine(cls, value):
        if isinstance(value, str) and value.startswith(("/", "~")):
            raise ValueError("must be written from the recipe's folder on: the recipe is published with the artifact")
        return value

    @model_validator(mode="after")
    def _purpose_is_measured(self):
        for name in self.purpose:
            if name not in self.metrics:
                raise ValueError(f"purpose names {name}, which is not among the metrics")
            if name in FIDELITY_METRICS:
                raise ValueError(f"purpose names {name}, which compares with the base's images and has no better side")
        return self

    @model_serializer(mode="wrap")
    def _without_what_is_not_said(self, handler):
        # A recipe that says nothing of these keeps the hash that it had before there were any.
        unsaid = {"limit": None, "seed": 0, "purpose": [], "reference": None}
        return {key: value for key, value in handler(self).items() if key not in unsaid or value != unsaid[key]}


class Export(Part):
    """One engine that `surgery apply` builds once the artifact is written; as the options of `surgery export`."""

    target: Literal["inductor", "tensorrt", "onnx"]
    component: Name | None = None
    shapes: Text | None = None
    dtype: Literal["fp16", "bf16", "fp32"] | None = None
    regional: bool = False
    weights: Literal["artifact", "engine"] = "artifact"
    decompose: bool = False
    max_autotune: bool = False

    @model_serializer(mode="wrap")
    def _without_the_usual(self, handler):
        # A recipe keeps the hash that it had before there were these.
        usual = {name: field.default for name, field in Export.model_fields.items()}
        return {key: value for key, value in handler(self).items() if key == "target" or value != usual[key]}


class Publish(Part):
    """What the model card states. `license: inherit` takes the base's."""

    license: Text = "inherit"
    tags: list[Text] = []


class Recipe(Part):
    """A whole recipe."""

    schema_version: Annotated[int, Field(alias="schema"), AfterValidator(_is_known_schema)]
    name: Name
    summary: str = ""
    base: Base
    operations: Annotated[list[Operation], Field(min_length=1, max_length=MOST)]
    sampling: Sampling = Sampling()
    guidance: Guidance | None = None  # pyright: ignore[reportInvalidTypeForm]
    validation: Annotated[Validate | None, Field(alias="validate")] = None
    export: list[Export] = []
    publish: Publish = Publish()

    @model_serializer(mode="wrap")
    def _without_guidance(self, handler):
        # A recipe without one keeps the hash that it had before there was the key.
        return {key: value for key, value in handler(self).items() if (key, value) != ("guidance", None)}
