"""LoRA files, of any format that diffusers reads: W' = W + scale * (alpha / rank) * up @ down, in float32."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from surgery.compat import lora_reader, peft_keys, read_lora
from surgery.errors import BaseError, UnsupportedModelError
from surgery.models.denoisers import FURTHER

from .weights import Adder

Layer = tuple[torch.Tensor, torch.Tensor, float]  # (up, down, alpha) of a weight; the rank is down's first axis


def lora_deltas(
    loras: Iterable[tuple[Path, float]],
    component: str,
    pipeline_class: str,
    config: Mapping,
    expected: Mapping[str, Sequence[int]],
) -> dict[str, Adder]:
    """{tensor name: function that adds every LoRA's delta to it}. loras: (path, scale) each; the rest as below."""
    stacks = {}
    for path, scale in loras:
        for name, layer in lora_layers(path, component, pipeline_class, config, expected).items():
            stacks.setdefault(name, []).append((layer, scale))
    return {name: adder(stack) for name, stack in stacks.items()}


def adder(stack: Sequence[tuple[Layer, float]]) -> Adder:
    """The function that adds to a float32 weight, wherever it lies, what each (layer, scale) does."""

    def add(weight):
        for (up, down, alpha), scale in stack:
            # A convolution's up matrix is 1x1, so the product over the flattened kernels is the whole delta.
            up, down = (matrix.to(weight.device).float().flatten(1) for matrix in (up, down))
            weight = weight + scale * alpha / len(down) * (up @ down).reshape(weight.shape)
        return weight

    return add


def lora_layers(
    path: Path, component: str, pipeline_class: str, config: Mapping, expected: Mapping[str, Sequence[int]]
) -> dict[str, Layer]:
    """{tensor name: Layer} of a LoRA file.

    component: "unet" or "transformer". config: the denoiser's, by which diffusers maps other tools' names of a UNet's
    blocks. expected: {name: shape} of the model.
    Raises UnsupportedModelError for layers besides the denoiser's, BaseError for one that the model does not have, or
    has in another shape.
    """
    if component != "unet" and lora_reader(pipeline_class) is None:
        raise UnsupportedModelError(f"diffusers reads no LoRA for {pipeline_class}")
    layers = {}
    for name, (up, down, alpha) in _parts(path, component, pipeline_class, config).items():
        weight = f"{name}.weight"
        if weight not in expected:
            raise BaseError(f"{path}: the LoRA has a layer {name}, which this model does not have")
        shape = len(up), down[0].numel()
        if up[0].numel() != len(down) or math.prod(shape) != math.prod(expected[weight]):
            raise BaseError(f"{path}: the LoRA's {weight} has {shape} values, the weight {tuple(expected[weight])}")
        layers[weight] = up, down, alpha
    return layers


def _parts(path, component, pipeline_class, config):
    named = component.removesuffix("_2") if component in FURTHER else component  # a second's are named as the first's
    whose, room = ("UNet" if named == "unet" else named), f"{named}."
    try:
        state, alphas, metadata = read_lora(path, pipeline_class, config if component == "unet" else None)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise BaseError(f"{path} cannot be read as a LoRA: {error}") from error
    others = sorted(key for key in state if not key.startswith(room))
    if others:
        raise UnsupportedModelError(
            f"{path}: {len(others)} of its tensors are not the {whose}'s (first: {others[0]}); only the {whose}'s part "
            "of a LoRA can be fused"
        )
    state = peft_keys({key.removeprefix(room): value for key, value in state.items()})
    # An alpha goes by its layer's name or by its down matrix's, as diffusers' converters have it.
    alphas = peft_keys({key.removeprefix(room): alpha for key, alpha in alphas.items()})
    alphas = {key.partition(".lora_A.")[0].removesuffix(".alpha"): float(a) for key, a in alphas.items()}
    metadata = {key.removeprefix(room): value for key, value in metadata.items()}
    if metadata.get("use_dora") or metadata.get("use_rslora"):
        raise UnsupportedModelError(f"{path} is a DoRA or rank-stabilised LoRA; only plain LoRA can be fused")
    pattern = metadata.get("alpha_pattern") or {}
    parts = {}
    for key in state:
        name, _, rest = key.partition(".lora_A.")
        if not key.endswith((".lora_A.weight", ".lora_B.weight")):
            raise UnsupportedModelError(f"{path}: {key} is not plain LoRA (up and down matrices); cannot be fused")
        if not rest:
            continue
        other = key.replace(".lora_A.", ".lora_B.")
        if other not in state:
            raise BaseError(f"{path} lacks {other}, the other half of {key}")
        down, up = state[key], state[other]
        rank = down.shape[0]
        alpha: Any = alphas.get(name, pattern.get(name, metadata.get("lora_alpha", rank)))
        parts[name] = up, down, float(alpha)
    if not parts:
        raise BaseError(f"{path} holds no LoRA layer for the {whose}")
    strays = sorted(set(alphas) - set(parts))
    if strays:
        raise BaseError(f"{path} has an alpha for {strays[0]}, but no layer of that name")
    return parts
