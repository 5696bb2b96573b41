"""What stands in a denoiser's call while a pipeline is guided: one call of the pipeline's becomes those of a method.

A pipeline that runs CFG in one batch takes U + w (C - U) of what comes back: it is given the guided output twice, for
which that is the output itself, whatever w. One that runs it in two calls is given C + scale / w (C - W) for the one
with the prompt, which comes to the same. The letters are those of base.py.
"""

import dataclasses
import inspect
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Self

import torch

from surgery.compat import rescale_noise_cfg
from surgery.errors import InputError, UnsupportedModelError
from surgery.models.anatomy import DENOISERS
from surgery.models.modular import is_modular
from surgery.models.patching import attachment, denoiser
from surgery.nn.backbones.record import Backbone
from surgery.nn.schedule import index_of, is_inside, sigma_at, step_at

from .base import Grid, Method, Step
from .guiders import guidance_scale_of, guider_of, heard
from .weakening import Weakening


class Call:
    """A call of a denoiser. pair: whether its batch is [without prompt, with prompt], as CFG has it.

    first, second, all: which rows, for `of` and `slice`; without a pair, each is all of them.
    """

    first, second, all = "first", "second", "all"

    def __init__(self, model: torch.nn.Module, args: tuple, kwargs: dict, latents: str, pair: bool) -> None:
        names = list(inspect.signature(type(model).forward).parameters)[1:]
        self.arguments = dict(zip(names, args, strict=False)) | kwargs
        self.latents, self.pair = latents, pair
        self.batch = self.arguments[latents].shape[0]

    @property
    def with_prompt(self) -> Self:
        """The Call of the rows with the prompt alone."""
        return self.of(self.second)

    def slice(self, rows: str) -> slice:
        """The rows as a slice of the batch."""
        if not self.pair or rows == self.all:
            return slice(0, self.batch)
        return slice(0, self.batch // 2) if rows == self.first else slice(self.batch // 2, self.batch)

    def of(self, rows: str) -> Self:
        """A Call of some of the rows: every tensor that has as many rows as the latents is cut."""
        chosen = self.slice(rows)
        if chosen == slice(0, self.batch):
            return self
        cut = self.with_(**{name: _cut(value, self.batch, chosen) for name, value in self.arguments.items()})
        cut.pair, cut.batch = False, chosen.stop - chosen.start
        return cut

    def with_(self, **arguments: Any) -> Self:
        """A copy with other arguments."""
        copy = object.__new__(type(self))
        copy.__dict__.update(self.__dict__, arguments={**self.arguments, **arguments})
        return copy


def _cut(value, batch, chosen):
    if torch.is_tensor(value):
        return value[chosen] if value.ndim and value.shape[0] == batch else value
    if isinstance(value, dict):
        return {name: _cut(part, batch, chosen) for name, part in value.items()}
    if isinstance(value, (list, tuple)) and any(torch.is_tensor(part) for part in value):
        return type(value)(_cut(part, batch, chosen) for part in value)
    return value


def prediction_of(result: Any) -> torch.Tensor:
    """The tensor that a denoiser predicts, in whatever it returns."""
    return result[0]


def with_prediction(result: Any, prediction: torch.Tensor) -> Any:
    """What a denoiser returned, with another prediction in it."""
    if isinstance(result, tuple):
        return (prediction, *result[1:])
    name = next(field.name for field in dataclasses.fields(result))
    return dataclasses.replace(result, **{name: prediction})


def _by_row(scales, pred_cond):
    """(batch, 1, ...) float32: each image's guidance_scale. Under 1 a pipeline runs no CFG, which is a scale of 1."""
    values = [max(scale, 1.0) for scale in scales]
    return torch.tensor(values, dtype=torch.float32, device=pred_cond.device).view(-1, *[1] * (pred_cond.ndim - 1))


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


class Driver:
    """Callable in a denoiser's place, in the runs of a pipeline. guidance_scale: where the pipeline tells none."""

    def __init__(
        self,
        pipeline: Any,
        model: torch.nn.Module,
        backbone: Backbone,
        method: Method,
        guidance_scale: float | None = None,
    ) -> None:
        self.pipeline, self.backbone, self.method = pipeline, backbone, method
        self.batches_cfg = backbone.batches_cfg and not is_modular(pipeline)
        self.model: Any = model
        self.guidance_scale = guidance_scale
        self.scales: Sequence[float] | None = None  # of each image, in place of the pipeline's one
        self.call = None  # in a run: the denoiser, or what torch.compile made of it
        self.evaluations = 0  # of the denoiser, each row of a batch as one, over all images
        self._index = None  # of this run's last call, in the scheduler's timesteps
        self._had_pair = False  # in this run
        self._context = None  # of the pipeline's `cache_context` that the call is in
        self._taken_for = None  # the guidance_scale that the last call with the prompt was computed for
        self._weak_step = None  # the Step of that call, where the method weakens the one without the prompt too

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the denoiser's."""
        method = self.method
        guidance_scale, pair = self._scale_and_pair()
        call = Call(self.model, args, kwargs, self.backbone.latents, pair)
        if self._context == "uncond":
            if method.method not in ("cfg", "nag") and self._taken_for is not None and self._taken_for <= 1:
                raise InputError(
                    f"{type(self.pipeline).__name__} runs CFG in calls of its own: give its scale as "
                    "guide(..., guidance_scale=...)"
                )
            return self._run_uncond(call)
        scheduler = self.pipeline.scheduler
        self._weak_step = None
        self._index = self._index_of(call)
        index, steps = step_at(scheduler, self._index)
        self._taken_for, self._had_pair = guidance_scale, self._had_pair or pair
        sigma = sigma_at(scheduler, self._index) if "sigma" in method.window else None
        inside = is_inside(method.window, index, steps, sigma)
        if not inside and method.method != "cfg":
            return self._run(call)
        level = float(scheduler.timesteps[self._index]) / scheduler.config.get("num_train_timesteps", 1000)
        step = Step(index, level, self._grid(call))
        if attachment(self.model) and method.changes_modules:
            raise InputError(
                f"guidance: {method.method} changes modules, which an engine has compiled; load without one"
            )
        weakens_uncond = isinstance(method, Weakening) and method.weakens_uncond
        self._weak_step = step if weakens_uncond else None
        asked = call.with_prompt if weakens_uncond else call
        with method.around(asked, step):
            result = self._run(asked)
        output = prediction_of(result)
        pred_uncond = output[asked.slice(asked.first)] if asked.pair else None
        pred_cond = output[asked.slice(asked.second)]
        if not inside:
            return with_prediction(result, torch.cat([pred_cond, pred_cond]) if pair else pred_cond)
        if method.needs_pair and not pair:
            if self._had_pair:  # a callback has turned CFG off since
                return result
            raise InputError(
                f"guidance: {method.method} needs classifier-free guidance in one batch; sample with a "
                "guidance_scale above 1"
            )
        guided = self._guided(call, step, pred_cond, pred_uncond, guidance_scale)
        return with_prediction(result, torch.cat([guided, guided]) if pair else guided)

    @contextmanager
    def running(self) -> Iterator[None]:
        """While it lasts, which is a run of the pipeline, the pipeline finds a StandIn where its denoiser is."""
        if denoiser(self.pipeline) is not self.model:
            raise InputError("the denoiser is another than when guidance began: surgery.unguide and guide again")
        # By way of __dict__: a pipeline writes what it is assigned into its config.
        parts = vars(self.pipeline)
        name = next(name for name in DENOISERS if parts.get(name) is not None)
        self.call, self._index, self._had_pair, self._weak_step = parts[name], None, False, None
        self.method.begin()
        parts[name] = StandIn(self.call, self)
        try:
            with heard(guider_of(self.pipeline), self._hear):
                yield
        finally:
            parts[name] = self.call

    def _hear(self, name):
        self._context = name

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

    def _run_uncond(self, call):
        """The call without the prompt of a pipeline that makes two: as it is, or of the weakened model."""
        if self._weak_step is None or not isinstance(self.method, Weakening):
            return self._run(call)
        with self.method.weakened(dataclasses.replace(self._weak_step, grid=self._grid(call))):
            return self._run(call)

    def _guided(self, call, step, pred_cond, pred_uncond, guidance_scale):
        method, pred_cond_skip = self.method, None
        if isinstance(method, Weakening) and (method.scale or method.weakens_uncond):
            pred_uncond, pred_cond_skip = method.weak_outputs(self, call, step, pred_cond, pred_uncond)
        if self.scales is not None:
            guidance_scale = _by_row(self.scales, pred_cond)
        channels = call.arguments[self.backbone.latents].shape[1]
        if pred_cond.shape[1] == 2 * channels and pred_cond.ndim == 4:  # a variance behind, which nobody guides
            uncond, skip = (None if one is None else one[:, :channels] for one in (pred_uncond, pred_cond_skip))
            guided = self._combined(step, pred_cond[:, :channels], uncond, skip, guidance_scale)
            return torch.cat([guided, pred_cond[:, channels:]], dim=1)
        return self._combined(step, pred_cond, pred_uncond, pred_cond_skip, guidance_scale)

    def _combined(self, step, pred_cond, pred_uncond, pred_cond_skip, guidance_scale):
        method, rescale = self.method, getattr(self.pipeline, "guidance_rescale", 0.0)
        guided = method.combined(pred_cond, pred_uncond, guidance_scale, step)
        if isinstance(method, Weakening) and pred_cond_skip is not None:
            share = 1.0 if self.batches_cfg else 1.0 / max(float(guidance_scale), 1.0)
            guided = guided + method.scale * share * method.away(pred_cond, pred_uncond, pred_cond_skip)
        if pred_uncond is not None and rescale:
            guided = rescale_noise_cfg(guided, pred_cond, rescale)
        return guided.to(pred_cond.dtype)  # scales of each image are float32

    def _scale_and_pair(self):
        """(guidance_scale, whether the batch is a pair) of the pipeline's present run."""
        pipeline = self.pipeline
        told = getattr(pipeline, "guidance_scale", None)
        if is_modular(pipeline):
            return guidance_scale_of(guider_of(pipeline)), False
        if self.batches_cfg:
            guidance_scale = self.guidance_scale if told is None else told
            if guidance_scale is None:
                raise InputError(
                    f"{type(pipeline).__name__} does not tell its guidance_scale: give it as "
                    "guide(..., guidance_scale=...)"
                )
            pair = getattr(pipeline, "do_classifier_free_guidance", None)
            return guidance_scale, bool(guidance_scale > 1.0 if pair is None else pair)
        if hasattr(pipeline, "do_classifier_free_guidance"):
            return (told if pipeline.do_classifier_free_guidance else 1.0), False
        return self.guidance_scale or 1.0, False

    def _index_of(self, call):
        """Where among the scheduler's timesteps a call stands."""
        scheduler = self.pipeline.scheduler
        for name in ("step_index", "begin_index"):  # the second before the first step
            if (told := getattr(scheduler, name, None)) is not None:
                return told
        count = len(scheduler.timesteps)
        run = getattr(self.pipeline, "num_timesteps", None) or count  # fewer where it begins late or ends early
        counted = count - run if self._index is None else self._index + 1
        return index_of(scheduler, call.arguments["timestep"], counted)

    def _grid(self, call):
        if not self.method.needs_grid:
            return None
        try:
            shape = self.backbone.grid(self.model.config, call.arguments)
        except ValueError as error:
            raise UnsupportedModelError(str(error)) from error
        except (KeyError, TypeError, IndexError) as error:
            raise UnsupportedModelError(
                f"guidance: where the image's tokens are cannot be told from this call ({error})"
            ) from error
        return Grid(*shape, self.backbone.has_levels, self.backbone.text_first)
