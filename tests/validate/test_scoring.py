"""One metric over two sides: what it says, what it keeps, and what is wrong before anything is drawn."""

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from surgery.errors import InputError, SurgeryError
from surgery.validate.jobs import ImagePair, Job, PairedImages, Side
from surgery.validate.metrics import METRICS, metric_class
from surgery.validate.metrics.info import Info
from surgery.validate.prompts import Prompt
from surgery.validate.prompts.shapes import shapes_prompts
from surgery.validate.reference import open_reference
from surgery.validate.scoring import Scorer, check_metrics, prepare_scorers, score
from surgery.validate.store import read_image

PROMPTS = tuple(Prompt(f"prompt {at}", "even" if at % 2 == 0 else "odd") for at in range(8))
JOBS = [Job(prompt, at) for at, prompt in enumerate(PROMPTS)]
BASE, PATCHED, OTHER = (Side(name, None, {"of": name}) for name in ("base", "patched", "other"))


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

    def resampled(self, features, reference, draws):
        return (self.distance(features[draw], reference) for draw in draws)


@pytest.fixture
def images(tmp_path):
    """PairedImages: base images of grey 10 at, patched 5 brighter, but for the last, 1 darker."""
    pairs = []
    for at, job in enumerate(JOBS):
        pair = ImagePair(job, tmp_path / f"base-{at}.png", tmp_path / f"patched-{at}.png")
        grey = 10 * at + 10
        for path, level in ((pair.base, grey), (pair.patched, grey + (5 if at < 7 else -1))):
            Image.new("RGB", (8, 8), (level, level, level)).save(path)
        pairs.append(pair)
    return PairedImages(BASE, PATCHED, tuple(pairs))


def scorer_of(cls, reference=None):
    return Scorer(cls, {}, "cpu", reference)


def test_a_score_is_compared_pair_by_pair_and_by_category(images, tmp_path):
    result = score(scorer_of(Brightness), tmp_path, images)
    metric = result.metric
    assert list(result.patched - result.base) == [5] * 7 + [-1]
    assert metric.difference == pytest.approx(4.25) and metric.interval[0] < 4.25 < metric.interval[1] <= 5
    assert (metric.win_rate, metric.tie_rate, metric.n, metric.groups) == (7 / 8, 0, 8, 8)
    even, odd = metric.categories
    assert (even.name, even.n, even.difference) == ("even", 4, 5) and (odd.name, odd.difference) == ("odd", 3.5)
    assert metric.verdict == "better" and metric.base == pytest.approx(45)


def test_what_was_scored_is_not_scored_again_even_after_a_torn_line(images, tmp_path):
    Brightness.made = 0
    few = replace(images, pairs=images.pairs[:5])
    first = score(scorer_of(Brightness), tmp_path, few).metric
    assert Brightness.made == 1
    again = score(scorer_of(Brightness), tmp_path, few).metric
    assert Brightness.made == 1 and again == first
    (path,) = tmp_path.glob(f"values/brightness-{BASE.key[:12]}*.jsonl")
    assert path.name == f"brightness-{BASE.key[:12]}-{scorer_of(Brightness).identity[:12]}.jsonl"
    path.write_text(path.read_text()[:-9])  # a process that was killed while writing
    whole = score(scorer_of(Brightness), tmp_path, images).metric
    assert whole.difference == pytest.approx(4.25)
    values = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("]")]
    assert {key for key, _ in values} == {job.key for job in JOBS}  # these prompts have no facts


def test_values_of_other_images_are_not_taken_for_these(images, tmp_path):
    score(scorer_of(Brightness), tmp_path, images)
    same = tuple(replace(pair, patched=pair.base) for pair in images.pairs)
    metric = score(scorer_of(Brightness), tmp_path, PairedImages(BASE, OTHER, same)).metric
    assert metric.difference == 0 and metric.tie_rate == 1 and metric.verdict == "no difference"


