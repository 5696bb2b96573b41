"""What OpenAI's clients send and read: the official package over loopback, with replicas that are no processes."""

import base64
import io
import threading
import time
import urllib.request
from dataclasses import replace

import pytest
from PIL import Image

from surgery.engines.record import parse_profile
from surgery.export.serve.request import ImageResult

from .test_gateway import Replica, call, running
from .test_request import SERVED

openai = pytest.importorskip("openai")


def png(width=64, height=48, mode="RGB", color=(200, 10, 10)):
    """A file of one colour."""
    file = io.BytesIO()
    Image.new(mode, (width, height), color).save(file, format="PNG")
    return file.getvalue()


class Drawing(Replica):
    """Draws a file that is an image, after the previews that are wanted."""

    def __init__(self, image=None):
        super().__init__()
        self.seen = []
        text = base64.b64encode(image or png()).decode()
        self.result = lambda request: ImageResult(image=text, size="64x48", tokens=5, cut=2, positions=48)

    async def send(self, key, requests, show):
        self.seen.append((key, requests))
        for at, request in enumerate(requests):
            for number in range(request.previews):
                show(at, number, ImageResult(image="cHJldmlldw==", size="64x48"))
        return await super().send(key, requests, show)


def client_of(url, **options):
    return openai.OpenAI(base_url=f"{url}/v1", api_key="a" * 20, **options)


def test_every_field_of_2026_is_taken_and_answered():
    replica = Drawing()
    with running(replica) as (url, _, _):
        made = client_of(url).images.generate(
            model="shapes-pladis",
            prompt="a star",
            n=3,
            size="64x64",
            quality="high",
            background="opaque",
            moderation="low",
            style="vivid",
            output_format="jpeg",
            output_compression=40,
            response_format="b64_json",
            user="someone",
            extra_body={"seed": 5, "guidance": "apg", "scheduler": "EulerDiscreteScheduler"},
        )
    assert [image.seed for image in made.data] == [5, 6, 7] and made.quality == "high" and made.size == "64x48"
    assert (made.usage.input_tokens, made.usage.output_tokens, made.usage.total_tokens) == (15, 144, 159)
    assert made.safety_identifier == "someone" and made.guidance["method"] == "apg"
    ((key, requests), *_) = replica.seen
    assert [(one.format, one.compression) for one in requests] == [("jpeg", 40)]
    assert key.sampling()["guidance"]["method"] == "apg" and key.sampling()["scheduler"] == "EulerDiscreteScheduler"
    told = "quality has no effect here", "style has no effect here", "the last 2 were cut off"
    assert all(any(words in warning for warning in made.warnings) for words in told)


def test_a_field_that_is_not_known_is_a_warning_or_if_strict_a_mistake():
    with running(Drawing()) as (url, _, _):
        raw = client_of(url).images.with_raw_response.generate(prompt="a", extra_body={"stpes": 3, "frame_count": 2})
        assert "there is no stpes here; did you mean steps?; it was ignored" in raw.headers["x-surgery-warning"]
        assert len(raw.parse().warnings) == 3 and raw.headers["x-request-id"].startswith("req_")
    with running(Drawing(), strict=True) as (url, _, _), pytest.raises(openai.BadRequestError) as caught:
        client_of(url).images.generate(prompt="a", extra_body={"stpes": 3})
    assert caught.value.param == "stpes" and "did you mean steps?" in str(caught.value)


def test_a_fields_name_writes_no_header_of_its_own():
    with running(Drawing()) as (url, _, _):
        status, _, headers = call(url, prompt="a", **{"x\r\nEvil: 1": 1, "\u00e9\u4e2d": 2})
        assert status == 200 and "Evil" not in headers
        assert "x\\r\\nEvil" in headers["X-Surgery-Warning"] and "\\xe9\\u4e2d" in headers["X-Surgery-Warning"]


def test_partial_images_come_as_events_before_the_last_one():
    with running(Drawing()) as (url, _, _):
        events = list(client_of(url).images.generate(prompt="a", stream=True, partial_images=2))
        assert [event.type.rpartition(".")[2] for event in events] == ["partial_image", "partial_image", "completed"]
        assert [event.partial_image_index for event in events[:2]] == [0, 1]
        assert events[-1].usage.input_tokens == 5 and events[0].quality == "auto"
        assert len(list(client_of(url).images.generate(prompt="a", stream=True))) == 1


def test_a_stream_that_is_refused_has_the_status_of_any_refusal_and_one_that_fails_later_says_so():
    replica = Drawing()
    with running(replica) as (url, gateway, _):
        with pytest.raises(openai.BadRequestError):
            client_of(url).images.generate(prompt=" ", stream=True)
        replica.result = lambda request: ImageResult(problem="too bad", kind="failed")
        with pytest.raises(openai.InternalServerError):
            client_of(url, max_retries=0).images.generate(prompt="a", stream=True)
        events = client_of(url).images.generate(prompt="a", stream=True, partial_images=1)
        assert next(events).type.endswith("partial_image")
        with pytest.raises(openai.APIError, match="too bad"):
            list(events)
        assert gateway.open_requests == 0


def test_a_client_that_leaves_a_stream_makes_room():
    replica = Drawing()
    with running(replica) as (url, gateway, _):
        replica.held = True
        events = client_of(url).images.generate(prompt="a", stream=True, partial_images=1)
        next(events)
        events.response.close()
        deadline = time.monotonic() + 20
        while gateway.open_requests or replica.stopped != replica.begun:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_a_url_is_signed_and_gives_the_file():
    with running(Drawing(png())) as (url, _, _):
        (image,) = client_of(url).images.generate(prompt="a", response_format="url").data
        assert image.b64_json is None and image.url.startswith(f"{url}/v1/images/files/")
        with urllib.request.urlopen(image.url) as answer:
            assert answer.read() == png() and answer.headers["content-type"] == "image/png"
        path = image.url.removeprefix(url)
        assert call(url, path[:-1] + ("0" if path[-1] != "0" else "1"))[0] == 403
        assert call(url, path.replace("expires=", "expires=9"))[0] == 403


