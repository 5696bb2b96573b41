"""surgery.load: verified, no remote code run, and every way in which an artifact can be broken is a clear error."""

import json
import shutil

import pytest
import torch
from diffusers import DiffusionPipeline

import surgery
from surgery.errors import ArtifactError, InputError
from surgery.runtime.load import open_model

from ..conftest import SHAPES, draw, load_shapes

BUFFERS = "unet/diffusion_pytorch_model-00002-of-00002.safetensors"
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def artifact(shapes_artifact, tmp_path):
    """A copy of the artifact that may be broken."""
    return shutil.copytree(shapes_artifact, tmp_path / "artifact")


def code_of(folder):
    return next((folder / "unet").glob("modeling_pladis_*.py"))


def test_it_draws_what_the_patched_base_draws(shapes_artifact, capsys):
    pipeline = surgery.load(shapes_artifact, verify=True)
    message = capsys.readouterr().err
    assert "loaded shapes-pladis" in message and "7 modules with pladis (alpha 1.5, scale 1" in message
    assert "all sha256 verified" in message
    expected = draw(surgery.patch(load_shapes(), scale=1.0))
    assert (draw(pipeline) - expected).abs().max() < 1e-4
    surgery.unpatch(pipeline)
    assert (draw(pipeline) - draw(load_shapes())).abs().max() < 1e-4


def test_without_this_package_the_images_are_the_same_to_the_bit(shapes_artifact, tmp_path, run):
    expected = draw(surgery.load(shapes_artifact, quiet=True))
    code = (
        "import sys; sys.modules['surgery'] = None\n"
        "import torch\n"
        "from diffusers import DiffusionPipeline\n"
        f"torch.set_num_threads({torch.get_num_threads()})\n"
        "load = DiffusionPipeline.from_pretrained\n"
        f"pipe = load({str(shapes_artifact)!r}, trust_remote_code=True, dtype=torch.float32)\n"
        "images = pipe(['a red circle to the left of a blue square', 'two green stars'], num_inference_steps=2,\n"
        "    guidance_scale=4.0, height=64, width=64, output_type='np',\n"
        "    generator=[torch.Generator().manual_seed(s) for s in (0, 1)]).images\n"
        f"torch.save(torch.from_numpy(images), {str(tmp_path / 'images.pt')!r})\n"
        f"pipe.save_pretrained({str(tmp_path / 'again')!r})\n"
    )
    run(python=code, env={"HF_MODULES_CACHE": str(tmp_path / "modules")}, check=0)
    assert torch.equal(torch.load(tmp_path / "images.pt", weights_only=True), expected)
    assert torch.equal(draw(surgery.load(tmp_path / "again", quiet=True)), expected)


def test_the_code_in_the_artifact_is_not_run(artifact):
    # Code of another release: checked against the manifest, and not imported.
    code = code_of(artifact)
    other = code.with_name("modeling_pladis_0123456789ab.py")
    other.write_text("raise SystemExit('this code was run')\n")
    code.unlink()
    rename_code(artifact, code, other)
    assert len(surgery.load(artifact, quiet=True).unet.pladis_operations()[0]["layers"]) == 7


def rename_code(folder, code, other):
    from surgery.artifact.manifest import Manifest
    from surgery.hub import sha256_of

    index = json.loads((folder / "model_index.json").read_text())
    index["unet"][0] = other.stem
    index["auto_map"] = {"AutoModel": ".".join(index["unet"])}
    (folder / "model_index.json").write_text(json.dumps(index))
    data = json.loads((folder / "surgery.json").read_text())
    data["code"] = f"unet/{other.name}"
    data["files"][f"unet/{other.name}"] = data["files"].pop(f"unet/{code.name}")
    for name in (f"unet/{other.name}", "model_index.json"):
        data["files"][name] |= {"sha256": sha256_of(folder / name), "size": (folder / name).stat().st_size}
    data["hash"] = Manifest.model_validate(data).computed_hash()
    (folder / "surgery.json").write_text(json.dumps(data))


def edit_json(path, change):
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data, indent=2))


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.unlink()  # not through a link into the base
    path.write_bytes(data)


