"""ComfyUI itself, from the folder that COMFYUI_PATH names, on the CPU, and tiny models of its with diffusers' weights.

torchvision and torchaudio are stubs where they are missing: ComfyUI imports them for models that are not run here.
"""

import importlib.util
import os
import sys
import types
from importlib.machinery import ModuleSpec

import torch


class _Stubs:
    """Modules of any name in these packages, with any class."""

    packages = ("torchvision", "torchaudio")

    def find_spec(self, name, path=None, target=None):
        return ModuleSpec(name, self, is_package=True) if name.split(".")[0] in self.packages else None

    def create_module(self, spec):
        module = types.ModuleType(spec.name)
        module.__getattr__ = self._made
        return module

    def exec_module(self, module):
        pass

    @staticmethod
    def _made(name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def folder():
    """Where ComfyUI is; None where COMFYUI_PATH does not name its folder."""
    found = os.environ.get("COMFYUI_PATH")
    return found if found and os.path.isfile(os.path.join(found, "comfy", "samplers.py")) else None


def comfyui():
    """Make ComfyUI's packages importable, for the CPU."""
    if "comfy" not in sys.modules:
        import transformers.utils  # noqa: F401  both ask for torchvision, which the stubs must not promise them

        if importlib.util.find_spec("torchvision") is None:
            sys.meta_path.append(_Stubs())
        sys.path.insert(0, folder())
        from comfy.cli_args import args

        args.cpu = args.use_pytorch_cross_attention = True


def unet(config, stock, stored=None):
    """A ModelPatcher of a UNet with the weights of diffusers' `stock`; config: ComfyUI's own of that shape.

    stored: the dtype of its weights, which are cast to float32 at each layer.
    """
    comfy_utils, supported, base = _parts()
    made = (supported.SDXL if "adm_in_channels" in config else supported.SD15)(config)
    made.unet_config = dict(config)
    if stored is not None:
        made.set_inference_dtype(stored, torch.float32)
    model = (base.SDXL if "adm_in_channels" in config else base.BaseModel)(made, device="cpu")
    return _loaded(model, stock, comfy_utils.unet_to_diffusers(config))


def flux(config, stock):
    """A ModelPatcher of FLUX.1 with the weights of diffusers' `stock`."""
    comfy_utils, supported, base = _parts()
    made = supported.Flux(config)
    made.unet_config = config
    names = comfy_utils.flux_to_diffusers(config)
    return _loaded(base.Flux(made, device="cpu"), stock, names)


def _parts():
    import comfy.model_base
    import comfy.supported_models
    import comfy.utils

    return comfy.utils, comfy.supported_models, comfy.model_base


def _loaded(model, stock, names):
    """names: {diffusers' key: ComfyUI's, or (it, (dimension, first, how many))}, or with a function behind."""
    import comfy.model_patcher

    state, given = model.diffusion_model.state_dict(), stock.state_dict()
    unset = set(state)
    for name, weight in given.items():
        to, part, change = (
            names[name]
            if isinstance(names[name], tuple) and len(names[name]) == 3
            else (
                *(names[name] if isinstance(names[name], tuple) else (names[name], None)),
                None,
            )
        )
        weight = weight if change is None else change(weight)
        target = state[to] if part is None else state[to].narrow(*part)
        target.copy_(weight.reshape(target.shape))
        unset.discard(to)
    assert not unset, f"weights that diffusers has not: {sorted(unset)}"
    model.diffusion_model.load_state_dict(state)
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model.eval(), load_device=cpu, offload_device=cpu)


def sampled(model, noise, sigmas, prompt, negative, scale=3.0, pooled=None, more=(), **about):
    """The latents that ComfyUI's Euler sampler makes, as diffusers has them: not divided by the latent format's factor.

    more: conditionings beside the prompt's; about: what the prompts say too. noise: as the first latents of diffusers,
    which are multiplied by what its schedulers call init_noise_sigma.
    """
    import comfy.samplers

    def conditioning(tokens, pooled):
        return [[tokens, {**about, **({} if pooled is None else {"pooled_output": pooled})}]]

    pooled = pooled or (None, None)
    sampler = comfy.samplers.sampler_object("euler")
    found = comfy.samplers.sample(
        model,
        noise,
        [*conditioning(prompt, pooled[0]), *more],
        conditioning(negative, pooled[1]),
        scale,
        torch.device("cpu"),
        sampler,
        sigmas,
        model_options=model.model_options,
        latent_image=torch.zeros_like(noise),
        disable_pbar=True,
        seed=0,
    )
    return model.model.process_latent_in(found)
