"""Real inputs of a pipeline's components, one component in memory at a time.

The pipeline is run several times, each time with one kind of component whole and the others hollow: on the meta device,
giving back what they gave when they were whole. So the largest component, not the sum, is what is held.
"""

import inspect
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import torch

from surgery.artifact.manifest import Manifest
from surgery.engines.compiling import repeated_blocks
from surgery.errors import InputError
from surgery.hub.base import read_index, read_json_file
from surgery.hub.foreign import reading
from surgery.hub.listing import components_of
from surgery.models.denoisers import FURTHER
from surgery.models.negative import always_tell, has_negative, told_in
from surgery.models.patching import denoisers
from surgery.models.videos import draws_videos
from surgery.recipe.guidance_scale import largest_scale
from surgery.runtime.load import assemble, load_denoiser
from surgery.runtime.modular import called, is_modular, settings_of

from .recording import Captured, Recorded, Stop, recorded, replayed, results_of, stopped, watched

PROMPT = "three red apples to the left of a blue ceramic bowl, a wooden table, morning light"
# Most pipelines pad every text to one length; where it follows the prompt (Qwen-Image) these are its ends.
PROMPTS = {"shortest": "", "longest": " ".join([PROMPT] * 64)}
# Of operations on one, where the recipe's sampling has none: an engine is for texts of its length.
NEGATIVE_PROMPT = "blurry, low quality"
STEPS = 2  # of denoising: one call at pure noise, one amid
# The `sampling` that a denoiser's inputs depend on; height and width are the profile's.
_CAPTURED_WITH = (
    "guidance_scale",
    "guidance_scale_2",
    "true_cfg_scale",
    "num_frames",
    "max_sequence_length",
    "negative_prompt",
    "regions",
)


Size = tuple[int, int, int]  # images, height, width


def _stop_after_the_last_step(pipeline, step, timestep, tensors):
    """A callback_on_step_end: some pipelines (FLUX.2) need the VAE's tensors even for latents, and it is hollow."""
    if step + 1 >= STEPS:
        raise Stop
    return tensors


def hollow(module: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """A module without its weights, in place: on the meta device, but telling `device` as where it is."""
    kind = type(module)
    module.to("meta")
    inside = {"device": property(lambda self: device), "__module__": kind.__module__, "__doc__": kind.__doc__}
    module.__class__ = type(kind.__name__, (kind,), inside)
    return module


def run_untilstopped(
    pipeline: Any,
    size: Size,
    sampling: Mapping[str, Any],
    decode: bool = False,
    guided: bool = True,
    prompt: str = PROMPT,
) -> None:
    """Draw as `sampling` has it, in STEPS steps or until a `recorded` with a limit has enough.

    size: (images, height, width). decode: on to the images, not the latents alone. guided: False draws without
    guidance, whose batch is half as large. prompt: of every image.
    """
    images, height, width = size
    known = {key: value for key, value in sampling.items() if key in _CAPTURED_WITH and value is not None}
    if "guidance_scale" in known:
        known["guidance_scale"] = largest_scale(known)
    if is_modular(pipeline):
        _run_blocks(pipeline, size, known, decode, prompt)
        return
    if has_negative(pipeline):
        known.setdefault("negative_prompt", NEGATIVE_PROMPT)
    if "negative_prompt" in known:
        known["negative_prompt"] = [known["negative_prompt"]] * images
    accepted = inspect.signature(type(pipeline).__call__).parameters
    if not guided:
        known |= {name: 1.0 for name in ("guidance_scale", "true_cfg_scale") if name in accepted}
    if not decode and "callback_on_step_end" in accepted:
        known["callback_on_step_end"] = _stop_after_the_last_step
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in range(images)]
    pipeline.set_progress_bar_config(disable=True)
    try:
        with suppress(Stop), told_in(pipeline, known):
            pipeline(
                prompt=[prompt] * images,
                height=height,
                width=width,
                num_inference_steps=STEPS,
                generator=generators,
                output_type="pt" if decode else "latent",
                **known,
            )
    finally:
        # what a pipeline leaves behind when it is stopped
        pipeline.maybe_free_model_hooks()


