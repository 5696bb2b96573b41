"""What is not published: each refusal comes before anything is sent."""

import json
import shutil

import pytest

import surgery
from surgery.errors import ArtifactError, InputError, PublishError, SurgeryError

from ..loopback_hub import WRITE_TOKEN
from .conftest import BASE

REPO = "me/patched"


@pytest.fixture
def copy(artifact, tmp_path):
    """A copy of the artifact whose files may be changed: its weights are links to the cache."""
    shutil.copytree(artifact, tmp_path / "copy")
    return tmp_path / "copy"


def refused(hub, folder, match, error=SurgeryError, **options):
    hub.reset_log()
    with pytest.raises(error, match=match) as caught:
        surgery.push(folder, options.pop("repo", REPO), **options)
    assert {method for method, path in hub.requests if "paths-info" not in path} <= {"GET", "HEAD"}
    assert REPO not in hub.repositories and WRITE_TOKEN not in str(caught.value)
    return str(caught.value)


def flip(path):
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


@pytest.mark.parametrize(
    "name",
    [
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
        "unet/diffusion_pytorch_model-00002-of-00002.safetensors",
        "unet/config.json",
        "tokenizer/tokenizer.json",
        "model_index.json",
    ],
)
def test_an_artifact_whose_files_are_not_its_manifests(hub, copy, name):
    flip(copy / name)
    refused(hub, copy, f"{name} is not the file that was written", ArtifactError)
    (copy / name).unlink()
    refused(hub, copy, f"{name} is missing", ArtifactError)


def test_edited_code_manifest_recipe_and_card(hub, copy):
    code = next(copy.glob("unet/modeling_*.py"))
    original = code.read_bytes()
    code.write_bytes(original.replace(b"softmax", b"softmin", 1))
    refused(hub, copy, "is not the file that was written", ArtifactError)
    code.write_bytes(original)
    recipe, card = copy / "recipe.yaml", copy / "README.md"
    text = recipe.read_text()
    recipe.write_text(text.replace("scale: 1.0", "scale: 9.0"))
    refused(hub, copy, "not the recipe that this artifact was made with", ArtifactError)
    recipe.write_text(text)
    words = card.read_text()
    card.write_text(words + "\nState of the art.\n")
    refused(hub, copy, r"README\.md was edited.*`summary`", ArtifactError)
    card.unlink()
    assert surgery.push(copy, "me/other").made and b"State of the art" not in hub.read("me/other", "README.md")
    manifest = copy / "surgery.json"
    manifest.write_text(manifest.read_text().replace('"alpha": 1.5', '"alpha": 1.4'))
    refused(hub, copy, "was edited: its hash does not fit", ArtifactError)


def test_a_folder_that_is_none(hub, tmp_path):
    refused(hub, tmp_path / "nothing", "there is no folder", InputError)
    refused(hub, "nothing", "there is no folder nothing; `surgery apply` writes one", InputError)
    (tmp_path / "empty").mkdir()
    refused(hub, tmp_path / "empty", "is no surgery artifact", ArtifactError)


def scores_of(artifact_hash, **more):
    metric = {"name": "Aligned", "higher_is_better": True, "n": 600, "base": 0.565, "patched": 0.473}
    metric |= {"difference": -0.092, "interval": [-0.13, -0.053], "win_rate": 0.41}
    return {
        "schema_version": 1,
        "artifact_hash": artifact_hash,
        "date": "2026-11-21",
        "hardware": "2 CPU cores",
        "versions": {"torch": "2.13.0"},
        "prompts": [{"name": "shapes", "count": 600, "sha256": "a" * 64}],
        "metrics": [metric],
        **more,
    }


def test_scores_of_another_artifact_and_damaged_ones(hub, copy):
    own = json.loads((copy / "surgery.json").read_text())["hash"]
    path = copy / "scores.json"
    for text, match in (
        (json.dumps(scores_of("0" * 64)), "was measured on another artifact"),
        (json.dumps({"metrics": []}), "was measured on another artifact"),
        (json.dumps(scores_of(own, schema_version=9)), "schema_version 9"),
        (json.dumps(scores_of(own, metrics=[{"name": "x"}])), r"wrong at metrics\.0"),
        ("{", "cannot be read"),
    ):
        path.write_text(text)
        refused(hub, copy, match, ArtifactError)
    path.write_text(json.dumps(scores_of(own)))
    surgery.push(copy, REPO, allow_regression=True)
    card = hub.read(REPO, "README.md").decode()
    assert "Worse than the base on Aligned" in card and "-0.13 to -0.053" in card and "Not scored" not in card
    assert json.loads(hub.read(REPO, "scores.json"))["artifact_hash"] == own


