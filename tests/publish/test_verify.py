"""`surgery verify`: each thing that can be wrong with a model is found, and nothing of a whole one is called wrong."""

import json
import shutil

import pytest

import surgery
from surgery.errors import BaseError, InputError

from .conftest import BASE
from .test_push import REPO
from .test_refusals import flip, scores_of


def failures(report):
    return {(check.what, check.subject.split("/")[-1]) for check in report.checks if check.status == "failed"}


@pytest.mark.parametrize("weights", ["copy", "thin"])
def test_a_whole_one_is_verified_without_downloading_weights(hub, artifact, use_hub, weights):
    surgery.push(artifact, REPO, weights=weights)
    use_hub(hub, home="fresh", token=None)
    hub.reset_log()
    report = surgery.verify(REPO)
    assert report.verified and not failures(report)
    assert [check.status for check in report.checks if check.what == "weights"] == ["ok"] * 3
    fetched = {path for path in hub.fetched() if path.endswith(".safetensors")}
    assert fetched == {"unet/diffusion_pytorch_model-00002-of-00002.safetensors"}
    assert surgery.verify(artifact).verified


def test_the_command_prints_a_table_or_json_and_an_honest_status(hub, artifact, run, tmp_path):
    surgery.push(artifact, REPO)
    done = run("verify", REPO, check=0)
    assert "byte for byte" in done.stdout and done.stdout.strip().endswith("verified")
    hub.commit_as_other(REPO, {"unet/config.json": b"{}"})
    done = run("verify", REPO, "--json", check=1)
    data = json.loads(done.stdout)
    assert data["verified"] is False and data["commit"] == hub.commits(REPO)[0].oid
    assert run("verify", BASE, check=2).stderr.count("is no artifact") == 1
    assert "not verified" in run("verify", REPO, check=1).stdout


def test_altered_files_of_a_repository(hub, artifact):
    surgery.push(artifact, REPO)
    code = next(path for path in hub.tree(REPO) if "modeling_" in path)
    unet = "unet/diffusion_pytorch_model.safetensors"
    weights = bytearray(hub.read(REPO, unet))
    weights[-1] ^= 1
    hub.commit_as_other(
        REPO,
        {
            unet: bytes(weights),
            code: hub.read(REPO, code) + b"# changed\n",
            "tokenizer/tokenizer.json": None,
            "scores.json": json.dumps(scores_of("0" * 64)).encode(),
            "README.md": b"# The best model\n",
        },
    )
    report = surgery.verify(REPO)
    assert failures(report) == {
        ("weights", "diffusion_pytorch_model.safetensors"),
        ("files", code.split("/")[-1]),
        ("files", "tokenizer.json"),
        ("code", code.split("/")[-1]),
        ("scores", "scores.json"),
    }
    assert {check.status for check in report.checks if check.what == "files"} == {"failed"}
    assert [check.detail for check in report.checks if check.what == "card"] == [
        "edited by hand since it was written from manifest, recipe and scores"
    ]


def test_a_consistent_forgery_is_found_by_the_bases_listing_and_the_releases(hub, artifact, tmp_path):
    """Weights and code replaced, and the manifest made to fit them."""
    from surgery.artifact.manifest import Manifest, write_json
    from surgery.hub import sha256_of

    forged = tmp_path / "forged"
    shutil.copytree(artifact, forged)
    manifest = json.loads((forged / "surgery.json").read_text())
    flip(forged / "vae/diffusion_pytorch_model.safetensors")
    code = forged / manifest["code"]
    code.write_text(code.read_text() + "\n# a back door\n")
    for path in ("vae/diffusion_pytorch_model.safetensors", manifest["code"]):
        manifest["files"][path] |= {"sha256": sha256_of(forged / path), "size": (forged / path).stat().st_size}
    manifest["hash"] = Manifest.model_validate(manifest).computed_hash()
    write_json(forged / "surgery.json", manifest)
    hub.create("mallory/forged", forged)
    for model in (forged, "mallory/forged"):
        report = surgery.verify(model)
        names = {("weights", "diffusion_pytorch_model.safetensors"), ("code", code.name)}
        assert failures(report) == names and not report.verified


def test_buffers_that_are_not_the_configs(hub, artifact, tmp_path):
    import torch
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "buffers"
    shutil.copytree(artifact, folder)
    shard = next(folder.glob("unet/*-00002-of-00002.safetensors"))
    buffers = load_file(shard)
    name = next(key for key in buffers if key.endswith("pladis_scale"))
    for change, match in (
        ({name: torch.tensor(9.0)}, f"{name} holds 9.0, the config says 1.0"),
        ({name: buffers[name].half()}, f"{name} holds 1.0"),
        ({"extra.pladis_scale": torch.tensor(1.0)}, "extra.pladis_scale is in the shard alone"),
    ):
        save_file({**buffers, **change}, shard)
        found = [check for check in surgery.verify(folder).checks if check.what == "buffers"]
        assert found[0].status == "failed" and match in found[0].detail


def test_what_cannot_be_looked_at_is_not_called_verified(hub, artifact, use_hub, no_waiting):
    surgery.push(artifact, REPO)
    hub.repositories.pop(BASE)
    report = surgery.verify(REPO)
    assert not report.verified and not failures(report)
    assert [check.status for check in report.checks if check.what == "weights"] == ["unknown"] * 3
    use_hub(hub, offline=True)
    with pytest.raises(BaseError, match="cannot be listed without a connection"):
        surgery.verify(REPO)
    assert not surgery.verify(artifact).verified


def test_a_local_base_and_rewritten_weights_are_named_as_such(hub, tiny_base, write_recipe, tmp_path):
    folder = surgery.apply(write_recipe(base=tiny_base, license="mit"), tmp_path / "local").folder
    report = surgery.verify(folder)
    assert report.verified
    assert all("its base is a folder" in check.detail for check in report.checks if check.what == "weights")
    flip_target = folder / "unet/diffusion_pytorch_model.safetensors"
    data = flip_target.read_bytes()
    flip_target.unlink()  # a link to the base's own file, which must not change
    flip_target.write_bytes(data)
    flip(flip_target)
    assert failures(surgery.verify(folder)) == {("weights", "diffusion_pytorch_model.safetensors")}


def test_what_is_no_artifact(tmp_path, tiny_base):
    with pytest.raises(InputError, match="there is no folder"):
        surgery.verify(tmp_path / "nothing")
    with pytest.raises(InputError, match="is no artifact"):
        surgery.verify(tiny_base)