def test_fidelity_has_no_base(images, tmp_path):
    result = score(scorer_of(Nearness), tmp_path, images)
    metric, values = result.metric, result.patched
    assert metric.base is None and metric.difference is None and metric.patched == pytest.approx(-4.5)
    assert metric.interval[0] <= -4.5 <= metric.interval[1] and metric.verdict == "" and list(values)[-1] == -1


def test_a_distance_is_of_each_side_to_the_reference(images, tmp_path):
    folder = tmp_path / "reference"
    folder.mkdir()
    for at in range(3):
        Image.new("RGB", (8, 8), (50, 50, 50)).save(folder / f"{at}.png")
    reference = open_reference(folder)
    metric = score(scorer_of(Spread, reference), tmp_path, images).metric
    assert metric.base == pytest.approx(5 * 3**0.5) and metric.patched == pytest.approx(0.75 * 3**0.5)
    assert metric.difference == pytest.approx(-4.25 * 3**0.5) and metric.win_rate is None
    assert metric.interval[0] < metric.difference < metric.interval[1]
    assert len(list(tmp_path.glob("values/*.npy"))) == 3
    again = score(scorer_of(Spread, reference), tmp_path, images).metric
    assert again == metric


def test_a_damaged_image_is_named_and_taken_away(images, tmp_path):
    path = images.pairs[3].patched
    path.write_bytes(path.read_bytes()[:45])
    with pytest.raises(SurgeryError, match=r"patched-3\.png is damaged .* was removed; run the same command again"):
        score(scorer_of(Brightness), tmp_path, images)
    assert not path.exists()


def test_every_metric_can_be_had_and_says_what_it_is():
    from surgery.recipe.metric_names import FIDELITY_METRICS, METRIC_NAMES

    assert tuple(METRICS) == METRIC_NAMES
    for name in METRICS:
        info = metric_class(name).info
        method = {"score": "score", "distance": "distance", "fidelity": "compare", "diversity": "of_prompt"}[info.kind]
        assert info.name == name and info.title and info.source and hasattr(metric_class(name), method)
        assert (info.kind == "fidelity") == (name in FIDELITY_METRICS)


def settings_of(names, reference=None):
    from surgery.validate.prompts import PromptSet
    from surgery.validate.session import Settings

    return Settings(PromptSet("x", PROMPTS), 1, 0, tuple(names), (), reference)


@pytest.mark.parametrize(
    ("names", "sampling", "match"),
    [
        (["clipscore"], {}, r"there is no metric 'clipscore'; did you mean clip_score\? There are:"),
        (["ssim", "ssim"], {}, "named twice"),
        (["fid"], {}, "fid compares with real images: give a folder"),
        (["geneval"], {}, "GenEval"),
        (["shape_alignment"], {}, "shape_alignment judges the shapes prompts"),
    ],
)
def test_metrics_that_cannot_be_are_told_before_anything_is_fetched(names, sampling, match):
    with pytest.raises(InputError, match=match):
        check_metrics(settings_of(names), sampling)


def test_an_artifact_of_another_size_is_told_before_it_is_drawn():
    metric_class("shape_alignment").check_sampling({"height": 64, "width": None})
    with pytest.raises(InputError, match="judges images of 64x64 pixels"):
        metric_class("shape_alignment").check_sampling({"height": 128, "width": 64})
    settings = replace(settings_of(["shape_alignment"]), prompts=shapes_prompts(1))
    check_metrics(settings, {"height": 64, "width": 64})
    with pytest.raises(InputError, match="judges images of 64x64 pixels"):
        check_metrics(settings, {"height": 128, "width": 64})


def test_what_is_no_file_of_values_is_told_and_not_read(images, tmp_path):
    name = f"brightness-{BASE.key[:12]}-{scorer_of(Brightness).identity[:12]}.jsonl"
    (tmp_path / "values" / name).mkdir(parents=True)
    with pytest.raises(SurgeryError, match="cannot write .*brightness-"):
        score(scorer_of(Brightness), tmp_path, images)