def test_a_picture_of_another_artifact(hub, copy):
    from PIL import Image

    (copy / "images").mkdir()
    Image.new("RGB", (8, 8)).save(copy / "images/pretty.png")
    refused(hub, copy, "was drawn elsewhere, so it may not stand on this artifact's card", ArtifactError)


@pytest.mark.parametrize(
    ("card", "license", "weights", "match"),
    [
        ({}, "inherit", "copy", "licence of owner/base is unknown"),
        ({}, "inherit", "thin", "licence of owner/base is unknown"),
        ({"license": "unknown"}, "inherit", "copy", "licence of owner/base is unknown"),
        ({"license": "other"}, "inherit", "copy", "licence of owner/base is unknown"),
        ({"license": "other", "license_name": "odd"}, "inherit", "copy", "odd, allows a copy .* is not known"),
        ({"license": "cc-by-nd-4.0"}, "inherit", "copy", "cc-by-nd-4.0, forbids a copy .* --weights thin"),
        ({"license": "cc-by-nd-4.0"}, "mit", "copy", "cc-by-nd-4.0, forbids a copy"),
    ],
)
def test_a_licence_that_is_unknown_or_forbids_it(hub, write_recipe, tmp_path, tiny_base, card, license, weights, match):
    hub.create(BASE, tiny_base, card=card)
    folder = surgery.apply(write_recipe(license=license), tmp_path / "licensed").folder
    refused(hub, folder, match, PublishError, weights=weights)


@pytest.mark.parametrize(
    ("card", "license", "weights", "front"),
    [
        ({}, "apache-2.0", "copy", "license: apache-2.0"),
        ({"license": "other", "license_name": "odd"}, "odd", "copy", "license: other\nlicense_name: odd"),
        (
            {"license": "other", "license_name": "odd", "license_link": "https://odd.example"},
            "inherit",
            "thin",
            "odd.example",
        ),
        ({"license": "cc-by-nd-4.0"}, "inherit", "thin", "license: cc-by-nd-4.0"),
        (
            {"license": "other", "license_name": "flux-1-dev-non-commercial-license"},
            "inherit",
            "copy",
            "license_name: flux-1-dev-non-commercial-license",
        ),
        ({"license": "openrail++"}, "inherit", "copy", "license: openrail++"),
    ],
)
def test_a_licence_that_is_stated_or_allows_it(hub, write_recipe, tmp_path, tiny_base, card, license, weights, front):
    hub.create(BASE, tiny_base, card=card)
    folder = surgery.apply(write_recipe(license=license), tmp_path / "licensed").folder
    surgery.push(folder, REPO, weights=weights)
    assert front in hub.read(REPO, "README.md").decode()


def test_weights_under_different_licences_need_a_word_from_the_recipe(hub, tiny_base, write_recipe, tmp_path):
    hub.create("other/unet", tiny_base, card={"license": "cc-by-nc-4.0"})
    file = "unet/diffusion_pytorch_model.safetensors"
    override = "base.components.unet={repo: other/unet, file: " + file + "}"
    folder = surgery.apply(write_recipe(), tmp_path / "two", overrides=[override]).folder
    said = refused(hub, folder, "under different licences", PublishError)
    assert "owner/base apache-2.0" in said and "other/unet cc-by-nc-4.0" in said
    more = ["publish.license=cc-by-nc-4.0", override]
    folder = surgery.apply(write_recipe(), tmp_path / "three", overrides=more).folder
    surgery.push(folder, REPO)
    card = hub.read(REPO, "README.md").decode()
    assert "license: cc-by-nc-4.0" in card and "owner/base: apache-2.0; other/unet: cc-by-nc-4.0" in card
    assert "base_model_relation: merge" in card and "- other/unet" in card


