"""Artifacts: weightless, whole or not at all, and the weights that recipes convert and fuse."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

import surgery
from surgery.artifact.tensors import read_header, read_tensors, write_tensors
from surgery.artifact.weights import buffer_shard_name, index_name
from surgery.errors import BaseError, InputError, SurgeryError, UnsupportedModelError

from ..conftest import SHAPES, draw, load_shapes
from ..test_patching import lora_state

UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def recipe(tmp_path):
    """A recipe on the shapes pipeline in a folder of its own."""
    path = tmp_path / "r.yaml"
    path.write_text(
        f"schema: 1\nname: r\nbase: {{pipeline: {SHAPES}}}\n"
        "operations: [{replace: cross-attention, with: {operator: pladis, scale: 1.0}}]\n"
        "publish: {license: apache-2.0}\n"
    )
    return path


def test_weights_are_the_bases_own_files_and_the_rest_is_small(shapes_artifact):
    own = 0
    for path in shapes_artifact.rglob("*"):
        if path.suffix == ".safetensors" and "00002" not in path.name:
            assert path.samefile(SHAPES / path.relative_to(shapes_artifact))
        elif path.is_file():
            assert path.stat().st_nlink == 1  # an edit of the artifact's text must not reach the base
            own += path.stat().st_size
    assert own < 200_000


def test_the_manifest_accounts_for_every_file(shapes_artifact):
    manifest = json.loads((shapes_artifact / "surgery.json").read_text())
    there = {path.relative_to(shapes_artifact).as_posix() for path in shapes_artifact.rglob("*") if path.is_file()}
    assert set(manifest["files"]) == there - {"surgery.json"}
    assert manifest["files"][UNET]["origin"]["kind"] == "base"
    assert manifest["operations"][0]["alpha"] == 1.5 and len(manifest["operations"][0]["layers"]) == 10
    assert {"torch", "diffusers", "pladis-surgery", "python"} <= set(manifest["versions"])
    assert str(SHAPES.parent) not in json.dumps(manifest)  # no path of this machine


def test_the_same_recipe_gives_the_same_hash_and_another_scale_another(recipe, tmp_path):
    hashes = [surgery.apply(recipe, tmp_path / name).manifest.hash for name in ("a", "b")]
    other = surgery.apply(recipe, tmp_path / "c", overrides=["operations.0.with.scale=1.1"])
    assert hashes[0] == hashes[1] != other.manifest.hash
    assert "scale: 1.1" in (tmp_path / "c/recipe.yaml").read_text()


def test_where_links_do_not_work_files_are_copied(recipe, tmp_path, monkeypatch):
    def no_link(*_):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", no_link)
    artifact = surgery.apply(recipe, tmp_path / "out")
    assert artifact.linked_bytes == 0 and artifact.copied_bytes > 16e6
    assert not (artifact.folder / UNET).samefile(SHAPES / UNET)
    surgery.load(artifact.folder, verify=True, quiet=True)


def test_an_existing_folder_is_refused_without_force_and_a_strangers_folder_always(recipe, tmp_path):
    out = surgery.apply(recipe, tmp_path / "out").folder
    with pytest.raises(InputError, match="exists already; --force replaces it"):
        surgery.apply(recipe, out)
    (out / "old").write_text("left over")
    surgery.apply(recipe, out, force=True)
    assert not (out / "old").exists()
    stranger = tmp_path / "photos"
    stranger.mkdir()
    (stranger / "cat.png").write_text("mine")
    with pytest.raises(InputError, match="is no surgery artifact, so it is never replaced"):
        surgery.apply(recipe, stranger, force=True)
    assert (stranger / "cat.png").read_text() == "mine"


def test_through_a_link_the_linked_folder_is_replaced(recipe, tmp_path):
    surgery.apply(recipe, tmp_path / "real")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    surgery.apply(recipe, tmp_path / "link", force=True, overrides=["name=new"])
    assert (tmp_path / "link").is_symlink()
    assert surgery.artifact.read_manifest(tmp_path / "real").name == "new"
    assert not list(tmp_path.glob(".*"))


def test_two_writers_of_one_folder_leave_one_whole_artifact(recipe, tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    def write(number):
        try:
            return surgery.apply(recipe, tmp_path / "out", overrides=[f"operations.0.with.scale={number}.5"])
        except SurgeryError as error:
            return error

    with ThreadPoolExecutor(3) as pool:
        done = list(pool.map(write, range(3)))
    assert sum(not isinstance(one, SurgeryError) for one in done) == 1, done
    surgery.load(tmp_path / "out", verify=True, quiet=True)
    assert not list(tmp_path.glob(".out*"))


def test_a_full_disk_is_a_clear_error_and_leaves_nothing(recipe, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "link", full)
    monkeypatch.setattr(shutil, "copyfile", full)
    before = set(tmp_path.iterdir())
    with pytest.raises(SurgeryError, match="is full: it ran full while writing.* Nothing was left there"):
        surgery.apply(recipe, tmp_path / "out")
    assert set(tmp_path.iterdir()) == before


def test_too_little_space_is_found_before_anything_is_written(recipe, tmp_path, monkeypatch):
    nearly_full = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: nearly_full)
    monkeypatch.setattr(os, "mkdir", lambda *_: pytest.fail("something was written"))
    with pytest.raises(SurgeryError, match="1.0 MB are needed, 0.0 MB are free"):
        surgery.apply(recipe, tmp_path / "out")


@pytest.mark.parametrize("where", ["_write_denoiser", "_hash_files", "_manifest"])
def test_a_kill_in_the_middle_leaves_no_artifact_and_the_next_run_cleans_up(recipe, tmp_path, where):
    code = (
        "import os, signal, surgery, surgery.artifact.write as write\n"
        f"write.{where} = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"surgery.apply({str(recipe)!r}, {str(tmp_path / 'out')!r}, force=True)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    assert len(list(tmp_path.glob(".out.*.partial"))) == 1
    surgery.load(surgery.apply(recipe, tmp_path / "out").folder, quiet=True)
    assert not list(tmp_path.glob(".out.*"))


def test_a_kill_while_an_artifact_is_replaced_keeps_the_old_or_the_new_one(recipe, tmp_path):
    old = surgery.apply(recipe, tmp_path / "out").manifest.hash
    code = (
        "import os, signal, surgery\n"
        "rename = os.rename\n"
        "def killed(source, target):\n"
        "    rename(source, target)\n"
        "    if str(target).endswith('.replaced'):\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "os.rename = killed\n"
        f"surgery.apply({str(recipe)!r}, {str(tmp_path / 'out')!r}, force=True, overrides=['name=new'])\n"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == -signal.SIGKILL
    with pytest.raises(InputError, match="exists already"):  # the next run puts the old one back first
        surgery.apply(recipe, tmp_path / "out")
    assert surgery.artifact.read_manifest(tmp_path / "out").hash == old
    assert not list(tmp_path.glob(".out.*"))


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_cleans_up_after_itself(recipe, tmp_path, stop):
    code = (
        "import time, surgery.artifact.write as write\n"
        "write._hash_files = lambda *a, **k: (print('now', flush=True), time.sleep(60))\n"
        "from surgery.cli import main\n"
        f"raise SystemExit(main(['apply', {str(recipe)!r}, '--out', {str(tmp_path / 'out')!r}]))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "now\n"
    process.send_signal(stop)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == (130 if stop == signal.SIGINT else 128 + signal.SIGTERM)
    assert "Traceback" not in errors
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_a_kill_at_any_time_never_leaves_half_an_artifact(recipe, tmp_path):
    command = [sys.executable, "-m", "surgery", "apply", str(recipe), "--out", str(tmp_path / "out")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not list(tmp_path.glob(".out.*.partial/unet")):
        time.sleep(0.001)
    process.kill()
    process.wait()
    if (tmp_path / "out").exists():
        surgery.load(tmp_path / "out", verify=True, quiet=True)
    surgery.load(surgery.apply(recipe, tmp_path / "out", force=True).folder, verify=True, quiet=True)


# Weights of another origin


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
        ("shape", r"conv_in.bias has shape \(3,\), the model needs \(64,\)"),
        ("cut", "not a whole safetensors file"),
        ("text", "not a whole safetensors file"),
        ("place", "the place of conv_in.bias does not fit its shape"),
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
        "unet.down_blocks.0.resnets.0.conv1.lora_A.weight": torch.randn(4, 64, 3, 3) * 0.05,
        "unet.down_blocks.0.resnets.0.conv1.lora_B.weight": torch.randn(64, 4, 1, 1) * 0.05,
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
    assert len(changed) == 41
    for name, tensor in written.items():
        assert tensor.dtype == torch.float16
        assert (tensor.float() - expected[name]).abs().max() <= 2e-3 * expected[name].abs().max()  # fp16 rounding
    surgery.load(artifact.folder, verify=True, quiet=True)


def test_a_lora_that_does_not_fit_is_refused(recipe, tmp_path):
    state = lora_state(load_shapes().unet)
    save_file(
        {key.replace("down_blocks.0", "down_blocks.7"): t for key, t in state.items()}, tmp_path / "a.safetensors"
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
    layout = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    write_tensors(tmp_path / "ours", layout, tensors.items())
    save_file(tensors, tmp_path / "theirs")
    for loaded in (load_file(tmp_path / "ours"), dict(read_tensors(tmp_path / "theirs"))):
        assert set(loaded) == set(tensors)
        for name, tensor in tensors.items():
            assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor)
    assert {n: (e.dtype, e.shape) for n, e in read_header(tmp_path / "ours").items()} == {
        n: (e.dtype, e.shape) for n, e in read_header(tmp_path / "theirs").items()
    }
