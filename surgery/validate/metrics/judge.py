"""A vision-language model of transformers that is asked about images: one, loaded once, for all metrics that ask."""

import hashlib
import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from surgery.errors import InputError

from .clip import CONFIG_FILE, IMAGE_FILE
from .info import Device, HubFiles

CHAT_FILE = "chat_template.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt")
READER_FILES = (CONFIG_FILE, IMAGE_FILE, CHAT_FILE, *TOKENIZER_FILES)
# GenEval 2's; its authors found it the nearest to people of those they tried (arXiv 2512.16853).
QWEN3_VL = HubFiles(
    "Qwen/Qwen3-VL-8B-Instruct",
    (*READER_FILES, "*.safetensors", "model.safetensors.index.json"),
    "0c351dd01ed87e9c1b53cbc748cba10e6187ff3b",
)

_IMAGE = "<|image_pad|>"


class Reader:
    """What makes a model's inputs of an image and a text, by the files of a Qwen-VL repository, without torchvision."""

    def __init__(self, folder: Path | str) -> None:
        """folder: of READER_FILES. InputError names what is missing there or cannot be read."""
        from transformers import AutoTokenizer
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        self.tokenizer: Any = read_part(AutoTokenizer, folder, "tokenizer_config.json")
        self.pixels: Any = read_part(Qwen2VLImageProcessorPil, folder, IMAGE_FILE)
        path = Path(folder, CHAT_FILE)
        try:
            self._template = json.loads(path.read_text(encoding="utf-8"))["chat_template"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{path}: no chat template can be read there; fetch the metric's checkpoints again"
            ) from error

    def inputs(self, image: Image.Image, text: str) -> dict[str, torch.Tensor]:
        """The inputs, of a batch of one, for a user's message that is an RGB PIL image and a text behind it.

        What would stand for another image is taken out of the text.
        """
        text = text.replace(_IMAGE, "")
        message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}
        written = self.tokenizer.apply_chat_template(
            [message], chat_template=self._template, tokenize=False, add_generation_prompt=True
        )
        seen = self.pixels([image], return_tensors="pt")
        count = int(seen["image_grid_thw"][0].prod()) // self.pixels.merge_size**2
        begin, end = written.split(_IMAGE)
        tokens = self.tokenizer(f"{begin}{_IMAGE * count}{end}", add_special_tokens=False, return_tensors="pt")
        places = torch.zeros_like(tokens["input_ids"])
        first = len(self.tokenizer(begin, add_special_tokens=False)["input_ids"])
        places[:, first : first + count] = 1
        return {
            "input_ids": tokens["input_ids"],
            "attention_mask": tokens["attention_mask"],
            "mm_token_type_ids": places,
            "pixel_values": seen["pixel_values"],
            "image_grid_thw": seen["image_grid_thw"],
        }


class Judge:
    """A Qwen3-VL model that is asked for one word; `judge_of` gives it."""

    def __init__(self, folder: Path | str, device: Device = "cpu") -> None:
        """folder: of QWEN3_VL's files. InputError names what is missing there or does not fit."""
        from transformers import Qwen3VLForConditionalGeneration

        self._reader = Reader(folder)
        model, told = read_part(
            Qwen3VLForConditionalGeneration, folder, CONFIG_FILE, dtype="auto", output_loading_info=True
        )
        if missing := sorted(told["missing_keys"]):
            raise InputError(f"{folder} lacks {len(missing)} weights, such as {missing[0]}; fetch it again")
        self._model = model.to(device).eval()
        self._known: dict[tuple, tuple[float, ...]] = {}

    def probabilities(self, image: Image.Image, text: str, *answers: Sequence[str]) -> tuple[float, ...]:
        """For each group of answers how probable it is that the reply begins with one of them.

        A group's is the sum over its answers' first tokens, as GenEval 2's code has it (evaluation.py,
        send_message_with_image): two answers that begin with the same token count it twice. What was asked before is
        remembered, since two metrics ask the same.
        """
        key = (hashlib.sha256(image.tobytes()).digest(), image.size, text, *map(tuple, answers))
        if key not in self._known:
            tokenizer = self._reader.tokenizer
            inputs = {name: one.to(self._model.device) for name, one in self._reader.inputs(image, text).items()}
            inputs["pixel_values"] = inputs["pixel_values"].to(self._model.dtype)
            with torch.inference_mode():
                logits = self._model(**inputs, logits_to_keep=1).logits[0, -1]
            likely = logits.double().softmax(-1)
            first = [[tokenizer.encode(one, add_special_tokens=False)[0] for one in group] for group in answers]
            self._known[key] = tuple(float(likely[tokens].sum()) for tokens in first)
        return self._known[key]


@lru_cache(maxsize=1)
def judge_of(folder: str, device: str) -> Judge:
    """The Judge of a folder on a device, which all metrics share."""
    return Judge(folder, device)


def read_part(kind: Any, folder: Path | str, file: str, **how: Any) -> Any:
    """What `kind` reads of a folder that has the file; InputError where it is not there or cannot be read."""
    if not Path(folder, file).is_file():  # transformers would go on with its defaults
        raise InputError(f"{Path(folder, file)}: there is no such file; fetch the metric's checkpoints again")
    try:
        return kind.from_pretrained(folder, local_files_only=True, **how)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise InputError(f"{folder}: no {kind.__name__} can be read there ({reason}); fetch it again") from error
