"""Self-attention guidance, which leads away from a model that sees the image blurred where self-attention looks."""

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from surgery.errors import InputError, UnsupportedModelError
from surgery.models.parts import Number

from .base import Blur, Layers, Step
from .layers import chosen_layers, guided_backbone, placed, swapped
from .weakening import Weakening

if TYPE_CHECKING:
    from torch import Tensor

    from .calls import Call
    from .driver import Driver


class Sag(Weakening):
    """Self-attention guidance, scale (U - W): W sees the predicted image blurred where self-attention looks.

    From the model's output U (C without CFG) follow the predicted image and noise; the image is blurred wherever the
    tokens of one self-attention module are attended to more than evenly, the same noise is put back, and W is the
    model's output for that. Hong et al., arXiv 2210.00939, and diffusers' retired pipeline of it. One evaluation and
    one map. blur: in latent pixels. layers: one module of self-attention of a UNet. Any scheduler of a
    variance-preserving process (`alphas_cumprod`).
    """

    method: Literal["sag"]
    scale: Number = 0.75
    blur: Blur = 1.0
    layers: Layers = ["mid"]

    needs_grid: ClassVar[bool] = True
    _recorder: Any = None

    def _prepare(self, model):
        from .standins import RecordingAttention

        if self.method not in guided_backbone(model).own_methods:
            raise UnsupportedModelError("guidance: sag is for the UNets of Stable Diffusion and SDXL")
        scheduler = self._pipeline.scheduler
        if not hasattr(scheduler, "alphas_cumprod"):
            raise InputError(f"guidance: sag needs a scheduler with alphas_cumprod, not {type(scheduler).__name__}")
        layer = chosen_layers(model, self.layers, ("self",), "self-attention")[0]
        self._recorder = RecordingAttention(model.get_submodule(layer.path))
        self._replacements = [(*placed(model, layer.path), self._recorder)]

    def around(self, call: "Call", step: Step) -> AbstractContextManager[object]:
        return swapped(self._replacements)

    def weak_outputs(
        self, driver: "Driver", call: "Call", step: Step, pred_cond: "Tensor", pred_uncond: "Tensor | None"
    ) -> "tuple[Tensor | None, Tensor]":
        """W of the rows without the prompt where there are any."""
        from .standins import blurred_where_seen

        rows = call.first if pred_uncond is not None else call.all
        given = call.of(rows)
        scheduler, timestep = self._pipeline.scheduler, given.arguments["timestep"]
        alpha = float(
            scheduler.alphas_cumprod[int(timestep.flatten()[0] if hasattr(timestep, "flatten") else timestep)]
        )
        assert step.grid is not None  # needs_grid
        degraded = blurred_where_seen(
            given.arguments["sample"],
            pred_cond if pred_uncond is None else pred_uncond,
            self._recorder.looked_at(call.slice(rows)),
            step.grid,
            self.blur,
            alpha,
            scheduler.config.prediction_type,
        )
        return pred_uncond, driver.output_of(given.with_(sample=degraded))

    def away(self, pred_cond: "Tensor", pred_uncond: "Tensor | None", pred_cond_skip: "Tensor") -> "Tensor":
        return (pred_cond if pred_uncond is None else pred_uncond) - pred_cond_skip
