"""Packages of blocks for Spaces on ZeroGPU: loaded as `spaces` loads them, from diffusers alone."""

import json
import struct
import zipfile

import pytest
import torch

import surgery
from surgery.engines.record import parse_profile
from surgery.errors import InputError
from surgery.export.engines.build import Wanted
from surgery.export.engines.zerogpu import build_packages

from ..nn.backbones.flux import FAMILIES
from . import spaces_loading
from .artifact import RECIPE, write_artifact


def pixels(pipeline, **given):
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        return pipeline("a cat", num_inference_steps=2, generator=generator, output_type="pt", **given).images


def as_a_space_has_it(folder):
    from diffusers import DiffusionPipeline

    return DiffusionPipeline.from_pretrained(folder, trust_remote_code=True, torch_dtype=torch.float32)


def set_scale(model, value):
    for module in model.modules():
        if hasattr(module, "pladis_scale"):
            module.pladis_scale.fill_(value)


def hold_against_eager(folder, component, load, **given):
    """The pipeline's images with packages are eager's, before and after a change of the hyperparameters."""
    pipeline, eager = as_a_space_has_it(folder), as_a_space_has_it(folder)
    load(getattr(pipeline, component))
    before = pixels(eager, **given)
    assert (pixels(pipeline, **given) - before).abs().max() < 1e-4
    for each in (pipeline, eager):
        set_scale(getattr(each, component), 4.0)
    after = pixels(eager, **given)
    assert (pixels(pipeline, **given) - after).abs().max() < 1e-4 < (after - before).abs().max()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--out", "blocks", "--component", "vae"], "(unet), and vae is none; leave --component out"),
        (["--out", "blocks", "--weights", "engine"], "without weights; leave --weights out"),
        (["--out", "file/blocks"], "cannot write to file/blocks: Not a directory"),
        (["--out", "."], ". is there already"),
        (["--out", "blocks", "--device", "no-such"], "--device no-such cannot be used here"),
        ([], "--out FOLDER goes with --target zerogpu"),
    ],
)
def test_what_cannot_be_made_is_told_before_the_model_is_loaded(shapes_artifact, run, tmp_path, options, words):
    (tmp_path / "file").touch()
    done = run("export", shapes_artifact, "--target", "zerogpu", *options, cwd=tmp_path, check=2)
    assert words in done.stderr and "inputs:" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="for a machine without a GPU")
@pytest.mark.parametrize("target", [["inductor"], ["zerogpu", "--out", "blocks"]])
def test_a_gpu_that_is_not_here_is_told(shapes_artifact, run, tmp_path, target):
    done = run("export", shapes_artifact, "--device", "cuda", "--target", *target, cwd=tmp_path, check=2)
    assert "--device cuda cannot be used here" in done.stderr and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_blocks_of_one_width_are_loaded_by_their_class(tmp_path):
    next(family for family in FAMILIES if family.name == "flux").build()[0].save_pretrained(tmp_path / "base")
    sampling = "height: 32, width: 32, max_sequence_length: 24"
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace("height: 64, width: 64", sampling))
    artifact = surgery.apply(tmp_path / "recipe.yaml", tmp_path / "artifact")
    out = tmp_path / "blocks"
    wanted = Wanted("inductor", device="cpu", profile=parse_profile("1x32x32"))
    made = build_packages(artifact.folder, out, wanted)
    assert made.load == "spaces.aoti_blocks_load(pipe.transformer, REPOSITORY)"
    blocks = {f"Flux{kind}TransformerBlock/package.pt2" for kind in ("", "Single")}
    assert set(made.files) == {*blocks, "README.md", "packages.json"}
    assert json.loads((out / "packages.json").read_text())["artifact"] == artifact.manifest.hash
    given = {"height": 32, "width": 32, "max_sequence_length": 24}
    hold_against_eager(artifact.folder, "transformer", lambda model: spaces_loading.blocks_load(model, out), **given)
    with pytest.raises(InputError, match="is there already"):
        build_packages(artifact.folder, out, wanted)


@pytest.mark.slow
def test_blocks_that_their_class_does_not_tell_apart_are_loaded_by_path(tmp_path):
    write_artifact(tmp_path, tmp_path / "another")
    operations = """operations:
  - {replace: cross-attention, layers: down, with: {operator: pladis, alpha: 1.5, scale: 2.0}}
  - {replace: cross-attention, layers: mid, with: {operator: gag, scale: 2.0}}
"""
    head, tail = RECIPE.partition("operations:")[0], RECIPE[RECIPE.index("sampling:") :]
    (tmp_path / "recipe.yaml").write_text(head + operations + tail)
    artifact, out = surgery.apply(tmp_path / "recipe.yaml", tmp_path / "artifact").folder, tmp_path / "blocks"
    made = build_packages(
        artifact, out, Wanted("inductor", device="cpu", operator="decomposed", profile=parse_profile("1x64x64"))
    )
    assert made.load == "spaces.aoti_load(pipe.unet, REPOSITORY)"
    packages = [path for path in made.files if path.endswith(".pt2")]
    assert not any(flags & 1 for path in packages for flags in stack_flags(out / path))
    assert len(packages) == 2 and all(path.startswith("package/submodules/") for path in packages)
    hold_against_eager(artifact, "unet", lambda model: spaces_loading.load(model, out), height=64, width=64)


def stack_flags(package):
    """The flags of the stack's program header of each library in a package (ELF-64)."""
    with zipfile.ZipFile(package) as archive:
        for name in archive.namelist():
            if name.endswith(".so"):
                data = archive.read(name)
                start, (size, count) = struct.unpack_from("<Q", data, 32)[0], struct.unpack_from("<HH", data, 54)
                headers = [struct.unpack_from("<II", data, start + size * index) for index in range(count)]
                yield next(flags for kind, flags in headers if kind == 0x6474E551)


def test_what_is_wrong_is_said_before_anything_is_built(tmp_path, run):
    done = run("export", tmp_path, "--target", "zerogpu", check=2)
    assert "--out FOLDER goes with --target zerogpu" in done.stderr
    done = run("export", tmp_path, "--target", "inductor", "--out", tmp_path / "x", check=2)
    assert "--out FOLDER goes with --target zerogpu" in done.stderr
    done = run("export", tmp_path, "--target", "zerogpu", "--out", tmp_path / "x", check=1)
    assert "is no surgery artifact" in done.stderr and not (tmp_path / "x").exists()
