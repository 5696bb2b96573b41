"""A server of a model that draws videos: the request, what a replica draws for it, the file that comes back."""

import base64
import io
import json
import threading

import pytest
from PIL import Image

from surgery.artifact import read_manifest
from surgery.errors import InputError
from surgery.export.serve.checking import Limits, ServedModel, served_model
from surgery.export.serve.refusal import Refusal
from surgery.export.serve.replica import BatchRunner
from surgery.export.serve.request import ImageResult, read_request
from surgery.runtime.worker import WorkerConfig

from ..runtime.videos import SAMPLING, video_artifact  # noqa: F401  a fixture
from .test_gateway import Replica, call, running
from .test_request import SERVED as IMAGES

SERVED = ServedModel("tiny-video", "f" * 64, SAMPLING, 32, 32, is_video=True, frames=9)
PATH = "/v1/videos/generations"


def read(**asked):
    job = read_request(json.dumps({"prompt": "a cat", **asked}).encode(), SERVED, Limits(strict=True).of(SERVED))
    return job.key, job.requests


def test_a_request_is_for_one_video_with_the_models_own_frames_and_rate():
    key, (request,) = read(seed=3)
    assert key.sampling() == {name: SAMPLING[name] for name in key.sampling()}
    assert (key.num_frames, key.fps, request.seed, request.format) == (9, 4, 3, "mp4")
    assert read(num_frames=5, fps=8, output_format="gif")[0].sampling()["num_frames"] == 5
    assert len({read(**asked)[0] for asked in ({}, {"num_frames": 5}, {"fps": 8})}) == 3


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"n": 2}, "there is no n here"),
        ({"num_frames": 19}, "num_frames must be at most 18 here"),
        ({"fps": 0}, "greater than or equal to 1"),
        ({"output_format": "png"}, "'mp4', 'webp' or 'gif'"),
    ],
)
def test_what_a_request_cannot_have_is_told(asked, words):
    with pytest.raises(Refusal, match=words) as told:
        read(**asked)
    assert told.value.status == 400


def test_limits_follow_the_model():
    assert Limits().of(SERVED).max_batch == 1 and Limits(max_batch=3).of(SERVED).max_batch == 3
    images = ServedModel("x", None, {}, 64, 64)
    assert Limits().of(images).max_batch == 4 and Limits().of(images).max_frames is None
    with pytest.raises(InputError, match="--max-frames 8 is below the model's own 9"):
        Limits(max_frames=8).of(SERVED)


def test_a_video_comes_back_as_a_file_of_its_type():
    pytest.importorskip("uvicorn")
    replica = Replica()
    file = base64.b64encode(b"a video").decode()
    replica.result = lambda request: ImageResult(image=file, size="32x32", frames=9, fps=4.0)
    with running(replica, served=SERVED) as (url, _, _):
        status, body, headers = call(url, PATH, prompt="a cat", seed=7)
        assert status == 200 and body == b"a video" and headers["content-type"] == "video/mp4"
        told = {name: headers[f"X-Surgery-{name}"] for name in ("Seed", "Size", "Frames", "Fps", "Artifact-Hash")}
        assert told == {"Seed": "7", "Size": "32x32", "Frames": "9", "Fps": "4", "Artifact-Hash": "f" * 64}
        assert call(url, PATH, prompt="a cat", output_format="gif")[2]["content-type"] == "image/gif"
        status, body, _ = call(url, "/v1/images/generations", prompt="a cat")
        assert status == 404 and "POST /v1/videos/generations" in json.loads(body)["error"]["message"]
    with running(Replica()) as (url, _, _):
        status, body, _ = call(url, PATH, prompt="a cat")
        assert status == 404 and "draws images" in json.loads(body)["error"]["message"]
    with running(replica, served=IMAGES, further=(SERVED,)) as (url, _, _):
        assert call(url, PATH, prompt="a cat")[:2] == (200, b"a video")
        assert call(url, prompt="a cat")[0] == call(url, prompt="a cat", model="shapes-pladis")[0] == 200
        assert call(url, PATH, prompt="a cat", model="shapes-pladis")[0] == 404


def test_a_replica_draws_the_video_of_the_request_by_the_recipes_negative_prompt(video_artifact):  # noqa: F811
    served, opened, _ = served_model(video_artifact)
    assert served.is_video and served.frames == 9 and served.width == 32
    manifest = read_manifest(video_artifact)
    config = WorkerConfig(opened, None, manifest.hash, manifest.sampling, device="cpu", threads=1)

    def ask(**asked):
        body = json.dumps({"prompt": "a cat", "seed": 3, "output_format": "webp", **asked}).encode()
        job = read_request(body, served, Limits().of(served))
        return job.key, job.requests

    runner = BatchRunner(config, ask(num_frames=1)[0], 1)
    results = {}
    for name, asked in {
        "own": {},
        "bad": {"negative_prompt": "bad"},
        "other": {"negative_prompt": "a dog on it"},
    }.items():
        key, requests = ask(num_frames=5, fps=10, **asked)
        (results[name],) = runner.draw(key, requests, threading.Event())
    made = results["own"]
    assert made.problem is None and (made.size, made.frames, made.fps) == ("32x32", 5, 10)
    with Image.open(io.BytesIO(base64.b64decode(made.image))) as image:
        assert image.format == "WEBP" and image.n_frames == 5
    assert made.image == results["bad"].image != results["other"].image
