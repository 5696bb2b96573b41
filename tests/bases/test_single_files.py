"""A checkpoint in one file becomes an artifact: the same weights and images, or a refusal that says what to do."""

import json
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

import surgery
from surgery.errors import BaseError, BaseNotFoundError, RecipeError, SurgeryError, UnsupportedModelError
from surgery.hub import LocalBase, sha256_of
from surgery.hub.tensors import opened_tensors, read_header
from surgery.recipe.plan import make_plan
from surgery.recipe.schema import WeightFile
from surgery.recipe.single_file import SingleFileCheckpoint

from ..loopback_hub import COMMIT, environment, hub_server
from ..models.test_patch_survives import lora_state
from ..nn.backbones.flux import flux
from ..nn.backbones.two_streams import sd3
from . import single_files

RECIPE = """\
schema: 1
name: one
base: {single_file: x.safetensors, config: ./configs}
operations: [{replace: cross-attention, with: {operator: pladis, scale: 0.0}}]
"""
CALL = {"height": 64, "width": 64, "num_inference_steps": 2, "output_type": "pt"}
UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def made(request, tmp_path_factory):
    """(pipeline, folder with its checkpoint in one file, its configs and a recipe)."""
    folder = tmp_path_factory.mktemp(request.param)
    pipe = single_files.pipeline(request.param == "sdxl")
    single_files.write(folder / "x.safetensors", pipe)
    single_files.configs_alone(pipe, folder / "configs")
    (folder / "r.yaml").write_text(RECIPE)
    return pipe, folder


@pytest.fixture(scope="module")
def sd15(tmp_path_factory):
    """As `made`, of SD 1.5 alone, with its tensors."""
    folder = tmp_path_factory.mktemp("sd15")
    pipe = single_files.pipeline(False)
    single_files.write(folder / "x.safetensors", pipe)
    single_files.configs_alone(pipe, folder / "configs")
    (folder / "r.yaml").write_text(RECIPE)
    return pipe, folder, load_file(folder / "x.safetensors")


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


def test_what_was_converted_is_recorded(sd15, tmp_path):
    _, folder, _ = sd15
    planned = make_plan(folder / "r.yaml")
    artifact = surgery.apply(folder / "r.yaml", tmp_path / "out")
    base = artifact.manifest.base
    assert (base["single_file"], base["pipeline"]) == ("x.safetensors", "./configs")
    assert base["single_file_sha256"] == sha256_of(folder / "x.safetensors")
    sizes = {file.path: file.size for file in planned.plan.files if file.weights}
    assert set(sizes) == {UNET, "vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"}
    for path, size in sizes.items():
        origin = artifact.manifest.files[path].origin
        assert (origin.kind, origin.source) == ("converted", "x.safetensors")
        entries = read_header(artifact.folder / path).values()
        assert size == sum(4 * torch.Size(entry.shape).numel() for entry in entries)
    card = (artifact.folder / "README.md").read_text()
    assert "the weights of text_encoder, unet, vae are that file's, converted" in card
    assert f"sha256 `{base['single_file_sha256'][:12]}`" in card
    checks = [check for check in surgery.verify(artifact.folder).checks if check.what == "weights"]
    assert len(checks) == 3 and all("converted from x.safetensors" in check.detail for check in checks)


def test_half_precision_and_pickles_keep_their_dtype_and_a_lora_is_fused(sd15, tmp_path):
    pipe, folder, state = sd15
    torch.save({"state_dict": {key: tensor.half() for key, tensor in state.items()}}, folder / "x.ckpt")
    save_file(lora_state(pipe.unet), folder / "lora.safetensors")
    overrides = ["base.single_file=x.ckpt", "base.loras=[{file: lora.safetensors, scale: 0.5}]"]
    artifact = surgery.apply(folder / "r.yaml", tmp_path / "out", overrides=overrides)
    assert artifact.manifest.files[UNET].origin.kind == "fused"
    assert {entry.dtype for entry in read_header(artifact.folder / UNET).values()} == {"F16"}
    found = load_file(artifact.folder / UNET)
    key = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
    lora = {name.rpartition(".lora_")[2]: t for name, t in lora_state(pipe.unet).items() if f"{key}.lora" in name}
    delta = 0.5 * lora["B.weight"] @ lora["A.weight"]
    wanted = pipe.unet.state_dict()[f"{key}.weight"].half().float() + delta
    torch.testing.assert_close(found[f"{key}.weight"], wanted.half(), atol=1e-3, rtol=1e-3)


