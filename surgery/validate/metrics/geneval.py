"""GenEval: whether an image shows the objects of its prompt, in the number, the colours and the places asked for.

Ghosh et al. 2023 (arXiv 2310.11513); repository djghosh13/geneval, evaluation/evaluate_images.py. The verdict follows
its rules exactly (geneval_rules.py), the colours are told by the same CLIP ViT-L/14, but the detector is another
checkpoint: GenEval takes mmdetection's Mask2Former (Swin-S, COCO instances), which needs mmcv, and here it is the
checkpoint of the same architecture and data that the authors of Mask2Former published. So a figure may differ a little
from one that GenEval's own program gives; base and patched images are judged alike.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, Mask2FormerImageProcessorPil

from surgery.compat import projected_features
from surgery.errors import InputError

from ..prompts import Prompt
from .clip import CONFIG_FILE, IMAGE_FILE, TOKENIZER_FILES, WEIGHT_FILE, cropped_pixels
from .clip import load_model as load_clip
from .clip import load_tokenizer as load_clip_tokenizer
from .geneval_rules import CLASSES, COLORS, SCORE_ABOVE, Detection, check_facts, judge, kept
from .info import Device, Files, HubFiles, Images, Info, exact_convolutions
from .weights import filled, safetensors_checkpoint

_TEMPLATES = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")
_BACKGROUND = "#999"  # what is not the object is painted over with this grey before CLIP sees it
_CROPS_AT_ONCE = 16
_SHORTEST, _LONGEST, _DIVISOR = 800, 1333, 32  # pixels of the detector's input
_MOST_DETECTIONS = 100  # of an image, whatever their scores
# COCO's names for three of GenEval's classes, and the names of Pascal VOC that the published detector has for others.
_OTHER_NAMES = {
    **{"mouse": "computer mouse", "remote": "tv remote", "keyboard": "computer keyboard"},
    **{"motorbike": "motorcycle", "aeroplane": "airplane", "sofa": "couch", "tvmonitor": "tv"},
}


class GenEval:
    """1 for an image that is right and 0 for one that is not; the mean over GenEval's 553 prompts is its score."""

    info = Info(
        name="geneval",
        title="GenEval",
        margin=0.005,
        kind="score",
        higher_is_better=True,
        source="Ghosh et al. 2023, arXiv 2310.11513; its rules, with the detector of Cheng et al. 2021 (2112.01527)",
        checkpoints={
            "detector": HubFiles(
                "facebook/mask2former-swin-small-coco-instance", (CONFIG_FILE, WEIGHT_FILE, IMAGE_FILE)
            ),
            "clip": HubFiles(
                "openai/clip-vit-large-patch14",
                (CONFIG_FILE, WEIGHT_FILE, *TOKENIZER_FILES),
                "32bd64288804d66eefd0ccbe215aa642df71cc41",
            ),
        },
    )

    @staticmethod
    def check_prompts(prompts: Iterable[Prompt]) -> None:
        """Raise InputError unless all `Prompt`s have the facts that GenEval judges by, as its own prompts do."""
        for prompt in prompts:
            check_facts(prompt)

    def __init__(self, files: Files, device: Device = "cpu") -> None:
        """files: {"detector": folder, "clip": folder}. InputError names what is missing there or does not fit."""
        self._detector = Detector(files["detector"], device)
        self._colors = ColorClassifier(files["clip"], device)

    def score(self, images: Images, prompts: Sequence[Prompt]) -> np.ndarray:
        """float64 array (n,) of 1 or 0 for n RGB PIL images and their `Prompt`s, whose facts are GenEval's metadata.

        Raises InputError for a prompt without those facts, before any image is looked at.
        """
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} images, but {len(prompts)} prompts")
        self.check_prompts(prompts)
        verdicts = [self.verdict(image, prompt.facts)[0] for image, prompt in zip(images, prompts, strict=True)]
        return np.array(verdicts, dtype=np.float64)

    def verdict(self, image: Image.Image, facts: Mapping[str, Any]) -> tuple[bool, list[str]]:
        """(whether the image is right, [what is wrong]) for an RGB PIL image and one entry of GenEval's metadata."""
        with torch.inference_mode(), exact_convolutions():
            objects = kept(self._detector(image), facts["tag"])
            return judge(facts, objects, lambda found, name: self._colors(image, found, name))


