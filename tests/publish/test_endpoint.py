"""handler.py and requirements.txt of a publication, as Hugging Face's inference toolkit takes them.

What the toolkit does was read in its source: it puts the folder before sys.path, runs handler.py, makes an
EndpointHandler of the folder and calls it, one at a time, with the JSON of a request; a PIL image that comes back is
sent as base64 of a PNG, and an exception as {"error": its text}.
"""

import base64
import io
import json

import pytest

import surgery
from surgery.artifact.endpoint import requirements_problem
from surgery.errors import ArtifactError, PublishError

from ..quick import quick
from .test_frozen import FROZEN, VERSIONS
from .test_push import REPO
from .test_verify import failures

# The toolkit's part, in a process that has no pladis-surgery.
TOOLKIT = """
import base64, importlib.util, io, json, sys
sys.modules["surgery"] = None
folder, requests = sys.argv[1], json.loads(sys.argv[2])
spec = importlib.util.spec_from_file_location("handler.EndpointHandler", folder + "/handler.py")
sys.path.insert(0, folder)
module = importlib.util.module_from_spec(spec)
sys.modules["handler.EndpointHandler"] = module
spec.loader.exec_module(module)
handler = module.EndpointHandler(folder)

def serialized(image):
    with io.BytesIO() as out:
        image.save(out, format="PNG")
        return base64.b64encode(out.getvalue()).decode("utf-8")

for body in requests:
    try:
        print("ANSWER", json.dumps(handler(body), default=serialized))
    except Exception as error:
        print("ANSWER", json.dumps({"error": str(error)}))
"""


@pytest.fixture
def fetched(hub, tmp_path):
    """fetched(repo=REPO): the folder of all that a repository holds, as the toolkit downloads it."""

    def fetch(repo=REPO):
        folder = tmp_path / "repository"
        for path in hub.tree(repo):
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(hub.read(repo, path))
        return folder

    return fetch


@pytest.fixture
def ask(run, tmp_path):
    """ask(folder, *requests): what each comes to, an image's bytes or {"error": ...}."""

    def ask(folder, *requests, check=0):
        arguments = [str(folder), json.dumps(requests)]
        env = {"HF_HOME": str(tmp_path / "endpoint"), "HF_HUB_OFFLINE": "1", "MKL_CBWR": "AVX2,STRICT"}
        done = run(*arguments, python=TOOLKIT, env=env, check=check)
        lines = [line[7:] for line in done.stdout.splitlines() if line.startswith("ANSWER ")]
        return [json.loads(line) for line in lines] if check == 0 else done.stderr

    return ask


def pixels(answer):
    from PIL import Image

    assert isinstance(answer, str), answer
    return Image.open(io.BytesIO(base64.b64decode(answer))).tobytes()


def drawn(folder, prompt, seed, **sampling):
    """The bytes of the image that this package draws, with the artifact's own sampling where nothing else is said."""
    from surgery.artifact import read_manifest
    from surgery.runtime.draw import draw

    pipeline = surgery.load(folder, quiet=True, device="cpu")
    return draw(pipeline, [(prompt, seed)], {**read_manifest(folder).sampling, **sampling})[0].tobytes()


def apart(one, other):
    """The largest difference of two images' bytes."""
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


SCHEDULED = """
schema: 1
name: tiny-scheduled
base: {pipeline: owner/base, scheduler: {class: EulerDiscreteScheduler}}
operations:
  - {replace: cross-attention, with: {operator: pladis, alpha: 1.5, scale: 2.0}, schedule: {steps: [0, 1]}}
sampling:
  steps: 3
  guidance_scale: {uniform: [2.0, 9.0]}
  height: 16
  width: 16
  negative_prompt: a dog
publish: {license: apache-2.0}
"""


def test_a_published_artifact_draws_on_an_endpoint_what_this_package_draws(hub, tmp_path, fetched, ask):
    recipe = tmp_path / "scheduled.yaml"
    recipe.write_text(SCHEDULED)
    artifact = surgery.apply(recipe, tmp_path / "scheduled").folder
    surgery.push(artifact, REPO)
    assert surgery.verify(REPO).verified
    requests = [
        {"inputs": "a cat", "parameters": {"seed": 7}},
        {
            "inputs": {"prompt": "a cat"},
            "parameters": {"seed": "8", "num_inference_steps": "2", "guidance_scale": "4.5"},
        },
        {
            "inputs": "a cat",
            "parameters": {"seed": 7, "target_size": {"width": 24, "height": 16}, "negative_prompt": ""},
        },
        {"inputs": "a cat", "parameters": {"seed": 7, "scheduler": "EulerAncestralDiscreteScheduler"}},
        {"inputs": "a cat", "parameters": {"seed": 7, "num_images_per_prompt": 1, "guidance_scale": None}},
    ]
    ours, theirs, wide, other, again = (pixels(answer) for answer in ask(fetched(), *requests))
    assert ours == drawn(artifact, "a cat", 7) == again  # the recipe's scheduler is back after another one
    assert theirs == drawn(artifact, "a cat", 8, steps=2, guidance_scale=4.5)
    assert wide == drawn(artifact, "a cat", 7, width=24, negative_prompt="")
    assert other != ours


