"""What a request may say: OpenAI's fields, the recipe's own ranges, and every mistake told with its place."""

import json

import pytest

from surgery.export.serve.checking import Limits, ServedModel, served_model
from surgery.export.serve.refusal import Refusal
from surgery.export.serve.request import read_request
from surgery.export.serve.uploads import Form

from ..conftest import SHAPES

PLADIS = {"operator": "pladis", "alpha": 1.5, "scale": 1.0, "temperature": 1.0, "layers": ["a"]}
SAMPLING = {"steps": 25, "guidance_scale": 4.0, "height": 64, "width": 64}
SCHEDULERS = ("DDIMScheduler", "EulerDiscreteScheduler")
LORAS = ("sketch", "pixel")
SERVED = ServedModel("shapes-pladis", "f" * 64, SAMPLING, 64, 64, (PLADIS,), schedulers=SCHEDULERS, loras=LORAS)
LIMITS = Limits(max_images=4, max_pixels=64 * 128, strict=True)


def read(served=SERVED, **asked):
    job = read_request(json.dumps(asked).encode(), served, LIMITS)
    return job.key, job.requests


def test_a_prompt_alone_takes_everything_else_from_the_model():
    key, (request,) = read(prompt="a star")
    assert key.sampling() == SAMPLING and key.hyperparameters == ()
    assert request.prompt == "a star" and request.format == "png" and 0 <= request.seed < 2**32


def test_a_range_of_guidance_scale_is_the_models_and_one_number_takes_its_place():
    served = ServedModel("x", None, {"guidance_scale": {"uniform": [3.0, 5.0]}}, 64, 64)
    key, _ = read(served, prompt="a")
    assert key.sampling()["guidance_scale"] == {"uniform": [3.0, 5.0]} and hash(key) == hash(
        read(served, prompt="b")[0]
    )
    assert read(served, prompt="a", guidance_scale=4.0)[0].sampling()["guidance_scale"] == 4.0


def test_images_count_up_from_the_seed():
    _, requests = read(prompt="a star", n=3, seed=7, output_format="webp")
    assert [(request.seed, request.format) for request in requests] == [(7, "webp"), (8, "webp"), (9, "webp")]


def test_equal_settings_are_equal_however_they_are_said_and_others_are_not():
    said, _ = read(prompt="a", size="64x64", steps=25, pladis={"scale": 3, "alpha": 2.0}, user="somebody")
    again, _ = read(prompt="b", seed=4, pladis={"alpha": 2, "scale": 3.0}, model="shapes-pladis")
    assert said == again and hash(said) == hash(again)
    others = [{}, {"steps": 4}, {"size": "64x128"}, {"guidance_scale": 0}, {"negative_prompt": ""}]
    settings = {said, *(read(prompt="a", **other)[0] for other in others)}
    assert len(settings) == len(others) + 1


def test_steps_take_the_place_of_the_recipes_timesteps():
    served = ServedModel("x", None, {"steps": 2, "timesteps": [999, 499]}, 64, 64)
    assert read(served, prompt="a")[0].timesteps == (999, 499)
    assert read(served, prompt="a", steps=4)[0].sampling() == {"steps": 4, "width": 64, "height": 64}


