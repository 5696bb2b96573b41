"""A VAE of its own: from a folder, a folder in it, or a repository, under the names that the base's variant loads."""

import pytest
import torch
from diffusers import AutoencoderTiny

import surgery
from surgery.artifact import read_manifest
from surgery.errors import BaseError, RecipeError
from surgery.recipe.plan import make_plan

from ..conftest import SHAPES, load_shapes
from ..loopback_hub import COMMIT, environment, hub_server

RECIPE = f"""\
schema: 1
name: v
base: {{pipeline: {SHAPES}, vae: {{repo: ./vae}}}}
operations: [{{replace: cross-attention, with: {{operator: pladis, scale: 1.0}}}}]
"""
WEIGHTS = "vae/diffusion_pytorch_model.safetensors"


@pytest.fixture
def other(tmp_path):
    """(recipe, VAE with other weights in the folder beside it)."""
    vae = load_shapes().vae
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.mul_(1.25)
    vae.save_pretrained(tmp_path / "vae")
    (tmp_path / "r.yaml").write_text(RECIPE)
    return tmp_path / "r.yaml", vae


def assert_loaded(folder, vae):
    found = surgery.load(folder, quiet=True).vae.state_dict()
    assert all(torch.equal(found[key], tensor) for key, tensor in vae.state_dict().items())


def test_it_is_linked_and_recorded(other, tmp_path):
    recipe, vae = other
    artifact = surgery.apply(recipe, tmp_path / "out")
    assert_loaded(artifact.folder, vae)
    assert (artifact.folder / WEIGHTS).samefile(tmp_path / "vae/diffusion_pytorch_model.safetensors")
    origin = artifact.manifest.files[WEIGHTS].origin
    assert (origin.kind, origin.source) == ("component", "./vae")
    assert "the vae's weights are ./vae/diffusion" in (artifact.folder / "README.md").read_text()


def test_in_a_subfolder_with_a_variant_as_a_pickle_and_of_another_class(other, tmp_path):
    recipe, vae = other
    vae.save_pretrained(tmp_path / "all/vae", variant="fp16")
    overrides = ["base.vae={repo: ./all, subfolder: vae, variant: fp16}"]
    assert_loaded(surgery.apply(recipe, tmp_path / "a", overrides=overrides).folder, vae)
    vae.save_pretrained(tmp_path / "old", safe_serialization=False)
    artifact = surgery.apply(recipe, tmp_path / "b", overrides=["base.vae.repo=./old"])
    assert artifact.manifest.files[WEIGHTS].origin.kind == "converted"
    assert_loaded(artifact.folder, vae)
    tiny = AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
        latent_channels=vae.config.latent_channels,
    )
    tiny.save_pretrained(tmp_path / "tiny")
    artifact = surgery.apply(recipe, tmp_path / "c", overrides=["base.vae.repo=./tiny"])
    assert_loaded(artifact.folder, tiny)


def test_what_is_no_vae_is_refused(other, tmp_path):
    recipe, vae = other
    (tmp_path / "empty").mkdir()
    vae.save_pretrained(tmp_path / "fp16", variant="fp16")
    wide = type(vae).from_config({**vae.config, "latent_channels": 8})
    wide.save_pretrained(tmp_path / "wide")
    vae.save_pretrained(tmp_path / "all/vae")
    for value, message in (
        ("{repo: ./empty}", "./empty has no config.json, so it is no VAE"),
        ("{repo: ./all}", "./all has no config.json, so it is no VAE; give its subfolder"),
        ("{repo: ./nowhere}", "there is no folder .*nowhere"),
        (f"{{repo: {SHAPES}, subfolder: unet}}", "unet/ is no VAE but a UNet2DConditionModel"),
        ("{repo: ./wide}", "has 8 latent channels, the base's 4"),
        ("{repo: ./fp16}", "has no weights that load without a variant; name it"),
    ):
        with pytest.raises(BaseError, match=message):
            make_plan(recipe, [f"base.vae={value}"])
    with pytest.raises(RecipeError, match='did you mean "subfolder"'):
        make_plan(recipe, ["base.vae={repo: ./vae, subfoldr: x}"])
    path = tmp_path / "vae/diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(BaseError, match="is not a whole safetensors file"):
        surgery.apply(recipe, tmp_path / "out")


@pytest.mark.slow
def test_of_a_repository_it_is_named_by_its_commit(other, run, tmp_path):
    recipe, vae = other
    with hub_server() as server:
        server.repositories["me/vae"] = tmp_path / "vae"
        overrides = ["--set", "base.vae.repo=me/vae"]
        home = environment(server, tmp_path / "home")
        run("apply", recipe, "--out", tmp_path / "out", *overrides, env=home, check=0)
    origin = read_manifest(tmp_path / "out").files[WEIGHTS].origin
    assert (origin.kind, origin.source, origin.revision) == ("component", "me/vae", COMMIT)
    assert_loaded(tmp_path / "out", vae)