def _run_blocks(pipeline, size, known, decode, prompt):
    """As `run_until_stopped`, of a modular pipeline, which has one prompt, and its guidance by its guider."""
    images, height, width = size
    if images > 1:
        raise InputError("a modular pipeline's images are drawn one by one; give 1 image in --shapes")
    given = {"height": height, "width": width, "num_inference_steps": STEPS, **known}
    callback = _stop_after_the_last_step if not decode else lambda *ignored: None
    pipeline.set_progress_bar_config(disable=True)
    accepted = settings_of(pipeline, given)
    arguments = {name: value for name, value in given.items() if name in accepted}
    with suppress(Stop), called(pipeline, arguments, callback) as arguments:
        drawn = "videos" if draws_videos(type(pipeline)) else "images"
        pipeline(prompt=prompt, generator=torch.Generator("cpu").manual_seed(0), output=drawn, **arguments)


_NOT_DRAWN_WITH = ("safety_checker", "feature_extractor", "image_encoder")


def capture(
    folder: Path,
    manifest: Manifest,
    component: str,
    sizes: dict[str, Size],
    device: torch.device | str,
    dtype: torch.dtype,
    regional: bool,
) -> Captured:
    """The Captured of one component of an artifact. sizes: {"usual" and other corners: (images, height, width)}.

    Raises InputError for a component that the pipeline does not have or use, or where it has no repeated blocks.
    """
    with torch.no_grad():
        return _Pieces(folder, manifest, device, dtype).capture(component, sizes, regional)