BREAKAGES = {
    "corrupted buffers": (lambda f: flip(f / BUFFERS), "sha256 differs"),
    "cut buffers": (lambda f: (f / BUFFERS).write_bytes(b"x" * 100), "has 100 bytes, the manifest says"),
    "missing buffers": (lambda f: (f / BUFFERS).unlink(), "00002-of-00002.safetensors is missing"),
    "missing weights": (lambda f: (f / WEIGHTS).unlink(), "diffusion_pytorch_model.safetensors is missing"),
    "missing component": (lambda f: shutil.rmtree(f / "vae"), "is missing"),
    "edited code": (lambda f: flip(code_of(f)), "sha256 differs"),
    "edited config": (
        lambda f: edit_json(f / "unet/config.json", lambda c: c["pladis"][0].update(scale=9.0)),
        "the manifest says",
    ),
    "edited index": (lambda f: flip(f / "unet/diffusion_pytorch_model.safetensors.index.json"), "sha256 differs"),
    "future schema": (
        lambda f: edit_json(f / "surgery.json", lambda m: m.update(schema_version=2)),
        "has schema_version 2; this version .* reads 1",
    ),
    "no schema": (lambda f: edit_json(f / "surgery.json", lambda m: m.pop("schema_version")), "schema_version None"),
    "manifest is a list": (lambda f: (f / "surgery.json").write_text("[]"), "schema_version None"),
    "manifest cut": (lambda f: (f / "surgery.json").write_text('{"schema_ver'), "cannot be read"),
    "manifest lacks a key": (lambda f: edit_json(f / "surgery.json", lambda m: m.pop("files")), "damaged at files"),
    "manifest edited": (
        lambda f: edit_json(f / "surgery.json", lambda m: m["files"][WEIGHTS].update(sha256="0" * 64)),
        "its hash does not fit",
    ),
    "manifest's operation edited": (
        lambda f: edit_json(f / "surgery.json", lambda m: m["operations"][0].update(scale=9.0)),
        "its hash does not fit",
    ),
    "manifest's component edited": (
        lambda f: edit_json(f / "surgery.json", lambda m: m.update(component="../x")),
        "is damaged at component",
    ),
    "model_index is a list": (lambda f: (f / "model_index.json").write_text("[]"), "the manifest says"),
    "manifest names a file outside": (
        lambda f: edit_json(f / "surgery.json", lambda m: m["files"].update({"../x": m["files"][WEIGHTS]})),
        "outside its folder",
    ),
}


@pytest.mark.parametrize("breakage", BREAKAGES)
def test_a_broken_artifact_is_refused_with_the_file_and_the_next_step(artifact, breakage):
    break_it, message = BREAKAGES[breakage]
    break_it(artifact)
    with pytest.raises(ArtifactError, match=message):
        surgery.load(artifact, quiet=True)


def test_corrupted_weights_are_found_by_verify(artifact):
    flip(artifact / WEIGHTS)
    surgery.load(artifact, quiet=True)
    with pytest.raises(ArtifactError, match="sha256 differs"):
        surgery.load(artifact, verify=True, quiet=True)


def test_a_plain_diffusers_load_of_an_edited_config_refuses_too(artifact):
    edit_json(artifact / "unet/config.json", lambda config: config["pladis"][0].update(alpha=1.9))
    with pytest.raises(ValueError, match=r"the config says alpha 1.9 .* holds 1.5"):
        DiffusionPipeline.from_pretrained(artifact, trust_remote_code=True)


