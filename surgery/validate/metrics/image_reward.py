"""ImageReward: how people would rate an image for its prompt (Xu et al. 2023, arXiv 2304.05977)."""

import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from transformers import BertTokenizer, BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

from surgery.errors import InputError

from ..prompts import Prompt
from .clip import cropped_pixels
from .info import Device, Files, HubFiles, Images, Info, in_batches
from .weights import filled, filled_module, renamed, torch_checkpoint

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


def transformers_tensors(
    tensors: Mapping[str, torch.Tensor], vision_layers: int, text_layers: int, path: Path
) -> tuple[dict[str, torch.Tensor], ...]:
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


_WEIGHT_FILE = "ImageReward.pt"
_CONFIG_FILE = "med_config.json"

# Of med_config.json, what BlipTextConfig calls by the same name.
_TEXT_SETTINGS = (
    "hidden_act",
    "hidden_size",
    "intermediate_size",
    "layer_norm_eps",
    "max_position_embeddings",
    "num_attention_heads",
    "num_hidden_layers",
    "pad_token_id",
    "vocab_size",
)
_TOKENS = 35  # that a prompt is cut or padded to, start and end token included
_HEAD_SIZES = (1024, 128, 64, 16, 1)

# Of the training set's rewards, so that scores have mean 0 and variance 1 there.
_MEAN = 0.16717362830052426
_STD = 1.0333394966054072


class ImageReward:
    """The reward for each image in standard deviations from the mean of the training set: mostly -2 to 2.

    As in THUDM/ImageReward (ImageReward/ImageReward.py): a BLIP text encoder that attends to a ViT-L/16's image
    tokens, and a head without activations on its first token. Prompts are cut to 35 tokens. With the same random
    weights, images and prompts the reference (version 1.5) gave the same rewards, to rounding.
    """

    info = Info(
        name="image_reward",
        title="ImageReward",
        margin=0.02,
        kind="score",
        higher_is_better=True,
        source="Xu et al. 2023, arXiv 2304.05977; repository THUDM/ImageReward, ImageReward-v1.0",
        checkpoints={
            # formerly THUDM/ImageReward, which leads there
            "model": HubFiles(
                "zai-org/ImageReward", (_WEIGHT_FILE, _CONFIG_FILE), "5736be03b2652728fb87788c9797b0570450ab72"
            ),
            "tokenizer": HubFiles(
                "google-bert/bert-base-uncased",
                ("tokenizer.json", "tokenizer_config.json", "vocab.txt"),
                "86b5e0934494bd15c9632b12f734a8a67f723594",
            ),
        },
    )

    # BLIP's "large" vision transformer (models/BLIP/blip.py, create_vit), which no file of the checkpoint describes
    vision = {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 224,
        "patch_size": 16,
        "layer_norm_eps": 1e-6,
    }

    def __init__(self, files: Files, device: Device = "cpu") -> None:
        """files: {"model": folder, "tokenizer": folder}. InputError names what is missing there or does not fit."""
        path = Path(files["model"], _WEIGHT_FILE)
        vision_config = BlipVisionConfig(**self.vision)
        text_config = _text_config(Path(files["model"], _CONFIG_FILE), vision_config.hidden_size)
        vision, text, head = transformers_tensors(
            torch_checkpoint(path), vision_config.num_hidden_layers, text_config.num_hidden_layers, path
        )
        self._device = device
        self._tokenizer = _tokenizer(files["tokenizer"], text_config.vocab_size)
        self._vision = filled(BlipVisionModel, vision_config, vision, path).to(device)
        self._text = filled(BlipTextModel, text_config, text, path, add_pooling_layer=False).to(device)
        self._head = filled_module(_head(text_config.hidden_size), head, path).to(device)

    def score(self, images: Images, prompts: Sequence[Prompt]) -> np.ndarray:
        """float64 array (n,) for n RGB PIL images and their `Prompt`s."""
        return in_batches(self._score, images, prompts)

    def _score(self, images, texts):
        pixels = cropped_pixels(images, self.vision["image_size"]).to(self._device)
        tokens = self._tokenizer(
            texts, padding="max_length", truncation=True, max_length=_TOKENS, return_tensors="pt"
        ).to(self._device)
        image_tokens = self._vision(pixels).last_hidden_state  # (n, 1 + patches, hidden_size)
        states = self._text(
            tokens.input_ids, attention_mask=tokens.attention_mask, encoder_hidden_states=image_tokens
        ).last_hidden_state
        rewards = self._head(states[:, 0])[:, 0]
        return (rewards.double() - _MEAN) / _STD


def _text_config(path, image_width):
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        known = {name: settings[name] for name in _TEXT_SETTINGS}
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}); delete it and fetch it again") from error
    except KeyError as error:
        raise InputError(f"{path} does not say {error.args[0]}, so it is no config of ImageReward") from error
    # is_decoder is what gives a BlipTextModel its cross-attention; its mask stays bidirectional.
    return BlipTextConfig(**known, encoder_hidden_size=image_width, is_decoder=True)


def _tokenizer(folder, size):
    try:
        tokenizer = BertTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}: no BERT tokenizer can be read there ({error}); fetch it again") from error
    tokenizer.add_tokens(["[DEC]", "[ENC]"], special_tokens=True)  # BLIP's two, after BERT's own
    if len(tokenizer) != size:
        raise InputError(f"{folder}: the tokenizer has {len(tokenizer)} tokens, ImageReward {size}; fetch both again")
    return tokenizer


def _head(width):
    linears = [torch.nn.Linear(*sizes) for sizes in pairwise((width, *_HEAD_SIZES))]
    return torch.nn.Sequential(OrderedDict(zip(map(str, HEAD_LAYERS), linears, strict=True)))