def test_what_the_file_lacks_is_the_configs_own(tmp_path):
    pipe, _ = sd3()
    pipe.save_pretrained(tmp_path / "configs")
    wanted = {name: getattr(pipe, name).state_dict() for name in ("transformer", "vae", "text_encoder")}
    state = {key: torch.randn_like(tensor) for key, tensor in wanted["transformer"].items()}
    save_file({k: t.contiguous() for k, t in single_files.original_sd3(state).items()}, tmp_path / "x.safetensors")
    (tmp_path / "r.yaml").write_text(RECIPE)
    artifact = surgery.apply(tmp_path / "r.yaml", tmp_path / "out")
    kinds = {path: file.origin.kind for path, file in artifact.manifest.files.items() if file.weights}
    assert kinds.pop("transformer/diffusion_pytorch_model.safetensors") == "converted"
    assert len(kinds) == 4 and set(kinds.values()) == {"base"}
    loaded = surgery.load(artifact.folder, quiet=True)
    found = loaded.transformer.state_dict()
    assert all(torch.equal(found[key], tensor) for key, tensor in state.items())
    assert all(torch.equal(loaded.vae.state_dict()[key], tensor) for key, tensor in wanted["vae"].items())


def flux_checkpoint(path, written):
    """A FLUX.1 of one block of each kind, in its own width, which the converter takes for granted; zeros but `written`.

    Its file has holes: 0.6 GB that take no room.
    """
    d = 3072
    matrices = {"time_in.in_layer": (d, 256), "time_in.out_layer": (d, d), "vector_in.in_layer": (d, 32)}
    matrices |= {"vector_in.out_layer": (d, d), "txt_in": (d, 32), "img_in": (d, 16)}
    matrices |= {"final_layer.linear": (16, d), "final_layer.adaLN_modulation.1": (2 * d, d)}
    matrices |= {"single_blocks.0.modulation.lin": (3 * d, d), "single_blocks.0.linear1": (7 * d, d)}
    matrices |= {"single_blocks.0.linear2": (d, 5 * d)}
    for stream in ("img", "txt"):
        room = f"double_blocks.0.{stream}"
        matrices |= {f"{room}_mod.lin": (6 * d, d), f"{room}_attn.qkv": (3 * d, d), f"{room}_attn.proj": (d, d)}
        matrices |= {f"{room}_mlp.0": (4 * d, d), f"{room}_mlp.2": (d, 4 * d)}
    shapes = {f"{name}.weight": shape for name, shape in matrices.items()}
    shapes |= {f"{name}.bias": shape[:1] for name, shape in matrices.items()}
    norms = ["single_blocks.0.norm", "double_blocks.0.img_attn.norm", "double_blocks.0.txt_attn.norm"]
    shapes |= {f"{name}.{kind}_norm.scale": (128,) for name in norms for kind in ("query", "key")}
    header, at = {}, 0
    for name, shape in shapes.items():
        size = 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + at)
        for name, tensor in written.items():
            file.seek(8 + len(text) + header[name]["data_offsets"][0])
            file.write(tensor.view(torch.uint8).numpy().tobytes())


def test_flux_is_planned_from_its_header_and_computed_tensor_by_tensor(tmp_path):
    """q, k, v, mlp = split(linear1); (scale, shift) = swap of final_layer's (shift, scale)."""
    pipe, _ = flux(guidance_embeds=False)
    pipe.save_pretrained(tmp_path / "configs")
    path = tmp_path / "configs/transformer/config.json"
    config = json.loads(path.read_text())
    config |= {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 128, "num_attention_heads": 24}
    path.write_text(json.dumps(config))
    linear1, swapped = torch.randn(7 * 3072).bfloat16(), torch.randn(2 * 3072).bfloat16()
    written = {"single_blocks.0.linear1.bias": linear1, "final_layer.adaLN_modulation.1.bias": swapped}
    flux_checkpoint(tmp_path / "x.safetensors", written)
    (tmp_path / "r.yaml").write_text(RECIPE)
    plan = make_plan(tmp_path / "r.yaml").plan
    file = next(f for f in plan.files if f.path == "transformer/diffusion_pytorch_model.safetensors")
    assert file.origin.kind == "converted"
    with open(tmp_path / "x.safetensors", "rb") as checkpoint:
        header = 8 + struct.unpack("<Q", checkpoint.read(8))[0]
    assert file.size == (tmp_path / "x.safetensors").stat().st_size - header
    single = SingleFileCheckpoint(WeightFile(file="x.safetensors"), tmp_path)
    base = LocalBase(tmp_path / "configs")
    conversion = single.conversions(base, base.read_json("model_index.json"))["transformer"]
    with opened_tensors(tmp_path / "x.safetensors") as (_, get):
        key = conversion.tensor("single_transformer_blocks.0.attn.to_k.bias", get)
        norm = conversion.tensor("norm_out.linear.bias", get)
    assert torch.equal(key, linear1[3072:6144])
    assert torch.equal(norm, torch.cat([swapped[3072:], swapped[:3072]]))


