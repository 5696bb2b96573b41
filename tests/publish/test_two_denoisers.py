"""The artifact of a pipeline with two denoisers, Wan 2.2's: written, loaded by both libraries, verified, published."""

import json

import pytest
import torch
from diffusers import DiffusionPipeline

import surgery
from surgery.cli.main import main
from surgery.errors import ArtifactError, BaseError, InputError, RecipeError
from surgery.models.patching import operations_of, patched_modules
from surgery.recipe.plan import make_plan

from ..loopback_hub import hub_server
from ..nn.backbones.checks import draw
from ..nn.backbones.video import wan22
from .test_push import REPO
from .test_verify import failures

RECIPE = """
schema: 1
name: two-pladis
base: {{pipeline: {base}}}
operations:
  - {{replace: cross-attention, layers: "blocks.*", with: {{operator: pladis, scale: 1.0}}}}
  - {{replace: cross-attention, layers: transformer_2, with: {{operator: gag, scale: 2.0}}}}
sampling: {{steps: 2, height: 32, width: 32, num_frames: 9, guidance_scale: 4.0, guidance_scale_2: 3.0,
  max_sequence_length: 16}}
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(The folder of a tiny base, the arguments of a call, its artifact, what the patched pipeline draws)."""
    folder = tmp_path_factory.mktemp("two")
    pipeline, arguments = wan22()
    arguments = {**arguments, "output_type": "latent"}
    pipeline.save_pretrained(folder / "base")
    (folder / "recipe.yaml").write_text(RECIPE.format(base="./base"))
    artifact = surgery.apply(folder / "recipe.yaml", folder / "out")
    surgery.patch(pipeline.transformer, scale=1.0)
    surgery.patch(pipeline.transformer_2, operator="gag", scale=2.0)
    return folder, arguments, artifact, draw(pipeline, arguments)


def copied(built, tmp_path):
    """A copy of the artifact's folder, of which a file may be altered."""
    import shutil

    return shutil.copytree(built[2].folder, tmp_path / "copy")


def test_it_holds_the_bases_weights_and_loads_as_it_was_with_and_without_this_package(built, monkeypatch, tmp_path):
    folder, arguments, artifact, patched = built
    manifest = artifact.manifest
    assert list(manifest.patched) == ["transformer", "transformer_2"]
    for name in manifest.patched:
        weights = f"{name}/diffusion_pytorch_model.safetensors"
        assert (folder / "base" / weights).read_bytes() == (artifact.folder / weights).read_bytes()
        config = json.loads((artifact.folder / name / "config.json").read_text())
        assert config["pladis"] == manifest.operations_of(name) and len(config["pladis"][0]["layers"]) == 2
    pipeline = surgery.load(artifact.folder, quiet=True, verify=True)
    assert torch.equal(draw(pipeline, arguments), patched)
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    theirs = DiffusionPipeline.from_pretrained(artifact.folder, trust_remote_code=True)
    assert torch.equal(draw(theirs, arguments), patched)
    for kind in ("transformer", "transformer_2"):
        stock = type(wan22()[0].transformer)
        with pytest.raises(TypeError):  # its number of layers is none
            stock.from_pretrained(artifact.folder, subfolder=kind)
    surgery.unpatch(pipeline)
    base = DiffusionPipeline.from_pretrained(folder / "base")
    assert torch.equal(draw(pipeline, arguments), draw(base, arguments))


def test_what_is_saved_again_is_found_patched_in_both(built, tmp_path):
    pipeline = surgery.load(built[2].folder, quiet=True)
    surgery.tune(pipeline, layers="transformer_2", scale=3.0)
    pipeline.save_pretrained(tmp_path / "saved")
    again = surgery.load(tmp_path / "saved", quiet=True)
    assert operations_of(again) == operations_of(pipeline) and len(patched_modules(again)) == 4
    assert again.transformer_2.pladis_operations()[0]["scale"] == 3.0


def test_whatever_is_wrong_in_the_second_is_named(built, tmp_path):
    folder = copied(built, tmp_path)
    manifest = built[2].manifest.further["transformer_2"]
    for path, change, error in (
        (manifest.buffers, lambda data: data[:-4] + b"\0\0\0\0", "is not the file that was written"),
        (manifest.code, lambda data: data + b"\n", "bytes, the manifest says"),
        ("transformer_2/config.json", lambda data: data.replace(b"gag", b"gbg"), "is not the file that was written"),
        ("transformer_2/diffusion_pytorch_model.safetensors", lambda data: data[:100], "bytes, the manifest says"),
    ):
        file = folder / path
        whole = file.read_bytes()
        file.unlink()  # it may be a link to the base's
        file.write_bytes(change(whole))
        with pytest.raises(ArtifactError, match=f"{path} .*{error}"):
            surgery.load(folder, quiet=True)
        assert path.rpartition("/")[2] in {name for _, name in failures(surgery.verify(folder))}
        file.write_bytes(whole)
    assert surgery.verify(folder).verified
    (folder / "transformer_2" / "other.py").write_text("")
    assert ("code", "other.py") in failures(surgery.verify(folder))


