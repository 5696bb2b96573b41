"""What guidance needs to know of a backbone: how its pipeline runs CFG, and where the image's tokens are."""

from collections.abc import Callable
from dataclasses import dataclass

from surgery.errors import UnsupportedModelError


@dataclass(frozen=True)
class Family:
    """A denoiser's class.

    batched: CFG is one call with [without prompt, with prompt] in the batch; else it is two calls, each in a
        `cache_context` of its name, and `guidance_scale` may mean a distilled model's input.
    latents: the argument with the noisy latents. grid: (model, arguments of a call) -> (frames, height, width) in
        tokens of the finest attention. text_first: where joint attention in one stream has its text.
    """

    batched: bool
    latents: str
    grid: Callable
    text_first: bool = True


def family_of(model):
    """The Family of a live denoiser; UnsupportedModelError for a class that guidance knows nothing of."""
    name = type(model).__name__.removeprefix("Pladis")
    if name not in FAMILIES:
        raise UnsupportedModelError(f"there is no guidance for {name}; there is for {', '.join(FAMILIES)}")
    return FAMILIES[name]


@dataclass(frozen=True)
class Grid:
    """The image's tokens as frames x height x width; halves: coarser levels have half the side, rounded up."""

    frames: int
    height: int
    width: int
    halves: bool
    text_first: bool

    def at(self, tokens):
        """(frames, height, width, first token) of the image in a sequence of so many tokens; None where it has none.

        Such as the text's own, in joint attention of two streams.
        """
        height, width = self.height, self.width
        while self.halves and height * width > tokens and height * width > 1:
            height, width = -(-height // 2), -(-width // 2)
        count = self.frames * height * width
        if count == tokens or self.halves:
            return (self.frames, height, width, 0) if count == tokens else None
        return (self.frames, height, width, tokens - count if self.text_first else 0) if count < tokens else None


def _unet(model, given):
    return 1, *given["sample"].shape[-2:]  # a video's frames are in the batch


def _image(model, given):
    patch = model.config.patch_size
    height, width = given["hidden_states"].shape[-2:]
    return 1, height // patch, width // patch


def _packed(model, given):
    return given["num_frames"], given["height"], given["width"]


def _video(model, given):
    frames, height, width = given["hidden_states"].shape[-3:]
    patch = model.config.patch_size
    time, *space = patch if isinstance(patch, (tuple, list)) else (getattr(model.config, "patch_size_t", 1), patch)
    return frames // time, height // space[0], width // space[-1]


def _flux(model, given):
    ids = given["img_ids"]
    last = (ids[0] if ids.ndim == 3 else ids).amax(dim=0)
    if len(given["hidden_states"][0]) != (last[1] + 1) * (last[2] + 1):
        raise UnsupportedModelError("guidance by attention takes no images beside the one that is drawn")
    return 1, int(last[1]) + 1, int(last[2]) + 1


def _qwen(model, given):
    shapes = given["img_shapes"][0]
    if isinstance(shapes, list) and len(shapes) > 1:
        raise UnsupportedModelError("guidance by attention takes no images beside the one that is drawn")
    return tuple(shapes[0] if isinstance(shapes, list) else shapes)


FAMILIES = {
    "UNet2DConditionModel": Family(True, "sample", _unet),
    "UNetSpatioTemporalConditionModel": Family(True, "sample", _unet),
    "PixArtTransformer2DModel": Family(True, "hidden_states", _image),
    "SanaTransformer2DModel": Family(True, "hidden_states", _image),
    "SD3Transformer2DModel": Family(True, "hidden_states", _image, text_first=False),
    "LTXVideoTransformer3DModel": Family(True, "hidden_states", _packed),
    "MochiTransformer3DModel": Family(True, "hidden_states", _video, text_first=False),
    "WanTransformer3DModel": Family(False, "hidden_states", _video),
    "HunyuanVideoTransformer3DModel": Family(False, "hidden_states", _video, text_first=False),
    "FluxTransformer2DModel": Family(False, "hidden_states", _flux),
    "Flux2Transformer2DModel": Family(False, "hidden_states", _flux),
    "QwenImageTransformer2DModel": Family(False, "hidden_states", _qwen),
}


def grid_of(model, family, given):
    """The Grid of a call. given: {argument's name: value}."""
    halves = model.__class__.__name__.removeprefix("Pladis").startswith("UNet")
    return Grid(*family.grid(model, given), halves, family.text_first)
