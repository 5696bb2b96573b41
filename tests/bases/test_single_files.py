"""A checkpoint in one file becomes an artifact: the same images, without the library's own loader in between."""

import pytest
import torch

import surgery

from . import single_files

RECIPE = """\
schema: 1
name: one
base: {single_file: x.safetensors, config: ./configs}
operations: [{replace: cross-attention, with: {operator: pladis, scale: 0.0}}]
"""
CALL = {"height": 64, "width": 64, "num_inference_steps": 2, "output_type": "pt"}


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def made(request, tmp_path_factory):
    """(pipeline, folder with its checkpoint in one file, its configs and a recipe)."""
    folder = tmp_path_factory.mktemp(request.param)
    pipe = single_files.pipeline(request.param == "sdxl")
    single_files.write(folder / "x.safetensors", pipe)
    single_files.configs_alone(pipe, folder / "configs")
    (folder / "r.yaml").write_text(RECIPE)
    return pipe, folder


def image(pipe):
    return pipe("a cat", generator=torch.Generator().manual_seed(0), **CALL).images


def test_the_artifact_draws_what_the_checkpoint_draws(made, tmp_path):
    pipe, folder = made
    artifact = surgery.apply(folder / "r.yaml", tmp_path / "out")
    loaded = surgery.load(artifact.folder, verify=True, quiet=True)
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        if hasattr(pipe, name):
            wanted, found = getattr(pipe, name).state_dict(), getattr(loaded, name).state_dict()
            assert all(torch.equal(found[key], tensor) for key, tensor in wanted.items()), name
    torch.testing.assert_close(image(loaded), image(pipe), atol=1e-5, rtol=0)