@pytest.mark.parametrize(
    ("asked", "param", "words"),
    [
        ({}, "prompt", "field required"),
        ({"prompt": " \n"}, "prompt", "blank"),
        ({"prompt": "a" * 32_001}, "prompt", "at most 32000"),
        ({"prompt": "a", "n": 0}, "n", "greater than or equal to 1"),
        ({"prompt": "a", "n": 5}, "n", "at most 4 here"),
        ({"prompt": "a", "n": "2"}, "n", "valid integer, not '2'"),
        ({"prompt": "a", "n": True}, "n", "valid integer"),
        ({"prompt": "a", "stpes": 2}, "stpes", "did you mean steps?"),
        ({"prompt": "a", "steps": 1001}, "steps", "less than or equal to 1000"),
        ({"prompt": "a", "seed": -1}, "seed", "greater than or equal to 0"),
        ({"prompt": "a", "seed": 2**63 - 1, "n": 2}, "seed", "below 2^63"),
        ({"prompt": "a", "size": "64"}, "size", '"64x64"'),
        ({"prompt": "a", "size": "64x64\n"}, "size", '"64x64"'),
        ({"prompt": "a", "size": "6\N{FULLWIDTH DIGIT FOUR}x64"}, "size", '"64x64"'),
        ({"prompt": "a", "size": "60x64"}, "size", "multiples of 8"),
        ({"prompt": "a", "size": "128x128"}, "size", "at most 8192 pixels here, not 16384"),
        ({"prompt": "a", "guidance_scale": float("nan")}, None, ""),
        ({"prompt": "a", "n": 11}, "n", "less than or equal to 10"),
        ({"prompt": "a", "response_format": "path"}, "response_format", "'b64_json' or 'url'"),
        ({"prompt": "a", "quality": "best"}, "quality", "'low', 'medium'"),
        ({"prompt": "a", "background": "transparent"}, "background", "draws no transparency"),
        ({"prompt": "a", "output_compression": 50}, "output_compression", "a png loses nothing"),
        ({"prompt": "a", "partial_images": 2}, "partial_images", 'goes with "stream": true'),
        ({"prompt": "a", "stream": True, "partial_images": 4}, "partial_images", "less than or equal to 3"),
        ({"prompt": "a", "stream": True, "response_format": "url"}, "response_format", "b64_json in a stream"),
        ({"prompt": "a", "scheduler": "EulerScheduler"}, "scheduler", "did you mean EulerDiscreteScheduler?"),
        ({"prompt": "a", "guidance": "apq"}, "guidance", "is no method"),
        ({"prompt": "a", "guidance": {"method": "autoguidance", "weak": {"pipeline": "me/x"}}}, "guidance.weak", ""),
        ({"prompt": "a", "lora": "skech"}, "lora", "did you mean sketch?"),
        ({"prompt": "a", "lora": "watercolour"}, "lora", "there are sketch, pixel"),
        ({"prompt": "a", "lora": ["pixel", {"name": "pixel"}]}, "lora", "'pixel' is given twice"),
        ({"prompt": "a", "lora": {"name": "pixel", "scale": 11}}, "lora.0.scale", "less than or equal to 10"),
        ({"prompt": "a", "lora": {"name": "pixel", "scael": 1}}, "lora.0.scael", "did you mean scale?"),
        ({"prompt": "a", "lora": {"scale": 1}}, "lora.0.name", "field required"),
        ({"prompt": "a", "lora": 3}, "lora.0", ""),
        ({"prompt": "a", "output_format": "gif"}, "output_format", "'png', 'jpeg' or 'webp'"),
        ({"prompt": "a", "pladis": {"alpha": 2.5}}, "pladis.alpha", "less than or equal to 2, not 2.5"),
        ({"prompt": "a", "pladis": {"eta": 1}}, "pladis.eta", "there are alpha, scale, temperature"),
        ({"prompt": "a", "pladis": {"scale": "2"}}, "pladis.scale", "valid number"),
        ({"prompt": "a", "pladis": {"scale": 1e30}}, "pladis.scale", "must lie in [-100, 100] here, not 1e+30"),
        ({"prompt": "a", "pladis": {"temperature": 1e-30}}, "pladis.temperature", "must lie in [0.01, 100]"),
        ([], None, "the body"),
    ],
)
def test_a_mistake_is_told_with_its_place(asked, param, words):
    with pytest.raises(Refusal) as caught:
        read_request(json.dumps(asked).encode(), SERVED, LIMITS)
    error = caught.value.body()["error"]
    assert caught.value.status == 400 and error["type"] == "invalid_request_error"
    assert words in error["message"] and (param is None or error["param"] == param)


def test_loras_are_the_same_however_they_are_said_and_each_set_is_drawn_apart():
    said, _ = read(prompt="a", lora=["sketch", {"name": "pixel", "scale": 0.5}])
    again, _ = read(prompt="b", lora=[{"name": "pixel", "scale": 0.5}, {"name": "sketch"}])
    assert said == again and said.loras == (("pixel", 0.5), ("sketch", 1.0))
    form = Form({"lora": {"name": "pixel", "scale": "0.5"}, "prompt": "a"}, {})
    others = [read(prompt="a", lora="pixel")[0], read_request(form, SERVED, LIMITS).key, read(prompt="a")[0]]
    assert [one.loras for one in others] == [(("pixel", 1.0),), (("pixel", 0.5),), ()] and len({said, *others}) == 4
    assert read(prompt="a", lora={"name": "pixel", "scale": 0})[0] == others[-1]


def test_a_wrong_lora_is_a_mistake_where_unknown_fields_are_warned_of():
    with pytest.raises(Refusal, match="did you mean scale"):
        read_request(json.dumps({"prompt": "a", "lora": {"name": "pixel", "scael": 1}}).encode(), SERVED, Limits())


def test_all_mistakes_are_told_at_once():
    with pytest.raises(Refusal, match="n: .*; there is no stpes"):
        read(prompt="a", n="2", stpes=4)


