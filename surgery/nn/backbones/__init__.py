"""Every backbone that there is surgery for: one line for each model class of diffusers. Any other is refused by name.

A line says where the model's cross-attention or joint attention is, where in it the text stands, and which files of
surgery/nn hold its patched form. The attention classes themselves are told apart in those files: each names the
diffusers class and the processors that it stands for, and refuses every other.
"""

import importlib
from dataclasses import dataclass
from pathlib import PurePosixPath

# Imports run downward only, so this order defines every name before it is used.
_CORE = (
    "kernels/entmax.py",
    "operators.py",
    "kernels/reference.py",
    "kernels/cpu_solver.py",
    "kernels/cpu_source.py",
    "kernels/cpu.py",
    "kernels/triton_tiles.py",
    "kernels/triton_short.py",
    "kernels/triton_solver.py",
    "kernels/triton_held.py",
    "kernels/triton_long.py",
    "kernels/triton_kernel.py",
    "kernels/fused.py",
    "functional.py",
    "hooks.py",
    "schedule.py",
    "module.py",
)
_CROSS = ("backbones/cross.py", "model.py")
_JOINT = ("joint.py", "model.py")


@dataclass(frozen=True)
class Backbone:
    """One model class of diffusers and its patched form.

    stock, patched: names of the classes. sites: glob patterns over module paths, for people to read. text: where the
    text's keys are. files: of surgery/nn, beyond those that all share; the last one defines `patched`.
    """

    stock: str
    patched: str
    sites: str
    text: str
    files: tuple[str, ...]

    @property
    def parts(self):
        """All the files that an artifact of this backbone ships, in the order in which they are joined."""
        return _CORE + self.files

    def patched_class(self):
        """The patched model class; imports diffusers' model."""
        module = importlib.import_module(f"{__name__}.{PurePosixPath(self.files[-1]).stem}")
        return getattr(module, self.patched)


_ALL = (
    Backbone(
        stock="UNet2DConditionModel",
        patched="PladisUNet2DConditionModel",
        sites="*.transformer_blocks.*.attn2",
        text="all keys, those of an IP-Adapter's image tokens apart",
        files=(*_CROSS, "backbones/unet.py"),
    ),
    Backbone(
        stock="PixArtTransformer2DModel",
        patched="PladisPixArtTransformer2DModel",
        sites="transformer_blocks.*.attn2",
        text="all keys; padding is masked",
        files=(*_CROSS, "backbones/pixart.py"),
    ),
    Backbone(
        stock="SanaTransformer2DModel",
        patched="PladisSanaTransformer2DModel",
        sites="transformer_blocks.*.attn2",
        text="all keys; padding is masked",
        files=(*_CROSS, "backbones/sana.py"),
    ),
    Backbone(
        stock="SD3Transformer2DModel",
        patched="PladisSD3Transformer2DModel",
        sites="transformer_blocks.*.attn",
        text="the last keys of image and text together",
        files=(*_JOINT, "backbones/sd3.py"),
    ),
    Backbone(
        stock="QwenImageTransformer2DModel",
        patched="PladisQwenImageTransformer2DModel",
        sites="transformer_blocks.*.attn",
        text="the first keys of text and image together; padding is masked",
        files=(*_JOINT, "backbones/qwen_image.py"),
    ),
    Backbone(
        stock="LTXVideoTransformer3DModel",
        patched="PladisLTXVideoTransformer3DModel",
        sites="transformer_blocks.*.attn2",
        text="all keys; padding is masked",
        files=("model.py", "backbones/ltx.py"),
    ),
    Backbone(
        stock="WanTransformer3DModel",
        patched="PladisWanTransformer3DModel",
        sites="blocks.*.attn2",
        text="all keys, padding among them; of image-to-video models the last 512, behind the image's",
        files=("model.py", "backbones/wan.py"),
    ),
    Backbone(
        stock="MochiTransformer3DModel",
        patched="PladisMochiTransformer3DModel",
        sites="transformer_blocks.*.attn1",
        text="the last keys of image and text together; padding is masked",
        files=(*_JOINT, "backbones/mochi.py"),
    ),
    Backbone(
        stock="HunyuanVideoTransformer3DModel",
        patched="PladisHunyuanVideoTransformer3DModel",
        sites="transformer_blocks.*.attn, single_transformer_blocks.*.attn",
        text="the last keys of image and text together; padding is masked",
        files=(*_JOINT, "backbones/hunyuan_video.py"),
    ),
    Backbone(
        stock="FluxTransformer2DModel",
        patched="PladisFluxTransformer2DModel",
        sites="transformer_blocks.*.attn, single_transformer_blocks.*.attn",
        text="the first keys of text and image together, padding among them",
        files=(*_JOINT, "backbones/flux_streams.py", "backbones/flux.py"),
    ),
    Backbone(
        stock="Flux2Transformer2DModel",
        patched="PladisFlux2Transformer2DModel",
        sites="transformer_blocks.*.attn, single_transformer_blocks.*.attn",
        text="the first keys of text and image together, padding among them",
        files=(*_JOINT, "backbones/flux_streams.py", "backbones/flux2.py"),
    ),
)
BACKBONES = {backbone.stock: backbone for backbone in _ALL}
PATCHED = {backbone.patched: backbone for backbone in _ALL}