class Detector:
    """Mask2Former on COCO: an image -> {class: [Detection]}, as mmdetection's MaskFormerFusionHead scores instances."""

    def __init__(self, folder: Path | str, device: Device = "cpu") -> None:
        """folder: of config.json, model.safetensors and preprocessor_config.json; InputError if they do not fit."""
        config = _read(Mask2FormerConfig, folder)
        self._names = _class_names(config.id2label, Path(folder, CONFIG_FILE))
        path = Path(folder, WEIGHT_FILE)
        tensors = safetensors_checkpoint(path)
        # A constant of Swin's windows, which older versions of transformers stored and newer ones compute.
        tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(".relative_position_index")}
        self._model = filled(Mask2FormerForUniversalSegmentation, config, tensors, path).to(device)
        processor = _read(Mask2FormerImageProcessorPil, folder)
        self._mean, self._std = (torch.tensor(values) for values in (processor.image_mean, processor.image_std))

    def __call__(self, image: Image.Image) -> dict[str, list[Detection]]:
        """{class name: [Detection]} of an RGB PIL image: those of its 100 best that score more than 0.3.

        A detection is a query with a class; its score is the class's probability times the mean probability of its
        mask's pixels. Masks are brought to the image's own size before they are decided; a box is what a mask fills.
        """
        pixels, (height, width) = self._pixels(image)
        outputs = self._model(pixel_values=pixels.to(self._model.device))
        probabilities = outputs.class_queries_logits[0].softmax(-1)[:, :-1]  # (queries, classes), the last being none
        best = probabilities.flatten().topk(min(_MOST_DETECTIONS, probabilities.numel()))
        # A mask only lowers a score, so what its class leaves under the threshold needs no mask.
        chosen = best.indices[best.values > SCORE_ABOVE]
        detected = {}
        for index in chosen.tolist():
            query, label = divmod(index, probabilities.shape[1])
            mask = self._mask(outputs.masks_queries_logits[0, query], pixels.shape[-2:], (height, width), image.size)
            inside = mask > 0
            certainty = (mask.sigmoid() * inside).sum() / (inside.sum() + 1e-6)
            score = float(probabilities[query, label] * certainty)
            inside = inside.cpu().numpy()
            detected.setdefault(self._names[label], []).append(Detection(_box(inside), score, inside))
        return detected

    def _pixels(self, image):
        """(float32 tensor (1, 3, h, w), (height, width)): the image, resized to height and width, padded to h and w.

        The shorter side becomes 800 pixels, or less where the longer would pass 1333; h and w are multiples of 32.
        """
        shorter, longer = sorted(image.size)
        scale = min(_SHORTEST / shorter, _LONGEST / longer)
        width, height = (int(side * scale + 0.5) for side in image.size)
        array = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR), dtype=np.float32)
        pixels = ((torch.from_numpy(array) / 255 - self._mean) / self._std).permute(2, 0, 1)[None]
        return functional.pad(pixels, (0, -width % _DIVISOR, 0, -height % _DIVISOR)), (height, width)

    @staticmethod
    def _mask(logits, padded, resized, size):
        """A mask's logits (h / 4, w / 4) at the image's own size (height, width), the padding cut off."""
        logits = functional.interpolate(logits[None, None], tuple(padded), mode="bilinear", align_corners=False)
        logits = logits[..., : resized[0], : resized[1]]
        return functional.interpolate(logits, size[::-1], mode="bilinear", align_corners=False)[0, 0]


class ColorClassifier:
    """Which of ten colours an object has, by CLIP: the nearest to it of three sentences' mean, for each colour."""

    def __init__(self, folder: Path | str, device: Device = "cpu") -> None:
        """folder: of a CLIP model and its tokenizer; InputError if they do not fit."""
        self._model = load_clip(folder).to(device)
        self._tokenizer = load_clip_tokenizer(folder)
        self._size = self._model.config.vision_config.image_size
        self._directions = {}  # {class name: (colours, d)}

    def __call__(self, image: Image.Image, detections: Sequence[Detection], name: str) -> list[str]:
        """A colour of COLORS for each Detection of the class in an RGB PIL image."""
        crops = [_crop(image, detection) for detection in detections]
        colors = []
        for start in range(0, len(crops), _CROPS_AT_ONCE):
            pixels = cropped_pixels(crops[start : start + _CROPS_AT_ONCE], self._size).to(self._model.device)
            features = functional.normalize(projected_features(self._model.get_image_features(pixels)), dim=-1)
            colors += [COLORS[index] for index in (features @ self._of(name).T).argmax(-1).tolist()]
        return colors

    def _of(self, name):
        """(colours, d): the direction of each colour for objects of a class, computed once."""
        if name not in self._directions:
            texts = [template.format(color=color, name=name) for color in COLORS for template in _TEMPLATES]
            tokens = self._tokenizer(texts, padding=True, return_tensors="pt").to(self._model.device)
            features = functional.normalize(projected_features(self._model.get_text_features(**tokens)), dim=-1)
            means = features.unflatten(0, (len(COLORS), len(_TEMPLATES))).mean(1)
            self._directions[name] = functional.normalize(means, dim=-1)
        return self._directions[name]


def _crop(image, detection):
    """The object alone: the rest of the image painted over with grey, then cut to its box."""
    if detection.mask is not None:
        mask = Image.fromarray(detection.mask.astype(np.uint8) * 255)
        image = Image.composite(image, Image.new("RGB", image.size, _BACKGROUND), mask)
    return image.crop(detection.box)


def _box(mask):
    """(left, top, right, bottom) of a bool (height, width), right and bottom outside it; zeros for an empty mask."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not rows.size:
        return (0.0, 0.0, 0.0, 0.0)
    return (float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1))


def _class_names(id2label, where):
    """[GenEval's name] of each of the detector's classes, which must be COCO's 80, by whatever spelling."""
    ours = {_letters(name): name for name in CLASSES} | {_letters(a): name for a, name in _OTHER_NAMES.items()}
    names = [ours.get(_letters(id2label[index]), f"?{id2label[index]}") for index in sorted(id2label)]
    if sorted(names) != sorted(CLASSES):
        missing = [name for name in CLASSES if name not in names]
        unknown = [name[1:] for name in names if name.startswith("?")]
        raise InputError(
            f"{where}: the detector does not have COCO's 80 classes; missing: {', '.join(missing[:5]) or 'none'}; "
            f"unknown: {', '.join(unknown[:5]) or 'none'}"
        )
    return names


def _letters(name):
    return "".join(name.lower().split())


def _read(kind, folder):
    try:
        return kind.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise InputError(f"{folder}: no {kind.__name__} can be read there ({reason}); fetch it again") from error
