"""What stands in a denoiser's call while a pipeline is guided: one call of the pipeline's becomes those of a method.

A pipeline that runs CFG in one batch takes U + w (C - U) of what comes back: it is given the guided output G twice, for
which that is G itself, whatever w. One that runs it in two calls, the one with the prompt first, is given C, and then
in U's place (w C - G) / (w - 1), of which it makes G; what it does beside, such as giving G the norm of C, it does as
ever. Where a guider of its own combines both, C is overwritten with G, and both are G. Letters as in base.py.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from surgery.compat import rescale_noise_cfg
from surgery.errors import InputError, UnsupportedModelError
from surgery.models.denoisers import FURTHER
from surgery.models.modular import is_modular
from surgery.models.patching import attachment, denoisers
from surgery.nn.backbones.record import Backbone
from surgery.nn.schedule import index_of, is_inside, sigma_at, step_at

from .base import Grid, Method, Step
from .calls import Call, prediction_of, with_prediction
from .guiders import guidance_scale_of, guider_of, heard
from .weakening import Weakening

_WITHOUT = ("uncond", "pred_uncond")  # names of a `cache_context` around the call without the prompt
_OTHERS = ("uncond_stg", "uncond_modality")  # and around those of a pipeline's own methods


class StandIn:
    """A denoiser to whoever looks, isinstance() among them; its calls are a Driver's, all else is the denoiser's."""

    def __init__(self, model: Any, driver: "Driver") -> None:
        vars(self).update(stood_for=model, driver=driver)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the denoiser's, guided."""
        return self.driver(*args, **kwargs)

    def __getattr__(self, name):
        return getattr(self.stood_for, name)

    def __setattr__(self, name, value):
        setattr(self.stood_for, name, value)

    @property
    def __class__(self):
        return type(self.stood_for)

    def cache_context(self, name: str, **more: Any) -> AbstractContextManager:
        """As the denoiser's; the Driver learns of the name."""
        return self.driver.named(name, self.stood_for.cache_context(name, **more))


@dataclasses.dataclass(frozen=True)
class _Asked:
    """The call with the prompt, of a pipeline that makes two, until the one without it comes."""

    place: tuple  # in the run
    step: Step
    inside: bool  # the method's window
    pred_cond: torch.Tensor
    pred_cond_skip: torch.Tensor | None
    guidance_scale: float


