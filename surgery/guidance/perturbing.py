"""Weakened models that see the image's tokens in disorder, attend evenly, or see a part of the image at a time."""

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator

from surgery.errors import InputError, UnsupportedModelError
from surgery.models.parts import Number

from .base import Layers, Step
from .layers import chosen_layers, guided_backbone, replaced_blocks
from .weakening import Weakening, queries_in

if TYPE_CHECKING:
    from torch import Tensor

    from .calls import Call
    from .driver import Driver


class Tpg(Weakening):
    """Token perturbation guidance: in W the image's tokens come to some blocks in a random order.

    Rajabi et al., arXiv 2506.10036: C + scale (C - W), another permutation in each block and at each step, the same for
    all images of a batch. One evaluation. layers: blocks; without, all of a UNet on its way down, as in the paper, or a
    transformer's middle one. In a UNet a block's output stays in that order, as in the authors' code for SDXL, since
    what stands around the blocks has the old one. A transformer has nothing around them: there only what a block adds
    comes in the wrong places (ours; the paper's experiment on Stable Diffusion 3 has no released code). share: of the
    tokens that change places. seed: of the permutations.
    """

    method: Literal["tpg"]
    scale: Number = 3.0
    share: Annotated[float, Field(gt=0, le=1)] = 1.0
    seed: int = 0
    layers: Layers | None = None

    _among_text: bool = False

    @property
    def needs_grid(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]  known once it is prepared
        return self._among_text

    def _prepare(self, model):
        from .standins import ShuffledBlock

        has_levels = guided_backbone(model).has_levels
        self._among_text = not has_levels

        def shuffled(block: Any, streams: tuple[str, ...] | None) -> ShuffledBlock:
            return ShuffledBlock(block, streams, self.share, self.seed, keeps_order=not has_levels)

        self._replacements = replaced_blocks(model, self.layers or (["down"] if has_levels else ["mid"]), shuffled)

    def weakened(self, step: Step) -> AbstractContextManager[None]:
        for number, (_, _, block) in enumerate(self._replacements):
            block.step, block.grid = step.index * len(self._replacements) + number, step.grid
        return super().weakened(step)


# Names of what makes queries ready for attention: a norm where there is one, else the projection; of image and text.
_READY = (("norm_q", "to_q"), ("q_rms_norm", "to_q"), ("query_norm", "to_query"))
_READY_TEXT = (("norm_added_q", "add_q_proj"), ("q_rms_norm_t", "to_q_t"))


class Erg(Weakening):
    """Entropy rectifying guidance: in W some attention is softmax(tau q k), more even than the model's.

    Ifriqi et al., arXiv 2504.13987. One evaluation, and with `guidance_scale` 1 it is the paper's
    W + (1 + scale) (C - W), where W takes the place of U. tau under 1 evens out, above it sharpens; 0.01 is what
    ACE-Step's released pipeline has. layers: modules of self-attention or of joint attention, where the text's queries
    are scaled too, behind their norm, so that a patched module's operator sees them so. The energy's other parameters
    (its weight, step size and number of steps) are 1, as in the paper unless it studies them.
    That is the paper's I-ERG. tau_c, for its C-ERG: the same of the text encoders' self-attention, so that W is given
    the prompt as such encoders read it; 1 is without. text_layers: [from, to) of each encoder's layers, from 0, all
    unless given, as in the paper; ACE-Step has tau_c 0.01 in layers [8, 10] of 12. Each encoder runs twice a prompt.
    """

    method: Literal["erg"]
    scale: Number = 1.0
    tau: Annotated[float, Field(gt=0, le=100)] = 0.01
    layers: Layers = ["mid"]
    tau_c: Annotated[float, Field(gt=0, le=100)] = 1.0
    text_layers: Annotated[list[Annotated[int, Field(ge=0)] | None], Field(min_length=2, max_length=2)] | None = None

    @field_validator("text_layers")
    @classmethod
    def _rises(cls, value):
        if value is not None and value[1] is not None and (value[0] or 0) >= value[1]:
            raise ValueError(f"must rise: {value[0]} to {value[1]} holds no layer")
        return value

    def around_run(self) -> AbstractContextManager[object]:
        if self.tau_c == 1:
            return nullcontext()
        from surgery.models.tempered import second_text

        return second_text(self._pipeline, self.tau_c, self.text_layers)

    def weak_outputs(
        self, driver: "Driver", call: "Call", step: Step, pred_cond: "Tensor", pred_uncond: "Tensor | None"
    ) -> "tuple[Tensor | None, Tensor]":
        weak = call if self.tau_c == 1 else call.with_second_text
        if weak is None:
            raise InputError(
                "guidance: erg with tau_c needs the text encoders to read the prompt; give prompt, not prompt_embeds"
            )
        return super().weak_outputs(driver, weak, step, pred_cond, pred_uncond)

    def _prepare(self, model):
        from surgery.models.tempered import check_tempers

        from .standins import ScaledQueries

        if self.tau_c != 1:
            check_tempers(self._pipeline, self.text_layers)

        def has_softmax(attention: Any) -> bool:
            """Not so of linear attention, from which a factor of the queries cancels."""
            linear = "Linear" in type(getattr(attention, "processor", None)).__name__
            return not linear and (queries_in(attention) is not None or getattr(attention, "norm_q", None) is not None)

        layers = chosen_layers(model, self.layers, ("self", "joint"), "self-attention by softmax", has_softmax)
        self._replacements = []
        for layer in layers:
            attention: Any = model.get_submodule(layer.path)
            if getattr(attention, "fused_projections", False) and getattr(attention, "norm_q", None) is None:
                raise UnsupportedModelError(
                    f"guidance: {layer.path} has its projections fused; unfuse_qkv_projections() first"
                )
            for known in (_READY, _READY_TEXT):
                names = (name for pair in known for name in pair if getattr(attention, name, None) is not None)
                if (name := next(names, None)) is not None:
                    scaled = ScaledQueries(getattr(attention, name), self.tau)
                    self._replacements.append((attention, name, scaled))


class Swg(Weakening):
    """Sliding window guidance: W is put together of the model's outputs for parts of the image.

    The latents are cut into windows x windows crops of `size` of each side at even steps, the model predicts each as
    if it were an image of its own, and where crops overlap their mean is taken. Adaloglou et al., arXiv 2411.10257, and
    the authors' code (HHU-MMBS/swg_bmvc2025_official). masked: only where crops overlap, the paper's M-SWG. Of a video
    every frame is cut. Evaluations: windows^2, of size^2 of the image each (1.6 in all by default).
    """

    method: Literal["swg"]
    scale: Number = 0.2
    size: Annotated[float, Field(gt=0, lt=1)] = 0.625
    windows: Annotated[int, Field(ge=2, le=8)] = 2
    masked: bool = True

    needs_grid: ClassVar[bool] = True
    changes_modules: ClassVar[bool] = False

    def evaluations(self, guided: bool) -> int:
        return 1 + guided + self.windows**2

    def weak_outputs(
        self, driver: "Driver", call: "Call", step: Step, pred_cond: "Tensor", pred_uncond: "Tensor | None"
    ) -> "tuple[Tensor | None, Tensor]":
        from .windows import crops, put_together

        assert step.grid is not None  # needs_grid
        given = call.with_prompt
        found = [(crop, driver.output_of(crop.call)) for crop in crops(given, step.grid, self.size, self.windows)]
        return pred_uncond, put_together(found, pred_cond, step.grid, self.masked)
