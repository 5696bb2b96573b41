"""HPS v2 and v2.1: what people prefer on the Human Preference Dataset v2 (Wu et al. 2023, arXiv 2306.09341)."""

import html
from functools import partial
from pathlib import Path

from transformers import CLIPModel

from surgery.validate.metrics.batches import in_batches
from surgery.validate.metrics.clip_images import padded_pixels
from surgery.validate.metrics.clip_model import CONFIG_FILE, TOKENIZER_FILES, ClipModel, load_config, load_tokenizer
from surgery.validate.metrics.info import HubFiles, Info
from surgery.validate.metrics.open_clip_keys import transformers_tensors
from surgery.validate.metrics.pick_score import VIT_H_14
from surgery.validate.metrics.strict_weights import filled, torch_checkpoint

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
        kind="score",
        higher_is_better=True,
        source="Wu et al. 2023, arXiv 2306.09341; repository tgxs002/HPSv2, version v2.0",
        checkpoints={
            "weights": HubFiles("xswu/HPSv2", ("HPS_v2_compressed.pt",), "697403c78157020a1ae59d23f111aa58ced35b0a"),
            "processor": HubFiles(VIT_H_14[0], (CONFIG_FILE, *TOKENIZER_FILES), VIT_H_14[1]),
        },
    )

    def __init__(self, files, device="cpu"):
        """files: {"weights": folder, "processor": folder}. InputError names what is missing there or does not fit."""
        (weight_file,) = self.info.checkpoints["weights"].files
        path = Path(files["weights"], weight_file)
        config = load_config(files["processor"])
        model = filled(CLIPModel, config, transformers_tensors(torch_checkpoint(path), config, path), path)
        pixels = partial(padded_pixels, size=config.vision_config.image_size)
        self._clip = ClipModel(model, load_tokenizer(files["processor"]), pixels, device)

    def score(self, images, prompts):
        """float64 array (n,) for n RGB PIL images and their `Prompt`s."""
        return in_batches(self._score, images, prompts)

    def _score(self, images, texts):
        return self._clip.cosines(images, [_cleaned(text) for text in texts])


class HpsV21(HpsV2):
    """HpsV2 with the weights of version v2.1, whose scores cannot be compared with those of v2.0."""

    info = Info(
        name="hps_v2.1",
        title="HPSv2.1",
        kind="score",
        higher_is_better=True,
        source="Wu et al. 2023, arXiv 2306.09341; repository tgxs002/HPSv2, version v2.1",
        checkpoints=HpsV2.info.checkpoints
        | {"weights": HubFiles("xswu/HPSv2", ("HPS_v2.1_compressed.pt",), "697403c78157020a1ae59d23f111aa58ced35b0a")},
    )


def _cleaned(text):
    """The text with its HTML entities and curly quotes plain; the tokenizer does the rest (spaces, case, NFC)."""
    return html.unescape(html.unescape(text)).translate(_STRAIGHT).strip()
