"""Diversity: how unlike each other the images of one prompt are, by features of DINOv2."""

from pathlib import Path

import numpy as np
import torch

from .clip import CONFIG_FILE, IMAGE_FILE, WEIGHT_FILE
from .info import Device, Files, HubFiles, Images, Info, exact_convolutions
from .judge import read_part
from .weights import filled, safetensors_checkpoint

DINOV2 = HubFiles(
    "facebook/dinov2-base", (CONFIG_FILE, WEIGHT_FILE, IMAGE_FILE), "f9e44c814b77203eaa57a6bdbbd535f21ede1415"
)
_BATCH = 16


class _Diversity:
    """A metric of the kind "diversity"; files: {"dino": folder}."""

    info: Info

    def __init__(self, files: Files, device: Device = "cpu") -> None:
        """InputError names what is missing there or does not fit."""
        from transformers import Dinov2Config, Dinov2Model
        from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

        folder = files["dino"]
        path = Path(folder, WEIGHT_FILE)
        config = read_part(Dinov2Config, folder, CONFIG_FILE)
        self._model = filled(Dinov2Model, config, safetensors_checkpoint(path), path).to(device)
        self._pixels = read_part(BitImageProcessorPil, folder, IMAGE_FILE)

    def features(self, images: Images) -> np.ndarray:
        """float64 (n, d) of length 1: what DINOv2's class token says of n RGB PIL images."""
        found = []
        with torch.inference_mode(), exact_convolutions():
            for start in range(0, len(images), _BATCH):
                pixels = self._pixels(list(images[start : start + _BATCH]), return_tensors="pt").pixel_values
                found.append(self._model(pixels.to(self._model.device)).last_hidden_state[:, 0].double().cpu())
        return torch.nn.functional.normalize(torch.cat(found), dim=-1).numpy()


class DinoDiversity(_Diversity):
    """Of each image the mean of 1 - cosine with the others of its prompt: the mean over all pairs of a prompt.

    Times 100. The papers on diversity report such a mean, of DINO, CLIP or LPIPS distances.
    """

    info = Info(
        name="dino_diversity",
        title="DINO diversity",
        kind="diversity",
        higher_is_better=True,
        source="mean pairwise 1 - cosine of images of a prompt, times 100; DINOv2 ViT-B/14 (arXiv 2304.07193)",
        checkpoints={"dino": DINOV2},
    )

    @staticmethod
    def of_prompt(features: np.ndarray) -> np.ndarray:
        """(n,) values of the n images of one prompt by their features (n, d), n of 2 or more."""
        cosines = features @ features.T
        return 100 * (1 - (cosines.sum(1) - np.diag(cosines)) / (len(features) - 1))


class VendiScore(_Diversity):
    """The effective number of different images of a prompt, from 1 to as many as there are.

    exp of the entropy of the eigenvalues of K / n, with K the cosines. Friedman and Dieng 2022, arXiv 2210.02410.
    """

    info = Info(
        name="vendi_score",
        title="Vendi score",
        kind="diversity",
        higher_is_better=True,
        source="Friedman and Dieng 2022, arXiv 2210.02410, over the images of each prompt; DINOv2 ViT-B/14",
        checkpoints={"dino": DINOV2},
    )

    @staticmethod
    def of_prompt(features: np.ndarray) -> np.ndarray:
        """(n,) the prompt's value for each of its n images, by their features (n, d)."""
        shares = np.linalg.eigvalsh(features @ features.T / len(features)).clip(0)
        shares = shares[shares > 0]
        return np.full(len(features), float(np.exp(-(shares * np.log(shares)).sum())))