class _Pieces:
    def __init__(self, folder: Path, manifest: Manifest, device: torch.device | str, dtype: torch.dtype) -> None:
        self.folder, self.manifest, self.device, self.dtype = folder, manifest, torch.device(device), dtype
        self.variant = manifest.weight_variant()
        parts = components_of(read_index(folder))
        given = {name: None for name in _NOT_DRAWN_WITH if name in parts}
        given |= {"vae": self._hollow_vae()} if "vae" in parts else {}
        models = {name: self._hollow_denoiser(name) for name in manifest.patched}
        self.pipeline = assemble(folder, models, self.variant, dtype, given)
        self.denoisers = list(denoisers(self.pipeline))
        always_tell(self.pipeline)
        for name in set(self.denoisers) - set(models):  # another that is not patched
            hollow(getattr(self.pipeline, name), self.device)

    def _let_act(self, component):
        """Have one of two denoisers called at every step: there is one in memory."""
        if len(self.denoisers) > 1:  # a share of the timesteps, from which on down the second acts
            self.pipeline.register_to_config(boundary_ratio=2.0 if component in FURTHER else 0.0)

    def capture(self, component: str, sizes: dict[str, Size], regional: bool) -> Captured:
        pipeline = self.pipeline
        denoiser = component if component in self.manifest.patched else self.manifest.component
        self._let_act(denoiser)
        modules = {name: m for name, m in pipeline.components.items() if isinstance(m, torch.nn.Module)}
        if component not in modules:
            raise InputError(f"the pipeline has no {component}; it has {', '.join(modules)}")
        encoders = {name: m for name, m in modules.items() if name not in (*self.denoisers, "vae")}
        calls, given, shapes = self._conditions(encoders, sizes, component, denoiser)
        if component in self.denoisers and component != denoiser:
            raise InputError(f"{component} is not patched, so no engine of it is built")
        if component in encoders:
            return Captured(encoders[component], calls)
        of_prompts = {} if component == "vae" else dict.fromkeys(PROMPTS, sizes["usual"])
        sizes = sizes | {corner: size for corner, size in of_prompts.items() if shapes[corner] != shapes["usual"]}
        for module in encoders.values():
            hollow(module, self.device)
        model = load_denoiser(self.folder, denoiser, self.variant, self.dtype).to(self.device).eval()
        _put_in(pipeline, denoiser, model)
        if component == denoiser:
            return self._denoiser_calls(model, encoders, given, sizes, regional)
        guesses = {}
        for corner, size in sizes.items():
            with ExitStack() as stack:
                self._replay(stack, encoders, given[corner])
                guesses[corner] = stack.enter_context(results_of(model))
                self._run(corner, size)
        hollow(model, self.device)
        with reading(f"{self.folder}/vae cannot be loaded", self.folder / "vae"):
            vae = self._vae_class().from_pretrained(
                self.folder, subfolder="vae", variant=self.variant, torch_dtype=self.dtype
            )
        _put_in(pipeline, "vae", vae.to(self.device).eval())
        calls = Recorded("decode")
        for corner, size in sizes.items():
            with ExitStack() as stack:
                self._replay(stack, encoders, given[corner])
                stack.enter_context(replayed(model, guesses[corner]))
                calls.calls[corner] = stack.enter_context(recorded(vae, "decode", limit=1))
                self._run(corner, size, decode=True)
        return Captured(vae, calls)

    def _conditions(self, encoders, sizes, component, denoiser):
        """(Recorded of `component` if it is an encoder, {corner: {encoder: its results}}, the denoiser's shapes).

        Of the profile's corners and those of PROMPTS. The shapes are {corner: {input: shape}}.
        """
        calls, given, shapes = Recorded(), {}, {}
        for module in encoders.values():
            module.to(self.device).eval()
        for corner, size in {**sizes, **dict.fromkeys(PROMPTS, sizes["usual"])}.items():
            with ExitStack() as stack:
                given[corner] = {name: stack.enter_context(results_of(m)) for name, m in encoders.items()}
                if component in encoders:
                    calls.calls[corner] = stack.enter_context(recorded(encoders[component]))
                # stopped before the call: there are no weights to make it with
                shapes[corner] = stack.enter_context(stopped(getattr(self.pipeline, denoiser)))
                self._run(corner, size)
        if component in encoders and not calls.calls["usual"]:
            raise InputError(f"{component} is not called when the pipeline draws, so there is nothing to compile")
        return calls, given, shapes

    def _denoiser_calls(self, model, encoders, given, sizes, regional):
        captured = Captured(model, Recorded())
        for corner, size in sizes.items():
            with ExitStack() as stack:
                self._replay(stack, encoders, given[corner])
                captured.recorded.calls[corner] = stack.enter_context(
                    recorded(model, limit=None if corner == "usual" else 1)
                )
                if regional:
                    stack.enter_context(watched(repeated_blocks(model), captured.blocks, corner))
                self._run(corner, size)
        return captured

    def _run(self, corner, size, decode=False):
        # The smallest batch is that of the fewest images without guidance.
        guided, prompt = corner != "low", PROMPTS.get(corner, PROMPT)
        run_untilstopped(self.pipeline, size, self.manifest.sampling, decode, guided, prompt)

    def _replay(self, stack, encoders, results):
        for name, module in encoders.items():
            stack.enter_context(replayed(module, results[name]))

    def _hollow_denoiser(self, component):
        from surgery.nn import backbone_of

        config = read_json_file(self.folder / component / "config.json")
        kind = backbone_of(config["_class_name"]).patched
        assert kind is not None
        with torch.device("meta"):
            model = kind.from_config(config)
        return hollow(model.to(self.dtype), self.device)

    def _hollow_vae(self):
        kind = self._vae_class()
        with torch.device("meta"):
            model = kind.from_config(kind.load_config(self.folder / "vae"))
        return hollow(model.to(self.dtype), self.device)

    def _vae_class(self):
        import diffusers

        return getattr(diffusers, read_json_file(self.folder / "vae" / "config.json")["_class_name"])


def _put_in(pipeline, name, module):
    put = pipeline.update_components if is_modular(pipeline) else pipeline.register_modules
    put(**{name: module})