def test_what_is_wrong_with_a_request_is_said_in_one_sentence_each(hub, artifact, fetched, ask):
    surgery.push(artifact, REPO)
    bad = [
        (
            {"inputs": ["a", "b"], "parameters": {"seed": -1}},
            ["one prompt", "seed must be a whole number from 0"],
        ),
        ({"inputs": "a", "parameters": {"inference_steps": 3}}, ["did you mean num_inference_steps?"]),
        ({"prompt": "a"}, ["with `inputs`, the prompt"]),
        ({"inputs": "a", "parameters": [1]}, ["`parameters` must be an object"]),
        ({"inputs": "a", "parameters": {"height": 17, "width": 1e9}}, ["multiple of 8", "from 8 to 8192"]),
        ({"inputs": "a", "parameters": {"num_inference_steps": 2.5}}, ["a whole number from 1 to 1000, not 2.5"]),
        ({"inputs": "a", "parameters": {"guidance_scale": "much"}}, ["a number from 0 to 1000, not 'much'"]),
        ({"inputs": "a", "parameters": {"scheduler": "Euler"}}, ["does not fit", "EulerDiscreteScheduler"]),
        ({"inputs": "a", "parameters": {"target_size": 16}}, ["target_size must be an object"]),
        ({"inputs": "a", "parameters": {"num_images_per_prompt": 4}}, ["num_images_per_prompt can only be 1"]),
        ({"inputs": "a", "parameters": {"seed": True}}, ["seed must be a whole number"]),
        ({"inputs": "a", "parameters": {"negative_prompt": 3}}, ["negative_prompt must be a text"]),
    ]
    for (body, words), answer in zip(bad, ask(fetched(), *(body for body, _ in bad)), strict=True):
        for word in words:
            assert word in answer["error"], (body, answer)


def test_code_that_was_changed_is_not_run_there(hub, artifact, fetched, ask):
    surgery.push(artifact, REPO)
    folder = fetched()
    code = next((folder / "unet").glob("modeling_*.py"))
    code.write_text(code.read_text() + "raise SystemExit('it was run')\n")
    said = ask(folder, check=1)
    assert f"unet/{code.name} is not the file that surgery.json lists" in said and "it was run" not in said


def test_a_changed_handler_or_requirement_is_not_verified(hub, artifact):
    surgery.push(artifact, REPO)
    whole = {check.subject: check.detail for check in surgery.verify(REPO).checks if check.what == "endpoint"}
    assert "as installed here" in whole["handler.py"] and "lists it" in whole["requirements.txt"]
    text = hub.read(REPO, "requirements.txt")
    hub.commit_as_other(REPO, {"handler.py": b"import os\n", "requirements.txt": text + b"evil\n"})
    assert failures(surgery.verify(REPO)) >= {("endpoint", "handler.py"), ("endpoint", "requirements.txt")}
    with pytest.raises(PublishError, match="handler.py"):
        surgery.push(artifact, REPO)
    assert surgery.push(artifact, REPO, overwrite=True).made
    assert surgery.verify(REPO).verified
    assert (
        requirements_problem("torch>=2.8,<2.14\n--index-url https://example.org\n") == "--index-url https://example.org"
    )
    assert requirements_problem("diffusers @ https://example.org/x.whl")


def test_without_a_handler_none_is_left(hub, artifact, tmp_path):
    surgery.push(artifact, REPO)
    assert "handler.py" in hub.read(REPO, "README.md").decode()
    surgery.push(artifact, REPO, no_handler=True)
    assert not {"handler.py", "requirements.txt"} & set(hub.tree(REPO))
    assert "Inference Endpoints" not in hub.read(REPO, "README.md").decode()


@pytest.mark.parametrize("why", ["thin", "guidance"])
def test_what_diffusers_alone_cannot_draw_gets_none_and_says_why(hub, artifact, write_recipe, tmp_path, why):
    if why == "guidance":
        recipe = write_recipe()
        recipe.write_text(recipe.read_text() + "guidance: {method: apg}\n")
        artifact = surgery.apply(recipe, tmp_path / "guided").folder
    plan = surgery.push(artifact, REPO, dry_run=True, weights="thin" if why == "thin" else "copy")
    assert "handler.py" not in [step.path for step in plan.steps]
    assert any("no handler.py" in note and ("apg" if why == "guidance" else "weights") in note for note in plan.notes)


def test_a_repository_that_was_fetched_is_published_again_as_it_is(hub, artifact, fetched):
    surgery.push(artifact, REPO)
    folder = fetched()
    (folder / ".gitattributes").unlink()
    assert not surgery.push(folder, REPO).made
    (folder / "handler.py").write_text("print()\n")
    with pytest.raises(ArtifactError, match=r"handler.py was edited"):
        surgery.push(folder, "me/again")


@pytest.mark.parametrize("version", quick(VERSIONS, VERSIONS[-1]))
def test_artifacts_of_older_versions_get_one_too(hub, version, fetched, ask):
    folder = FROZEN / version / "artifact"
    surgery.push(folder, "me/frozen")
    size = {"height": 16, "width": 16}
    (answer,) = ask(fetched("me/frozen"), {"inputs": "a cat", "parameters": {"seed": 0, **size}})
    assert pixels(answer) == drawn(folder, "a cat", 0, **size)