def damage(state, path, how):
    """Write a bad checkpoint."""
    if how == "truncated":
        save_file(state, path)
        path.write_bytes(path.read_bytes()[:-1000])
    elif how == "garbage":
        path.write_bytes(b"<html>Not Found</html>")
    elif how == "lora":
        save_file({"lora_unet_down_blocks_0.lora_up.weight": torch.zeros(2, 2)}, path)
    elif how == "quantised":
        save_file({**state, "model.diffusion_model.out.2.scale_weight": torch.ones(1)}, path)
    elif how == "half of it":
        save_file({key: tensor for key, tensor in state.items() if "output_blocks.1" not in key}, path)
    elif how == "vae alone":
        save_file({key: tensor for key, tensor in state.items() if key.startswith("first_stage")}, path)
    elif how == "other shapes":
        key = "model.diffusion_model.input_blocks.0.0.weight"
        save_file({**state, key: torch.zeros(32, 9, 3, 3)}, path)


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ("truncated", BaseError, "is not a whole safetensors file: .*; fetch it again"),
        ("garbage", BaseError, "is not a whole safetensors file"),
        ("lora", BaseError, "is a LoRA, no checkpoint of a pipeline; give it under base.loras"),
        ("quantised", UnsupportedModelError, "is quantised .*scale_weight"),
        ("half of it", BaseError, r"holds a part of the unet: \d+ of \d+ tensors are missing .*output|up_blocks"),
        ("vae alone", BaseError, "holds no UNet2DConditionModel.*name the `config`"),
        ("other shapes", BaseError, r"unet conv_in.weight has shape \(32, 9, 3, 3\), the config needs \(32, 4, 3, 3\)"),
    ],
)
def test_a_bad_checkpoint_is_refused_by_its_plan(sd15, tmp_path, how, error, message):
    _, folder, state = sd15
    damage(state, tmp_path / "bad.safetensors", how)
    with pytest.raises(error, match=message):
        make_plan(folder / "r.yaml", [f"base.single_file={tmp_path / 'bad.safetensors'}"])


class Runs:
    def __reduce__(self):
        return print, ("code that ran",)


def test_a_pickle_with_code_a_wrong_kind_and_a_missing_file_are_refused(sd15, tmp_path, capsys):
    _, folder, _ = sd15
    torch.save({"state_dict": {"a": Runs()}}, tmp_path / "evil.ckpt")
    for name, error, message in (
        (tmp_path / "evil.ckpt", BaseError, "holds more than tensors, so reading it could run code"),
        ("y.safetensors", BaseNotFoundError, "y.safetensors is not there; give `repo`"),
        ("model.gguf", UnsupportedModelError, "GGUFQuantizationConfig"),
        ("x.txt", UnsupportedModelError, r"a single_file is one of .safetensors, .ckpt"),
    ):
        with pytest.raises(error, match=message):
            make_plan(folder / "r.yaml", [f"base.single_file={name}"])
    assert "code that ran" not in capsys.readouterr().out
    for override, message in (
        ("base={single_file: x.safetensors, pipeline: ./configs}", "needs a pipeline, or a single_file in its place"),
        ("base={pipeline: ./configs, config: ./configs}", "config belongs to single_file"),
        ("base={}", "needs a pipeline, or a single_file in its place"),
    ):
        with pytest.raises(RecipeError, match=message):
            make_plan(folder / "r.yaml", [override])
    with pytest.raises(SurgeryError, match="there is no folder .*nowhere"):
        make_plan(folder / "r.yaml", ["base.config=./nowhere"])


def test_weights_that_nobody_has_are_named(sd15, tmp_path):
    _, folder, state = sd15
    unet = {key: tensor for key, tensor in state.items() if key.startswith("model.")}
    save_file(unet, tmp_path / "unet.safetensors")
    with pytest.raises(BaseError, match="neither .*unet.safetensors nor the config has weights of the "):
        make_plan(folder / "r.yaml", [f"base.single_file={tmp_path / 'unet.safetensors'}"])


@pytest.mark.slow
def test_on_the_hub_a_plan_reads_the_files_header_alone(sd15, run, tmp_path):
    _, folder, _ = sd15
    (tmp_path / "r.yaml").write_text(
        RECIPE.replace("single_file: x.safetensors", "single_file: {repo: me/one, file: x.safetensors}").replace(
            "./configs", "me/configs"
        )
    )
    (tmp_path / "one").mkdir()
    (tmp_path / "one/x.safetensors").write_bytes((folder / "x.safetensors").read_bytes())
    with hub_server() as server:
        server.repositories["me/one"], server.repositories["me/configs"] = tmp_path / "one", folder / "configs"
        home = environment(server, tmp_path / "home")
        plan = json.loads(run("plan", tmp_path / "r.yaml", "--json", env=home, check=0).stdout)
        assert not list((tmp_path / "home").rglob("x.safetensors"))
        sha256 = sha256_of(folder / "x.safetensors")
        assert (plan["base"]["single_file_sha256"], plan["base"]["single_file_revision"]) == (sha256, COMMIT)
        run("apply", tmp_path / "r.yaml", "--out", tmp_path / "out", env=home, check=0)
    manifest = json.loads((tmp_path / "out/surgery.json").read_text())
    assert manifest["files"][UNET]["origin"] | {"loras": []} == {
        "kind": "converted",
        "source": "me/one",
        "revision": COMMIT,
        "path": "x.safetensors",
        "loras": [],
    }