@pytest.mark.parametrize(
    ("names", "checkpoints", "match"),
    [
        (["ssim"], {"ssim.model": "x"}, r"ssim has no such part; it has none"),
        (["clip_score"], {"clip_score.modle": "x"}, "clip_score has no such part; it has model"),
        (["clip_score"], {"clip_score.model": "./nowhere"}, "there is no folder nowhere"),
        (["ssim"], {"clip_score.model": "x"}, r"write METRIC\.PART=PATH, for one of ssim"),
    ],
)
def test_checkpoints_that_are_none_of_a_metric_are_told(names, checkpoints, match):
    with pytest.raises(InputError, match=match):
        prepare_scorers(names, checkpoints=checkpoints)


def test_a_corrected_annotation_is_judged_anew(images, tmp_path):
    """The image is the same, and what it is judged by is not."""

    class Named(Brightness):
        info = Info("named", "Named", "score", True, "tests")

        def score(self, images, prompts):
            return np.array([float(prompt.facts["worth"]) for prompt in prompts])

    for worth in (1, 2):
        jobs = [Job(Prompt(job.prompt.text, "", {"worth": worth}), job.seed) for job in JOBS]
        pairs = tuple(replace(pair, job=job) for pair, job in zip(images.pairs, jobs, strict=True))
        metric = score(scorer_of(Named), tmp_path, replace(images, pairs=pairs)).metric
        assert metric.base == worth


def test_one_prompt_written_six_times_is_one_prompt(images, tmp_path):
    pairs = tuple(replace(pair, job=Job(Prompt("the same"), pair.job.seed)) for pair in images.pairs)
    metric = score(scorer_of(Brightness), tmp_path, replace(images, pairs=pairs)).metric
    assert (metric.n, metric.groups, metric.verdict) == (8, 1, "cannot tell with 1 prompt")
    assert metric.counted == "8 (1 prompt)"


@pytest.mark.parametrize(("lost", "verdict"), [(4, "cannot tell with 50 prompts"), (6, "worse")])
def test_a_verdict_needs_six_prompts_on_which_the_sides_differ(lost, verdict):
    from surgery.artifact.scores import Metric
    from surgery.validate.statistics import paired

    found = paired(np.ones(50), np.r_[np.zeros(lost), np.ones(50 - lost)], range(50))
    assert found.interval[1] < 0 and found.decided == lost
    figures = {name: getattr(found, name) for name in ("n", "groups", "base", "patched", "difference", "decided")}
    assert Metric(name="x", higher_is_better=True, interval=list(found.interval), **figures).verdict == verdict


@pytest.mark.parametrize(
    ("interval", "verdict"),
    [
        ([-0.4, 0.6], "cannot tell with 50 prompts"),
        ([-0.1, 0.1], "no difference"),
        ([-0.1, 0.11], "cannot tell with 50 prompts"),
        ([0.01, 0.09], "better"),
        ([-0.2, -0.1], "worse"),
        ([-0.2, 0.0], "cannot tell with 50 prompts"),
        ([0.0, 0.2], "cannot tell with 50 prompts"),
    ],
)
def test_no_difference_is_shown_by_an_interval_within_the_margin(interval, verdict):
    from surgery.artifact.scores import Metric

    figures = {"n": 50, "base": 1.0, "patched": 1.0, "difference": 0.0, "interval": interval, "margin": 0.1}
    assert Metric(name="x", higher_is_better=True, **figures).verdict == verdict


def test_an_image_that_the_system_cannot_open_is_not_thrown_away(images, tmp_path, monkeypatch):
    def refuse(*arguments, **options):
        raise OSError(24, "Too many open files")

    path = images.pairs[3].patched
    monkeypatch.setattr(Image, "open", refuse)
    with pytest.raises(SurgeryError, match="Too many open files"):
        read_image(path)
    assert path.exists()
