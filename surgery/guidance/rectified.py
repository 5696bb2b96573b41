"""Rectified-CFG++, which guides at the place where the step without guidance would lead."""

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from surgery.errors import UnsupportedModelError

from .layers import guided_backbone
from .outputs import OfBoth

if TYPE_CHECKING:
    from torch import Tensor

    from .base import Step
    from .calls import Call
    from .driver import Driver


class RectifiedCfg(OfBoth):
    """Rectified-CFG++, for rectified flows: C here, and C - U where a part of the step along C leads.

        x' = x + ahead (sigma_next - sigma) C;  C + (w - 1) (1 - sigma)^decay (C(x') - U(x'))

    C(x'), U(x') at the noise level of x'. Saini et al., arXiv 2510.07631: ahead 0.5, and the correction's weight
    lambda (1 - t)^gamma, of which w - 1 is lambda and decay gamma. Their released code looks a whole step ahead, keeps
    the weight even (decay 0, so here by default) and adds a noise of 0.005 to x', which is left out. Three evaluations
    a step: U(x) is not needed. Where the pipeline's second call, without the prompt, comes, it is made at x'.
    """

    method: Literal["rectified-cfg++"]
    ahead: Annotated[float, Field(gt=0, le=1)] = 0.5
    decay: Annotated[float, Field(ge=0, le=100)] = 0.0

    _sign: int = 1
    _rate: float | None = None  # the model's timestep moves by it where the scheduler's moves by one
    _weight: float = 1.0  # (1 - sigma)^decay
    _there: Any = None  # (latents, timestep, C) at x'

    @property
    def asks_with_prompt_alone(self) -> bool:
        return True

    def evaluations(self, guided: bool) -> int:
        return 3 if guided else 1

    def _prepare(self, model):
        scheduler = self._pipeline.scheduler
        if "FlowMatchEuler" not in type(scheduler).__name__ and not scheduler.config.get("use_flow_sigmas"):
            raise UnsupportedModelError(
                f"guidance: rectified-cfg++ is for rectified flows, whose step is along the model's output; "
                f"{type(scheduler).__name__} is no scheduler of one"
            )
        self._sign = -1 if guided_backbone(model).turns_velocity else 1

    def begin(self) -> None:
        self._rate = self._there = None

    def outputs(
        self, driver: "Driver", call: "Call", step: "Step", pred_cond: "Tensor", pred_uncond: "Tensor | None"
    ) -> "tuple[Tensor | None, Tensor | None]":
        """U(x') where one batch has both, and no W."""
        scheduler, at = self._pipeline.scheduler, driver.position
        count = scheduler.config.num_train_timesteps
        width = self.ahead * float(scheduler.sigmas[at + 1] - scheduler.sigmas[at])
        sigma = float(scheduler.sigmas[at])
        self._weight = (sigma if scheduler.config.get("invert_sigmas") else max(1 - sigma, 0.0)) ** self.decay
        ahead = call.with_prompt.latents.clone()
        place = tuple(slice(None, size) for size in pred_cond.shape)  # channels of another image may lie behind
        moving = ahead[place]
        if moving.shape != pred_cond.shape:
            raise UnsupportedModelError(
                "guidance: rectified-cfg++ moves the latents along the model's output, which has another shape here"
            )
        ahead[place] = (moving.float() + self._sign * width * pred_cond.float()).to(ahead.dtype)
        told = [float(timestep) for timestep in scheduler.timesteps[at : at + 2]]
        last = float(scheduler.sigmas[at + 1]) * count  # where the last step leads
        timestep = self._moved(call.timestep, told[0], self.ahead * ([*told, last][1] - told[0]), count)
        moved = call.at(ahead.repeat(2, *[1] * (ahead.ndim - 1)) if call.pair else ahead, timestep)
        output = driver.output_of(moved)
        self._there = (ahead, timestep, output[call.slice(call.second)])
        return output[call.slice(call.first)] if call.pair else pred_uncond, None

    def _moved(self, timestep, told, by, count):
        """The model's timestep where the scheduler's is `told` + `by`, by how it follows from `told`."""
        now = float(timestep.flatten()[0]) if hasattr(timestep, "flatten") else float(timestep)
        part = told / count
        near = {1.0: abs(now - told) / count, 1 / count: abs(now - part), -1 / count: abs(now - 1 + part)}
        rate = self._rate if self._rate is not None else min(near, key=lambda one: near[one])
        even = not hasattr(timestep, "flatten") or bool((timestep == timestep.flatten()[0]).all())
        if near[rate] > 0.01 or not even:
            raise UnsupportedModelError(
                "guidance: rectified-cfg++ evaluates the model at another noise level, and how the timestep that this "
                f"one is given ({now:g}) follows from the scheduler's ({told:g}) is not known"
            )
        self._rate = rate
        return timestep + rate * by

    def without_prompt(self, call: "Call") -> "Call":
        return call.at(*self._there[:2])

    def of_both(
        self, pred_cond: "Tensor", pred_uncond: "Tensor", guidance_scale: "float | Tensor", step: "Step"
    ) -> "Tensor":
        """pred_uncond: at x'."""
        away = self._there[2] - pred_uncond
        return pred_cond + (guidance_scale - 1) * self._weight * away
