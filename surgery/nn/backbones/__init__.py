"""Every backbone that there is surgery for, by its model class of diffusers; any other is refused by name.

All that is known of one stands in its own file here: its attention, whose classes name the diffusers class and the
processors that they stand for and refuse every other; its model class; and, last, its record (record.py). A new
backbone is one such file and its line below, which can be read without torch.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .record import Backbone

# {model class: the file here that has it}
BACKBONES = {
    "UNet2DConditionModel": "unet",
    "PixArtTransformer2DModel": "pixart",
    "SanaTransformer2DModel": "sana",
    "SD3Transformer2DModel": "sd3",
    "QwenImageTransformer2DModel": "qwen_image",
    "LTXVideoTransformer3DModel": "ltx",
    "WanTransformer3DModel": "wan",
    "MochiTransformer3DModel": "mochi",
    "HunyuanVideoTransformer3DModel": "hunyuan_video",
    "FluxTransformer2DModel": "flux",
    "Flux2Transformer2DModel": "flux2",
    "ChromaTransformer2DModel": "chroma",
    "ZImageTransformer2DModel": "z_image",
    "Krea2Transformer2DModel": "krea2",
    "LongCatImageTransformer2DModel": "longcat_image",
    "OvisImageTransformer2DModel": "ovis_image",
    "BriaTransformer2DModel": "bria",
    "BriaFiboTransformer2DModel": "bria_fibo",
    "BriaFibo2Transformer2DModel": "bria_fibo2",
    "LTX2VideoTransformer3DModel": "ltx2",
    "CosmosTransformer3DModel": "cosmos",
    "ErnieImageTransformer2DModel": "ernie_image",
    "HunyuanImageTransformer2DModel": "hunyuan_image",
    "HunyuanVideo15Transformer3DModel": "hunyuan_video15",
    "Lumina2Transformer2DModel": "lumina2",
    "CogView4Transformer2DModel": "cogview4",
    "AuraFlowTransformer2DModel": "aura_flow",
    "PRXTransformer2DModel": "prx",
    "Kandinsky5Transformer3DModel": "kandinsky5",
    "HiDreamImageTransformer2DModel": "hidream",
    "SanaVideoTransformer3DModel": "sana_video",
    "Flux3Transformer2DModel": "flux3",
    "GlmImageTransformer2DModel": "glm_image",
    "NucleusMoEImageTransformer2DModel": "nucleus_moe",
}
PATCHED = {f"Pladis{stock}": file for stock, file in BACKBONES.items()}
# Those that guidance alone is for: the operators change nothing there.
GUIDED_ALONE = {"UNetSpatioTemporalConditionModel": "unet"}
# Models that were looked at, and why none of their attention is replaced.
REFUSED = {
    "QwenImage21Transformer2DModel": (
        "text and the images that it is given alternate in one sequence under a block-causal mask, so no slice is text"
    ),
    "Ideogram4Transformer2DModel": (
        "several prompts and images are packed into one sequence, where an indicator for each token says what it is"
    ),
    "OmniGenTransformer2DModel": (
        "prompt, images and time are one sequence of a language model, told apart by their place alone"
    ),
}


def backbone_of(model_class: str) -> "Backbone":
    """The record of a model class or patched class, by its name, a key of one of the tables; imports its model."""
    tables = {**BACKBONES, **PATCHED, **GUIDED_ALONE}
    module = importlib.import_module(f"{__name__}.{tables[model_class]}")
    return module.GUIDED_ALONE if model_class in GUIDED_ALONE else module.BACKBONE
