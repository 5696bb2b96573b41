"""The methods of guidance that need no other output than CFG's: what is made of U and C, with no evaluation more."""

from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from surgery.errors import InputError
from surgery.models.parts import LARGEST, Number

from .base import Method, Step
from .layers import guided_backbone

if TYPE_CHECKING:
    from torch import Tensor


class Cfg(Method):
    """Classifier-free guidance, U + w (C - U); outside a window, C.

    Ho and Salimans, arXiv 2207.12598; in an interval of steps alone, Kynkaanniemi et al., arXiv 2404.07724.
    """

    method: Literal["cfg"]

    changes_modules: ClassVar[bool] = False

    @property
    def needs_pair(self) -> bool:
        return bool(self.window)


class OfBoth(Method):
    """A method that is made of both of CFG's outputs and changes no module."""

    changes_modules: ClassVar[bool] = False
    needs_pair: ClassVar[bool] = True

    def combined(
        self,
        pred_cond: "Tensor",
        pred_uncond: "Tensor | None",
        guidance_scale: "float | Tensor",
        step: Step,
    ) -> "Tensor":
        assert pred_uncond is not None  # needs_pair
        return self.of_both(pred_cond, pred_uncond, guidance_scale, step)

    if TYPE_CHECKING:

        def of_both(
            self, pred_cond: Tensor, pred_uncond: Tensor, guidance_scale: float | Tensor, step: Step
        ) -> Tensor: ...


class Apg(OfBoth):
    """Adaptive projected guidance: CFG whose difference is averaged over steps, bounded, and stripped of its part
    along C.

        d = (C - U) + momentum d_before;  d *= min(1, rescale / |d|);  C + (w - 1) (d_orthogonal + eta d_parallel)

    norm and projection over all dimensions but the batch. Sadat et al., arXiv 2410.02416, there on the predicted image,
    here on the model's output, as in diffusers, whose arithmetic it is. 0 for no momentum, 0 for no rescaling.
    """

    method: Literal["apg"]
    eta: Number = 0.0
    momentum: Number = -0.5
    rescale: Annotated[float, Field(ge=0, le=LARGEST)] = 15.0

    _before: Any = None

    def begin(self) -> None:
        from surgery.compat import momentum_buffer

        self._before = momentum_buffer(self.momentum) if self.momentum else None

    def of_both(
        self, pred_cond: "Tensor", pred_uncond: "Tensor", guidance_scale: "float | Tensor", step: Step
    ) -> "Tensor":
        from surgery.compat import normalized_guidance

        return normalized_guidance(
            pred_cond,
            pred_uncond,
            guidance_scale - 1,
            self._before,
            self.eta,
            self.rescale,
            use_original_formulation=True,  # C + (w - 1) d, which is CFG where d is C - U
        )


class CfgZero(OfBoth):
    """CFG-Zero*, for flow models: U scaled so that it lies closest to C, and no output at all at the first steps.

        s U + w (C - s U),  s = <C, U> / |U|^2

    Fan et al., arXiv 2503.18886; s by diffusers. zero_init: at so many first steps the output is 0.
    """

    method: Literal["cfg-zero"]
    zero_init: Annotated[int, Field(ge=0)] = 1

    def _prepare(self, model):
        if self.zero_init and guided_backbone(model).keeps_norm:
            raise InputError(
                f"guidance.zero_init: {type(self._pipeline).__name__} gives the guided output the norm of the one with "
                "the prompt, so none can be left out; set it to 0"
            )

    def of_both(
        self, pred_cond: "Tensor", pred_uncond: "Tensor", guidance_scale: "float | Tensor", step: Step
    ) -> "Tensor":
        from surgery.compat import cfg_zero_star_scale

        if step.index < self.zero_init:
            if getattr(self._pipeline, "guidance_rescale", None):  # 0 / 0
                raise InputError(
                    "guidance.zero_init: guidance_rescale gives the guided output the deviation of the one with the "
                    "prompt, so none can be left out; set either of them to 0"
                )
            return pred_cond.new_zeros(pred_cond.shape)
        scale = cfg_zero_star_scale(pred_cond.flatten(1), pred_uncond.flatten(1)).view(-1, *[1] * (pred_cond.ndim - 1))
        return scale * pred_uncond + guidance_scale * (pred_cond - scale * pred_uncond)


class Tcfg(OfBoth):
    """Tangential CFG: of U only what lies along the first of both outputs' singular vectors.

        U' + w (C - U'),  U' = <U, v1> v1,  v1 the first right singular vector of the matrix [C; U]

    Kwon et al., arXiv 2503.18137; by diffusers.
    """

    method: Literal["tcfg"]

    def of_both(
        self, pred_cond: "Tensor", pred_uncond: "Tensor", guidance_scale: "float | Tensor", step: Step
    ) -> "Tensor":
        from surgery.compat import tangential_guidance

        return tangential_guidance(pred_cond, pred_uncond, guidance_scale)


