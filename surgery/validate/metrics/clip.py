"""CLIP models and how images are made ready for them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from surgery.compat import projected_features
from surgery.errors import InputError

from .info import Device, Images
from .weights import filled, safetensors_checkpoint

# What a Hub repository of a CLIP model calls its files.
CONFIG_FILE = "config.json"
WEIGHT_FILE = "model.safetensors"
IMAGE_FILE = "preprocessor_config.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt")


class ClipModel:
    """A CLIP model, its tokenizer, and `pixels`, which makes a tensor (n, 3, height, width) of n PIL images."""

    def __init__(
        self,
        model: Any,  # a CLIPModel, whose config transformers annotates as what it is made from
        tokenizer: CLIPTokenizer,
        pixels: Callable[[Images], torch.Tensor],
        device: Device = "cpu",
    ) -> None:
        text = model.config.text_config
        if len(tokenizer) != text.vocab_size:  # of an incomplete folder transformers makes a tokenizer of two
            counts = f"the tokenizer has {len(tokenizer)} tokens, the CLIP model {text.vocab_size}"
            raise InputError(f"{counts}; fetch the metric's checkpoints again")
        self.model = model.to(device)
        self.tokenizer = tokenizer
        self.pixels = pixels
        self.length = text.max_position_embeddings  # 77 tokens

    @property
    def scale(self) -> torch.Tensor:
        """The factor that the model was trained to put before its cosines, exp(logit_scale)."""
        return self.model.logit_scale.exp().double()

    def cosines(self, images: Images, texts: list[str]) -> torch.Tensor:
        """float64 tensor (n,): the cosine of each of n PIL images with its own text, computed in float32.

        Longer texts are cut to 77 tokens, the first being the start token and the last the end token.
        """
        # Padded to one length, so that a score does not depend on which other prompts it is computed with.
        tokens = self.tokenizer(
            texts, padding="max_length", truncation=True, max_length=self.length, return_tensors="pt"
        )
        image_features = projected_features(self.model.get_image_features(self.pixels(images).to(self.model.device)))
        text_features = projected_features(self.model.get_text_features(**tokens.to(self.model.device)))
        return torch.nn.functional.cosine_similarity(image_features.double(), text_features.double())


def load_model(folder: Path | str) -> Any:
    """The CLIPModel of a folder with config.json and model.safetensors, float32; InputError where they do not fit."""
    path = Path(folder, WEIGHT_FILE)
    return filled(CLIPModel, load_config(folder), safetensors_checkpoint(path), path)


def load_config(folder: Path | str) -> Any:
    """The CLIPConfig of a folder with config.json."""
    return _loaded(CLIPConfig, folder, CONFIG_FILE)


def load_tokenizer(folder: Path | str) -> CLIPTokenizer:
    """The CLIPTokenizer of a folder."""
    return _loaded(CLIPTokenizer, folder, "tokenizer_config.json")


def load_pixels(folder: Path | str) -> Callable[[Images], torch.Tensor]:
    """PIL images -> float32 tensor (n, 3, height, width), as the folder's preprocessor_config.json says, by Pillow."""
    processor = _loaded(CLIPImageProcessorPil, folder, IMAGE_FILE)
    return lambda images: processor(list(images), return_tensors="pt").pixel_values


def _loaded(kind, folder, file):
    if not Path(folder, file).is_file():  # transformers would go on with its defaults
        raise InputError(f"{Path(folder, file)}: there is no such file; fetch the metric's checkpoints again")
    try:
        return kind.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise InputError(f"{folder}: no {kind.__name__} can be read there ({reason}); fetch it again") from error


# CLIP's mean and standard deviation of red, green and blue, which both metrics use.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def cropped_pixels(images: Images, size: int) -> torch.Tensor:
    """float32 tensor (n, 3, size, size): the shorter side resized to `size` by Pillow, the middle of the longer kept.

    torchvision's Resize(size, BICUBIC), CenterCrop(size), ToTensor, Normalize on PIL images.
    """
    return torch.stack([_normalised(_tensor(_cropped(image, size))) for image in images])


def padded_pixels(images: Images, size: int) -> torch.Tensor:
    """float32 tensor (n, 3, size, size): the longer side resized to `size`, the shorter padded with black.

    The tensor is resized bicubically with antialiasing (torchvision's default since 0.17) and not clamped to [0, 1]:
    tgxs002/HPSv2 hpsv2/src/open_clip/transform.py, image_transform with resize_longest_max.
    """
    return torch.stack([_normalised(_padded(_tensor(image), size)) for image in images])


def _cropped(image, size):
    shorter, longer = sorted(image.size)
    longer = int(size * longer / shorter)
    width, height = (size, longer) if image.width <= image.height else (longer, size)
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - size) / 2), round((height - size) / 2)  # halves to the even number, as torchvision
    return image.crop((left, top, left + size, top + size))


def _padded(tensor, size):
    scale = size / max(tensor.shape[1:])
    height, width = (max(1, round(side * scale)) for side in tensor.shape[1:])
    if tensor.shape[1:] != (height, width):
        tensor = torch.nn.functional.interpolate(tensor[None], (height, width), mode="bicubic", antialias=True)[0]
    top, left = (size - height) // 2, (size - width) // 2
    return torch.nn.functional.pad(tensor, (left, size - width - left, top, size - height - top))


def _tensor(image):
    """float32 (3, height, width) in [0, 1]."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 255


def _normalised(tensor):
    return (tensor - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
