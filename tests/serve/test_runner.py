"""What a replica draws: the image of its seed, whatever it is drawn beside, after, or in place of what did not fit."""

import base64
import io
import threading
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image

from surgery.errors import ArtifactError, SurgeryError
from surgery.export.serve.replica import BatchRunner, StartFailure, Stopped, read_start_failure
from surgery.export.serve.request import BatchKey
from surgery.runtime.worker import ImageRequest, WorkerConfig

from ..conftest import load_shapes
from ..models.test_patch_survives import lora_state

SMALL = BatchKey(steps=2, guidance_scale=4.0, width=64, height=64)
REQUESTS = [ImageRequest("a red circle", 1), ImageRequest("two green stars", 2), ImageRequest("a blue square", 3)]
NEVER = threading.Event()


def config_of(folder, artifact_hash):
    return WorkerConfig(str(folder), None, artifact_hash, device="cpu", threads=1)


@pytest.fixture(scope="module")
def served(shapes_artifact):
    """The loaded pipeline of an artifact at scale 1."""
    from surgery.artifact import read_manifest

    return BatchRunner(config_of(shapes_artifact, read_manifest(shapes_artifact).hash), SMALL, 2)


def pixels(drawn):
    image = Image.open(io.BytesIO(base64.b64decode(drawn.image)))
    return np.asarray(image.convert("RGB"), int)


def difference(one, other):
    return np.abs(pixels(one) - pixels(other)).max()


def test_an_image_does_not_depend_on_what_it_is_drawn_with(served):
    together = served.draw(SMALL, REQUESTS, NEVER)
    for request, drawn in zip(REQUESTS, together, strict=True):
        (alone,) = served.draw(SMALL, [request], NEVER)
        assert alone.size == "64x64" and difference(alone, drawn) <= 2, request
    assert difference(together[0], together[1]) > 50


def test_hyperparameters_hold_for_their_batch_alone(served):
    (before,) = served.draw(SMALL, REQUESTS[:1], NEVER)
    strong = BatchKey(**{**vars(SMALL), "hyperparameters": (("alpha", 2.0), ("scale", 4.0))})
    (other,) = served.draw(strong, REQUESTS[:1], NEVER)
    (after,) = served.draw(SMALL, REQUESTS[:1], NEVER)
    assert difference(before, other) > 2 and before == after
    refused = BatchKey(**{**vars(SMALL), "hyperparameters": (("eta", 2.0),)})
    (drawn,) = served.draw(refused, REQUESTS[:1], NEVER)
    assert drawn.kind == "refused" and "which has no eta" in drawn.problem
    assert served.draw(SMALL, REQUESTS[:1], NEVER) == [before]


def test_negative_prompts_and_formats_are_each_images_own(served):
    key = BatchKey(**{**vars(SMALL), "negatives": True})
    plain, empty, other = served.draw(
        key,
        [
            ImageRequest("a star", 4, None, "png"),
            ImageRequest("a star", 4, "", "png"),
            ImageRequest("a star", 4, "blue", "webp"),
        ],
        NEVER,
    )
    assert difference(plain, empty) <= 2 and difference(plain, other) > 8
    assert base64.b64decode(other.image)[8:12] == b"WEBP"


def fails_from(monkeypatch, size, error):
    """Have batches of at least so many images fail; the sizes of all that are tried are returned as they are."""
    from surgery.runtime import draw as generating

    draw, tried = generating.draw, []

    def limited(pipeline, jobs, sampling, *rest):
        tried.append(len(jobs))
        if len(jobs) >= size:
            raise error
        return draw(pipeline, jobs, sampling, *rest)

    monkeypatch.setattr(generating, "draw", limited)
    return tried


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: not enough memory: you tried to"),
    ],
    ids=["cuda", "python", "cpu"],
)
def test_what_does_not_fit_is_drawn_in_halves_and_that_is_remembered(served, monkeypatch, error):
    expected = served.draw(SMALL, REQUESTS, NEVER)
    tried = fails_from(monkeypatch, 2, error)
    monkeypatch.setattr(served, "_fitting", {})
    drawn = served.draw(SMALL, REQUESTS, NEVER)
    assert all(difference(one, other) <= 2 for one, other in zip(drawn, expected, strict=True))
    assert tried == [3, 1, 2, 1, 1]
    served.draw(SMALL, REQUESTS, NEVER)
    assert tried[5:] == [1, 1, 1]