def test_the_manifest_of_another_component_is_refused(built, tmp_path):
    folder = copied(built, tmp_path)
    manifest = json.loads((folder / "surgery.json").read_text())
    manifest["further"] = {}
    (folder / "surgery.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match="other code than its own"):
        surgery.load(folder, quiet=True)


def test_the_command_line_plans_applies_and_inspects_it(built, tmp_path, capsys):
    folder = built[0]
    assert main(["plan", str(folder / "recipe.yaml")]) == 0
    out = capsys.readouterr().out
    assert "transformer WanTransformer3DModel and transformer_2 WanTransformer3DModel" in out
    assert main(["plan", str(folder / "recipe.yaml"), "--set", "operations.1.layers=transformer_3", "--json"]) == 2
    assert "'transformer_3' matches no module" in capsys.readouterr().err
    assert main(["inspect", str(folder / "base"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["replaceable"] == 4 and list(found["denoisers"]) == ["transformer", "transformer_2"]
    assert main(["apply", str(folder / "recipe.yaml"), "--out", str(folder / "out")]) == 2  # it is there already
    assert "exists already" in capsys.readouterr().err


def test_one_alone_may_be_patched_and_another_has_files_of_its_own(built, tmp_path):
    folder = built[0]
    (folder / "other").mkdir(exist_ok=True)
    source = folder / "base" / "transformer_2" / "diffusion_pytorch_model.safetensors"
    (folder / "other" / "low.safetensors").write_bytes(source.read_bytes())
    overrides = ["operations.0.layers=transformer_2.blocks.1.*", "operations.1.layers=transformer_2.blocks.0.*"]
    overrides += ["base.components.transformer_2.file=other/low.safetensors"]
    artifact = surgery.apply(folder / "recipe.yaml", tmp_path / "second", overrides=overrides)
    assert list(artifact.manifest.patched) == ["transformer_2"] == [artifact.manifest.component]
    assert artifact.manifest.files["transformer_2/diffusion_pytorch_model.safetensors"].origin.kind == "component"
    pipeline = surgery.load(artifact.folder, quiet=True)
    assert type(pipeline.transformer).__name__ == "WanTransformer3DModel" and len(patched_modules(pipeline)) == 2
    assert surgery.verify(artifact.folder).verified
    with pytest.raises(RecipeError, match="its transformer and its transformer_2"):
        make_plan(folder / "recipe.yaml", ["base.components.unet.file=other/low.safetensors"])
    (folder / "other" / "low.safetensors").write_bytes(source.read_bytes()[:-100])
    with pytest.raises(BaseError, match=r"low\.safetensors"):
        surgery.apply(folder / "recipe.yaml", tmp_path / "third", overrides=overrides)
    assert not (tmp_path / "third").exists()


def test_it_goes_to_the_hub_and_back(built, use_hub, tmp_path, monkeypatch):
    folder = built[0]
    with hub_server() as server:
        server.create("owner/base", folder / "base", card={"license": "apache-2.0"})
        use_hub(server)
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(RECIPE.format(base="owner/base"))
        artifact = surgery.apply(recipe, tmp_path / "out")
        surgery.push(artifact.folder, REPO, weights="thin")
        assert surgery.verify(REPO).verified
        assert not any(path.endswith("pytorch_model.safetensors") for path in server.tree(REPO))
        card = server.read(REPO, "README.md").decode()
        assert "modules, in transformer and transformer_2" in card and "`transformer_2.blocks.1.attn2`" in card
        use_hub(server, home="fresh")
        pipeline = surgery.load(REPO, dtype=torch.float32, quiet=True)
        assert operations_of(pipeline) == operations_of(surgery.load(artifact.folder, quiet=True))


@pytest.mark.parametrize("component", ["transformer", "transformer_2"])
def test_an_engines_inputs_are_taken_of_each_with_that_one_alone_in_memory(built, component):
    from surgery.export.engines.capture import capture

    folder, manifest = built[2].folder, built[2].manifest
    captured = capture(folder, manifest, component, {"usual": (1, 32, 32)}, "cpu", torch.float32, True)
    operator = manifest.operations_of(component)[0]["operator"]
    assert operations_of(captured.module)[0]["operator"] == operator
    assert len(captured.recorded.calls["usual"]) == 4  # at both steps, with the prompt and without
    assert set(captured.blocks) == {"blocks.0", "blocks.1"}
    with pytest.raises(InputError, match="no transformer_3; it has"):
        capture(folder, manifest, "transformer_3", {"usual": (1, 32, 32)}, "cpu", torch.float32, True)
