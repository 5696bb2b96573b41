"""What stands in a denoiser's call while a pipeline is guided: one call of the pipeline's becomes those of a method.

A pipeline that runs CFG in one batch takes U + w (C - U) of what comes back: it is given the guided output twice, for
which that is the output itself, whatever w. One that runs it in two calls is given C + scale / w (C - W) for the one
with the prompt, which comes to the same.
"""

from contextlib import contextmanager

import torch

from surgery.engines.attached import attachment
from surgery.errors import InputError, UnsupportedModelError
from surgery.nn.schedule import is_inside, sigma_at

from .calls import Call, prediction_of, with_prediction
from .families import grid_of
from .methods.base import Moment


class Driver:
    """Callable in a denoiser's place. call: what it stood before; guidance_scale: w, where the pipeline tells none."""

    def __init__(self, pipeline, model, family, method, call, guidance_scale=None):
        self.pipeline, self.model, self.family, self.method = pipeline, model, family, method
        self.call, self.guidance_scale = call, guidance_scale
        self.evaluations = 0  # of the denoiser, each row of a batch as one, over all images
        self._timesteps, self._step = None, 0
        self._context = None  # of the pipeline's `cache_context` that the call is in
        self._taken_for = None  # the w that the last call with the prompt was computed for

    def __call__(self, *args, **kwargs):
        """As the denoiser's."""
        settings = self.method.settings
        weight, pair = self._weight_and_pair()
        call = Call(self.model, args, kwargs, self.family.latents, pair)
        if self._context == "uncond":
            if settings.method not in ("cfg", "nag") and self._taken_for is not None and self._taken_for <= 1:
                raise InputError(
                    f"{type(self.pipeline).__name__} runs CFG in calls of its own: give its scale as "
                    "guide(..., guidance_scale=...)"
                )
            return self._run(call)
        step, steps = self._now()
        self._step += 1
        self._taken_for = weight
        inside = is_inside(settings.window, step, steps, self._sigma(step, steps) if "sigma" in settings.window else 0)
        if not inside and settings.method != "cfg":
            return self._run(call)
        moment = Moment(step, steps, self._level(step, steps), self._grid(call))
        if attachment(self.model) and self.method.changes_modules:
            raise InputError(
                f"guidance: {settings.method} changes modules, which an engine has compiled; load without one"
            )
        with self.method.around(call, moment):
            result = self._run(call)
        output = prediction_of(result)
        unguided, plain = (output[call.slice(call.first)], output[call.slice(call.second)]) if pair else (None, output)
        if not inside:
            return with_prediction(result, torch.cat([plain, plain]) if pair else plain)
        if self.method.needs_pair and not pair:
            raise InputError(
                f"guidance: {settings.method} needs classifier-free guidance in one batch; sample with a "
                "guidance_scale above 1"
            )
        guided = self._guided(call, moment, plain, unguided, weight)
        return with_prediction(result, torch.cat([guided, guided]) if pair else guided)

    def output_of(self, call):
        """The model's prediction for a Call."""
        return prediction_of(self._run(call))

    @contextmanager
    def named(self, name, enter):
        """While it lasts, calls are those of a pipeline's `cache_context` of this name."""
        before, self._context = self._context, name
        try:
            with enter:
                yield
        finally:
            self._context = before

    def _run(self, call):
        self.evaluations += call.batch
        return self.call(**call.arguments)

    def _guided(self, call, moment, plain, unguided, weight):
        method = self.method
        weak = None
        if method.settings.weakens and method.settings.scale:
            weak = method.weak_output(self, call, moment, plain, unguided)
        channels = call.arguments[self.family.latents].shape[1]
        if plain.shape[1] == 2 * channels and plain.ndim == 4:  # the second half is a variance, which nobody guides
            halves = [None if one is None else one[:, :channels] for one in (plain, unguided, weak)]
            return torch.cat([self._combined(moment, *halves, weight), plain[:, channels:]], dim=1)
        return self._combined(moment, plain, unguided, weak, weight)

    def _combined(self, moment, plain, unguided, weak, weight):
        method, rescale = self.method, getattr(self.pipeline, "guidance_rescale", 0.0)
        guided = method.combined(plain, unguided, weight, moment)
        if weak is not None:
            share = 1.0 if self.family.batched else 1.0 / max(weight, 1.0)
            guided = guided + method.settings.scale * share * method.away(plain, unguided, weak)
        if unguided is not None and rescale:
            from diffusers.guiders.guider_utils import rescale_noise_cfg

            guided = rescale_noise_cfg(guided, plain, rescale)
        return guided

    def _weight_and_pair(self):
        """(w, whether the batch is a pair) of the pipeline's present run."""
        pipeline = self.pipeline
        told = getattr(pipeline, "guidance_scale", None)
        if self.family.batched:
            weight = self.guidance_scale if told is None else told
            if weight is None:
                raise InputError(
                    f"{type(pipeline).__name__} does not tell its guidance_scale: give it as "
                    "guide(..., guidance_scale=...)"
                )
            pair = getattr(pipeline, "do_classifier_free_guidance", None)
            return weight, bool(weight > 1.0 if pair is None else pair)
        if hasattr(pipeline, "do_classifier_free_guidance"):
            return (told if pipeline.do_classifier_free_guidance else 1.0), False
        return self.guidance_scale or 1.0, False

    def _now(self):
        """(step from 0, steps) of the run: it is a new one when the scheduler has new timesteps."""
        timesteps = self.pipeline.scheduler.timesteps
        if timesteps is not self._timesteps:
            self._timesteps, self._step = timesteps, 0
        return self._step, getattr(self.pipeline, "num_timesteps", None) or len(timesteps)

    def _position(self, step, steps):
        timesteps = self.pipeline.scheduler.timesteps
        return min(len(timesteps) - steps + step, len(timesteps) - 1)

    def _level(self, step, steps):
        scheduler = self.pipeline.scheduler
        training = scheduler.config.get("num_train_timesteps", 1000)
        return float(scheduler.timesteps[self._position(step, steps)]) / training

    def _sigma(self, step, steps):
        return sigma_at(self.pipeline.scheduler, self._position(step, steps))

    def _grid(self, call):
        if not self.method.needs_grid:
            return None
        try:
            return grid_of(self.model, self.family, call.arguments)
        except (KeyError, TypeError, IndexError) as error:
            raise UnsupportedModelError(
                f"guidance: where the image's tokens are cannot be told from this call ({error})"
            ) from error
