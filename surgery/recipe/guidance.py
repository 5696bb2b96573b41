"""What a recipe's `guidance` may say: one model for each method, with its defaults. surgery/guidance carries it out.

C and U are the model's outputs with and without the prompt, W that of a weakened model with it, w `guidance_scale`.
Every method starts from CFG, U + w (C - U), or from C where the pipeline is sampled without it, and all but cfg, apg,
cfg-zero and nag add `scale` (C - W).
"""

from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Discriminator,
    Field,
    Tag,
    TypeAdapter,
    ValidationError,
    create_model,
    model_serializer,
)

from .parts import LARGEST, Number, Part, Selector, as_list, finite

WINDOWS = ("steps", "fraction", "sigma")  # as in surgery/nn/schedule.py


def _finite(value):
    return finite(value) if isinstance(value, float) else value


def _finite_ends(ends):
    return [_finite(end) for end in ends] if isinstance(ends, (list, tuple)) else ends


Layers = Annotated[list[Selector], BeforeValidator(as_list), Field(min_length=1)]
Blur = Annotated[float, Field(gt=0, allow_inf_nan=True), BeforeValidator(_finite)]


class _Method(Part):
    """What all methods have: the window of steps in which they act; outside it, the model is sampled as without them.

    steps, fraction, sigma: as in an operation's schedule, [from, to] each.
    """

    steps: list[int | None] | None = None
    fraction: list[float] | None = None
    sigma: Annotated[list[float], BeforeValidator(_finite_ends)] | None = None

    @model_serializer(mode="wrap")
    def _without_open_windows(self, handler):
        return {key: value for key, value in handler(self).items() if key not in WINDOWS or value is not None}

    @property
    def window(self):
        """{key: [from, to]} of the windows that are named."""
        return {key: getattr(self, key) for key in WINDOWS if getattr(self, key) is not None}

    def evaluations(self, guided):
        """Evaluations of the denoiser for one image at a step in the window; guided: whether CFG is on."""
        return 1 + guided + self.weakens

    @property
    def weakens(self):
        """Whether it evaluates a weakened model besides."""
        return "scale" in type(self).model_fields and self.method != "nag"


class Cfg(_Method):
    """Classifier-free guidance (arXiv 2207.12598); within a window: in a limited interval (arXiv 2404.07724)."""

    method: Literal["cfg"]


class Apg(_Method):
    """Adaptive projected guidance (arXiv 2410.02416).

    eta: what is kept of the difference's part along C; momentum: of the differences of earlier steps, 0 for none;
    rescale: the largest norm of the difference, 0 for any.
    """

    method: Literal["apg"]
    eta: Number = 0.0
    momentum: Number = -0.5
    rescale: Annotated[float, Field(ge=0, le=1e30)] = 15.0


class CfgZero(_Method):
    """CFG-Zero* (arXiv 2503.18886), for flow models. zero_init: at so many first steps the model's output is 0."""

    method: Literal["cfg-zero"]
    zero_init: Annotated[int, Field(ge=0)] = 1


class Pag(_Method):
    """Perturbed-attention guidance (arXiv 2403.17377): self-attention's map is the identity in W."""

    method: Literal["pag"]
    scale: Number = 3.0
    layers: Layers = ["mid"]


class Seg(_Method):
    """Smoothed energy guidance (arXiv 2408.00760): self-attention's queries are blurred in W.

    blur: the Gaussian's standard deviation in tokens; .inf replaces the queries by their mean.
    """

    method: Literal["seg"]
    scale: Number = 3.0
    blur: Blur = LARGEST
    layers: Layers = ["mid"]


class Oseg(_Method):
    """Orthogonal SEG: of each query only the part orthogonal to its token's key is blurred in W.

    keep_parallel: false drops the part along the key, as the authors' released code does.
    """

    method: Literal["oseg"]
    scale: Number = 3.0
    blur: Blur = 5.0
    keep_parallel: bool = True
    layers: Layers = ["mid"]


class Sag(_Method):
    """Self-attention guidance (arXiv 2210.00939): W sees the image blurred where self-attention looks.

    blur: of the predicted image, in latent pixels. layer: whose self-attention.
    """

    method: Literal["sag"]
    scale: Number = 0.75
    blur: Blur = 1.0
    layers: Layers = ["mid"]


class Slg(_Method):
    """Skip-layer guidance, as for Stable Diffusion 3.5: W skips whole transformer blocks."""

    method: Literal["slg"]
    scale: Number = 2.8
    layers: Layers = ["mid"]


