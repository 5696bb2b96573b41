"""A modular pipeline's artifact on the Hub: of a base that has a tokenizer elsewhere, and back."""

import json

import pytest
import torch
from diffusers import ModularPipeline

import surgery
from surgery.errors import BaseError
from surgery.recipe.plan import make_plan

from ..loopback_hub import hub_server
from ..nn.backbones.modular import anima
from .test_push import REPO
from .test_verify import failures

INDEX = "modular_model_index.json"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder of a tiny Anima whose index has all of it come from owner/base, one tokenizer from owner/t5."""
    folder = tmp_path_factory.mktemp("modular") / "base"
    anima().save_pretrained(str(folder), overwrite_modular_index=True)
    index = json.loads((folder / INDEX).read_text())
    for name, value in index.items():
        if isinstance(value, list):
            value[2]["pretrained_model_name_or_path"] = "owner/base"
            if name == "t5_tokenizer":
                value[2] |= {"pretrained_model_name_or_path": "owner/t5", "subfolder": ""}
    (folder / INDEX).write_text(json.dumps(index))
    (folder / "t5_tokenizer").rename(folder.parent / "t5")
    return folder


@pytest.fixture
def hub(use_hub, saved, monkeypatch):
    """A server with base and tokenizer on it, which diffusers in this process asks too."""
    import huggingface_hub

    with hub_server() as server:
        server.create("owner/base", saved, card={"license": "apache-2.0"})
        server.create("owner/t5", saved.parent / "t5", card={"license": "apache-2.0"})
        use_hub(server)
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", server.url)
        yield server


def test_it_goes_to_the_hub_and_back_and_the_index_there_names_where_it_is(
    hub, write_recipe, use_hub, tmp_path, monkeypatch
):
    artifact = surgery.apply(write_recipe(base="owner/base"), tmp_path / "out")
    origins = {path: file.origin.source for path, file in artifact.manifest.files.items()}
    assert origins["t5_tokenizer/tokenizer.json"] == "owner/t5" and origins["vae/config.json"] == "owner/base"
    assert surgery.verify(artifact.folder).verified
    pushed = surgery.push(artifact.folder, REPO)
    index = json.loads(hub.read(REPO, INDEX))
    commits = {name: hub.commits(name)[0].oid for name in ("owner/base", "owner/t5")}
    places = {
        name: (value[2]["pretrained_model_name_or_path"], value[2]["revision"])
        for name, value in index.items()
        if isinstance(value, list)
    }
    assert places["transformer"] == (REPO, None) and places["vae"] == ("owner/base", commits["owner/base"])
    assert places["t5_tokenizer"] == ("owner/t5", commits["owner/t5"])
    card = hub.read(REPO, "README.md").decode()
    assert f'ModularPipeline.from_pretrained("{REPO}")\npipe.load_components(trust_remote_code=True)' in card
    assert pushed.made and surgery.verify(REPO).verified
    assert not surgery.push(artifact.folder, REPO).made  # the same again
    use_hub(hub, home="fresh")
    ours = surgery.load(REPO, dtype=torch.float32)
    assert len(ours.transformer.pladis_operations()[0]["layers"]) == 2 and ours.t5_tokenizer is not None
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    theirs = ModularPipeline.from_pretrained(REPO)
    theirs.load_components(["transformer", "t5_tokenizer"], dtype=torch.float32)
    assert theirs.transformer is None and theirs.t5_tokenizer is not None  # not trusted
    theirs.load_components("transformer", dtype=torch.float32, trust_remote_code=True)
    assert theirs.transformer.pladis_operations() == ours.transformer.pladis_operations()


def test_a_thin_one_loads_from_the_bases_repositories(hub, write_recipe, use_hub, tmp_path):
    artifact = surgery.apply(write_recipe(base="owner/base"), tmp_path / "out")
    surgery.push(artifact.folder, "me/thin", weights="thin")
    assert "vae/diffusion_pytorch_model.safetensors" not in hub.tree("me/thin")
    use_hub(hub, home="fresh")
    assert surgery.load("me/thin", dtype=torch.float32).vae is not None
    assert surgery.verify("me/thin").verified


def test_an_index_that_has_a_component_come_from_elsewhere_is_not_verified(hub, write_recipe, use_hub, tmp_path):
    artifact = surgery.apply(write_recipe(base="owner/base"), tmp_path / "out")
    surgery.push(artifact.folder, REPO)
    index = json.loads(hub.read(REPO, INDEX))
    index["vae"][2]["pretrained_model_name_or_path"] = "evil/model"
    hub.commit_as_other(REPO, {INDEX: json.dumps(index).encode()})
    use_hub(hub, home="fresh")
    assert ("files", INDEX) in failures(surgery.verify(REPO))
    with pytest.raises(surgery.errors.ArtifactError, match="is not the file that the manifest names"):
        surgery.load(REPO, quiet=True)


def test_a_base_that_has_its_denoiser_from_elsewhere_says_from_where(hub, saved, write_recipe):
    index = json.loads((saved / INDEX).read_text())
    index["transformer"][2]["pretrained_model_name_or_path"] = "owner/base"
    hub.create("owner/blocks", card={"license": "apache-2.0"})
    hub.commit_as_other("owner/blocks", {INDEX: json.dumps(index).encode()})
    with pytest.raises(BaseError, match="transformer"):
        make_plan(write_recipe(base="owner/blocks"))