class Fdg(OfBoth):
    """Frequency-decoupled guidance: a scale of its own for high frequencies.

        U + w low(C - U) + high (C - U - low(C - U))

    low: half the sides and back, by the binomial kernel of five, as a Laplacian pyramid of two levels has it. Sadat et
    al., arXiv 2506.19713, Algorithm 1; Table 8 has 5 for low and 10 for high frequencies of SDXL. Each frame of a video
    by itself; where latents are packed into tokens, over the grid of those.
    """

    method: Literal["fdg"]
    high: Number = 10.0

    needs_grid: ClassVar[bool] = True

    def of_both(
        self, pred_cond: "Tensor", pred_uncond: "Tensor", guidance_scale: "float | Tensor", step: Step
    ) -> "Tensor":
        from .combining import frequency_decoupled, low_frequencies

        low_of = partial(step.in_planes, low_frequencies)
        return frequency_decoupled(pred_cond, pred_uncond, guidance_scale, self.high, low_of)


class FreSca(OfBoth):
    """FreSca: the high frequencies of C - U by one factor, the low ones by another.

        U + w F^-1(l F(C - U)),  l = low within the cutoff, high beyond

    The cutoff, in both directions, is where the spectrum's magnitude along the middle row and column adds up to the
    share `threshold`, at most a quarter of the shorter side and at least 3. Huang et al., arXiv 2504.02154, and their
    code (github.com/WikiChao/FreSca), which takes the cutoff of a whole batch; here each image has its own. Planes as
    `fdg` has them.
    """

    method: Literal["fresca"]
    high: Number = 1.5
    low: Number = 1.0
    threshold: Annotated[float, Field(ge=0, le=1)] = 0.2

    needs_grid: ClassVar[bool] = True

    def of_both(
        self, pred_cond: "Tensor", pred_uncond: "Tensor", guidance_scale: "float | Tensor", step: Step
    ) -> "Tensor":
        from .combining import scaled_frequencies

        scaled = step.in_planes(scaled_frequencies, pred_cond - pred_uncond, self.low, self.high, self.threshold)
        return pred_uncond + guidance_scale * scaled


class MamboG(OfBoth):
    """MAMBO-G: a scale that falls where C - U is large beside U.

        U + (1 + (w - 1) exp(-alpha |C - U| / |U|)) (C - U)

    arXiv 2508.03442. (diffusers' guider of it, as of 0.42, takes packed latents alone.)
    """

    method: Literal["mambo-g"]
    alpha: Annotated[float, Field(ge=0, le=LARGEST)] = 8.0

    def of_both(
        self, pred_cond: "Tensor", pred_uncond: "Tensor", guidance_scale: "float | Tensor", step: Step
    ) -> "Tensor":
        from .combining import mambo_g

        return mambo_g(pred_cond, pred_uncond, guidance_scale, self.alpha)


class Momentum(Method):
    """Momentum guidance: away from the average of the steps before, with CFG or without.

        G + scale (G - m),  m <- (1 - decay) G + decay m,  m = G at first,  G = U + w (C - U)

    Liao et al., arXiv 2602.20360, Algorithm 1: alpha and beta there, for velocities of flow models.
    """

    method: Literal["momentum"]
    scale: Number = 0.5
    decay: Annotated[float, Field(ge=0, lt=1)] = 0.6

    changes_modules: ClassVar[bool] = False
    _average: Any = None

    def begin(self) -> None:
        self._average = None

    def combined(
        self,
        pred_cond: "Tensor",
        pred_uncond: "Tensor | None",
        guidance_scale: "float | Tensor",
        step: Step,
    ) -> "Tensor":
        from .combining import momentum

        guided = super().combined(pred_cond, pred_uncond, guidance_scale, step)
        found, self._average = momentum(guided, self._average, self.scale, self.decay)
        return found


class SmcCfg(OfBoth):
    """Sliding mode control: C - U is driven towards a surface on which it decays from step to step.

        U + w e',  e' = e - gain sign(s),  s = (e - e'_before) + rate e'_before,  e = C - U, at first e'_before = e

    arXiv 2603.03281, and its authors' code (github.com/hanyang-21/CFG-Ctrl): lambda and K there, 5 and 0.2 for SD3,
    FLUX, Qwen-Image and Wan.
    """

    method: Literal["smc-cfg"]
    rate: Number = 5.0
    gain: Number = 0.2

    _before: Any = None

    def begin(self) -> None:
        self._before = None

    def of_both(
        self, pred_cond: "Tensor", pred_uncond: "Tensor", guidance_scale: "float | Tensor", step: Step
    ) -> "Tensor":
        from .combining import sliding_mode

        found, self._before = sliding_mode(pred_cond, pred_uncond, guidance_scale, self._before, self.rate, self.gain)
        return found