def test_the_card_and_scores_may_change(artifact):
    (artifact / "README.md").write_text("# edited by its owner\n")
    (artifact / "scores.json").write_text("{}")
    surgery.load(artifact, verify=True, quiet=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtype_is_of_the_weights_and_not_of_the_hyperparameters(shapes_artifact, dtype):
    pipeline = surgery.load(shapes_artifact, dtype=dtype, quiet=True)
    assert pipeline.unet.dtype == pipeline.text_encoder.dtype == pipeline.vae.dtype == dtype
    buffers = [buffer for name, buffer in pipeline.unet.named_buffers() if "pladis" in name]
    assert len(buffers) == 28 and {buffer.dtype for buffer in buffers} == {torch.float32}
    pipeline.to(torch.float32)
    assert {buffer.dtype for name, buffer in pipeline.unet.named_buffers() if "pladis" in name} == {torch.float32}


def test_arguments_that_contradict_the_artifact_are_refused(shapes_artifact):
    with pytest.raises(InputError, match="leave variant out"):
        surgery.load(shapes_artifact, variant="fp16", quiet=True)
    with pytest.raises(InputError, match="unet is what was patched"):
        surgery.load(shapes_artifact, unet=None, quiet=True)
    assert surgery.load(shapes_artifact, torch_dtype=torch.float16, quiet=True).unet.dtype == torch.float16


def test_what_is_no_artifact_says_what_it_is(tmp_path):
    with pytest.raises(InputError, match="is an unpatched pipeline: load it with diffusers and surgery.patch it"):
        surgery.load(SHAPES)
    with pytest.raises(InputError, match="there is no folder"):
        surgery.load("./nowhere")
    with pytest.raises(InputError, match="no model_index.json"):
        surgery.load(tmp_path)
    with pytest.raises(InputError, match="local folder and has no revision"):
        surgery.load(tmp_path, revision="main")


@pytest.fixture
def machine_with_gpu(monkeypatch):
    """A machine that says it has a GPU; what is moved there stays on the CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    moved = []
    monkeypatch.setattr(DiffusionPipeline, "to", lambda self, *where, **_: moved.append(str(where[0])) or self)
    return moved


@pytest.mark.parametrize("opened", ["artifact", "plain pipeline", "patched folder without a manifest"])
def test_the_device_decides_the_dtype_not_what_the_machine_has(shapes_artifact, tmp_path, machine_with_gpu, opened):
    model = shapes_artifact if opened == "artifact" else SHAPES
    if opened.startswith("patched"):
        model = tmp_path / "saved"
        surgery.load(shapes_artifact, quiet=True).save_pretrained(model)
        machine_with_gpu.clear()
    expected = {"cpu": ("cpu", torch.float32), "cuda": ("cuda", torch.float16), None: ("cuda", torch.float16)}
    for device, (where, dtype) in expected.items():
        pipeline, _, _ = open_model(model, device=device)
        assert pipeline.unet.dtype == pipeline.vae.dtype == dtype, device
        assert set(machine_with_gpu) == {where}
        machine_with_gpu.clear()
    assert open_model(model, device="cpu", dtype=torch.bfloat16)[0].unet.dtype == torch.bfloat16


def test_tables_of_whole_numbers_do_not_decide_the_dtype(tmp_path):
    from safetensors.torch import save_file

    from surgery.runtime.load import default_dtype

    save_file({"table": torch.zeros(99, dtype=torch.int64), "x": torch.zeros(2).half()}, tmp_path / "x.safetensors")
    assert default_dtype(tmp_path, "cuda") is torch.float16


def test_a_saved_pipeline_has_no_engines(shapes_artifact, tmp_path):
    surgery.load(shapes_artifact, quiet=True).save_pretrained(tmp_path / "saved")
    with pytest.raises(InputError, match=r"has no surgery.json, which lists an artifact's engines"):
        surgery.load(tmp_path / "saved", engine="auto", device="cpu", quiet=True)


def test_load_without_a_device_is_for_the_accelerator_and_with_one_for_that(shapes_artifact, machine_with_gpu):
    # Its users call .to("cuda") then, which must not hold float32 weights.
    assert surgery.load(shapes_artifact, quiet=True).unet.dtype == torch.float16
    assert machine_with_gpu == []
    assert surgery.load(shapes_artifact, device="cpu", quiet=True).unet.dtype == torch.float32
    assert surgery.load(shapes_artifact, device=torch.device("cpu"), quiet=True).unet.dtype == torch.float32
    assert surgery.load(shapes_artifact, device="cuda:1", quiet=True).unet.dtype == torch.float16
    assert surgery.load(shapes_artifact, device="cpu", dtype=torch.float16, quiet=True).unet.dtype == torch.float16


@pytest.mark.parametrize("device", ["toaster", "meta"])
def test_a_device_that_is_none_is_refused_before_anything_is_loaded(shapes_artifact, monkeypatch, device):
    monkeypatch.setattr("surgery.runtime.load.load_denoiser", lambda *_: pytest.fail("it was loaded"))
    with pytest.raises(InputError, match=f"--device {device} cannot be used here"):
        open_model(shapes_artifact, device=device)


def test_generate_draws_on_the_cpu_in_float32_where_there_is_a_gpu(shapes_artifact, tmp_path, run, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    given = ("--device", "cpu", "--steps", "1", "--out", tmp_path / "drawn.png")
    done = run("generate", shapes_artifact, "a red circle", *given, check=0)
    assert "7 in all; float32" in done.stderr


def test_an_engine_is_built_in_the_dtype_of_its_device(artifact, machine_with_gpu, monkeypatch):
    from surgery.export.engines.build import Wanted, build_engine

    def capture(source, manifest, component, sizes, device, dtype, regional):
        raise InputError(f"{dtype} on {device}")

    monkeypatch.setattr("surgery.export.engines.build.capture", capture)
    with pytest.raises(InputError, match=r"torch\.float32 on cpu"):
        build_engine(artifact, Wanted(target="inductor", device="cpu"))
