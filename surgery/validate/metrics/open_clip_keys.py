"""The weights of an open_clip ViT as a transformers CLIPModel names them.

open_clip's names are those of CLIP in mlfoundations/open_clip (src/open_clip/model.py and transformer.py). Its
attention keeps query, key and value in one matrix, and its two projections are matrices to multiply by from the right
where transformers has Linear layers. What the conversion leaves to the config: hidden_act "gelu" for ViT-H/14, where
OpenAI's own CLIP has "quick_gelu", and the text feature at the first end token.
"""

from surgery.validate.metrics.strict_weights import renamed

_BLOCK = {
    "ln_1": "layer_norm1",
    "attn.out_proj": "self_attn.out_proj",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_NORMS = {
    "visual.ln_pre": "vision_model.pre_layrnorm",  # so spelt in transformers
    "visual.ln_post": "vision_model.post_layernorm",
    "ln_final": "text_model.final_layer_norm",
}
_TENSORS = {
    "logit_scale": "logit_scale",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "text_projection": "text_projection.weight",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.proj": "visual_projection.weight",
}
_TRANSPOSED = ("text_projection.weight", "visual_projection.weight")


def transformers_tensors(tensors, config, path):
    """{transformers' name: tensor} for the {open_clip name: tensor} of the file `path` and a CLIPConfig of its sizes.

    InputError names the missing and the unexpected as open_clip does.
    """
    result = {}
    for name, tensor in renamed(tensors, _names(config), path).items():
        if ".in_proj." in name:  # (3 * width, width) or (3 * width,)
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                result[name.replace("in_proj", f"{letter}_proj")] = part
        else:
            result[name] = tensor.T if name in _TRANSPOSED else tensor
    return result


def _names(config):
    names = dict(_TENSORS)
    modules = dict(_NORMS)
    towers = (
        ("visual.transformer.resblocks", "vision_model.encoder.layers", config.vision_config.num_hidden_layers),
        ("transformer.resblocks", "text_model.encoder.layers", config.text_config.num_hidden_layers),
    )
    for blocks, layers, count in towers:
        for index in range(count):
            for kind in ("weight", "bias"):
                names[f"{blocks}.{index}.attn.in_proj_{kind}"] = f"{layers}.{index}.self_attn.in_proj.{kind}"
            for ours, theirs in _BLOCK.items():
                modules[f"{blocks}.{index}.{ours}"] = f"{layers}.{index}.{theirs}"
    for ours, theirs in modules.items():
        names |= {f"{ours}.{kind}": f"{theirs}.{kind}" for kind in ("weight", "bias")}
    return names
