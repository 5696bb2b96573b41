"""What a recipe's `guidance` may say: one model for each method, its formula, source, defaults and arithmetic.

Those that need no other output than CFG's are in outputs.py, rectified.py has one that evaluates the model elsewhere;
those that weaken the model for an output W are in weakening.py and perturbing.py.
"""

import warnings
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args

from pydantic import BeforeValidator, Discriminator, Field, Tag, TypeAdapter, ValidationError, create_model

from surgery.errors import UnsupportedModelError, nearest
from surgery.models.parts import LARGEST, Number
from surgery.models.patching import patched_modules

from .base import WINDOWS, Layers, Method, Step
from .layers import chosen_layers, guided_backbone, placed, swapped
from .outputs import Apg, Cfg, CfgZero, Fdg, FreSca, MamboG, Momentum, SmcCfg, Tcfg
from .perturbing import Erg, Swg, Tpg
from .rectified import RectifiedCfg
from .sag import Sag
from .weakening import AutoGuidance, Oseg, Pag, Seg, Slg, Stg, Tsg

if TYPE_CHECKING:
    from .calls import Call

MethodName = Literal[
    "cfg",
    "apg",
    "cfg-zero",
    "tcfg",
    "fdg",
    "fresca",
    "mambo-g",
    "momentum",
    "smc-cfg",
    "rectified-cfg++",
    "swg",
    "pag",
    "seg",
    "oseg",
    "sag",
    "slg",
    "stg",
    "autoguidance",
    "tsg",
    "tpg",
    "erg",
    "nag",
]


class Nag(Method):
    """Normalized attention guidance: in cross-attention's output, away from what a negative prompt attends to.

        Z = Z+ + scale (Z+ - Z-);  Z *= min(1, tau |Z+|_1 / |Z|_1);  alpha Z + (1 - alpha) Z+

    Z+ and Z- are a module's outputs for the prompt and the negative prompt, before its output projection. Chen et al.,
    arXiv 2505.21179. That is the paper's form; the released code has phi Z+ - (phi - 1) Z-, whose phi is one more than
    scale: its 5 is 4 here. No evaluation: the cross-attention modules run twice, and the negative prompt is encoded
    once a run. It works without CFG, on distilled models. layers: cross-attention of UNets, whose text comes to it as
    it was encoded. The GAG paper (arXiv 2603.02531, Remark 2.1, Figure 5b) finds that it does not go with GAG.
    """

    method: Literal["nag"]
    scale: Number = 5.0
    tau: Annotated[float, Field(gt=0, le=LARGEST)] = 2.5
    alpha: Annotated[float, Field(ge=0, le=1)] = 0.25
    negative_prompt: str = ""
    layers: Layers = ["all"]

    _text: Any = None  # the negative prompt, encoded
    _outputs: list = []  # [NormalizedOutput]

    def _prepare(self, model):
        from .standins import GuidedAttention, NormalizedOutput

        if self.method not in guided_backbone(model).own_methods:
            raise UnsupportedModelError("guidance: nag is for UNets, whose text comes to cross-attention as encoded")
        if any(module.pladis_operator == "gag" for module in patched_modules(model).values()):
            warnings.warn(
                "NAG with GAG: the GAG paper (arXiv 2603.02531, Figure 5b) measured that the two together score below "
                "GAG alone",
                stacklevel=4,
            )
        self._replacements, self._outputs = [], []
        for layer in chosen_layers(model, self.layers, ("cross",), "cross-attention"):
            attention = model.get_submodule(layer.path)
            output = NormalizedOutput(attention.to_out[0], self.scale, self.tau, self.alpha)
            self._outputs.append(output)
            self._replacements.append((attention.to_out, "0", output))
            self._replacements.append((*placed(model, layer.path), GuidedAttention(attention, output)))

    def begin(self) -> None:
        self._text = None

    def around(self, call: "Call", step: Step) -> AbstractContextManager[object]:
        if self._text is None:
            self._text = self._encoded(call)
        for output in self._outputs:
            output.rows, output.text = call.slice(call.second), self._text
        return swapped(self._replacements)

    def _encoded(self, call):
        text = call.arguments["encoder_hidden_states"]
        encoded = self._pipeline.encode_prompt(
            self.negative_prompt, device=text.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return encoded[0].to(text)


_OUTPUTS = (Cfg, Apg, CfgZero, Tcfg, Fdg, FreSca, MamboG, Momentum, SmcCfg, RectifiedCfg)
_WEAKENING = (Swg, Pag, Seg, Oseg, Sag, Slg, Stg, AutoGuidance, Tsg, Tpg, Erg)
METHODS = {get_args(part.model_fields["method"].annotation)[0]: part for part in (*_OUTPUTS, *_WEAKENING, Nag)}

# What a mapping is held to that names none of them, so that its other mistakes are reported beside that one.
_settings = {
    name: (Any, None) for part in METHODS.values() for name in part.model_fields if name not in ("method", *WINDOWS)
}
AnyMethod = create_model("AnyMethod", __base__=Method, **{**_settings, "method": (MethodName, ...)})

# The branches of the union by their tags. pydantic puts a tag into an error's location; none of these could be a key.
BRANCHES = {"any guidance": AnyMethod, **{f"guidance {name}": part for name, part in METHODS.items()}}


def _branch_of(values):
    name = values.get("method") if isinstance(values, dict) else getattr(values, "method", None)
    return f"guidance {name}" if f"guidance {name}" in BRANCHES else "any guidance"


def _with_method(values):
    return {"method": values} if isinstance(values, str) else values


Guidance = Annotated[
    Union[tuple(Annotated[part, Tag(tag)] for tag, part in BRANCHES.items())],  # noqa: UP007  of a tuple
    Discriminator(_branch_of),
    BeforeValidator(_with_method),
]
_ADAPTER: TypeAdapter[Method] = TypeAdapter(Guidance)  # pyright: ignore[reportArgumentType]  a union made of a tuple


def guidance_of(values: dict | str) -> Method:
    """The method of {"method": ..., its settings}, or of its name alone; ValueError saying what is wrong with it."""
    try:
        return _ADAPTER.validate_python(values)
    except ValidationError as error:
        raise ValueError("; ".join(_text(details) for details in error.errors(include_url=False))) from None


def _text(details):
    place = ".".join(str(part) for part in details["loc"] if part not in BRANCHES)
    message = details["msg"][0].lower() + details["msg"][1:]
    is_extra = details["type"] == "extra_forbidden"
    word, known = (place, _settings) if is_extra else (details["input"], METHODS if place == "method" else ())
    near = nearest(word, known)
    hint = f'; did you mean "{near}"?' if near else ""
    return f"guidance{f'.{place}' if place else ''}: {message}, not {details['input']!r}{hint}"
