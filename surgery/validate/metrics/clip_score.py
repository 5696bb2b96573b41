"""CLIPScore: how near CLIP ViT-L/14 puts an image to its prompt (Hessel et al. 2021, arXiv 2104.08718)."""

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


class ClipScore:
    """100 max(cosine, 0) for each image: torchmetrics' scale, in which the papers report figures such as 26.46.

    Hessel et al. multiply by 2.5 instead of 100 and use ViT-B/32. torchmetrics (functional/multimodal/clip_score.py)
    puts the mean over the images, not each of them, through max(., 0), and cuts a prompt of more than 77 tokens
    without its end token; here it keeps its end token, as CLIP was trained.
    """

    info = Info(
        name="clip_score",
        title="CLIPScore",
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

    def __init__(self, files, device="cpu"):
        """files: {"model": folder}. InputError names what is missing there or does not fit."""
        folder = files["model"]
        self._clip = ClipModel(load_model(folder), load_tokenizer(folder), load_pixels(folder), device)

    def score(self, images, prompts):
        """float64 array (n,) of figures between 0 and 100 for n RGB PIL images and their `Prompt`s."""
        return in_batches(self._score, images, prompts)

    def _score(self, images, texts):
        return 100 * self._clip.cosines(images, texts).clamp(min=0)
