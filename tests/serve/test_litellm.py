"""LiteLLM, the real package, over loopback: its calls for images reach the server and its answers are read."""

import base64
import os
from importlib.util import find_spec

import pytest

from .test_gateway import running
from .test_openai import Drawing, png

if find_spec("litellm") is None:
    pytest.skip("litellm is not installed", allow_module_level=True)
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # which it would fetch else
import litellm

MODEL = "openai/shapes-pladis"


@pytest.fixture
def server():
    """(the arguments of every call, the Drawing)."""
    replica = Drawing()
    with running(replica) as (url, _, _):
        yield {"model": MODEL, "api_base": f"{url}/v1", "api_key": "a" * 20, "max_retries": 0}, replica


def test_it_draws(server):
    options, replica = server
    made = litellm.image_generation(
        prompt="a star", n=2, size="64x64", extra_body={"seed": 5, "lora": {"name": "sketch", "scale": 0.5}}, **options
    )
    assert [base64.b64decode(image.b64_json)[:4] for image in made.data] == [b"\x89PNG"] * 2
    (key, (request,)), _ = replica.seen
    assert (request.prompt, request.seed, key.loras) == ("a star", 5, (("sketch", 0.5),))
    assert made.usage.input_tokens == 10 and made.usage.output_tokens == 96


def test_it_edits(server):
    options, replica = server
    made = litellm.image_edit(image=png(), prompt="a star", **options)
    ((key, (request,)),) = replica.seen
    assert made.data[0].b64_json and key.given == "image" and request.image == png()


def test_what_is_refused_is_an_error_of_its_own(server):
    options, _ = server
    with pytest.raises(litellm.BadRequestError, match="must be multiples of 8"):
        litellm.image_generation(prompt="a", size="63x64", **options)
    with pytest.raises(litellm.NotFoundError, match="did you mean shapes-pladis"):
        litellm.image_generation(prompt="a", **{**options, "model": "openai/shapes-pladi"})
