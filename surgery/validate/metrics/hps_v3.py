"""HPSv3: what people prefer, by a Qwen2-VL that was trained on HPDv3 (Ma et al. 2025, arXiv 2508.03789)."""

import ast
import math
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from surgery.errors import InputError

from ..prompts import Prompt
from .clip import CONFIG_FILE
from .info import Device, Files, HubFiles, Images, Info, WebFile, in_batches
from .judge import READER_FILES, Reader, read_part
from .weights import filled, filled_module, safetensors_checkpoint

_REWARD = "<|Reward|>"  # the token that the head reads
_SIDE, _PIXELS = 28, 256 * 28 * 28  # sides are multiples of _SIDE, and their product is about _PIXELS
_PACKAGE, _TEXTS = "hpsv3/dataset/data_collator_qwen.py", ("INSTRUCTION", "prompt_with_special_token")
_HEAD = "rm_head."


class HpsV3:
    """The mean of the preference (mu) for each image, some 0 to 15, as hpsv3's HPSv3RewardInferencer gives it.

    The head reads the hidden state at a token of its own behind the instruction that it was trained with, which is read
    from the authors' package (MIT); its code is not run. On a GPU the model computes in bfloat16, as theirs, else in
    float32; the head in float32.
    """

    info = Info(
        name="hps_v3",
        title="HPSv3",
        kind="score",
        higher_is_better=True,
        source="Ma et al. 2025, arXiv 2508.03789; repository MizzenAI/HPSv3",
        checkpoints={
            "weights": HubFiles("MizzenAI/HPSv3", ("HPSv3.safetensors",), "4f81e3e09edd82fe3c5f636444c721b592a735ca"),
            "reader": HubFiles("Qwen/Qwen2-VL-7B-Instruct", READER_FILES, "eed13092ef92e448dd6875b2a00151bd3f7db0ac"),
            "instruction": WebFile(
                "https://files.pythonhosted.org/packages/20/ed/"
                "6feb979b0086f57dc7a8b545693e1dbeffd60c8d942971e0445c65fcf438/hpsv3-1.0.0-py3-none-any.whl",
                "1a1b3ed1f538315ddf0e90c55b9f5c8ab3248d772cd713c11f7dfe35bf867ab3",
            ),
        },
    )

    def __init__(self, files: Files, device: Device = "cpu") -> None:
        """files: {"weights": folder, "reader": folder, "instruction": wheel}. InputError names what does not fit."""
        from transformers import Qwen2VLConfig, Qwen2VLModel

        self._before, self._behind = instruction_in(files["instruction"])
        self._reader = Reader(files["reader"])
        self._reader.tokenizer.add_special_tokens({"additional_special_tokens": [_REWARD]})
        self._token = self._reader.tokenizer.convert_tokens_to_ids(_REWARD)
        path = Path(files["weights"], "HPSv3.safetensors")
        tensors = safetensors_checkpoint(path)
        head = {name.removeprefix(_HEAD): tensors.pop(name) for name in list(tensors) if name.startswith(_HEAD)}
        config: Any = read_part(Qwen2VLConfig, files["reader"], CONFIG_FILE)
        body = _renamed(tensors)
        config.text_config.vocab_size = len(body.get(_EMBEDDING, ()))
        if config.text_config.vocab_size <= self._token:
            raise InputError(f"{path} has no {_EMBEDDING} for {self._token + 1} tokens; fetch it again")
        dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
        self._model = filled(Qwen2VLModel, config, body, path, dtype=dtype).to(device)
        width = config.text_config.hidden_size
        layers = (torch.nn.Linear(width, 1024), torch.nn.ReLU(), torch.nn.Dropout(0.05), torch.nn.Linear(1024, 16))
        made = torch.nn.Sequential(*layers, torch.nn.ReLU(), torch.nn.Linear(16, 2))  # mu and log sigma
        self._head = filled_module(made, {name: one.float() for name, one in head.items()}, path).to(device)

    def score(self, images: Images, prompts: Sequence[Prompt]) -> np.ndarray:
        """float64 array (n,) for n RGB PIL images and their `Prompt`s."""
        return in_batches(self._score, images, prompts, size=1)

    def _score(self, images, texts):
        image, text = images[0], self._before.format(text_prompt=texts[0]) + self._behind
        inputs = self._reader.inputs(image.resize(_size(*image.size), Image.Resampling.BICUBIC), text)
        inputs = {name: one.to(self._model.device) for name, one in inputs.items()}
        inputs["pixel_values"] = inputs["pixel_values"].to(self._model.dtype)
        states = self._model(**inputs).last_hidden_state[0]
        at = (inputs["input_ids"][0] == self._token).nonzero()[-1, 0]  # ours, whatever the prompt says before it
        return self._head(states[at].float())[:1].double()


def instruction_in(wheel: Path | str) -> tuple[str, str]:
    """(what stands before the image's prompt and after, with {text_prompt} for it; what asks for the rating).

    Read as the constants of a module in the authors' wheel; InputError where they are not there.
    """
    try:
        with zipfile.ZipFile(wheel) as package:
            tree = ast.parse(package.read(_PACKAGE))
        found = {
            target.id: ast.literal_eval(node.value)
            for node in tree.body
            if isinstance(node, ast.Assign)
            for target in node.targets
            if isinstance(target, ast.Name) and target.id in _TEXTS
        }
        return found[_TEXTS[0]], found[_TEXTS[1]]
    except (OSError, KeyError, ValueError, SyntaxError, zipfile.BadZipFile) as error:
        raise InputError(f"{wheel} does not hold HPSv3's instruction ({error}); fetch it again") from error


_EMBEDDING = "language_model.embed_tokens.weight"


def _renamed(tensors):
    """{name in a Qwen2VLModel: tensor} for names of transformers before 4.52 and since; without the language head."""
    found = {}
    for name, tensor in tensors.items():
        if name.startswith("lm_head."):
            continue
        inner = name.removeprefix("model.")
        known = name.startswith("visual.") or inner.startswith(("visual.", "language_model."))
        found[inner if known else f"language_model.{inner}"] = tensor
    return found


def _size(width, height):
    """(width, height) to which the authors' code brings an image: multiples of 28, about 256 * 28 * 28 pixels."""
    sides = [max(_SIDE, round(side / _SIDE) * _SIDE) for side in (width, height)]
    if math.prod(sides) == _PIXELS:
        return tuple(sides)
    ratio, whole = math.sqrt(width * height / _PIXELS), math.floor if math.prod(sides) > _PIXELS else math.ceil
    return tuple(max(_SIDE, whole(side / ratio / _SIDE) * _SIDE) for side in (width, height))
