"""GenEval: its rules on hand-made detections, its models against their definitions, and known verdicts end to end."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional

from surgery.errors import InputError
from surgery.validate.metrics import geneval, metric_class
from surgery.validate.metrics.geneval import ColorClassifier, Detector, GenEval
from surgery.validate.metrics.geneval_rules import CLASSES, COLORS, Detection
from surgery.validate.prompts import Prompt

from ...quick import quick
from . import tiny_clip

# What the published detector calls the classes that GenEval has another name for.
from .test_geneval_rules import CAT, DOG, RED_AND_BLUE, RED_CAT, at, facts, needs

DETECTORS_NAMES = {
    "motorcycle": "motorbike",
    "airplane": "aeroplane",
    "couch": "sofa",
    "potted plant": "pottedplant",
    "dining table": "diningtable",
    "tv": "tvmonitor",
    "computer mouse": "mouse",
    "tv remote": "remote",
    "computer keyboard": "keyboard",
}


@pytest.fixture(scope="module")
def detector_folder(tmp_path_factory):
    """A tiny Mask2Former in the files, names and settings of the published one; its classes are made certain."""
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

    torch.manual_seed(0)
    labels = {index: DETECTORS_NAMES.get(name, name) for index, name in enumerate(CLASSES)}
    config = Mask2FormerConfig(
        backbone_config=SwinConfig(
            image_size=32,
            embed_dim=8,
            depths=[1, 1, 1, 1],
            num_heads=[1, 1, 2, 2],
            window_size=4,
            out_features=["stage1", "stage2", "stage3", "stage4"],
        ),
        **dict.fromkeys(("feature_size", "mask_feature_size", "hidden_dim", "dim_feedforward"), 32),
        encoder_feedforward_dim=32,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        num_queries=12,
        id2label=labels,
        label2id={name: index for index, name in labels.items()},
    )
    model = Mask2FormerForUniversalSegmentation(config).eval()
    with torch.no_grad():  # untrained, every class and pixel would be as likely as the next
        model.class_predictor.weight *= 60
        for parameter in model.model.transformer_module.decoder.mask_predictor.mask_embedder.get_submodule(
            "2"
        ).parameters():
            parameter *= 40
    folder = tmp_path_factory.mktemp("detector")
    model.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    index = "model.pixel_level_module.encoder.encoder.layers.0.blocks.0.attention.self.relative_position_index"
    assert index.replace("index", "bias_table") in weights  # the names of the published file
    save_file({**weights, index: torch.zeros(16, 16, dtype=torch.long)}, folder / "model.safetensors", {"format": "pt"})
    processor = {
        "_max_size": 1333,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "ignore_index": 255,
        "image_mean": [0.485, 0.456, 0.406],
        "image_processor_type": "Mask2FormerImageProcessor",
        "image_std": [0.229, 0.224, 0.225],
        "num_labels": 80,
        "reduce_labels": False,
        "resample": 2,
        "rescale_factor": 0.00392156862745098,
        "size": {"longest_edge": 1333, "shortest_edge": 800},
        "size_divisor": 32,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


@pytest.fixture(scope="module")
def clip_tensors():
    return tiny_clip.open_clip_tensors()


@pytest.fixture(scope="module")
def clip_folder(clip_tensors, tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    tiny_clip.write_config(folder, "quick_gelu")
    tiny_clip.write_processor(folder)
    tiny_clip.write_weights(folder, clip_tensors)
    return folder


@pytest.fixture(scope="module")
def metric(detector_folder, clip_folder):
    return GenEval({"detector": detector_folder, "clip": clip_folder})


def defined_detections(model, image, resized, padded):
    """[(class, score, box, mask)] over 0.3 by mmdetection's steps in their order: masks, scores, boxes of all 100."""
    (width, height), (padded_width, padded_height) = resized, padded
    pixels = torch.from_numpy(np.array(image.resize(resized, Image.Resampling.BILINEAR))).permute(2, 0, 1) / 255
    mean, std = (torch.tensor(values)[:, None, None] for values in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    canvas = torch.zeros(1, 3, padded_height, padded_width)
    canvas[0, :, :height, :width] = (pixels - mean) / std
    with torch.inference_mode():
        outputs = model(pixel_values=canvas)
    masks = functional.interpolate(outputs.masks_queries_logits, (padded_height, padded_width), mode="bilinear")
    masks = functional.interpolate(masks[..., :height, :width], image.size[::-1], mode="bilinear")[0]
    scores = outputs.class_queries_logits[0].softmax(-1)[:, :-1]
    values, indices = scores.flatten().topk(100)
    found = []
    for value, index in zip(values, indices, strict=True):
        mask = masks[index // 80]
        binary = (mask > 0).float()
        score = value * (mask.sigmoid() * binary).sum() / (binary.sum() + 1e-6)
        if score > 0.3:
            ys, xs = torch.where(mask > 0)
            box = (xs.min().item(), ys.min().item(), xs.max().item() + 1, ys.max().item() + 1)
            found.append((CLASSES[index % 80], score.item(), box, binary.bool().numpy()))
    return found


@pytest.mark.parametrize(
    ("size", "resized", "padded"),
    quick(
        [
            ((64, 64), (800, 800), (800, 800)),
            ((96, 40), (1333, 555), (1344, 576)),
            ((60, 90), (800, 1200), (800, 1216)),
        ],
        ((96, 40), (1333, 555), (1344, 576)),
    ),
)
def test_the_detector_finds_what_mmdetections_definition_finds(detector_folder, size, resized, padded):
    from transformers import Mask2FormerForUniversalSegmentation

    (image,) = tiny_clip.pictures([size])
    model = Mask2FormerForUniversalSegmentation.from_pretrained(detector_folder).eval()
    expected = defined_detections(model, image, resized, padded)
    assert expected
    with torch.inference_mode():
        detected = Detector(detector_folder)(image)
    found = [(name, one) for name, some in detected.items() for one in some if one.score > 0.3]
    assert len(found) == len(expected)
    for (name, one), (expected_name, score, box, mask) in zip(
        sorted(found, key=lambda pair: pair[1].score), sorted(expected, key=lambda entry: entry[1]), strict=True
    ):
        assert name == expected_name and one.mask.shape == size[::-1]
        assert one.score == pytest.approx(score, abs=1e-5)
        assert one.box == box and (one.mask != mask).mean() < 1e-3


def test_a_checkpoint_that_is_not_the_detector_is_refused_by_name(detector_folder, tmp_path):
    def copied(name):
        folder = tmp_path / name
        folder.mkdir()
        for path in detector_folder.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        return folder

    folder = copied("lacking")
    weights = load_file(folder / "model.safetensors")
    renamed = {name.replace("class_predictor.bias", "other.bias"): tensor for name, tensor in weights.items()}
    save_file(renamed, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"missing: class_predictor\.bias; unexpected: other\.bias"):
        Detector(folder)

    folder = copied("classes")
    config = json.loads((folder / "config.json").read_text())
    config["id2label"]["3"] = "unicorn"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"COCO's 80 classes; missing: motorcycle; unknown: unicorn"):
        Detector(folder)

    (copied("none") / "preprocessor_config.json").unlink()
    with pytest.raises(InputError, match="no Mask2FormerImageProcessorPil can be read there"):
        Detector(tmp_path / "none")
    with pytest.raises(InputError, match="no Mask2FormerConfig can be read there"):
        Detector(tmp_path / "nothing")


def test_the_detectors_classes_are_genevals_by_either_spelling():
    for names in (CLASSES, [DETECTORS_NAMES.get(name, name) for name in CLASSES]):
        assert tuple(geneval._class_names(dict(enumerate(names)), "config.json")) == CLASSES


def test_a_colour_is_the_nearest_of_three_sentences_mean_on_grey(clip_folder, clip_tensors):
    (image,) = tiny_clip.pictures([(64, 48)])
    mask = np.zeros((48, 64), dtype=bool)
    mask[10:40, 5:35] = True
    mask[20:30, 10:20] = False
    whole = Detection((0.0, 0.0, 64.0, 48.0), 0.9)
    detections = [Detection((5.0, 10.0, 35.0, 40.0), 0.9, mask), whole]

    painted = np.array(image)
    painted[~mask] = 0x99
    crops = [Image.fromarray(painted).crop((5, 10, 35, 40)), image]
    directions = []
    for color in COLORS:
        sentences = [f"a photo of a {color} tv remote", f"a photo of a {color}-colored tv remote"]
        sentences.append(f"a photo of a {color} object")
        each = torch.stack(
            [tiny_clip.text_feature(clip_tensors, tiny_clip.token_ids(text), "quick_gelu") for text in sentences]
        )
        directions.append(functional.normalize(functional.normalize(each, dim=-1).mean(0), dim=-1))
    expected = []
    for crop in crops:
        shorter = min(crop.size)
        crop = crop.resize([28 * side // shorter for side in crop.size], Image.Resampling.BICUBIC)
        left = round((crop.width - 28) / 2)
        pixels = torch.from_numpy(np.array(crop.crop((left, 0, left + 28, 28)))).permute(2, 0, 1) / 255
        feature = tiny_clip.image_feature(clip_tensors, (pixels - tiny_clip.MEAN) / tiny_clip.STD, "quick_gelu")
        expected.append(functional.normalize(feature, dim=-1) @ torch.stack(directions).T)

    assert geneval._crop(image, detections[0]).getpixel((7, 12)) == (0x99, 0x99, 0x99)
    colors = ColorClassifier(clip_folder)
    with torch.inference_mode():
        assert torch.allclose(colors._of("tv remote"), torch.stack(directions), atol=1e-5)
        told = colors(image, detections * 20, "tv remote")  # more than one batch
    assert told == [COLORS[one.argmax()] for one in expected] * 20
    assert (torch.stack(expected).topk(2).values.diff(dim=1).abs() > 1e-4).all()  # no tie decides


# End to end


def test_scores_are_ones_and_zeros_the_same_in_any_company(metric):
    images = tiny_clip.pictures([(64, 64), (48, 64)])
    with torch.inference_mode():
        names = sorted(set(metric._detector(images[0])))
    asked = [facts("single_object", needs(names[0])), facts("single_object", needs("zebra", 9)), RED_AND_BLUE]
    prompts = [Prompt(str(number), "", one) for number, one in enumerate(asked)]
    together = metric.score([images[0], *images], prompts)
    assert together.dtype == np.float64 and together.tolist()[:2] == [1.0, 0.0]
    alone = [metric.score([image], [prompt])[0] for image, prompt in zip([images[0], *images], prompts, strict=True)]
    assert together.tolist() == alone


def test_scripted_detections_and_colours_give_the_known_verdicts(metric, monkeypatch):
    red, blue = (Image.new("RGB", (100, 40), color) for color in ("red", "blue"))
    scene = Image.new("RGB", (100, 40), "white")
    scene.paste((255, 0, 0), (5, 5, 25, 25))
    scene.paste((0, 0, 255), (70, 5, 90, 25))
    objects = {"cat": [at(5, 5, 20)], "dog": [at(70, 5, 20, score=0.8)]}

    def colors(image, found, name):
        mean = [np.array(image.crop(one.box)).reshape(-1, 3).mean(0) for one in found]
        return ["red" if pixel[0] > pixel[2] else "blue" for pixel in mean]

    monkeypatch.setattr(metric, "_detector", lambda image: objects if image is scene else {})
    monkeypatch.setattr(metric, "_colors", colors)
    cases = [
        (scene, facts("single_object", CAT), 1),
        (red, facts("single_object", CAT), 0),
        (scene, facts("two_object", CAT, DOG), 1),
        (scene, facts("counting", needs("cat", 1), exclude=[needs("cat", 2)]), 1),
        (scene, facts("counting", needs("dog", 1), exclude=[needs("dog", 2)]), 0),  # 0.8 is too little to count
        (scene, RED_CAT, 1),
        (scene, facts("colors", needs("dog", color="red")), 0),
        (scene, facts("position", CAT, needs("dog", position=["right of", 0])), 1),
        (scene, facts("position", CAT, needs("dog", position=["above", 0])), 0),
        (scene, RED_AND_BLUE, 1),
        (blue, RED_AND_BLUE, 0),
    ]
    prompts = [Prompt(f"{number}", one["tag"], one) for number, (_, one, _) in enumerate(cases)]
    assert metric.score([image for image, _, _ in cases], prompts).tolist() == [right for _, _, right in cases]
    assert metric.verdict(blue, RED_CAT) == (False, ["expected cat>=1, found 0"])


def test_foreign_prompts_are_refused_before_anything_is_looked_at(metric, monkeypatch):
    monkeypatch.setattr(metric, "_detector", None)
    prompts = [Prompt("a cat", "", facts("single_object", CAT)), Prompt("a dog in a hat")]
    for check in (lambda: GenEval.check_prompts(prompts), lambda: metric.score([None, None], prompts)):
        with pytest.raises(InputError, match="GenEval judges its own prompts only, and 'a dog in a hat'"):
            check()
    with pytest.raises(ValueError, match="1 images, but 2 prompts"):
        metric.score([None], prompts)


def test_the_metric_is_found_by_its_name_and_names_its_checkpoints():
    assert metric_class("geneval") is GenEval
    assert (GenEval.info.name, GenEval.info.kind, GenEval.info.higher_is_better) == ("geneval", "score", True)
    assert set(GenEval.info.checkpoints) == {"detector", "clip"}
