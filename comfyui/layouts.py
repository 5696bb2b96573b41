"""Where ComfyUI's diffusion models attend to the text, by class: which modules, and where the text stands there.

A module of ComfyUI's is named as diffusers names it (`path`), so that layers mean the same here, in recipes and in
artifacts. Facts of ComfyUI's code, read at commit a125cd8 (2025-10-11) and, for classes that came later, at 617048a.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

Argument = tuple[str, int]  # of a module's forward(): its name and its position


class Stack(NamedTuple):
    """Like modules of a model, which attend to the text or tell how much of a sequence is image.

    modules: a pattern over their whole ComfyUI paths. path: theirs in diffusers, {} being the groups of `modules`; None
    for those that only tell. kind: "cross" or "joint". block: "double", "single", or "". text: the argument that holds
    the text's states; in joint attention with None the text is what is no image of `sequence`. image: the argument
    with the image's states, whose length is remembered. images: the argument that counts tokens of another image at
    the text's front, to which a first attention of the module's own goes.
    """

    modules: str
    path: str | None = None
    kind: str = "joint"
    block: str = ""
    text: Argument | None = None
    sequence: Argument | None = None
    image: Argument | None = None
    images: Argument | None = None


class Layout(NamedTuple):
    """The stacks of a class. text_first: in a joint sequence. negative: that tokens may be put behind the text's.

    uneven: that rows of a batch may have the image begin in different places, by the sums of `attention_mask`.
    """

    stacks: tuple[Stack, ...]
    text_first: bool = True
    negative: bool = False
    uneven: bool = False


def _flux(double="transformer_blocks.{}.attn", single="single_transformer_blocks.{}.attn"):
    return (
        Stack(r"double_blocks\.(\d+)", double, block="double", text=("txt", 1), image=("img", 0)),
        Stack(r"single_blocks\.(\d+)", single, block="single", sequence=("x", 0)),
    )


def _cross(modules, path, **more):
    return Stack(modules, path, "cross", text=("context", 1), **more)


# {end of the class's module and name: Layout}; a class that inherits from one has its layout.
LAYOUTS: Mapping[str, Layout] = {
    "openaimodel.UNetModel": Layout((), negative=True),  # unet_sites
    "flux.model.Flux": Layout(_flux(), negative=True),
    "chroma.model.Chroma": Layout(_flux(), negative=True),
    "hunyuan_video.model.HunyuanVideo": Layout(_flux(), text_first=False),
    "diffusionmodules.mmdit.MMDiT": Layout(
        (
            Stack(
                r"joint_blocks\.(\d+)",
                "transformer_blocks.{}.attn",
                block="double",
                text=("context", 0),
                image=("x", 1),
            ),
        ),
        negative=True,
    ),
    "qwen_image.model.QwenImageTransformer2DModel": Layout(
        (
            Stack(
                r"transformer_blocks\.(\d+)",
                "transformer_blocks.{}.attn",
                block="double",
                text=("encoder_hidden_states", 1),
                image=("hidden_states", 0),
            ),
        ),
        negative=True,
    ),
    "aura.mmdit.MMDiT": Layout(
        (
            Stack(
                r"double_layers\.(\d+)",
                "joint_transformer_blocks.{}.attn",
                block="double",
                text=("c", 0),
                image=("x", 1),
            ),
            Stack(r"single_layers\.(\d+)", "single_transformer_blocks.{}.attn", block="single", sequence=("cx", 0)),
        )
    ),
    "hidream.model.HiDreamImageTransformer2DModel": Layout(
        (
            Stack(
                r"double_stream_blocks\.(\d+)",
                "double_stream_blocks.{}.block.attn1",
                block="double",
                text=("text_tokens", 2),
                image=("image_tokens", 0),
            ),
            Stack(
                r"single_stream_blocks\.(\d+)",
                "single_stream_blocks.{}.block.attn1",
                block="single",
                sequence=("image_tokens", 0),
            ),
        ),
        text_first=False,
    ),
    "lumina.model.NextDiT": Layout(  # Lumina 2 and Z-Image
        (
            Stack(r"noise_refiner\.\d+", image=("x", 0)),
            Stack(r"layers\.(\d+)", "layers.{}.attention", block="single", sequence=("x", 0)),
        ),
        uneven=True,
    ),
    "wan.model.WanModel": Layout(
        (_cross(r"blocks\.(\d+)\.cross_attn", "blocks.{}.attn2", images=("context_img_len", 2)),)
    ),
    "lightricks.model.LTXVModel": Layout((_cross(r"transformer_blocks\.(\d+)\.attn2", "transformer_blocks.{}.attn2"),)),
    "cosmos.predict2.MiniTrainDIT": Layout((_cross(r"blocks\.(\d+)\.cross_attn", "transformer_blocks.{}.attn2"),)),
    "cosmos.model.GeneralDIT": Layout(
        (_cross(r"blocks\.block(\d+)\.blocks\.1\.block\.attn", "transformer_blocks.{}.attn2"),)
    ),
    "pixart.pixartms.PixArtMS": Layout(
        (Stack(r"blocks\.(\d+)\.cross_attn", "transformer_blocks.{}.attn2", "cross", text=("cond", 1)),)
    ),
}


class Site(NamedTuple):
    """A place where a model attends to the text, or tells of it: its stack, the module, and its path in diffusers."""

    stack: Stack
    module: Any
    path: str | None
    block: str  # down, mid, up, double, single, or ""


def layout_of(model: Any) -> Layout | None:
    """The layout of a diffusion model of ComfyUI's; None where its class is not known."""
    for cls in type(model).__mro__:
        name = f"{cls.__module__}.{cls.__qualname__}"
        for key, layout in LAYOUTS.items():
            if name.endswith(f".{key}"):
                return layout
    return None


def sites_of(model: Any, layout: Layout) -> list[Site]:
    """The sites of a model, in its order."""
    if not layout.stacks:
        return unet_sites(model)
    found = []
    for path, module in model.named_modules():
        for stack in layout.stacks:
            if match := re.fullmatch(stack.modules, path):
                name = None if stack.path is None else stack.path.format(*match.groups())
                if name and layout.uneven and not hasattr(model, "cap_pad_token"):
                    name = name.replace(".attention", ".attn")  # Lumina 2, where Z-Image has the former
                found.append(Site(stack, module, name, stack.block))
    return found


def unet_sites(model: Any) -> list[Site]:
    """The cross-attentions of a UNet, named as in diffusers: there levels count, here blocks of all levels together."""
    found, level, place = [], 0, 0
    for block in list(model.input_blocks)[1:]:  # the first is a convolution
        if any(type(part).__name__ == "Downsample" for part in block):
            level, place = level + 1, 0
            continue
        found += _attentions(block, "down", f"down_blocks.{level}.attentions.{place}")
        place += 1
    found += _attentions(model.middle_block, "mid", "mid_block.attentions.0")
    level, place = 0, 0
    for block in model.output_blocks:
        found += _attentions(block, "up", f"up_blocks.{level}.attentions.{place}")
        place += 1
        if any(type(part).__name__ == "Upsample" for part in block):
            level, place = level + 1, 0
    return found


def _attentions(parts, group, path):
    stack = _cross("", None)
    return [
        Site(stack, block.attn2, f"{path}.transformer_blocks.{index}.attn2", group)
        for part in parts
        for index, block in enumerate(getattr(part, "transformer_blocks", ()))
        if getattr(block, "attn2", None) is not None
    ]
