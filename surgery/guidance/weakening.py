"""The methods that lead away from a weakened model: CFG + scale (C - W), with W from one evaluation more a step.

W is weakened by other attention maps (pag), by blurred queries (seg, oseg), by a blurred image (sag.py), by skipped or
perturbed blocks (slg, stg, autoguidance), by a noisy time (tsg), or is another checkpoint's (autoguidance). With oseg U
is weakened too.
"""

from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_serializer, model_validator

from surgery.errors import UnsupportedModelError
from surgery.models.parts import LARGEST, Number

from .base import WINDOWS, Blur, Layers, Method, Step
from .layers import chosen_layers, placed, replaced_blocks, swapped
from .weak import WeakModel, loaded

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from .calls import Call
    from .driver import Driver
    from .standins import BlurredQueries


class Weakening(Method):
    """A method with a weakened model."""

    scale: Number

    weakens: ClassVar[bool] = True

    @property
    def weakens_uncond(self) -> bool:
        """Whether CFG's output without the prompt is the weakened model's too, and the model's own is not computed."""
        return False

    @property
    def asks_with_prompt_alone(self) -> bool:
        return self.weakens_uncond

    def outputs(
        self, driver: "Driver", call: "Call", step: Step, pred_cond: "Tensor", pred_uncond: "Tensor | None"
    ) -> "tuple[Tensor | None, Tensor | None]":
        if not self.scale and not (self.weakens_uncond and call.pair):
            return pred_uncond, None
        return self.weak_outputs(driver, call, step, pred_cond, pred_uncond)

    def weakened(self, step: Step) -> AbstractContextManager[None]:
        """A context in which the model is weakened."""
        return swapped(self._replacements)

    def weak_outputs(
        self, driver: "Driver", call: "Call", step: Step, pred_cond: "Tensor", pred_uncond: "Tensor | None"
    ) -> "tuple[Tensor | None, Tensor]":
        """(U, W): CFG's output without the prompt, as given unless it is weakened too, and the weakened model's."""
        with self.weakened(step):
            return pred_uncond, driver.output_of(call.with_prompt)

    def away(self, pred_cond: "Tensor", pred_uncond: "Tensor | None", pred_cond_skip: "Tensor") -> "Tensor":
        """What leads away from the weakened model, C - W; `scale` times that is added."""
        return pred_cond - pred_cond_skip


class _Identity(Weakening):
    """A method whose W may have attention maps that are the identity."""

    _among: list = []  # [AmongImage], which have to be told the grid

    @property
    def needs_grid(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]  known once it is prepared
        return bool(self._among)

    def _make_identities(self, model, selectors):
        """Set what makes the maps of the attention that selectors name the identity."""
        from .identity import identity_in

        layers = chosen_layers(model, selectors, ("self", "joint"), "self-attention")
        found = [identity_in(model, layer) for layer in layers]
        self._replacements = [replacement for replacements, _ in found for replacement in replacements]
        self._among = [among for _, among in found if among is not None]

    def weakened(self, step: Step) -> AbstractContextManager[None]:
        for among in self._among:
            among.grid = step.grid
        return super().weakened(step)


class Pag(_Identity):
    """Perturbed-attention guidance: in W some self-attention's map is the identity, so each token keeps its own value.

    Ahn et al., arXiv 2403.17377. One evaluation. layers: modules of self-attention, or of joint attention, where a
    token of the image attends to itself and to the text, as in diffusers' PAG for Stable Diffusion 3.
    """

    method: Literal["pag"]
    scale: Number = 3.0
    layers: Layers = ["mid"]

    def _prepare(self, model):
        self._make_identities(model, self.layers)


# Names of projections: {queries': keys'}, None for one that makes queries, keys and values, in this order.
_QUERIES = {"to_q": "to_k", "to_query": "to_key", "img_qkv_proj": None}


class _BlurredQueries(Weakening):
    """A method whose W has other queries in self-attention, or of the image in joint attention."""

    if TYPE_CHECKING:
        layers: Layers

        def _queries(self, attention: Any) -> "BlurredQueries": ...

    needs_grid: ClassVar[bool] = True

    def _prepare(self, model):
        def has_queries(attention: "torch.nn.Module") -> bool:
            """Not so in FLUX.2's blocks of one stream, where one Linear makes queries, keys, values and more."""
            return queries_in(attention) is not None

        self._replacements = []
        for layer in chosen_layers(model, self.layers, ("self", "joint"), "self-attention", has_queries):
            attention = model.get_submodule(layer.path)
            if getattr(attention, "fused_projections", False):
                raise UnsupportedModelError(
                    f"guidance: {layer.path} has its projections fused; unfuse_qkv_projections() first"
                )
            self._replacements.append((attention, queries_in(attention), self._queries(attention)))

    def weakened(self, step: Step) -> AbstractContextManager[None]:
        for _, _, queries in self._replacements:
            queries.grid = step.grid
        return super().weakened(step)