def test_one_image_that_does_not_fit_is_said_so_and_the_replica_lives_on(served, monkeypatch):
    with monkeypatch.context() as patched:
        fails_from(patched, 1, MemoryError())
        patched.setattr(served, "_fitting", {})
        assert [drawn.kind for drawn in served.draw(SMALL, REQUESTS[:2], NEVER)] == ["memory", "memory"]
    assert served.draw(SMALL, REQUESTS[:1], NEVER)[0].problem is None


def test_an_error_of_one_image_is_not_that_of_those_beside_it(served, monkeypatch):
    from surgery.runtime import draw as generating

    draw = generating.draw

    def poisoned(pipeline, jobs, sampling, *rest):
        if any(seed == 2 for _, seed in jobs):
            raise ValueError("no such token\nsecond line")
        return draw(pipeline, jobs, sampling, *rest)

    monkeypatch.setattr(generating, "draw", poisoned)
    first, second, third = served.draw(SMALL, REQUESTS, NEVER)
    assert first.problem is third.problem is None
    assert (second.kind, second.problem) == ("failed", "ValueError: no such token")


def test_it_stops_at_the_next_step_when_nobody_waits(served):
    gone = threading.Event()
    gone.set()
    with pytest.raises(Stopped):
        served.draw(SMALL, REQUESTS, gone)


def test_another_artifact_than_the_one_that_was_checked_is_refused(shapes_artifact):
    with pytest.raises(ArtifactError, match="is artifact .* not 0000"):
        BatchRunner(config_of(shapes_artifact, "0" * 64), SMALL, 1)


def test_what_keeps_a_replica_from_starting_comes_back_as_the_error_that_it_was():
    failure = StartFailure.of(ArtifactError("a: b\nc"), "m")
    error = read_start_failure(f"Traceback ...\nRuntimeError: {failure}\n")
    assert type(error) is ArtifactError and str(error) == "a: b\nc"
    other = read_start_failure(str(StartFailure.of(KeyError("x"), "the/model")))
    assert type(other) is SurgeryError and str(other) == "the/model cannot be loaded: KeyError: 'x'"
    assert read_start_failure("Deployment has 2 replicas that have taken more than 30s to be scheduled") is None


def png_of(image, mode="RGB"):
    file = io.BytesIO()
    Image.fromarray(image, mode).save(file, format="PNG")
    return file.getvalue()


def key_of(**settings):
    return BatchKey(**{**vars(SMALL), **settings})


def test_previews_come_on_the_way_nearer_and_nearer_to_the_image(served):
    request = ImageRequest("a red circle", 1, previews=3)
    shown = []
    key = key_of(steps=8)
    plain, last = served.draw(key, [REQUESTS[1], request], NEVER, lambda *preview: shown.append(preview))
    assert [(at, number) for at, number, _ in shown] == [(1, 0), (1, 1), (1, 2)]
    away = [np.abs(pixels(preview) - pixels(last)).mean() for _, _, preview in shown]
    assert away[0] > away[1] > away[2] > 0 and away[2] < 20
    assert last == served.draw(key, [request], NEVER)[0] or difference(last, served.draw(key, [request], NEVER)[0]) <= 2
    assert plain.problem is None


