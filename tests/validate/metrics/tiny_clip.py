"""Tiny CLIP checkpoints in the files that real ones come in, and CLIP's forward pass in plain PyTorch."""

import json

import torch

from ...tiny import clip_tokenizer

SIZE, PATCH, WIDTH, LAYERS, HEADS, EMBEDDING = 28, 14, 32, 2, 4, 24
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
VOCABULARY, START, END = 514, 512, 513
PROMPTS = ["a red circle to the left of a blue square", "Two  green stars!", "", "a cat, " * 40]


def pictures(sizes, seed=0):
    """Smooth random RGB images of the (width, height) in `sizes`."""
    from PIL import Image

    generator = torch.Generator().manual_seed(seed)
    coarse = [torch.randint(0, 256, (5, 7, 3), generator=generator, dtype=torch.uint8) for _ in sizes]
    return [
        Image.fromarray(pixels.numpy()).resize(size, Image.Resampling.BICUBIC)
        for pixels, size in zip(coarse, sizes, strict=True)
    ]


def prompts(texts):
    """`Prompt`s of the texts."""
    from surgery.validate.prompts import Prompt

    return [Prompt(text) for text in texts]


def open_clip_tensors(seed=0):
    """Random weights of a tiny CLIP under open_clip's names, the values such as float16 holds."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape, spread=1.0, around=0.0):
        return (around + spread * torch.randn(shape, generator=generator)).half().float()

    def norm(name):
        return {f"{name}.weight": random(WIDTH, spread=0.2, around=1), f"{name}.bias": random(WIDTH, spread=0.2)}

    def linear(name, inputs, outputs, separator="."):
        weight, bias = random(outputs, inputs, spread=1.5 / inputs**0.5), random(outputs, spread=0.3)
        return {f"{name}{separator}weight": weight, f"{name}{separator}bias": bias}

    tensors = {
        "logit_scale": torch.tensor(3.0),
        "token_embedding.weight": random(VOCABULARY, WIDTH),
        "positional_embedding": random(77, WIDTH),
        "text_projection": random(WIDTH, EMBEDDING),
        "visual.class_embedding": random(WIDTH),
        "visual.conv1.weight": random(WIDTH, 3, PATCH, PATCH, spread=0.1),
        "visual.positional_embedding": random((SIZE // PATCH) ** 2 + 1, WIDTH),
        "visual.proj": random(WIDTH, EMBEDDING),
        **norm("visual.ln_pre"),
        **norm("visual.ln_post"),
        **norm("ln_final"),
    }
    for tower in ("visual.transformer", "transformer"):
        for index in range(LAYERS):
            block = f"{tower}.resblocks.{index}"
            tensors |= norm(f"{block}.ln_1") | norm(f"{block}.ln_2")
            tensors |= linear(f"{block}.attn.in_proj", WIDTH, 3 * WIDTH, "_")
            tensors |= linear(f"{block}.attn.out_proj", WIDTH, WIDTH)
            tensors |= linear(f"{block}.mlp.c_fc", WIDTH, 4 * WIDTH) | linear(f"{block}.mlp.c_proj", 4 * WIDTH, WIDTH)
    return tensors


def constant_features(tensors, image_feature, text_feature):
    """The weights changed so that every image and every text has the given feature, vectors of EMBEDDING numbers."""
    changed = dict(tensors)
    for norm, projection, feature in (
        ("visual.ln_post", "visual.proj", image_feature),
        ("ln_final", "text_projection", text_feature),
    ):
        changed[f"{norm}.weight"] = torch.zeros(WIDTH)
        changed[f"{norm}.bias"] = torch.eye(WIDTH)[0]
        changed[projection] = torch.zeros(WIDTH, EMBEDDING)
        changed[projection][0] = torch.tensor(feature)
    return changed


def hub_tensors(tensors):
    """open_clip's names -> those in the model.safetensors of a CLIP model on the Hub."""
    renames = {
        "visual.transformer.resblocks": "vision_model.encoder.layers",
        "transformer.resblocks": "text_model.encoder.layers",
        "visual.class_embedding": "vision_model.embeddings.class_embedding",
        "visual.conv1": "vision_model.embeddings.patch_embedding",
        "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
        "visual.ln_pre": "vision_model.pre_layrnorm",
        "visual.ln_post": "vision_model.post_layernorm",
        "visual.proj": "visual_projection.weight",
        "token_embedding": "text_model.embeddings.token_embedding",
        "positional_embedding": "text_model.embeddings.position_embedding.weight",
        "text_projection": "text_projection.weight",
        "ln_final": "text_model.final_layer_norm",
    }
    parts = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "c_fc": "fc1", "c_proj": "fc2", "attn.": "self_attn."}
    renamed = {}
    for name, tensor in tensors.items():
        start = next((start for start in renames if name.startswith(start)), "")
        name = name.replace(start, renames.get(start, ""), 1)
        for ours, theirs in parts.items():
            name = name.replace(ours, theirs)
        if "in_proj_" in name:
            for row, letter in enumerate("qkv"):
                part = tensor[row * WIDTH : (row + 1) * WIDTH].contiguous()
                renamed[name.replace("in_proj_", f"{letter}_proj.")] = part
        else:
            renamed[name] = tensor.T.contiguous() if name.endswith("projection.weight") else tensor
    for tower, count in (("vision", (SIZE // PATCH) ** 2 + 1), ("text", 77)):  # as older files have them
        renamed[f"{tower}_model.embeddings.position_ids"] = torch.arange(count)[None]
    return renamed


def write_config(folder, activation):
    """A CLIP model's config.json."""
    tower = {
        "hidden_act": activation,
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "num_attention_heads": HEADS,
        "num_hidden_layers": LAYERS,
        "projection_dim": EMBEDDING,
    }
    special = {"bos_token_id": START, "eos_token_id": END, "pad_token_id": END}
    config = {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": EMBEDDING,
        "text_config": {**tower, **special, "vocab_size": VOCABULARY, "model_type": "clip_text_model"},
        "vision_config": {**tower, "image_size": SIZE, "patch_size": PATCH, "model_type": "clip_vision_model"},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))


def write_processor(folder):
    """The tokenizer's files and preprocessor_config.json as old repositories have it."""
    folder.mkdir(parents=True, exist_ok=True)
    clip_tokenizer().save_pretrained(folder)
    config = {
        "crop_size": SIZE,
        "do_center_crop": True,
        "do_normalize": True,
        "do_resize": True,
        "feature_extractor_type": "CLIPFeatureExtractor",
        "image_mean": MEAN.flatten().tolist(),
        "image_std": STD.flatten().tolist(),
        "resample": 3,
        "size": SIZE,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(config))


def write_weights(folder, tensors):
    """A Hub repository's model.safetensors of open_clip's `tensors`."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file(hub_tensors(tensors), folder / "model.safetensors", {"format": "pt"})


def cosines(tensors, pixels, texts, activation):
    """float32 tensor (n,): CLIP by its definition on pixels (n, 3, SIZE, SIZE); texts are cut to 77 tokens."""
    images = torch.stack([image_feature(tensors, one, activation) for one in pixels])
    words = torch.stack([text_feature(tensors, token_ids(text), activation) for text in texts])
    return (images * words).sum(1) / images.norm(dim=1) / words.norm(dim=1)


def token_ids(text):
    """The tiny tokenizer's ids, without padding: lower case, single spaces, bytes, the end of each word marked."""
    letters = clip_tokenizer().get_vocab()
    return [START, *[letters[letter] for letter in clip_tokenizer().tokenize(text)][:75], END]


def image_feature(tensors, pixels, activation):
    """(EMBEDDING,) of pixels (3, SIZE, SIZE)."""
    patches = torch.nn.functional.unfold(pixels[None], PATCH, stride=PATCH)[0].T  # (patches, 3 * PATCH * PATCH)
    states = torch.cat([tensors["visual.class_embedding"][None], patches @ tensors["visual.conv1.weight"].flatten(1).T])
    states = _norm(tensors, "visual.ln_pre", states + tensors["visual.positional_embedding"])
    states = _transformer(tensors, "visual.transformer", states, None, activation)
    return _norm(tensors, "visual.ln_post", states[0]) @ tensors["visual.proj"]


def text_feature(tensors, ids, activation):
    """(EMBEDDING,) at the last of the ids, which is the end token."""
    states = tensors["token_embedding.weight"][ids] + tensors["positional_embedding"][: len(ids)]
    later = torch.full((len(ids), len(ids)), -torch.inf).triu(1)
    states = _transformer(tensors, "transformer", states, later, activation)
    return _norm(tensors, "ln_final", states)[-1] @ tensors["text_projection"]


def _norm(tensors, name, states):
    return torch.nn.functional.layer_norm(states, (WIDTH,), tensors[f"{name}.weight"], tensors[f"{name}.bias"], 1e-5)


def _transformer(tensors, tower, states, mask, activation):
    for index in range(LAYERS):
        block = f"{tower}.resblocks.{index}"
        attention = torch.nn.MultiheadAttention(WIDTH, HEADS)
        attention.load_state_dict(
            {name.split(".attn.")[1]: tensor for name, tensor in tensors.items() if name.startswith(f"{block}.attn.")}
        )
        normed = _norm(tensors, f"{block}.ln_1", states)
        states = states + attention(normed, normed, normed, attn_mask=mask, need_weights=False)[0]
        hidden = _linear(tensors, f"{block}.mlp.c_fc", _norm(tensors, f"{block}.ln_2", states))
        hidden = hidden * torch.sigmoid(1.702 * hidden) if activation == "quick_gelu" else _gelu(hidden)
        states = states + _linear(tensors, f"{block}.mlp.c_proj", hidden)
    return states.detach()


def _linear(tensors, name, states):
    return states @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"]


def _gelu(states):
    return states * 0.5 * (1 + torch.erf(states / 2**0.5))