class Stg(_Method):
    """Spatio-temporal guidance (arXiv 2411.18664): W skips self-attention in some layers.

    mode: "attention" gives it the identity as its map (STG-A), "residual" skips its whole block (STG-R).
    """

    method: Literal["stg"]
    scale: Number = 1.0
    mode: Literal["attention", "residual"] = "residual"
    layers: Layers = ["mid"]


class AutoGuidance(_Method):
    """AutoGuidance (arXiv 2406.02507) with the model itself as the bad version: W drops activations of some blocks.

    dropout: the share of what those blocks change that is dropped; seed: of which.
    """

    method: Literal["autoguidance"]
    scale: Number = 1.0
    dropout: Annotated[float, Field(gt=0, le=1)] = 0.1
    seed: int = 0
    layers: Layers = ["all"]


class Tsg(_Method):
    """Time-step guidance (arXiv 2407.02687): noise is added to the time's embedding in W.

    noise, power: the noise's standard deviation is noise (t/T)^power in units of the embedding's root mean square.
    """

    method: Literal["tsg"]
    scale: Number = 2.0
    noise: Annotated[float, Field(ge=0, le=1e30)] = 1.0
    power: Annotated[float, Field(ge=0, le=100)] = 1.0
    seed: int = 0


class Nag(_Method):
    """Normalized attention guidance (arXiv 2505.21179), in cross-attention's output: the only one that costs no W.

    tau: how far the norm may grow; alpha: how much of it is taken. negative_prompt: what to lead away from.
    """

    method: Literal["nag"]
    scale: Number = 5.0
    tau: Annotated[float, Field(gt=0, le=1e30)] = 2.5
    alpha: Annotated[float, Field(ge=0, le=1)] = 0.25
    negative_prompt: str = ""
    layers: Layers = ["all"]


METHODS = {
    part.model_fields["method"].annotation.__args__[0]: part
    for part in (Cfg, Apg, CfgZero, Pag, Seg, Oseg, Sag, Slg, Stg, AutoGuidance, Tsg, Nag)
}

# What a mapping is held to that names none of them, so that its other mistakes are reported beside that one.
_settings = {
    name: (Any, None) for part in METHODS.values() for name in part.model_fields if name not in ("method", *WINDOWS)
}
AnyMethod = create_model("AnyMethod", __base__=_Method, **{**_settings, "method": (Literal[tuple(METHODS)], ...)})

# The branches of the union by their tags. pydantic puts a tag into an error's location; none of these could be a key.
BRANCHES = {"any guidance": AnyMethod, **{f"guidance {name}": part for name, part in METHODS.items()}}


def _branch_of(values):
    name = values.get("method") if isinstance(values, dict) else getattr(values, "method", None)
    return f"guidance {name}" if f"guidance {name}" in BRANCHES else "any guidance"


def _with_method(values):
    return {"method": values} if isinstance(values, str) else values


Guidance = Annotated[
    Annotated[Cfg, Tag("guidance cfg")]
    | Annotated[Apg, Tag("guidance apg")]
    | Annotated[CfgZero, Tag("guidance cfg-zero")]
    | Annotated[Pag, Tag("guidance pag")]
    | Annotated[Seg, Tag("guidance seg")]
    | Annotated[Oseg, Tag("guidance oseg")]
    | Annotated[Sag, Tag("guidance sag")]
    | Annotated[Slg, Tag("guidance slg")]
    | Annotated[Stg, Tag("guidance stg")]
    | Annotated[AutoGuidance, Tag("guidance autoguidance")]
    | Annotated[Tsg, Tag("guidance tsg")]
    | Annotated[Nag, Tag("guidance nag")]
    | Annotated[AnyMethod, Tag("any guidance")],
    Discriminator(_branch_of),
    BeforeValidator(_with_method),
]
_ADAPTER = TypeAdapter(Guidance)


def guidance_of(values):
    """The method of {"method": ..., its settings}, or of its name alone; ValueError saying what is wrong with it."""
    try:
        return _ADAPTER.validate_python(values)
    except ValidationError as error:
        raise ValueError("; ".join(_text(details) for details in error.errors(include_url=False))) from None


def _text(details):
    place = ".".join(str(part) for part in details["loc"] if part not in BRANCHES)
    message = details["msg"][0].lower() + details["msg"][1:]
    return f"guidance{f'.{place}' if place else ''}: {message}, not {details['input']!r}"
