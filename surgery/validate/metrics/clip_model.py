"""A CLIP model as the scores use it: the cosine between an image and its prompt."""

from pathlib import Path

import torch
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from surgery.errors import InputError
from surgery.validate.metrics.strict_weights import filled, safetensors_checkpoint

# What a Hub repository of a CLIP model calls its files.
CONFIG_FILE = "config.json"
WEIGHT_FILE = "model.safetensors"
IMAGE_FILE = "preprocessor_config.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt")


class ClipModel:
    """A CLIP model, its tokenizer, and `pixels`, which makes a tensor (n, 3, height, width) of n PIL images."""

    def __init__(self, model, tokenizer, pixels, device="cpu"):
        text = model.config.text_config
        if len(tokenizer) != text.vocab_size:  # of an incomplete folder transformers makes a tokenizer of two
            counts = f"the tokenizer has {len(tokenizer)} tokens, the CLIP model {text.vocab_size}"
            raise InputError(f"{counts}; fetch the metric's checkpoints again")
        self.model = model.to(device)
        self.tokenizer = tokenizer
        self.pixels = pixels
        self.length = text.max_position_embeddings  # 77 tokens

    @property
    def scale(self):
        """The factor that the model was trained to put before its cosines, exp(logit_scale)."""
        return self.model.logit_scale.exp().double()

    def cosines(self, images, texts):
        """float64 tensor (n,): the cosine of each of n PIL images with its own text, computed in float32.

        Longer texts are cut to 77 tokens, the first being the start token and the last the end token.
        """
        # Padded to one length, so that a score does not depend on which other prompts it is computed with.
        tokens = self.tokenizer(
            texts, padding="max_length", truncation=True, max_length=self.length, return_tensors="pt"
        )
        # transformers 5 puts the projected features into .pooler_output
        image_features = self.model.get_image_features(self.pixels(images).to(self.model.device)).pooler_output
        text_features = self.model.get_text_features(**tokens.to(self.model.device)).pooler_output
        return torch.nn.functional.cosine_similarity(image_features.double(), text_features.double())


def load_model(folder):
    """The CLIPModel of a folder with config.json and model.safetensors, float32; InputError where they do not fit."""
    path = Path(folder, WEIGHT_FILE)
    return filled(CLIPModel, load_config(folder), safetensors_checkpoint(path), path)


def load_config(folder):
    """The CLIPConfig of a folder with config.json."""
    return _loaded(CLIPConfig, folder, CONFIG_FILE)


def load_tokenizer(folder):
    """The CLIPTokenizer of a folder."""
    return _loaded(CLIPTokenizer, folder, "tokenizer_config.json")


def load_pixels(folder):
    """PIL images -> float32 tensor (n, 3, height, width), as the folder's preprocessor_config.json says, by Pillow."""
    processor = _loaded(CLIPImageProcessorPil, folder, IMAGE_FILE)
    return lambda images: processor(images, return_tensors="pt").pixel_values


def _loaded(kind, folder, file):
    if not Path(folder, file).is_file():  # transformers would go on with its defaults
        raise InputError(f"{Path(folder, file)}: there is no such file; fetch the metric's checkpoints again")
    try:
        return kind.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise InputError(f"{folder}: no {kind.__name__} can be read there ({reason}); fetch it again") from error