ORGS = [{"name": "lab", "roleInOrg": "write"}, {"name": "club", "roleInOrg": "read"}]
FINE = {"scoped": [{"entity": {"type": "user", "name": "me"}, "permissions": ["repo.write"]}], "global": []}


@pytest.mark.parametrize(
    ("record", "repo", "match"),
    [
        ({"role": "read"}, REPO, "may read only"),
        ({}, "somebody/else", "may not write to somebody's repositories; it may to those of: me, lab, club"),
        ({}, "club/model", "has the role 'read' in club"),
        (
            {"role": "fineGrained", "fineGrained": {"scoped": [], "global": []}},
            REPO,
            "fine-grained token may not write",
        ),
        ({"role": "fineGrained", "fineGrained": FINE}, "lab/model", "fine-grained token may not write to lab/model"),
    ],
)
def test_a_token_without_write_access(hub, artifact, record, repo, match):
    hub.tokens[WRITE_TOKEN] |= {"orgs": ORGS, **record}
    refused(hub, artifact, match, PublishError, repo=repo)


def test_tokens_with_write_access(hub, artifact):
    hub.tokens[WRITE_TOKEN]["orgs"] = ORGS
    assert surgery.push(artifact, "lab/model", weights="thin").made
    hub.tokens[WRITE_TOKEN] |= {"role": "fineGrained", "fineGrained": FINE}
    assert surgery.push(artifact, "me/fine", weights="thin").made


def test_nobody_logged_in_an_unknown_token_and_no_connection(hub, artifact, use_hub, no_waiting):
    use_hub(hub, token=None)
    refused(hub, artifact, "nobody is logged in", PublishError)
    use_hub(hub, token="hf_" + "x" * 34)
    said = refused(hub, artifact, "does not know this machine's token", PublishError)
    assert "x" * 10 not in said
    use_hub(hub, offline=True)
    refused(hub, artifact, "HF_HUB_OFFLINE is set", PublishError)


def test_a_token_in_a_file(hub, write_recipe, tmp_path):
    recipe = write_recipe(more="# HF_TOKEN=hf_" + "Z" * 34 + "\n")
    folder = surgery.apply(recipe, tmp_path / "leaky").folder
    said = refused(hub, folder, r"(README\.md|recipe\.yaml) holds what looks like an access token", PublishError)
    assert "ZZZ" not in said


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"repo": "no-owner"}, "names no owner"),
        ({"repo": "a/b/c"}, "cannot be a repository"),
        ({"repo": "me/-bad-"}, "cannot be a repository"),
        ({"create_pr": True, "tag": "v1"}, "no commit on main that a tag could name"),
        ({"create_pr": True, "revision": "trial"}, "leave --revision out"),
        ({"weights": "none"}, "must be copy or thin"),
        ({"tag": "v 1"}, "no name that git takes"),
        ({"revision": "a" * 40}, "is a commit; name a branch"),
    ],
)
def test_options_that_contradict_themselves(hub, artifact, options, match):
    refused(hub, artifact, match, InputError, **options)


def test_a_thin_publication_of_what_is_nowhere_else(hub, tiny_base, write_recipe, tmp_path):
    local = surgery.apply(write_recipe(base=tiny_base, license="mit"), tmp_path / "local").folder
    refused(hub, local, "needs every weight file on the Hub already", PublishError, weights="thin")


def test_a_base_whose_listing_is_not_what_the_manifest_says(hub, artifact, tiny_base, tmp_path):
    shutil.copytree(tiny_base, tmp_path / "altered")
    flip(tmp_path / "altered/vae/diffusion_pytorch_model.safetensors")
    hub.create(BASE, tmp_path / "altered", card={"license": "apache-2.0"})
    refused(hub, artifact, "the Hub lists another sha256 there", PublishError)


def test_apply_and_push_asks_before_it_builds(hub, write_recipe, tmp_path, run):
    hub.tokens[WRITE_TOKEN]["role"] = "read"
    done = run("apply", write_recipe(), "--out", tmp_path / "o", "--push", REPO, check=1)
    assert "may read only" in done.stderr and not (tmp_path / "o").exists()
    assert "unet/diffusion_pytorch_model.safetensors" not in hub.fetched()
    done = run("apply", write_recipe(), "--tag", "v1", check=2)
    assert "--tag goes with --push" in done.stderr
