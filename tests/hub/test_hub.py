"""Bases and artifacts on a Hub, served on loopback: listed before fetched, only what is needed, clear refusals."""

import json
import shutil
from types import SimpleNamespace

import pytest

from surgery.hub.client import is_transient

from ..conftest import SHAPES, load_shapes
from ..loopback_hub import COMMIT, environment, hub_server

REPO = "owner/shapes"


@pytest.fixture
def hub(tmp_path):
    with hub_server() as server:
        server.repositories[REPO] = SHAPES
        server.cards[REPO] = {"license": "apache-2.0"}
        yield server


@pytest.fixture
def hub_run(run, hub, tmp_path):
    """`surgery ...` against the server, with a cache of its own."""
    return lambda *arguments, **options: run(*arguments, env=environment(hub, tmp_path / "home"), **options)


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "hub.yaml"
    path.write_text(
        f"schema: 1\nname: from-hub\nbase: {{pipeline: {REPO}}}\n"
        "operations: [{replace: cross-attention, with: {operator: pladis, scale: 1.0}}]\n"
        "sampling: {steps: 2, height: 64, width: 64}\n"
    )
    return path


@pytest.mark.parametrize(
    ("status", "again"), [(404, False), (408, True), (409, False), (429, True), (500, True), (501, False), (503, True)]
)
def test_which_answers_of_a_server_are_asked_for_again(status, again):
    error, around = RuntimeError("no"), RuntimeError("around it")
    error.response, around.__cause__ = SimpleNamespace(status_code=status), error
    assert is_transient(error) is again and is_transient(around) is again


def test_a_plan_fetches_configs_only_and_records_commit_hashes_and_licence(hub, hub_run, recipe):
    plan = json.loads(hub_run("plan", recipe, "--json", check=0).stdout)
    assert set(hub.fetched()) == {"model_index.json", "unet/config.json"}
    assert plan["base"]["revision"] == COMMIT and plan["base"]["license"] == "apache-2.0"
    weights = [file for file in plan["files"] if file["weights"]]
    assert len(weights) == 3 and all(len(file["sha256"]) == 64 for file in weights)


def test_apply_links_what_the_cache_holds_and_the_result_loads_from_the_hub(hub, hub_run, recipe, tmp_path, run):
    done = hub_run("apply", recipe, "--out", tmp_path / "out", check=0)
    assert "owner/shapes c0ffee" in done.stdout and "13.4 MB linked, 0 B copied" in done.stdout
    assert "README.md" not in hub.fetched()
    manifest = json.loads((tmp_path / "out/surgery.json").read_text())
    origin = manifest["files"]["unet/diffusion_pytorch_model.safetensors"]["origin"]
    assert (origin["source"], origin["revision"]) == (REPO, COMMIT)

    hub.repositories["me/patched"] = tmp_path / "out"
    (tmp_path / "out" / "notes.bin").write_bytes(b"not in the manifest, so not fetched")
    hub_run("generate", "me/patched", "a red circle", "--images", "1", "--out", tmp_path / "x.png", check=0)
    assert "notes.bin" not in hub.fetched()
    # and by diffusers alone, as somebody without the package would
    code = (
        "import sys; sys.modules['surgery'] = None\n"
        "from diffusers import DiffusionPipeline\n"
        "pipe = DiffusionPipeline.from_pretrained('me/patched', trust_remote_code=True)\n"
        "modules = [m for m in pipe.unet.modules() if hasattr(m, 'pladis_scale')]\n"
        "print(len(modules), modules[0].pladis_scale)\n"
        "try:\n"
        "    DiffusionPipeline.from_pretrained('me/patched')\n"
        "except ValueError as error:\n"
        "    print('refused:', 'trust_remote_code' in str(error))\n"
    )
    out = run(python=code, env=environment(hub, tmp_path / "other-home"), check=0).stdout
    assert "7 tensor(1.)" in out and "refused: True" in out


@pytest.mark.slow
def test_of_a_plain_repository_only_what_its_pipeline_loads_is_fetched(hub, hub_run, tmp_path, pipeline):
    import surgery

    shutil.copytree(SHAPES, tmp_path / "plain")
    (tmp_path / "plain/whole_checkpoint.safetensors").write_bytes(b"0" * 100)
    hub.repositories["owner/plain"] = tmp_path / "plain"
    small = ["--images", "1", "--steps", "1", "--height", "64", "--width", "64", "--out", tmp_path / "x.png"]
    hub_run("generate", "owner/plain", "a red circle", *small, check=0)
    surgery.patch(pipeline).save_pretrained(tmp_path / "saved")  # patched, without a manifest
    hub.repositories["me/saved"] = tmp_path / "saved"
    done = hub_run("generate", "me/saved", "a red circle", *small, "--force", check=0)
    assert "no manifest to verify" in done.stderr and "base and patched" in done.stdout
    assert not {"whole_checkpoint.safetensors", "README.md"} & set(hub.fetched())