def test_an_image_is_edited_where_the_mask_is_clear_and_varied_without_a_prompt():
    replica = Drawing()
    mask = png(mode="RGBA", color=(0, 0, 0, 0))
    with running(replica) as (url, _, _):
        client = client_of(url)
        extra = {"strength": 0.5, "steps": 4, "pladis": {"scale": 2.0}}
        made = client.images.edit(image=("a.png", png()), mask=("m.png", mask), prompt="a cat", n=2, extra_body=extra)
        assert made.usage.input_tokens_details.image_tokens == 96 and len(made.data) == 2
        key, (request, *_) = replica.seen[0]
        assert (key.given, key.strength, key.steps, key.width, key.height) == ("mask", 0.5, 4, 64, 48)
        assert (request.image, request.mask, request.prompt) == (png(), mask, "a cat")
        assert key.hyperparameters == (("scale", 2.0),)
        events = list(client.images.edit(image=[png()], prompt="a cat", stream=True, partial_images=1))
        assert [event.type for event in events] == ["image_edit.partial_image", "image_edit.completed"]
        with pytest.warns(DeprecationWarning):
            client.images.create_variation(image=png(), n=1)
        assert replica.seen[-1][0].given == "image" and replica.seen[-1][1][0].prompt == ""


@pytest.mark.parametrize(
    ("sent", "param", "words"),
    [
        ({"image": b"not an image"}, "image", "must be a PNG, JPEG or WEBP file"),
        ({"image": png()[:60]}, "image", "cannot be read"),
        ({"image": png(), "mask": png()}, "mask", "must have an alpha channel"),
        ({"image": png(), "mask": png(32, 32, "RGBA", (0, 0, 0, 0))}, "mask", "the image's size, 64x48, not 32x32"),
        ({"image": [png(), png()]}, "image", "is given twice"),
    ],
)
def test_what_is_wrong_with_an_upload_is_told_by_its_name(sent, param, words):
    with running(Drawing()) as (url, _, _), pytest.raises(openai.BadRequestError, match=words) as caught:
        client_of(url).images.edit(prompt="a cat", **sent)
    assert caught.value.param == param


def test_a_form_that_is_none_is_refused_and_so_are_files_of_other_formats():
    gif = io.BytesIO()
    Image.new("RGB", (8, 8)).save(gif, format="GIF")
    with running(Drawing()) as (url, _, _):
        with pytest.raises(openai.BadRequestError, match="PNG, JPEG or WEBP"):
            client_of(url).images.edit(image=gif.getvalue(), prompt="a")
        for kind, body in (
            ("multipart/form-data", b"--x\r\n"),
            ("multipart/form-data; boundary=x", b"--x\r\nContent-Disposition: form-data\r\n\r\na\r\n--x--"),
            ("multipart/form-data; boundary=x", b'--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\na'),
        ):
            request = urllib.request.Request(f"{url}/v1/images/edits", body, {"Content-Type": kind})
            with pytest.raises(urllib.error.HTTPError) as caught:
                urllib.request.urlopen(request)
            assert caught.value.code == 400 and b'"invalid_form"' in caught.value.read(), kind


def test_a_model_is_found_by_each_of_its_names_and_the_nearest_is_told():
    served = replace(SERVED, aliases=("dall-e-3", "gpt-image-1"), profile=parse_profile("1..4x64..128x64"))
    other = replace(SERVED, name="other-model")
    with running(Drawing(), served=served, further=(other,)) as (url, _, _):
        client = client_of(url)
        assert [model.id for model in client.models.list()] == ["dall-e-3", "gpt-image-1", "other-model"]
        told = client.models.retrieve("gpt-image-1")
        assert told.sizes == {
            "default": "64x64",
            "multiple_of": 8,
            "max_pixels": None,
            "width": [64, 64],
            "height": [64, 128],
        }
        assert client.images.generate(prompt="a", model="gpt-image-1").model == "dall-e-3"
        assert client.images.generate(prompt="a", model="other-model").model == "other-model"
        for asking in (
            lambda: client.images.generate(prompt="a", model="gpt-image-2"),
            lambda: client.models.retrieve("gpt-image-2"),
        ):
            with pytest.raises(openai.NotFoundError, match=r"did you mean gpt-image-1\?") as caught:
                asking()
            assert caught.value.param == "model" and caught.value.code == "model_not_found"
        with pytest.raises(openai.BadRequestError, match="size must be 64x64 to 64x128 here"):
            client.images.generate(prompt="a", size="128x64")


def test_32_clients_at_once_are_all_served_by_a_queue_of_12():
    replica = Drawing()
    replica.seconds = 0.12

    async def send(key, requests, show):
        import asyncio

        await asyncio.sleep(replica.seconds)
        return [replica.result(request) for request in requests]

    replica.send = send
    problems, made = [], []

    def ask(client):
        try:
            made.append(client.images.generate(prompt="a"))  # with the client's own two retries
        except openai.APIError as error:
            problems.append(error)

    with running(replica, queue=12, max_batch=2) as (url, gateway, _):
        gateway.line.start(0.06 / 25)
        client = client_of(url)
        threads = [threading.Thread(target=ask, args=(client,)) for _ in range(32)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        refused = call(url, "/metrics")[1].decode().count('status="429"')
    assert len(made) == 32 and not problems and refused
