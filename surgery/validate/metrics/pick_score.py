"""PickScore: what people on Pick-a-Pic would prefer for a prompt (Kirstain et al. 2023, arXiv 2305.01569)."""

from surgery.validate.metrics.batches import in_batches
from surgery.validate.metrics.clip_model import (
    CONFIG_FILE,
    IMAGE_FILE,
    TOKENIZER_FILES,
    WEIGHT_FILE,
    ClipModel,
    load_model,
    load_pixels,
    load_tokenizer,
)
from surgery.validate.metrics.info import HubFiles, Info

# The repository whose tokenizer and preprocessing every metric on ViT-H/14 takes.
VIT_H_14 = ("laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "1c2b8495b28150b8a4922ee1c8edee224c284c0c")


class PickScore:
    """exp(logit_scale) times the cosine for each image, as in the README of yuvalkirstain/PickScore: some 22 of 100.

    Prompts are cut to 77 tokens, as there. A difference of 1 means odds of e to 1 for the better image.
    """

    info = Info(
        name="pick_score",
        title="PickScore",
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

    def __init__(self, files, device="cpu"):
        """files: {"model": folder, "processor": folder}. InputError names what is missing there or does not fit."""
        processor = files["processor"]
        self._clip = ClipModel(load_model(files["model"]), load_tokenizer(processor), load_pixels(processor), device)

    def score(self, images, prompts):
        """float64 array (n,) for n RGB PIL images and their `Prompt`s."""
        return in_batches(self._score, images, prompts)

    def _score(self, images, texts):
        return self._clip.scale * self._clip.cosines(images, texts)