@pytest.mark.slow
def test_with_a_variant_diffusers_fetches_and_loads_the_buffers_too(hub, hub_run, tmp_path, run):
    for path in SHAPES.rglob("*"):
        if path.is_file():
            name = path.name.replace(".safetensors", ".fp16.safetensors")
            target = tmp_path / "base" / path.relative_to(SHAPES).parent / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
    hub.repositories["owner/half"] = tmp_path / "base"
    recipe = tmp_path / "half.yaml"
    recipe.write_text(
        "schema: 1\nname: half\nbase: {pipeline: owner/half, variant: fp16}\n"
        "operations: [{replace: cross-attention, with: {operator: pladis, alpha: 1.3, scale: 1.1}}]\n"
    )
    hub_run("apply", recipe, "--out", tmp_path / "out", check=0)
    assert (tmp_path / "out/unet/diffusion_pytorch_model.fp16-00002-of-00002.safetensors").is_file()
    hub.repositories["me/half"] = tmp_path / "out"
    code = (
        "import sys; sys.modules['surgery'] = None\n"
        "import torch\n"
        "from diffusers import DiffusionPipeline\n"
        "half = {'variant': 'fp16', 'dtype': torch.float16}\n"
        "pipe = DiffusionPipeline.from_pretrained('me/half', trust_remote_code=True, **half)\n"
        "module = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2\n"
        "print(pipe.unet.dtype, module.pladis_scale.dtype, round(module.pladis_scale.item(), 6))\n"
    )
    out = run(python=code, env=environment(hub, tmp_path / "other-home"), check=0).stdout
    assert "torch.float16 torch.float32 1.1" in out
    loaded = run(
        python="import surgery; surgery.load('me/half', verify=True)", env=environment(hub, tmp_path / "home"), check=0
    )
    assert "alpha 1.3, scale 1.1" in loaded.stderr and "all sha256 verified" in loaded.stderr


def test_a_corrupted_download_is_named_and_nothing_is_written(hub, hub_run, recipe, tmp_path):
    hub.corrupted.add("vae/diffusion_pytorch_model.safetensors")
    done = hub_run("apply", recipe, "--out", tmp_path / "out", check=1)
    assert "is damaged: its sha256 is not the one that the Hub lists" in done.stderr
    assert "vae/diffusion_pytorch_model.safetensors" in done.stderr and "Delete that file" in done.stderr
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


@pytest.mark.slow
def test_a_corrupted_download_is_not_fused_or_converted_either(hub, hub_run, recipe, tmp_path):
    import torch
    from safetensors.torch import load_file, save_file

    from ..models.test_patch_survives import lora_state

    unet = load_file(SHAPES / "unet/diffusion_pytorch_model.safetensors")
    (tmp_path / "more").mkdir()
    torch.save(unet, tmp_path / "more/unet.bin")
    save_file(lora_state(load_shapes().unet), tmp_path / "more/lora.safetensors")
    hub.repositories["owner/more"] = tmp_path / "more"
    hub.corrupted |= {"unet.bin", "lora.safetensors"}
    for override in (
        "base.components.unet={repo: owner/more, file: unet.bin}",
        "base.loras=[{repo: owner/more, file: lora.safetensors}]",
    ):
        done = hub_run("apply", recipe, "--out", tmp_path / "out", "--set", override, check=1)
        assert "is damaged: its sha256 is not the one that the Hub lists" in done.stderr
        assert not (tmp_path / "out").exists()


def test_a_server_that_fails_is_a_clear_error_and_a_second_run_finishes(hub, hub_run, recipe, tmp_path):
    hub.faults["vae/diffusion_pytorch_model.safetensors"] = 1
    done = hub_run("apply", recipe, "--out", tmp_path / "out")
    if done.returncode:  # whether huggingface_hub retried is its own affair
        assert done.returncode == 1 and "run the same command again" in done.stderr
        hub.requests.clear()
        hub_run("apply", recipe, "--out", tmp_path / "out", check=0)
        assert "text_encoder/model.safetensors" not in hub.fetched()  # what had arrived is kept
    assert (tmp_path / "out/surgery.json").is_file()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("base.pipeline=owner/nothing", "no model repository owner/nothing on the Hub"),
        ("base.revision=v9", "owner/shapes has no revision 'v9'"),
        ("base.components.unet={repo: owner/shapes, file: unet/difusion_pytorch_model.safetensors}", "did you mean"),
    ],
)
def test_what_is_not_on_the_hub_is_a_clear_error(hub_run, recipe, override, message):
    assert message in hub_run("plan", recipe, "--set", override, check=2).stderr


def test_a_gated_base_says_what_to_do(hub, hub_run, recipe):
    hub.gated.add(REPO)
    assert "is gated: accept its terms" in hub_run("plan", recipe, check=1).stderr


def test_without_a_connection_the_cache_is_used_and_without_cache_it_says_so(hub, hub_run, recipe, tmp_path, run):
    hub_run("apply", recipe, "--out", tmp_path / "one", check=0)
    offline = {**environment(hub, tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    run("apply", recipe, "--out", tmp_path / "two", env=offline, check=0)
    manifests = [json.loads((tmp_path / name / "surgery.json").read_text()) for name in ("one", "two")]
    assert manifests[0]["hash"] == manifests[1]["hash"]
    empty = {**offline, "HF_HOME": str(tmp_path / "empty")}
    done = run("plan", recipe, env=empty, check=1)
    assert "cannot reach the Hub" in done.stderr and "not in the local cache" in done.stderr
    refused = {**environment(hub, tmp_path / "empty"), "HF_ENDPOINT": "http://127.0.0.1:9"}
    assert "cannot reach the Hub" in run("plan", recipe, env=refused, check=1).stderr


def test_a_folder_that_is_not_written_as_one_is_told_how_it_is_written(hub, hub_run, recipe, run, tmp_path):
    beside = recipe.parent
    (beside / "models" / "mine").mkdir(parents=True)
    there = hub_run("plan", recipe, "--set", "base.pipeline=models/mine", check=2).stderr
    assert 'if it is a folder: there is one, which is written "./models/mine"' in there
    for written in ("models/mime", "./models/mime"):
        near = hub_run("plan", recipe, "--set", f"base.pipeline={written}", check=2).stderr
        assert 'did you mean "./models/mine"?' in near, near
