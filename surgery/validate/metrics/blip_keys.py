"""The weights of ImageReward's BLIP as transformers' BlipVisionModel and BlipTextModel name them, and its scoring head.

The file's names are those of THUDM/ImageReward (ImageReward/ImageReward.py and models/BLIP/vit.py, med.py). The text
encoder's are transformers' own.
"""

from surgery.validate.metrics.strict_weights import renamed

_VISION = "blip.visual_encoder."
_TEXT = "blip.text_encoder."
_HEAD = "mlp."

_BLOCK = {
    "norm1": "layer_norm1",
    "attn.qkv": "self_attn.qkv",
    "attn.proj": "self_attn.projection",
    "norm2": "layer_norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_ATTENTION = ("self.query", "self.key", "self.value", "output.dense", "output.LayerNorm")
HEAD_LAYERS = (0, 2, 4, 6, 7)  # those between them are dropout

# In the file, but not in the score: two projections that BLIP was pretrained with, and the positions 0, 1, 2, ...
_UNUSED = (
    *(f"blip.{modality}_proj.{kind}" for modality in ("vision", "text") for kind in ("weight", "bias")),
    f"{_TEXT}embeddings.position_ids",
)


def transformers_tensors(tensors, vision_layers, text_layers, path):
    """(vision, text, head): {name: tensor} for BlipVisionModel, BlipTextModel and the head's Sequential.

    InputError names what is missing in the file `path` or unexpected, as it stands there.
    """
    names = _vision_names(vision_layers) | _text_names(text_layers) | _both(f"{_HEAD}layers.", "head.", HEAD_LAYERS)
    named = renamed(tensors, names, path, _UNUSED)
    return tuple(
        {name.removeprefix(prefix): tensor for name, tensor in named.items() if name.startswith(prefix)}
        for prefix in ("vision.", "text.", "head.")
    )


def _vision_names(layers):
    names = {
        f"{_VISION}cls_token": "vision.embeddings.class_embedding",
        f"{_VISION}pos_embed": "vision.embeddings.position_embedding",
    }
    modules = {"patch_embed.proj": "embeddings.patch_embedding", "norm": "post_layernorm"}
    for index in range(layers):
        modules |= {f"blocks.{index}.{ours}": f"encoder.layers.{index}.{theirs}" for ours, theirs in _BLOCK.items()}
    for ours, theirs in modules.items():
        names |= {f"{_VISION}{ours}.{kind}": f"vision.{theirs}.{kind}" for kind in ("weight", "bias")}
    return names


def _text_names(layers):
    modules = ["embeddings.LayerNorm"]
    for index in range(layers):
        layer = f"encoder.layer.{index}."
        modules += [f"{layer}{kind}.{part}" for kind in ("attention", "crossattention") for part in _ATTENTION]
        modules += [f"{layer}{part}" for part in ("intermediate.dense", "output.dense", "output.LayerNorm")]
    embeddings = {
        f"{_TEXT}embeddings.{kind}_embeddings.weight": f"text.embeddings.{kind}_embeddings.weight"
        for kind in ("word", "position")
    }
    return embeddings | _both(_TEXT, "text.", modules)


def _both(ours, theirs, modules):
    return {f"{ours}{module}.{kind}": f"{theirs}{module}.{kind}" for module in modules for kind in ("weight", "bias")}