def test_what_is_no_json_and_another_models_name_are_refused():
    with pytest.raises(Refusal, match="no JSON"):
        read_request(b'{"prompt": ', SERVED, LIMITS)
    with pytest.raises(Refusal) as caught:
        read(prompt="a", model="dall-e-3")
    assert caught.value.status == 404 and caught.value.code == "model_not_found"


def test_hyperparameters_are_those_that_every_operation_has_and_no_schedule_sets():
    gag = {"operator": "gag", "alpha": 1.5, "scale": 10.0, "temperature": 1.0, "zeta": 0.0, "eta": 15.0, "unit": "head"}
    both = ServedModel("x", None, {}, 64, 64, (PLADIS, {**gag, "layers": ["b"]}))
    assert both.hyperparameters() == {"alpha": [1.5, 1.5], "scale": [1.0, 10.0], "temperature": [1.0, 1.0]}
    with pytest.raises(Refusal, match="there is no pladis.eta"):
        read(both, prompt="a", pladis={"eta": 1.0})
    scheduled = ServedModel("x", None, {}, 64, 64, ({**PLADIS, "schedule": {"steps": [1, 3], "scale": [1.0, 2.0]}},))
    assert read(scheduled, prompt="a", pladis={"alpha": 2.0})[0].hyperparameters == (("alpha", 2.0),)
    with pytest.raises(Refusal, match="follows the schedule"):
        read(scheduled, prompt="a", pladis={"scale": 2.0})
    with pytest.raises(Refusal, match="is not patched"):
        read(ServedModel("x", None, {}, 64, 64), prompt="a", pladis={"scale": 2.0})


def test_bounds_are_those_of_all_operators_and_what_the_model_was_built_with_is_inside():
    gag = {"operator": "gag", "alpha": 1.5, "scale": 10.0, "temperature": 1.0, "zeta": 0.0, "eta": 15.0, "unit": "head"}
    alone = ServedModel("x", None, {}, 64, 64, (gag,))
    assert dict(read(alone, prompt="a", pladis={"scale": 900.0, "eta": 1e30})[0].hyperparameters)["scale"] == 900.0
    with pytest.raises(Refusal, match="scale must lie in .-100, 100. here, not 900"):
        read(ServedModel("x", None, {}, 64, 64, (PLADIS, gag)), prompt="a", pladis={"scale": 900.0})
    strong = ServedModel("x", None, {}, 64, 64, ({**PLADIS, "scale": 500.0},))
    assert read(strong, prompt="a", pladis={"scale": 500.0})[0].hyperparameters == (("scale", 500.0),)
    with pytest.raises(Refusal, match="not 501"):
        read(strong, prompt="a", pladis={"scale": 501.0})


def test_a_model_is_described_without_its_weights(shapes_artifact, tmp_path):
    served, opened, revision = served_model(shapes_artifact)
    assert (served.name, served.width, served.height, revision) == ("shapes-pladis", 64, 64, None)
    assert opened == str(shapes_artifact) and len(served.artifact_hash) == 64
    named = {"alpha": [1.5], "scale": [1.0], "temperature": [1.0], "sparse_temperature": [1.0]}
    assert served.hyperparameters() == named
    plain, _, _ = served_model(SHAPES)
    assert (plain.name, plain.artifact_hash, plain.operations) == ("shapes", None, ())
    assert (plain.width, plain.height) == (64, 64)  # by its configs


def test_what_comes_from_the_hub_is_opened_as_a_folder_here_and_by_its_commit_elsewhere(shapes_artifact, monkeypatch):
    from surgery.export.serve import checking as module
    from surgery.hub.base import LocalBase

    class Hub(LocalBase):  # the artifact's folder, as if it were a repository
        commit = "c" * 40

        def __init__(self, repo, revision=None):
            super().__init__(shapes_artifact)

    monkeypatch.setattr(module, "HubBase", Hub)
    monkeypatch.setattr(module, "model_folder", lambda model, revision=None: shapes_artifact)
    here, elsewhere, by_key = (
        served_model("me/shapes", "main", **how) for how in ({}, {"here": False}, {"as_repository": True})
    )
    assert here[1:] == (str(shapes_artifact), None)
    assert elsewhere[1:] == by_key[1:] == ("me/shapes", "c" * 40)
    assert here[0] == elsewhere[0] == by_key[0] and here[0].name == "shapes-pladis"
    monkeypatch.setattr(module, "model_folder", lambda model, revision=None: SHAPES)
    assert served_model("me/plain")[0].name == "me/plain"
