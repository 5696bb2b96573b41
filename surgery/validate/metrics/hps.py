"""HPS v2 and v2.1: what people prefer on the Human Preference Dataset v2 (Wu et al. 2023, arXiv 2306.09341)."""

import html
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from transformers import CLIPConfig, CLIPModel

from ..prompts import Prompt
from .clip import CONFIG_FILE, TOKENIZER_FILES, ClipModel, load_config, load_tokenizer, padded_pixels
from .clip_scores import VIT_H_14
from .info import Device, Files, HubFiles, Images, Info, in_batches
from .weights import filled, renamed, torch_checkpoint

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


def transformers_tensors(
    tensors: Mapping[str, torch.Tensor], config: CLIPConfig, path: Path
) -> dict[str, torch.Tensor]:
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


# ftfy, which open_clip cleans prompts with, makes these curly quotes straight.
_STRAIGHT = str.maketrans(
    dict.fromkeys("\u02bc\u2018\u2019\u201a\u201b", "'") | dict.fromkeys("\u201c\u201d\u201e\u201f", '"')
)


class HpsV2:
    """The cosine for each image, some 0.27, as `hpsv2.score` of tgxs002/HPSv2 (hpsv2/img_score.py) gives it.

    Its benchmark tables, and some papers, show 100 times that. The checkpoint is an open_clip ViT-H-14 whose values are
    float16; here it computes in float32 where the reference does so under automatic mixed precision. Prompts are
    cleaned as there, but for what the reference's ftfy repairs beyond quotes and entities (wrongly decoded text,
    ligatures, full-width letters), and cut to 77 tokens. With the same random weights, images and prompts, and both in
    float32, the reference's model, transform and tokenizer gave the same scores, to rounding.
    """

    info = Info(
        name="hps_v2",
        title="HPSv2",
        margin=0.0003,
        kind="score",
        higher_is_better=True,
        source="Wu et al. 2023, arXiv 2306.09341; repository tgxs002/HPSv2, version v2.0",
        checkpoints={
            "weights": HubFiles("xswu/HPSv2", ("HPS_v2_compressed.pt",), "697403c78157020a1ae59d23f111aa58ced35b0a"),
            "processor": HubFiles(VIT_H_14[0], (CONFIG_FILE, *TOKENIZER_FILES), VIT_H_14[1]),
        },
    )

    def __init__(self, files: Files, device: Device = "cpu") -> None:
        """files: {"weights": folder, "processor": folder}. InputError names what is missing there or does not fit."""
        published = self.info.checkpoints["weights"]
        assert isinstance(published, HubFiles)
        path = Path(files["weights"], published.files[0])
        config = load_config(files["processor"])
        model = filled(CLIPModel, config, transformers_tensors(torch_checkpoint(path), config, path), path)
        pixels = partial(padded_pixels, size=config.vision_config.image_size)
        self._clip = ClipModel(model, load_tokenizer(files["processor"]), pixels, device)

    def score(self, images: Images, prompts: Sequence[Prompt]) -> np.ndarray:
        """float64 array (n,) for n RGB PIL images and their `Prompt`s."""
        return in_batches(self._score, images, prompts)

    def _score(self, images, texts):
        return self._clip.cosines(images, [_cleaned(text) for text in texts])


class HpsV21(HpsV2):
    """HpsV2 with the weights of version v2.1, whose scores cannot be compared with those of v2.0."""

    info = Info(
        name="hps_v2.1",
        title="HPSv2.1",
        margin=0.0003,
        kind="score",
        higher_is_better=True,
        source="Wu et al. 2023, arXiv 2306.09341; repository tgxs002/HPSv2, version v2.1",
        checkpoints=HpsV2.info.checkpoints
        | {"weights": HubFiles("xswu/HPSv2", ("HPS_v2.1_compressed.pt",), "697403c78157020a1ae59d23f111aa58ced35b0a")},
    )


def _cleaned(text):
    """The text with its HTML entities and curly quotes plain; the tokenizer does the rest (spaces, case, NFC)."""
    return html.unescape(html.unescape(text)).translate(_STRAIGHT).strip()
