"""One metric over two sides: what it says, what it keeps, and what is wrong before anything is drawn."""

import json

import numpy as np
import pytest
from PIL import Image

from surgery.errors import InputError, SurgeryError
from surgery.validate.drawing import Job
from surgery.validate.metrics import METRICS, metric_class
from surgery.validate.metrics.info import Info
from surgery.validate.prompts import Prompt
from surgery.validate.reference import open_reference
from surgery.validate.scoring import Scorer, prepare_scorers, score

PROMPTS = tuple(Prompt(f"prompt {at}", "even" if at % 2 == 0 else "odd") for at in range(8))
JOBS = [Job(prompt.text, at, at) for at, prompt in enumerate(PROMPTS)]


class Brightness:
    """The mean of an image."""

    info = Info("brightness", "Brightness", "score", True, "tests")
    made = 0

    def __init__(self, files, device="cpu"):
        type(self).made += 1

    def score(self, images, prompts):
        assert all(image.mode == "RGB" for image in images) and len(images) == len(prompts)
        return np.array([np.asarray(image, float).mean() for image in images])


class Nearness:
    """Minus the mean distance of two images."""

    info = Info("nearness", "Nearness", "fidelity", True, "tests")

    def __init__(self, files, device="cpu"):
        pass

    def compare(self, patched, base):
        return np.array(
            [-np.abs(np.asarray(a, float) - np.asarray(b, float)).mean() for a, b in zip(patched, base, strict=True)]
        )


class Spread:
    """The distance of the mean colours of two sets."""

    info = Info("spread", "Spread", "distance", False, "tests")

    def __init__(self, files, device="cpu"):
        pass

    def features(self, images):
        return np.array([np.asarray(image, np.float32).mean((0, 1)) for image in images])

    def distance(self, features, reference):
        return float(np.linalg.norm(features.mean(0) - reference.mean(0)))

    def differences(self, patched, base, reference, draws):
        return np.array([self.distance(patched[d], reference) - self.distance(base[d], reference) for d in draws])


@pytest.fixture
def images(tmp_path):
    """{side: (key, {Job key: path})}: base images of grey 10 at, patched 5 brighter, but for the last, 1 darker."""
    sides = {}
    for side, key in (("base", "b" * 64), ("patched", "c" * 64)):
        paths = {}
        for at, job in enumerate(JOBS):
            grey = 10 * at + 10 + (0 if side == "base" else 5 if at < 7 else -1)
            paths[job.key] = tmp_path / f"{side}-{at}.png"
            Image.new("RGB", (8, 8), (grey, grey, grey)).save(paths[job.key])
        sides[side] = (key, paths)
    return sides


def scorer_of(cls, reference=None):
    return Scorer(cls, {}, "cpu", reference)


def test_a_score_is_compared_pair_by_pair_and_by_category(images, tmp_path):
    metric, (base, patched) = score(scorer_of(Brightness), tmp_path, images["base"], images["patched"], JOBS, PROMPTS)
    assert list(patched - base) == [5] * 7 + [-1]
    assert metric.difference == pytest.approx(4.25) and metric.interval[0] < 4.25 < metric.interval[1] <= 5
    assert (metric.win_rate, metric.tie_rate, metric.n, metric.groups) == (7 / 8, 0, 8, 8)
    even, odd = metric.categories
    assert (even.name, even.n, even.difference) == ("even", 4, 5) and (odd.name, odd.difference) == ("odd", 3.5)
    assert metric.verdict == "better" and metric.base == pytest.approx(45)


def test_what_was_scored_is_not_scored_again_even_after_a_torn_line(images, tmp_path):
    Brightness.made = 0
    first, _ = score(scorer_of(Brightness), tmp_path, images["base"], images["patched"], JOBS[:5], PROMPTS)
    assert Brightness.made == 1
    again, _ = score(scorer_of(Brightness), tmp_path, images["base"], images["patched"], JOBS[:5], PROMPTS)
    assert Brightness.made == 1 and again == first
    (path,) = tmp_path.glob("values/brightness-bbbb*.jsonl")
    path.write_text(path.read_text()[:-9])  # a process that was killed while writing
    whole, _ = score(scorer_of(Brightness), tmp_path, images["base"], images["patched"], JOBS, PROMPTS)
    assert whole.difference == pytest.approx(4.25)
    values = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("]")]
    assert {key for key, _ in values} == {job.key for job in JOBS}