class Driver:
    """Callable in a denoiser's place, in the runs of a pipeline."""

    def __init__(
        self, pipeline: Any, component: str, model: torch.nn.Module, backbone: Backbone, method: Method
    ) -> None:
        self.pipeline, self.component, self.backbone, self.method = pipeline, component, backbone, method
        self.is_modular = is_modular(pipeline)
        self.batches_cfg = backbone.batches_cfg and not self.is_modular
        self.model: Any = model
        self.scales: Sequence[float] | None = None  # of each image, in place of the pipeline's one
        self.call = None  # in a run: the denoiser, or what torch.compile made of it
        self.evaluations = 0  # of the denoiser, each row of a batch as one, over all images
        self._arguments: Mapping[str, Any] = {}  # of the pipeline's call
        self._index = None  # of this run's last call, in the scheduler's timesteps
        self._had_pair = False  # in this run: both of CFG's outputs, in one call or two
        self._context = None  # of the pipeline's `cache_context` that the call is in
        self._asked: _Asked | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the denoiser's."""
        call = Call(self.model, args, kwargs, self.backbone)
        if self._context in _OTHERS:
            return self._run(call)
        if self._is_without_prompt(call):
            return self._run_without_prompt(call)
        self._check_answered()
        self._asked = None
        self._index = self._index_of(call)
        guidance_scale, is_guided = self._scale_of(call)
        call.pair = is_guided and self.batches_cfg
        self._had_pair = self._had_pair or call.pair
        step, inside = self._step_of(call)
        method = self.method
        if not inside and method.method != "cfg":
            return self._run(call)
        if attachment(self.model) and method.changes_modules:
            raise InputError(
                f"guidance: {method.method} changes modules, which an engine has compiled; load without one"
            )
        asked = call
        if method.asks_with_prompt_alone and not self.backbone.predicts_sound:
            asked = call.with_prompt
        with method.around(asked, step):
            result = self._run(asked)
        output = prediction_of(result)
        pred_uncond = output[asked.slice(asked.first)] if asked.pair else None
        pred_cond = output[asked.slice(asked.second)]
        if not is_guided and not inside:
            return result
        if method.needs_pair and not is_guided:
            if self._had_pair:  # a callback has turned CFG off since
                return result
            raise InputError(
                f"guidance: {method.method} needs classifier-free guidance; sample with a guidance_scale above 1 "
                "(true_cfg_scale and a negative prompt where the pipeline has these)"
            )
        waits = is_guided and not call.pair
        if method.is_plain and inside and self.scales is None:  # what the pipeline makes of it is the method
            return result
        if inside:
            pred_uncond, pred_cond_skip = method.outputs(self, call, step, pred_cond, pred_uncond)
        else:
            pred_cond_skip = None
        if waits:
            self._asked = _Asked(self._place(call), step, inside, pred_cond, pred_cond_skip, float(guidance_scale))
            return result
        guided = pred_cond
        if inside:
            guided = self._combined(call, step, pred_cond, pred_uncond, pred_cond_skip, guidance_scale)
        return with_prediction(result, torch.cat([guided, guided]) if call.pair else guided)

    @contextmanager
    def running(self, arguments: Mapping[str, Any]) -> Iterator[None]:
        """While it lasts, which is a run of the pipeline, the pipeline finds a StandIn where its denoiser is.

        arguments: of the pipeline's call, with its defaults.
        """
        if denoisers(self.pipeline).get(self.component) is not self.model:
            raise InputError("the denoiser is another than when guidance began: surgery.unguide and guide again")
        # By way of __dict__: a pipeline writes what it is assigned into its config.
        parts = vars(self.pipeline)
        name = self.component
        self.call, self._arguments = parts[name], arguments
        self._index, self._had_pair, self._asked = None, False, None
        self.method.begin()
        parts[name] = StandIn(self.call, self)
        try:
            with heard(guider_of(self.pipeline, self.component), self._hear):
                yield
            self._check_answered()
        finally:
            parts[name] = self.call

    def _hear(self, name):
        self._context = name

    @property
    def position(self) -> int:
        """Where among the scheduler's timesteps the call with the prompt stands."""
        assert self._index is not None
        return self._index

    def output_of(self, call: Call, model: torch.nn.Module | None = None) -> torch.Tensor:
        """The prediction for a Call, of the denoiser or of another model."""
        return prediction_of(self._run(call, model))

    @contextmanager
    def named(self, name: str, enter: AbstractContextManager) -> Iterator[None]:
        """While it lasts, calls are those of a pipeline's `cache_context` of this name."""
        before, self._context = self._context, name
        try:
            with enter:
                yield
        finally:
            self._context = before

    def _run(self, call, model=None):
        self.evaluations += call.batch
        run = model or self.call
        assert run is not None, "a Driver calls the denoiser within a run of the pipeline"
        return run(**call.arguments)

    def _is_without_prompt(self, call):
        """Whether a call is CFG's second: so named, or, where calls have no name, at the place of the one before."""
        if self.batches_cfg:
            return False
        if self._context is not None:
            return self._context in _WITHOUT
        return self._asked is not None and self._asked.place == self._place(call)

    def _place(self, call):
        """Where in a run a call is, alike for both of CFG's."""
        timestep = call.timestep
        first = float(timestep.flatten()[0]) if torch.is_tensor(timestep) else float(timestep)
        return getattr(self.pipeline.scheduler, "step_index", None), first

    def _run_without_prompt(self, call):
        asked, self._asked, method = self._asked, None, self.method
        if asked is None:
            return self._run(call)
        self._had_pair = True
        weakened: AbstractContextManager = nullcontext()
        if asked.inside and isinstance(method, Weakening) and method.weakens_uncond:
            weakened = method.weakened(dataclasses.replace(asked.step, grid=self._grid(call)))
        with weakened:
            result = self._run(method.without_prompt(call) if asked.inside else call)
        guided, w = asked.pred_cond, asked.guidance_scale
        if asked.inside:
            outputs = (asked.pred_cond, prediction_of(result), asked.pred_cond_skip)
            guided = self._combined(call, asked.step, *outputs, w)
        if self.backbone.guider and not self.is_modular:
            return with_prediction(result, asked.pred_cond.copy_(guided))
        stands_for_uncond = (w * asked.pred_cond.float() - guided.float()) / (w - 1)
        return with_prediction(result, stands_for_uncond.to(guided.dtype))

    def _check_answered(self):
        """Raise InputError where a call without the prompt was to come and never did."""
        if self._asked is not None and not self._had_pair:
            raise InputError(
                f"guidance: {type(self.pipeline).__name__} was called with a scale above 1 and runs no classifier-free "
                "guidance; give a negative prompt, or a scale of 1"
            )

    def _step_of(self, call):
        """(the Step of a call, whether it is inside the method's window)."""
        scheduler, method, at = self.pipeline.scheduler, self.method, self.position
        index, steps = step_at(scheduler, at)
        sigma = sigma_at(scheduler, at) if "sigma" in method.window else None
        inside = is_inside(method.window, index, steps, sigma)
        level = float(scheduler.timesteps[at]) / scheduler.config.get("num_train_timesteps", 1000)
        return Step(index, level, self._grid(call) if inside else None), inside

    def _combined(self, call, step, pred_cond, pred_uncond, pred_cond_skip, guidance_scale):
        """The guided output of the rows with the prompt."""
        if self.scales is not None:
            guidance_scale = self._by_row(pred_cond)
        outputs = (pred_cond, pred_uncond, pred_cond_skip)
        channels = call.latents.shape[1]
        if pred_cond.ndim > 3 and pred_cond.shape[1] == 2 * channels:  # a variance behind, which nobody guides
            cond, uncond, skip = (None if one is None else one[:, :channels] for one in outputs)
            guided = self._of_means(step, cond, uncond, skip, guidance_scale)
            return torch.cat([guided, pred_cond[:, channels:]], dim=1)
        return self._of_means(step, *outputs, guidance_scale)

    def _of_means(self, step, pred_cond, pred_uncond, pred_cond_skip, guidance_scale):
        method, rescale = self.method, getattr(self.pipeline, "guidance_rescale", 0.0)
        guided = method.combined(pred_cond, pred_uncond, guidance_scale, step)
        if isinstance(method, Weakening) and pred_cond_skip is not None:
            guided = guided + method.scale * method.away(pred_cond, pred_uncond, pred_cond_skip)
        if pred_uncond is not None and rescale and self.backbone.batches_cfg:
            guided = rescale_noise_cfg(guided, pred_cond, rescale)
        return guided.to(pred_cond.dtype)  # scales of each image are float32

    def _by_row(self, pred_cond):
        """(batch, 1, ...) float32: each image's w. A pipeline runs no CFG under its least scale, which is w = 1."""
        assert self.scales is not None
        values = [max(scale + self.backbone.adds_to_cond, 1.0) for scale in self.scales]
        return torch.tensor(values, dtype=torch.float32, device=pred_cond.device).view(-1, *[1] * (pred_cond.ndim - 1))

    def _scale_of(self, call):
        """(w, whether CFG is on) in the pipeline's present call."""
        pipeline, backbone = self.pipeline, self.backbone
        if self.is_modular:
            scale = guidance_scale_of(guider_of(pipeline, self.component))
            return scale, scale != 1.0
        if backbone.guider:
            guider = getattr(pipeline, "guider", None)
            return (guider.guidance_scale, guider.num_conditions > 1) if guider is not None else (1.0, False)
        if backbone.embeds_guidance and type(pipeline).__name__ not in backbone.guided_pipelines:
            scale = self._arguments.get("true_cfg_scale") or 1.0
            given = (value for name, value in self._arguments.items() if name.startswith("negative_prompt"))
            return scale, scale > 1 and any(value is not None for value in given)
        if not backbone.embeds_guidance and call.arguments.get("guidance") is not None:  # distilled: the model's input
            return 1.0, False
        told = getattr(pipeline, "guidance_scale", None)
        scale = self._arguments.get("guidance_scale") if told is None else told
        if scale is None:
            raise InputError(f"guidance: {type(pipeline).__name__} has no guidance_scale, and without one nothing runs")
        is_guided = getattr(pipeline, "do_classifier_free_guidance", None)
        is_guided = bool(scale > 1 if is_guided is None else is_guided)
        own = self._arguments.get("guidance_scale_2") if self.component in FURTHER else None
        if own is not None:  # at 1 the pipeline still makes both calls, and takes the one with the prompt
            scale, is_guided = own, is_guided and own > 1
        if backbone.lists:  # at some steps it may leave CFG out
            is_guided = is_guided and call.is_doubled
        return scale + backbone.adds_to_cond, is_guided

    def _index_of(self, call):
        """Where among the scheduler's timesteps a call stands."""
        scheduler = self.pipeline.scheduler
        for name in ("step_index", "begin_index"):  # the second before the first step
            if (told := getattr(scheduler, name, None)) is not None:
                return told
        count = len(scheduler.timesteps)
        run = getattr(self.pipeline, "num_timesteps", None) or count  # fewer where it begins late or ends early
        counted = count - run if self._index is None else self._index + 1
        return index_of(scheduler, call.timestep, counted)

    def _grid(self, call):
        if not self.method.needs_grid:
            return None
        backbone, config = self.backbone, self.model.config
        try:
            shape = backbone.grid(config, call.arguments)
            start = backbone.image_start and backbone.image_start(config, call.with_prompt.arguments)
        except ValueError as error:
            raise UnsupportedModelError(str(error)) from error
        except (KeyError, TypeError, IndexError) as error:
            raise UnsupportedModelError(
                f"guidance: where the image's tokens are cannot be told from this call ({error})"
            ) from error
        return Grid(
            *shape,
            has_levels=backbone.has_levels,
            text_first=backbone.text_first,
            start=start,
            fills_to=backbone.fills_up_to,
            channels_last=backbone.channels_last,
        )
