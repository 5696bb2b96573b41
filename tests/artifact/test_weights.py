"""The weights in an artifact: linked, converted, fused, sharded; and what is refused."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import surgery
from surgery.artifact.weights import buffer_shard_name, index_name, write_tensors
from surgery.errors import BaseError, UnsupportedModelError
from surgery.hub.tensors import opened_tensors, read_header

from ..conftest import SHAPES, draw, load_shapes
from ..models.test_patch_survives import lora_state

UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def other_unet(tmp_path):
    """The shapes UNet with every weight halved, as a state dict."""
    return {name: tensor / 2 for name, tensor in load_file(SHAPES / UNET).items()}


def with_unet(file):
    return [f"base.components.unet.file={file}"]


def test_another_unet_as_safetensors_is_linked(recipe, tmp_path, other_unet):
    save_file(other_unet, tmp_path / "other.safetensors")
    artifact = surgery.apply(recipe, tmp_path / "out", overrides=with_unet("./other.safetensors"))
    assert (artifact.folder / UNET).samefile(tmp_path / "other.safetensors")
    assert artifact.manifest.files[UNET].origin.kind == "component"
    assert "byte for byte" in (artifact.folder / "README.md").read_text()
    loaded = surgery.load(artifact.folder, quiet=True).unet.state_dict()
    assert all(torch.equal(loaded[name], tensor.float()) for name, tensor in other_unet.items())


@pytest.mark.parametrize("new_format", [True, False])
def test_another_unet_as_bin_is_converted_with_the_dtype_it_has(recipe, tmp_path, other_unet, new_format):
    torch.save(other_unet, tmp_path / "other.bin", _use_new_zipfile_serialization=new_format)
    artifact = surgery.apply(recipe, tmp_path / "out", overrides=with_unet("other.bin"))
    written = load_file(artifact.folder / UNET)
    assert {tensor.dtype for tensor in written.values()} == {torch.float16}
    assert all(torch.equal(written[name], tensor) for name, tensor in other_unet.items())
    assert artifact.manifest.files[UNET].origin.kind == "converted"
    surgery.load(artifact.folder, verify=True, quiet=True)


def test_a_bin_that_would_run_code_is_refused_unread(recipe, tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.system, (f"touch {tmp_path}/ran",))

    torch.save({"conv_in.weight": Evil()}, tmp_path / "evil.bin")
    with pytest.raises(BaseError, match="holds more than tensors, so reading it could run code"):
        surgery.apply(recipe, tmp_path / "out", overrides=with_unet("evil.bin"))
    assert not (tmp_path / "ran").exists() and not (tmp_path / "out").exists()


def test_weights_that_are_not_this_unets_are_refused(recipe, tmp_path, other_unet):
    fewer = {name: tensor for name, tensor in other_unet.items() if name != "conv_in.bias"}
    save_file(fewer, tmp_path / "fewer.safetensors")
    save_file({**other_unet, "lora.x": torch.zeros(1)}, tmp_path / "more.safetensors")
    save_file({**other_unet, "conv_in.bias": torch.zeros(3)}, tmp_path / "shape.safetensors")
    whole = (SHAPES / UNET).read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    header["conv_in.bias"]["shape"] = [65]
    text = json.dumps(header).encode()
    (tmp_path / "place.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + whole[8 + length :])
    (tmp_path / "empty.bin").write_bytes(b"")
    (tmp_path / "short.bin").write_bytes(b"GGUF")
    (tmp_path / "text.safetensors").write_text("<html>404</html>")
    for name, message in (
        ("fewer", r"1 tensors are missing \(first: conv_in.bias\)"),
        ("more", r"1 are unknown to the model \(first: lora.x\)"),
        ("shape", r"conv_in.bias has shape \(3,\), the model needs \(48,\)"),
        ("cut", "not a whole safetensors file"),
        ("text", "not a whole safetensors file"),
        ("place", "not a whole safetensors file"),
        ("empty.bin", "empty.bin cannot be read"),
        ("short.bin", "short.bin"),
    ):
        file = name if "." in name else f"{name}.safetensors"
        with pytest.raises(BaseError, match=message):
            surgery.apply(recipe, tmp_path / "out", overrides=with_unet(file))
        assert not (tmp_path / "out").exists()


def test_a_base_that_is_cut_short_or_lacks_tensors_is_refused(recipe, tmp_path):
    base = shutil.copytree(SHAPES, tmp_path / "base")
    override = [f"base.pipeline={base}"]
    whole = (SHAPES / "vae/diffusion_pytorch_model.safetensors").read_bytes()
    (base / "vae/diffusion_pytorch_model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(BaseError, match="vae/diffusion_pytorch_model.safetensors is not a whole safetensors file"):
        surgery.apply(recipe, tmp_path / "out", overrides=override)
    (base / "vae/diffusion_pytorch_model.safetensors").write_bytes(whole)
    unet = load_file(SHAPES / UNET)
    del unet["conv_in.bias"]
    save_file({**unet, "unused": torch.zeros(1)}, base / UNET)
    with pytest.raises(BaseError, match=r"1 tensors are missing \(first: conv_in.bias\)\. It"):
        surgery.apply(recipe, tmp_path / "out", overrides=override)
    assert not (tmp_path / "out").exists()


def kohya(state):
    """The same LoRA in the layout of kohya's trainer, as the Hub's files often are, with alpha = 2."""
    named = {}
    for key, tensor in state.items():
        path, kind = key.removeprefix("unet.").split(".lora_")
        stem = "lora_unet_" + path.replace(".", "_")
        named[f"{stem}.lora_{'down' if kind.startswith('A') else 'up'}.weight"] = tensor
        named[f"{stem}.alpha"] = torch.tensor(2.0)
    return named


@pytest.mark.parametrize("layout", ["peft", "kohya"])
def test_a_fused_lora_is_what_peft_fuses(recipe, tmp_path, layout):
    from safetensors.torch import save_file

    reference = load_shapes()
    state = lora_state(reference.unet)
    state |= {  # a convolution too
        "unet.down_blocks.0.resnets.0.conv1.lora_A.weight": torch.randn(4, 48, 3, 3) * 0.05,
        "unet.down_blocks.0.resnets.0.conv1.lora_B.weight": torch.randn(48, 4, 1, 1) * 0.05,
    }
    state = state if layout == "peft" else kohya(state)
    save_file(state, tmp_path / "lora.safetensors")
    lora = "base.loras=[{file: lora.safetensors, scale: 0.8}]"
    artifact = surgery.apply(recipe, tmp_path / "out", overrides=[lora])
    assert artifact.manifest.files[UNET].origin.loras[0]["scale"] == 0.8
    assert "lora.safetensors fused in" in (artifact.folder / "README.md").read_text()

    reference.load_lora_weights(str(tmp_path / "lora.safetensors"))
    reference.fuse_lora(lora_scale=0.8)
    reference.unload_lora_weights()
    expected = reference.unet.state_dict()
    written, base = load_file(artifact.folder / UNET), load_file(SHAPES / UNET)
    changed = {name for name in base if not torch.equal(base[name], written[name])}
    assert len(changed) == 29
    for name, tensor in written.items():
        assert tensor.dtype == torch.float16
        assert (tensor.float() - expected[name]).abs().max() <= 2e-3 * expected[name].abs().max()  # fp16 rounding
    surgery.load(artifact.folder, verify=True, quiet=True)


def test_a_lora_that_does_not_fit_is_refused(recipe, tmp_path):
    state = lora_state(load_shapes().unet)
    save_file(
        {key.replace("down_blocks.1", "down_blocks.7"): t for key, t in state.items()}, tmp_path / "a.safetensors"
    )
    missing = "mid_block.attentions.0.transformer_blocks.0.attn2.to_q.lora_B.weight"
    save_file({key: t for key, t in state.items() if not key.endswith(missing)}, tmp_path / "c.safetensors")
    save_file({key: t * 1e3 for key, t in state.items()}, tmp_path / "d.safetensors")
    text = {"text_encoder.layers.0.q_proj.lora_A.weight": torch.zeros(4, 8)}
    save_file({**state, **text}, tmp_path / "b.safetensors")
    for name, error, message in (
        ("a", BaseError, "has a layer down_blocks.7"),
        ("c", BaseError, "lacks .*to_q.lora_B.weight, the other half"),
        ("d", BaseError, "overflows torch.float16; use a smaller scale"),
        ("b", UnsupportedModelError, "1 of its tensors are not the UNet's"),
    ):
        with pytest.raises(error, match=message):
            surgery.apply(recipe, tmp_path / "out", overrides=[f"base.loras=[{{file: {name}.safetensors}}]"])


def test_a_sharded_base_keeps_its_shards_and_the_buffers_count_one_up(recipe, tmp_path):
    base = load_shapes()
    base.save_pretrained(tmp_path / "base", max_shard_size="10MB")
    shards = sorted((tmp_path / "base/unet").glob("*-of-*.safetensors"))
    assert len(shards) > 1
    overrides = [f"base.pipeline={tmp_path / 'base'}", "operations.0.with.scale=0.0"]
    artifact = surgery.apply(recipe, tmp_path / "out", overrides=overrides)
    count = len(shards) + 1
    assert (artifact.folder / f"unet/diffusion_pytorch_model-{count:05d}-of-{count:05d}.safetensors").is_file()
    assert all((artifact.folder / "unet" / shard.name).samefile(shard) for shard in shards)
    assert (draw(surgery.load(artifact.folder, quiet=True)) - draw(base)).abs().max() < 1e-3


def test_another_scheduler_is_written_and_loaded(recipe, tmp_path):
    overrides = ["base.scheduler={class: EulerDiscreteScheduler, timestep_spacing: trailing}"]
    artifact = surgery.apply(recipe, tmp_path / "out", overrides=overrides)
    scheduler = surgery.load(artifact.folder, quiet=True).scheduler
    assert type(scheduler).__name__ == "EulerDiscreteScheduler"
    assert scheduler.config.timestep_spacing == "trailing" and scheduler.config.prediction_type == "v_prediction"


@pytest.mark.parametrize(
    ("names", "shard", "index"),
    [
        (["m.safetensors"], "m-00002-of-00002.safetensors", "m.safetensors.index.json"),
        (["m.fp16.safetensors"], "m.fp16-00002-of-00002.safetensors", "m.safetensors.index.fp16.json"),
        (
            ["m.fp16-00001-of-00002.safetensors", "m.fp16-00002-of-00002.safetensors"],
            "m.fp16-00003-of-00003.safetensors",
            "m.safetensors.index.fp16.json",
        ),
        (
            ["m-00001-of-00002.fp16.safetensors", "m-00002-of-00002.fp16.safetensors"],
            "m.fp16-00003-of-00003.safetensors",
            "m.safetensors.index.fp16.json",
        ),
    ],
)
def test_names_of_the_buffers_shard_and_the_index(names, shard, index):
    assert (buffer_shard_name(names), index_name(names)) == (shard, index)


def test_tensor_files_are_read_and_written_as_the_safetensors_package_does(tmp_path):
    tensors = {
        "a": torch.randn(3, 5).bfloat16(),
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(2.5),
        "half": torch.randn(7).half(),
        "whole": torch.arange(6).reshape(2, 3),
        "flag": torch.tensor([True, False]),
    }
    turned = torch.randn(3, 2).T  # whose elements lie in another order than its own
    tensors["turned"] = turned.contiguous()
    layout = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    write_tensors(tmp_path / "ours.safetensors", layout, {**tensors, "turned": turned}.items())
    save_file(tensors, tmp_path / "theirs.safetensors")
    with opened_tensors(tmp_path / "theirs.safetensors") as (layout, get):
        theirs = {name: get(name) for name in layout}
    for loaded in (load_file(tmp_path / "ours.safetensors"), theirs):
        assert set(loaded) == set(tensors)
        for name, tensor in tensors.items():
            assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor)
    assert {n: (e.dtype, e.shape) for n, e in read_header(tmp_path / "ours.safetensors").items()} == {
        n: (e.dtype, e.shape) for n, e in read_header(tmp_path / "theirs.safetensors").items()
    }
