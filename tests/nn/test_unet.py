"""PladisUNet2DConditionModel: saved and loaded as patched, on every path; buffers and config must agree."""

import json
import shutil

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from surgery.nn import PladisUNet2DConditionModel, is_pladis
from surgery.nn.shipped import module_name

MODULE_NAME = module_name("PladisUNet2DConditionModel")

SMALL = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "cross_attention_dim": 8,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
}


def patched_unet(**numbers):
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**SMALL).eval()
    layers = [path for path, module in unet.named_modules() if path.endswith("attn2")]
    operation = {"operator": "pladis", "alpha": 1.33, "scale": 1.7, "temperature": 0.9, **numbers}
    return PladisUNet2DConditionModel.convert(unet, [{**operation, "layers": layers}])


def forward(unet, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    sample, text = (torch.randn(shape, generator=generator).to(dtype) for shape in ((1, 4, 8, 8), (1, 7, 8)))
    with torch.no_grad():
        return unet(sample, 5, text).sample


PATHS = [
    {},
    {"dtype": torch.float16},
    {"dtype": torch.bfloat16},
    {"low_cpu_mem_usage": False},
    {"low_cpu_mem_usage": False, "dtype": torch.float16},
    {"low_cpu_mem_usage": False, "torch_dtype": torch.bfloat16},
    {"device_map": "cpu"},
    {"device_map": "auto", "dtype": torch.bfloat16},
    {"variant": "fp16", "dtype": torch.float16},
]


@pytest.mark.parametrize("arguments", PATHS, ids=str)
def test_every_loading_path_keeps_the_patch_and_the_buffers_in_float32(tmp_path, arguments):
    unet = patched_unet()
    unet.save_pretrained(tmp_path, variant=arguments.get("variant"))
    loaded = PladisUNet2DConditionModel.from_pretrained(tmp_path, **arguments)
    dtype = arguments.get("dtype") or arguments.get("torch_dtype") or torch.float32
    assert type(loaded) is PladisUNet2DConditionModel and loaded.dtype == dtype
    modules = [module for module in loaded.modules() if is_pladis(module)]
    assert len(modules) == 4
    for module in modules:
        assert {buffer.dtype for buffer in (module.pladis_alpha, module.pladis_scale)} == {torch.float32}
        wanted = {"alpha": 1.33, "scale": 1.7, "temperature": 0.9, "sparse_temperature": 1.0}
        assert module.hyperparameters() == wanted
    error = (forward(loaded, dtype).float() - forward(unet)).abs().max()
    assert error < (1e-5 if dtype == torch.float32 else 0.1)


def test_loading_without_accelerate_works(tmp_path, monkeypatch):
    patched_unet().save_pretrained(tmp_path)
    for module in ("diffusers.models.modeling_utils", "surgery.nn.model"):
        monkeypatch.setattr(f"{module}.is_accelerate_available", lambda: False)
    loaded = PladisUNet2DConditionModel.from_pretrained(tmp_path, dtype=torch.float16)
    assert next(m for m in loaded.modules() if is_pladis(m)).pladis_alpha.dtype == torch.float32


def test_shards_and_a_second_save_stay_loadable(tmp_path):
    unet = patched_unet()
    unet.save_pretrained(tmp_path / "one", max_shard_size="50KB")
    assert len(list((tmp_path / "one").glob("*.safetensors"))) > 1
    again = PladisUNet2DConditionModel.from_pretrained(tmp_path / "one")
    again.save_pretrained(tmp_path / "two")
    assert (tmp_path / "two" / f"{MODULE_NAME}.py").is_file()
    assert torch.equal(forward(PladisUNet2DConditionModel.from_pretrained(tmp_path / "two")), forward(unet))


def test_buffers_changed_by_hand_are_saved_as_they_are(tmp_path):
    unet = patched_unet()
    first = next(module for module in unet.modules() if is_pladis(module))
    first.pladis_scale.fill_(0.25)
    unet.save_pretrained(tmp_path)
    loaded = PladisUNet2DConditionModel.from_pretrained(tmp_path)
    assert torch.equal(forward(loaded), forward(unet))
    assert {operation["scale"] for operation in loaded.config.pladis} == {0.25, 1.7}


def test_an_edited_config_is_refused(tmp_path):
    patched_unet().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["pladis"][0]["scale"] = 3.0
    (tmp_path / "config.json").write_text(json.dumps(config))
    for arguments in ({}, {"low_cpu_mem_usage": False}):
        with pytest.raises(ValueError, match=r"the config says scale 3.0 .* holds 1.7"):
            PladisUNet2DConditionModel.from_pretrained(tmp_path, **arguments)


def test_missing_buffers_are_refused(tmp_path):
    patched_unet().save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    save_file({k: v for k, v in load_file(path).items() if "pladis" not in k}, path, metadata={"format": "pt"})
    for arguments in ({}, {"low_cpu_mem_usage": False}):
        with pytest.raises(ValueError, match="16 PLADIS buffers are not in the weights"):
            PladisUNet2DConditionModel.from_pretrained(tmp_path, **arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(pladis=[]), "names no layer"),
        (lambda c: c.pop("pladis"), "names no layer"),
        (lambda c: c["pladis"][0].update(operator="nag"), "lacks phi, tau, blend"),
        (lambda c: c["pladis"][0].update(operator="gag"), "lacks zeta, eta, unit"),
        (lambda c: c["pladis"][0].update(operator="sparse"), "sparse has no scale; it has alpha, temperature"),
        (lambda c: c["pladis"][0].update(schedule={"steps": [3, 1]}), r"schedule\.steps must rise"),
        (lambda c: c["pladis"][0]["layers"].append("mid_block.attn9"), "no module mid_block.attn9"),
        (lambda c: c["pladis"].append(c["pladis"][0]), "a second time"),
        (lambda c: c["pladis"][0].pop("alpha"), "lacks alpha"),
    ],
)
def test_a_config_that_names_no_valid_patch_is_refused(tmp_path, change, message):
    patched_unet().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    change(config)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        PladisUNet2DConditionModel.from_pretrained(tmp_path)