def test_values_of_other_images_are_not_taken_for_these(images, tmp_path):
    score(scorer_of(Brightness), tmp_path, images["base"], images["patched"], JOBS, PROMPTS)
    other = ("d" * 64, images["base"][1])
    metric, _ = score(scorer_of(Brightness), tmp_path, images["base"], other, JOBS, PROMPTS)
    assert metric.difference == 0 and metric.tie_rate == 1 and metric.verdict == "no difference"


def test_fidelity_has_no_base(images, tmp_path):
    metric, values = score(scorer_of(Nearness), tmp_path, images["base"], images["patched"], JOBS, PROMPTS)
    assert metric.base is None and metric.difference is None and metric.patched == pytest.approx(-4.5)
    assert metric.interval[0] <= -4.5 <= metric.interval[1] and metric.verdict == "" and list(values)[-1] == -1


def test_a_distance_is_of_each_side_to_the_reference(images, tmp_path):
    folder = tmp_path / "reference"
    folder.mkdir()
    for at in range(3):
        Image.new("RGB", (8, 8), (50, 50, 50)).save(folder / f"{at}.png")
    reference = open_reference(folder)
    metric, _ = score(scorer_of(Spread, reference), tmp_path, images["base"], images["patched"], JOBS, PROMPTS)
    assert metric.base == pytest.approx(5 * 3**0.5) and metric.patched == pytest.approx(0.75 * 3**0.5)
    assert metric.difference == pytest.approx(-4.25 * 3**0.5) and metric.win_rate is None
    assert metric.interval[0] < metric.difference < metric.interval[1]
    assert len(list(tmp_path.glob("values/*.npy"))) == 3
    again, _ = score(scorer_of(Spread, reference), tmp_path, images["base"], images["patched"], JOBS, PROMPTS)
    assert again == metric


def test_a_damaged_image_is_named_and_taken_away(images, tmp_path):
    path = images["patched"][1][JOBS[3].key]
    path.write_bytes(path.read_bytes()[:45])
    with pytest.raises(SurgeryError, match=r"patched-3\.png is damaged .* was removed; run the same command again"):
        score(scorer_of(Brightness), tmp_path, images["base"], images["patched"], JOBS, PROMPTS)
    assert not path.exists()


def test_every_metric_can_be_had_and_says_what_it_is():
    from surgery.metric_names import FIDELITY_METRICS, METRIC_NAMES

    assert tuple(METRICS) == METRIC_NAMES
    for name in METRICS:
        info = metric_class(name).info
        method = {"score": "score", "distance": "distance", "fidelity": "compare"}[info.kind]
        assert info.name == name and info.title and info.source and hasattr(metric_class(name), method)
        assert (info.kind == "fidelity") == (name in FIDELITY_METRICS)


@pytest.mark.parametrize(
    ("names", "options", "match"),
    [
        (["clipscore"], {}, r"there is no metric 'clipscore'; did you mean clip_score\? There are:"),
        (["ssim", "ssim"], {}, "named twice"),
        (["fid"], {}, "fid compares with real images: give a folder"),
        (["geneval"], {}, "GenEval"),
        (["ssim"], {"checkpoints": {"ssim.model": "x"}}, r"ssim has no such part; it has none"),
        (["clip_score"], {"checkpoints": {"clip_score.modle": "x"}}, "clip_score has no such part; it has model"),
        (["clip_score"], {"checkpoints": {"clip_score.model": "./nowhere"}}, "there is no folder nowhere"),
        (["ssim"], {"checkpoints": {"clip_score.model": "x"}}, r"write METRIC\.PART=PATH, for one of ssim"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_drawn(names, options, match):
    from surgery.validate.prompts import PromptSet

    with pytest.raises(InputError, match=match):
        prepare_scorers(names, PromptSet("x", PROMPTS), **options)