def queries_in(attention: "torch.nn.Module") -> str | None:
    """What the projection of queries is called in an attention module, or None."""
    return next((name for name in _QUERIES if getattr(attention, name, None) is not None), None)


def projections_of(attention: Any) -> tuple[Any, Any, int | None]:
    """(the projection of queries, of keys or None, how many channels of the first are queries where it makes both)."""
    name = str(queries_in(attention))
    to_query, keys = getattr(attention, name), _QUERIES[name]
    return (to_query, None, to_query.out_features // 3) if keys is None else (to_query, getattr(attention, keys), None)


class Seg(_BlurredQueries):
    """Smoothed energy guidance: in W the queries of some self-attention are blurred over the tokens' grid.

    Each frame of a video by itself. Hong, arXiv 2408.00760, and its code for the kernel, which is no longer than the
    grid. One evaluation. blur: the Gaussian's standard deviation in tokens; .inf replaces the queries by their mean.
    layers: modules of self-attention, and the image's queries in joint attention. Queries are blurred as they come from
    their projection, before any norm and rotary embedding, which the paper's UNets do not have. (diffusers' guider of
    that name, as of 0.42, never applies its hook.)
    """

    method: Literal["seg"]
    scale: Number = 3.0
    blur: Blur = LARGEST
    layers: Layers = ["mid"]

    def _queries(self, attention):
        from .standins import BlurredQueries

        to_query, _, joined = projections_of(attention)
        return BlurredQueries(to_query, self.blur, joined=joined)


class Oseg(_BlurredQueries):
    """Orthogonal SEG: it blurs only what drives the curvature of attention's energy, in both of CFG's rows.

        C + gamma (C - U') + scale (C - C'),  gamma = guidance_scale - 1

    Per head and token the query splits into q_par along the key of the same token and the rest, q_orth; the weakened
    model, of which U' and C' are the outputs without and with the prompt, uses q_par + blur(q_orth). Saqib, the slides
    of oseg-guidance.github.io. Where CFG is one batch it is evaluated on the prompt's rows alone, then once more,
    weakened, on the whole batch: three evaluations an image, as SEG's, since the plain U is not needed. Where CFG is
    two calls, that without the prompt is weakened: three as well. Without CFG it is C + scale (C - C'), two. The keys'
    projection of those modules runs once more.
    unconditional: "weakened" as in the slides; "plain" takes U from the model as it is, which gives SEG's formula with
    these queries, U + w (C - U) + scale (C - C'). keep_parallel: false drops q_par, so that the weakened queries are
    blur(q_orth) alone; a variant of ours, in no paper. layers, kernel: as SEG's.
    """

    method: Literal["oseg"]
    scale: Number = 3.0
    blur: Blur = 5.0
    unconditional: Literal["weakened", "plain"] = "weakened"
    keep_parallel: bool = True
    layers: Layers = ["mid"]

    @property
    def weakens_uncond(self) -> bool:
        return self.unconditional == "weakened"

    def _queries(self, attention):
        from .standins import BlurredQueries

        to_query, to_key, joined = projections_of(attention)
        heads = getattr(attention, "heads", None) or attention.num_heads
        head_dim = (joined or to_query.out_features) // heads
        return BlurredQueries(to_query, self.blur, to_key, head_dim, self.keep_parallel, joined)

    def weak_outputs(
        self, driver: "Driver", call: "Call", step: Step, pred_cond: "Tensor", pred_uncond: "Tensor | None"
    ) -> "tuple[Tensor | None, Tensor]":
        if not self.weakens_uncond:
            return super().weak_outputs(driver, call, step, pred_cond, pred_uncond)
        with self.weakened(step):
            output = driver.output_of(call)
        return output[call.slice(call.first)] if call.pair else pred_uncond, output[call.slice(call.second)]


class Slg(Weakening):
    """Skip-layer guidance: W skips whole transformer blocks.

    Stability AI's code for Stable Diffusion 3.5 (github.com/Stability-AI/sd3.5), there blocks 7, 8 and 9 of
    SD3.5-medium and steps from 0.01 to 0.2 of the run: layers [transformer_blocks.7, ...], fraction [0.01, 0.2]. One
    evaluation, without those blocks. layers: blocks, of both kinds of stream. (diffusers' hook gives back text and
    image in the wrong order for blocks whose text comes first.)
    """

    method: Literal["slg"]
    scale: Number = 2.8
    layers: Layers = ["mid"]

    def _prepare(self, model):
        from .standins import SkippedBlock

        self._replacements = replaced_blocks(model, self.layers, SkippedBlock)


class Stg(_Identity):
    """Spatio-temporal guidance of video: W skips self-attention in some layers.

    mode: "residual" (STG-R) skips the layer's whole block, "attention" (STG-A) makes its map the identity, as PAG does.
    Hyung et al., arXiv 2411.18664; the authors take block 19 of LTX-Video's 28, 35 of Mochi's 48, 22 of HunyuanVideo's.
    One evaluation. layers: blocks, or modules of self-attention.
    """

    method: Literal["stg"]
    scale: Number = 1.0
    mode: Literal["attention", "residual"] = "residual"
    layers: Layers = ["mid"]

    def _prepare(self, model):
        if self.mode == "attention":
            return self._make_identities(model, self.layers)
        from .standins import SkippedBlock

        self._replacements = replaced_blocks(model, self.layers, SkippedBlock)


class AutoGuidance(Weakening):
    """AutoGuidance: W is a bad version of the model, another checkpoint or the model with activations dropped.

    With `guidance_scale` 1 it is the paper's W + (1 + scale) (C - W). Karras et al., arXiv 2406.02507, whose W is a
    smaller model or one trained less. weak: such a checkpoint (WeakModel), of the same class and with the same inputs,
    loaded beside the model in its dtype; it is neither patched nor compiled. Without one, W drops activations of some
    blocks, as in diffusers' guider. dropout: the share of what the blocks change that is dropped (ours); seed: of
    which; layers: transformer blocks. One evaluation of either.
    """

    method: Literal["autoguidance"]
    scale: Number = 1.0
    weak: WeakModel | None = None
    dropout: Annotated[float, Field(gt=0, le=1)] = 0.1
    seed: int = 0
    layers: Layers = ["all"]

    _weak_model: Any = None

    @model_validator(mode="after")
    def _is_one_of_both(self):
        named = [name for name in _STAND_IN if name in self.model_fields_set]
        if self.weak is not None and named:
            raise ValueError(f"{named[0]} is of the stand-in for a weak model; with weak leave it out")
        return self

    @model_serializer(mode="wrap")
    def _with_its_own_settings(self, handler):
        unused = ("weak",) if self.weak is None else _STAND_IN
        return {k: v for k, v in handler(self).items() if k not in unused and (k not in WINDOWS or v is not None)}

    @property
    def changes_modules(self) -> bool:
        return self.weak is None

    def pinned(self, model: "torch.nn.Module", folder: Path = Path()) -> Self:
        return self if self.weak is None else self.model_copy(update={"weak": self.weak.pinned(model, folder)})

    def _prepare(self, model):
        if self.weak is not None:
            self._weak_model = loaded(self.weak, model, self._pipeline.scheduler)
            return
        from .standins import DroppedBlock

        def dropped(block: "torch.nn.Module", streams: tuple[str, ...] | None) -> DroppedBlock:
            return DroppedBlock(block, streams, self.dropout, self.seed)

        self._replacements = replaced_blocks(model, self.layers, dropped)

    def weakened(self, step: Step) -> AbstractContextManager[None]:
        for number, (_, _, block) in enumerate(self._replacements):
            block.step = step.index * len(self._replacements) + number
        return super().weakened(step)

    def weak_outputs(
        self, driver: "Driver", call: "Call", step: Step, pred_cond: "Tensor", pred_uncond: "Tensor | None"
    ) -> "tuple[Tensor | None, Tensor]":
        if self._weak_model is None:
            return super().weak_outputs(driver, call, step, pred_cond, pred_uncond)
        weak = self._weak_model.to(device=pred_cond.device)  # where offloading has the model just now
        return pred_uncond, driver.output_of(call.with_prompt, weak)


_STAND_IN = ("dropout", "seed", "layers")  # settings of AutoGuidance without a checkpoint


class Tsg(Weakening):
    """Time-step guidance: in W noise is added to the time's embedding.

        embedding + noise (t / T)^power rms(embedding) n,  n ~ N(0, I)

    the same n for all images of a batch, another at each step. With `guidance_scale` 1 it is the paper's
    W + (1 + scale) (C - W). Sadat et al., arXiv 2407.02687, section 5; there the noise is s t^power n, with s chosen so
    that it becomes comparable to the embedding, which the root mean square does here for any model. One evaluation.
    """

    method: Literal["tsg"]
    scale: Number = 2.0
    noise: Annotated[float, Field(ge=0, le=LARGEST)] = 1.0
    power: Annotated[float, Field(ge=0, le=100)] = 1.0
    seed: int = 0

    def _prepare(self, model):
        from .standins import NoisyEmbedding, time_embedding_in

        path = time_embedding_in(model)
        noisy = NoisyEmbedding(model.get_submodule(path), self.noise, self.power, self.seed)
        self._replacements = [(*placed(model, path), noisy)]

    def weakened(self, step: Step) -> AbstractContextManager[None]:
        self._replacements[0][-1].step = step
        return super().weakened(step)