def test_the_joined_file_is_what_an_environment_without_this_package_runs(tmp_path, run):
    unet = patched_unet()
    unet.save_pretrained(tmp_path / "unet")
    # Only the shipped file is importable there, under another folder, as diffusers places it.
    modules = tmp_path / "modules"
    modules.mkdir()
    shutil.copy(tmp_path / "unet" / f"{MODULE_NAME}.py", modules)
    code = (
        "import sys; sys.modules['surgery'] = None\n"
        f"sys.path.insert(0, {str(modules)!r})\n"
        "import torch, importlib\n"
        f"shipped = importlib.import_module({MODULE_NAME!r})\n"
        f"unet = shipped.PladisUNet2DConditionModel.from_pretrained({str(tmp_path / 'unet')!r})\n"
        "g = torch.Generator().manual_seed(0)\n"
        "x, t = torch.randn(1, 4, 8, 8, generator=g), torch.randn(1, 7, 8, generator=g)\n"
        f"torch.save(unet(x, 5, t).sample.detach(), {str(tmp_path / 'out.pt')!r})\n"
        f"unet.save_pretrained({str(tmp_path / 'again')!r})\n"
    )
    run(python=code, check=0)
    assert torch.equal(torch.load(tmp_path / "out.pt", weights_only=True), forward(unet))
    shipped, again = (tmp_path / name / f"{MODULE_NAME}.py" for name in ("unet", "again"))
    assert shipped.read_bytes() == again.read_bytes()


def test_buffers_that_the_config_does_not_name_are_refused(tmp_path):
    patched_unet().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["pladis"][0]["layers"][0]
    (tmp_path / "config.json").write_text(json.dumps(config))
    for arguments in ({}, {"low_cpu_mem_usage": False}):
        with pytest.raises(ValueError, match="but the config names no operation there"):
            PladisUNet2DConditionModel.from_pretrained(tmp_path, **arguments)


def test_saving_into_an_artifact_is_refused(tmp_path):
    (tmp_path / "surgery.json").write_text("{}")
    with pytest.raises(ValueError, match="save elsewhere"):
        patched_unet().save_pretrained(tmp_path / "unet")