def test_an_image_is_drawn_from_another_and_the_mask_keeps_the_rest(served):
    (drawn,) = served.draw(key_of(steps=8), REQUESTS[:1], NEVER)
    start = png_of(pixels(drawn).astype(np.uint8))
    alpha = np.full((64, 64, 4), 255, np.uint8)
    alpha[:, :32, 3] = 0
    requests = [ImageRequest("a blue square", seed, image=start) for seed in (5, 6)]
    near, far = (key_of(steps=8, given="image", strength=strength) for strength in (0.25, 1.0))
    one, two = served.draw(near, requests, NEVER)
    (other,) = served.draw(far, requests[:1], NEVER)
    away = [np.abs(pixels(image) - pixels(drawn)).mean() for image in (one, two, other)]
    assert max(away[:2]) < away[2] and difference(one, two) > 2
    masked = ImageRequest("a blue square", 5, image=start, mask=png_of(alpha, "RGBA"))
    (half,) = served.draw(key_of(steps=8, given="mask", strength=1.0), [masked], NEVER)
    changed = np.abs(pixels(half) - pixels(drawn)).mean(axis=(0, 2))
    assert changed[:28].mean() > 3 * changed[36:].mean()


def test_a_request_may_have_its_own_scheduler_and_guidance_and_the_next_has_the_models_own(served):
    (before,) = served.draw(SMALL, REQUESTS[:1], NEVER)
    for settings in ({"scheduler": "EulerDiscreteScheduler"}, {"guidance": '{"method": "apg"}'}):
        (other,) = served.draw(key_of(**settings), REQUESTS[:1], NEVER)
        assert other.problem is None and difference(before, other) > 2, settings
        assert served.draw(SMALL, REQUESTS[:1], NEVER) == [before]


def test_a_batch_has_its_loras_and_the_next_has_none_of_them(shapes_artifact, tmp_path):
    from safetensors.torch import save_file

    from surgery.artifact import read_manifest
    from surgery.runtime.loras import lora_source

    config = config_of(shapes_artifact, read_manifest(shapes_artifact).hash)
    for seed, name in enumerate(("one", "two")):
        save_file(lora_state(load_shapes().unet, seed), tmp_path / f"{name}.safetensors")
    loras = tuple(lora_source(f"{name}={tmp_path / name}.safetensors") for name in ("one", "two"))
    runner = BatchRunner(replace(config, loras=loras), SMALL, 1)
    chosen = (), (("one", 1.0),), (("one", 1.0), ("two", 0.5)), (("two", 0.5),), (("one", 1.0),), ()
    drawn = [runner.draw(key_of(loras=one), REQUESTS[:1], NEVER)[0] for one in chosen]
    assert all(image.problem is None for image in drawn)
    assert drawn[0] == drawn[5] and drawn[1] == drawn[4]
    assert all(difference(one, other) > 2 for one, other in pairwise(drawn[:4]))
    (refused,) = runner.draw(key_of(loras=(("one", 1e39),)), REQUESTS[:1], NEVER)
    assert refused.kind == "refused" and "use a smaller scale" in refused.problem
    assert runner.draw(SMALL, REQUESTS[:1], NEVER) == drawn[:1]


def test_it_tells_how_much_of_a_prompt_is_read(served):
    short, long = ImageRequest("a red circle", 1), ImageRequest("red " * 500, 1)
    one, two = served.draw(SMALL, [short, long], NEVER)
    assert 3 <= one.tokens < 12 and one.cut == 0 and one.positions == 64 * 64 // served_factor(served) ** 2
    assert two.cut == 500 + one.tokens - 3 - two.tokens > 400  # all but its words are the two ends, as of the short one


def served_factor(served):
    return served._worker.pipeline.vae_scale_factor


def test_compression_is_the_files_own(served):
    small, large = (ImageRequest("a red circle", 1, format="jpeg", compression=quality) for quality in (5, 100))
    one, two = served.draw(SMALL, [small, large], NEVER)
    assert len(one.image) < len(two.image)
