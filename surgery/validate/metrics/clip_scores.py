"""CLIP score and PickScore: cosines of CLIP embeddings of images and prompts."""

from collections.abc import Sequence

import numpy as np

from ..prompts import Prompt
from .clip import (
    CONFIG_FILE,
    IMAGE_FILE,
    TOKENIZER_FILES,
    WEIGHT_FILE,
    ClipModel,
    load_model,
    load_pixels,
    load_tokenizer,
)
from .info import Device, Files, HubFiles, Images, Info, in_batches


class ClipScore:
    """100 max(cosine, 0) for each image: torchmetrics' scale, in which the papers report figures such as 26.46.

    Hessel et al. multiply by 2.5 instead of 100 and use ViT-B/32. torchmetrics (functional/multimodal/clip_score.py)
    puts the mean over the images, not each of them, through max(., 0), and cuts a prompt of more than 77 tokens
    without its end token; here it keeps its end token, as CLIP was trained.
    """

    info = Info(
        name="clip_score",
        title="CLIPScore",
        margin=0.1,
        kind="score",
        higher_is_better=True,
        source="Hessel et al. 2021, arXiv 2104.08718, times 100 instead of 2.5; CLIP ViT-L/14",
        checkpoints={
            "model": HubFiles(
                "openai/clip-vit-large-patch14",
                (CONFIG_FILE, WEIGHT_FILE, IMAGE_FILE, *TOKENIZER_FILES),
                "32bd64288804d66eefd0ccbe215aa642df71cc41",
            )
        },
    )

    def __init__(self, files: Files, device: Device = "cpu") -> None:
        """files: {"model": folder}. InputError names what is missing there or does not fit."""
        folder = files["model"]
        self._clip = ClipModel(load_model(folder), load_tokenizer(folder), load_pixels(folder), device)

    def score(self, images: Images, prompts: Sequence[Prompt]) -> np.ndarray:
        """float64 array (n,) of figures between 0 and 100 for n RGB PIL images and their `Prompt`s."""
        return in_batches(self._score, images, prompts)

    def _score(self, images, texts):
        return 100 * self._clip.cosines(images, texts).clamp(min=0)


# The repository whose tokenizer and preprocessing every metric on ViT-H/14 takes.
VIT_H_14 = ("laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "1c2b8495b28150b8a4922ee1c8edee224c284c0c")


class PickScore:
    """exp(logit_scale) times the cosine for each image, as in the README of yuvalkirstain/PickScore: some 22 of 100.

    Prompts are cut to 77 tokens, as there. A difference of 1 means odds of e to 1 for the better image.
    """

    info = Info(
        name="pick_score",
        title="PickScore",
        margin=0.02,
        kind="score",
        higher_is_better=True,
        source="Kirstain et al. 2023, arXiv 2305.01569; repository yuvalkirstain/PickScore",
        checkpoints={
            "model": HubFiles(
                "yuvalkirstain/PickScore_v1",
                (CONFIG_FILE, WEIGHT_FILE),
                "a4e4367c6dfa7288a00c550414478f865b875800",
            ),
            "processor": HubFiles(VIT_H_14[0], (IMAGE_FILE, *TOKENIZER_FILES), VIT_H_14[1]),
        },
    )

    def __init__(self, files: Files, device: Device = "cpu") -> None:
        """files: {"model": folder, "processor": folder}. InputError names what is missing there or does not fit."""
        processor = files["processor"]
        self._clip = ClipModel(load_model(files["model"]), load_tokenizer(processor), load_pixels(processor), device)

    def score(self, images: Images, prompts: Sequence[Prompt]) -> np.ndarray:
        """float64 array (n,) for n RGB PIL images and their `Prompt`s."""
        return in_batches(self._score, images, prompts)

    def _score(self, images, texts):
        return self._clip.scale * self._clip.cosines(images, texts)
