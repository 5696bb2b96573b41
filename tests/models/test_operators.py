"""Every operator from a recipe to an artifact, to a loaded pipeline, and saved again: its own settings all the way."""

import hashlib
import json
import shutil

import pytest
import torch
import yaml
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

import surgery
from surgery.artifact.manifest import Operation
from surgery.errors import ArtifactError, InputError
from surgery.nn import PladisUNet2DConditionModel, is_pladis
from surgery.nn.operators import OPERATORS

from ..conftest import SHAPES, draw, load_shapes
from ..quick import quick

# Not the defaults: what is forgotten on the way comes back as one.
SETTINGS = {
    "pladis": {"alpha": 1.3, "scale": 1.7, "temperature": 0.9, "sparse_temperature": 0.8},
    "sparse": {"alpha": 1.3, "temperature": 0.9},
    "gag": {
        "alpha": 1.3,
        "scale": 7.0,
        "temperature": 0.9,
        "zeta": 0.1,
        "eta": 2.5,
        "sparse_temperature": 1.0,
        "parallel": 1.0,
        "unit": "token",
    },
    "anderson": {
        "alpha": 1.6,
        "scale": 0.9,
        "temperature": 0.9,
        "alpha_low": 1.2,
        "scale_low": 0.7,
        "sparse_temperature": 1.1,
    },
    "anderson_least_squares": {
        "alpha": 1.6,
        "temperature": 0.9,
        "alpha_low": 1.2,
        "sparse_temperature": 0.9,
        "unit": "image",
    },
    "anderson_history": {"alpha": 1.4, "scale": 0.8, "temperature": 0.9, "unit": "token"},
}
BUFFERS = "unet/diffusion_pytorch_model-00002-of-00002.safetensors"


def apply(folder, settings, schedule=None):
    """The folder of an artifact of the shapes pipeline with these settings in all layers."""
    operation = {"replace": "cross-attention", "with": settings, **({"schedule": schedule} if schedule else {})}
    recipe = {"schema": 1, "name": "r", "base": {"pipeline": str(SHAPES)}, "operations": [operation]}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "r.yaml").write_text(yaml.safe_dump(recipe))
    return surgery.apply(folder / "r.yaml", folder / "out").folder


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory):
    """{operator: folder}"""
    folder = tmp_path_factory.mktemp("operators")
    return {name: apply(folder / name, {"operator": name, **settings}) for name, settings in SETTINGS.items()}


def settings_of(pipeline):
    """The one setting that all patched modules share."""
    found = [module.setting() for module in pipeline.unet.modules() if is_pladis(module)]
    assert len(found) == 7 and all(setting == found[0] for setting in found)
    return found[0]


@pytest.mark.parametrize("operator", OPERATORS)
def test_config_manifest_and_buffers_hold_the_operators_own_settings_and_nothing_else(artifacts, operator):
    folder = artifacts[operator]
    setting = {"operator": operator, **SETTINGS[operator]}
    manifest = json.loads((folder / "surgery.json").read_text())
    for (operation,) in (json.loads((folder / "unet/config.json").read_text())["pladis"], manifest["operations"]):
        assert len(operation.pop("layers")) == 7
        assert list(operation.items()) == list(setting.items())
    buffers = load_file(folder / BUFFERS)
    names = {f"pladis_{name}" for name in OPERATORS[operator].defaults}
    assert {key.rpartition(".")[2] for key in buffers} == names and len(buffers) == 7 * len(names)
    for key, value in buffers.items():
        expected = torch.tensor(SETTINGS[operator][key.rpartition("pladis_")[2]])
        assert value.dtype == torch.float32 and torch.equal(value, expected)


@pytest.mark.parametrize("operator", quick(list(OPERATORS), "pladis", "gag", "anderson_history"))
def test_what_is_loaded_draws_as_the_patched_base_and_is_saved_and_unpatched_whole(artifacts, operator, tmp_path):
    pipeline = surgery.load(artifacts[operator], verify=True, quiet=True)
    assert settings_of(pipeline) == {"operator": operator, **SETTINGS[operator]}
    images = draw(pipeline)
    live = surgery.patch(load_shapes(), operator=operator, **SETTINGS[operator])
    assert settings_of(live) == settings_of(pipeline)
    assert (draw(live) - images).abs().max() < 1e-4
    pipeline.save_pretrained(tmp_path)
    again = surgery.load(tmp_path, quiet=True)
    assert settings_of(again) == settings_of(pipeline) and torch.equal(draw(again), images)
    surgery.unpatch(pipeline)
    assert type(pipeline.unet) is UNet2DConditionModel
    assert not [name for name, _ in pipeline.unet.named_buffers() if "pladis" in name]
    base = draw(load_shapes())
    assert (draw(pipeline) - base).abs().max() < 1e-4 < 0.02 < (images - base).abs().max()


def test_the_operators_and_the_units_draw_different_images(artifacts):
    images = [draw(surgery.load(folder, quiet=True)) for folder in artifacts.values()]
    images.append(draw(surgery.patch(load_shapes(), operator="gag", **{**SETTINGS["gag"], "unit": "head"})))
    for index, one in enumerate(images):
        assert all((one - other).abs().max() > 1e-3 for other in images[:index])


def test_the_shipped_code_alone_runs_every_operator(artifacts, tmp_path, run):
    code = (
        "import sys; sys.modules['surgery'] = None\n"
        "import torch\n"
        "from diffusers import DiffusionPipeline\n"
        f"torch.set_num_threads({torch.get_num_threads()})\n"
        "for name, folder in zip(sys.argv[1::2], sys.argv[2::2]):\n"
        "    pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)\n"
        "    images = pipe(['a red circle to the left of a blue square', 'two green stars'], num_inference_steps=2,\n"
        "        guidance_scale=4.0, height=64, width=64, output_type='np',\n"
        "        generator=[torch.Generator().manual_seed(s) for s in (0, 1)]).images\n"
        f"    torch.save(torch.from_numpy(images), {str(tmp_path)!r} + f'/{{name}}.pt')\n"
    )
    names = ("gag", "anderson_least_squares", "anderson_history")
    arguments = [part for name in names for part in (name, artifacts[name])]
    run(*arguments, python=code, env={"HF_MODULES_CACHE": str(tmp_path / "modules")}, check=0)
    for name in names:
        expected = draw(surgery.load(artifacts[name], quiet=True))
        assert torch.equal(torch.load(tmp_path / f"{name}.pt", weights_only=True), expected)


def test_gag_without_its_bound_and_damping_is_pladis_with_a_scale_one_larger(tmp_path):
    folder = apply(tmp_path, {"operator": "gag", "scale": 1.0, "zeta": 1.0, "eta": float("inf")})
    assert "eta: .inf" in (folder / "recipe.yaml").read_text()
    pipeline = surgery.load(folder, quiet=True)
    assert settings_of(pipeline)["eta"] == 1e30
    assert "Infinity" not in (folder / "unet/config.json").read_text() + (folder / "surgery.json").read_text()
    assert (draw(pipeline) - draw(surgery.patch(load_shapes(), scale=2.0))).abs().max() < 2e-3


def test_load_says_what_each_operator_is_set_to(artifacts, capsys):
    for operator, words in (
        ("sparse", "7 modules with sparse (alpha 1.3, temperature 0.9); 7 in all"),
        ("gag", "7 modules with gag (alpha 1.3, scale 7, temperature 0.9, zeta 0.1, eta 2.5, unit token); 7 in all"),
        (
            "anderson",
            "7 modules with anderson (alpha 1.6, scale 0.9, temperature 0.9, alpha_low 1.2, scale_low 0.7, "
            "sparse_temperature 1.1);",
        ),
    ):
        surgery.load(artifacts[operator])
        message = capsys.readouterr().err
        assert words in message and "schedule" not in message


def test_the_card_cites_gags_paper_beside_pladis_where_gag_is_used(artifacts):
    cards = {operator: (folder / "README.md").read_text() for operator, folder in artifacts.items()}
    assert "\n- gag\n" in cards["gag"] and "arXiv 2603.02531" in cards["gag"] and "arXiv 2503.07677" in cards["gag"]
    assert (
        "| gag | alpha 1.3, scale 7, temperature 0.9, zeta 0.1, eta 2.5, unit token | every step | 7 |" in cards["gag"]
    )
    assert "\n- gag\n" not in cards["pladis"] and "2603.02531" not in cards["pladis"]
    assert "| sparse | alpha 1.3, temperature 0.9 | every step | 7 |" in cards["sparse"]


def test_tune_changes_what_an_operator_has_and_refuses_what_it_lacks(pipeline, tmp_path):
    surgery.patch(pipeline, operator="gag", layers=["mid", "up"])
    images = draw(pipeline)
    surgery.tune(pipeline, zeta=1.0, eta=float("inf"), scale=2.0)
    assert (draw(pipeline) - images).abs().max() > 1e-3
    settings = {(op["zeta"], op["eta"], op["scale"], op["unit"]) for op in pipeline.unet.config.pladis}
    assert settings == {(1.0, 1e30, 2.0, "head")}
    with pytest.raises(InputError, match=r"runs gag, which has no alpha_low"):
        surgery.tune(pipeline, alpha_low=1.1, alpha=1.2)
    with pytest.raises(InputError, match="there is no hyperparameter lambda; there are alpha, alpha_low, scale"):
        surgery.tune(pipeline, **{"lambda": 2})
    with pytest.raises(InputError, match="eta must be 0 or above"):
        surgery.tune(pipeline, eta=-1)
    assert {op["alpha"] for op in pipeline.unet.config.pladis} == {1.5}  # a refused call changes nothing
    pipeline.save_pretrained(tmp_path)
    assert surgery.load(tmp_path, quiet=True).unet.pladis_operations() == pipeline.unet.pladis_operations()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"operator": "gagg"}, "unknown operator 'gagg'; there are pladis, sparse, gag, anderson,"),
        ({"operator": "sparse", "scale": 2.0}, "sparse has no scale; it has alpha, temperature"),
        ({"operator": "gag", "unit": "heads"}, "unknown unit 'heads'; there are head, token, image"),
        ({"unit": "token"}, "pladis has no unit; it has alpha"),
        ({"operator": "gag", "eta": -0.5}, "eta must be 0 or above"),
        ({"operator": "gag", "zeta": float("inf")}, "zeta must be a finite number"),
        ({"operator": "anderson", "alpha_low": 0.5}, r"alpha_low must lie in \[1, 2\]"),
        ({"schedule": {"steps": [5, 2]}}, "schedule.steps must rise"),
        ({"schedule": {}}, "schedule must name steps"),
        ({"operator": "sparse", "schedule": {"scale": [1.0]}}, "schedule.scale is no window and no hyperparameter of"),
    ],
)
def test_a_wrong_patch_is_an_error_that_says_why_and_changes_nothing(pipeline, arguments, message):
    with pytest.raises(InputError, match=message):
        surgery.patch(pipeline, **arguments)
    assert type(pipeline.unet) is UNet2DConditionModel


def rename_operator(operation, operator):
    """The operation as another operator's, with all that that one has."""
    layers = operation["layers"]
    operation.clear()
    operation |= {"operator": operator, **SETTINGS[operator], "layers": layers}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda o: o.update(operator="gagg"), r"pladis\[0\]: unknown operator 'gagg'; there are pladis,"),
        (lambda o: o.update(operator="sparse"), r"pladis\[0\]: sparse has no unit; it has alpha, temperature"),
        (lambda o: o.update(operator="anderson"), r"pladis\[0\] lacks alpha_low, scale_low"),
        (lambda o: rename_operator(o, "pladis"), "the weights hold .*pladis_eta"),
        (lambda o: rename_operator(o, "anderson"), "pladis_(alpha_low|scale_low|eta|zeta)"),
        (lambda o: o.update(unit="heads"), r"pladis\[0\]: unknown unit 'heads'; there are head, token, image"),
        (lambda o: o.pop("unit"), r"pladis\[0\] lacks unit"),
        (lambda o: o.update(eta=3.0), "the config says eta 3.0 .* holds 15.0"),
        (lambda o: o.update(zeta="0"), r"pladis\[0\]: zeta must be a finite number, not '0'"),
        (lambda o: o.update(schedule={"steps": [5, 2]}), r"pladis\[0\].schedule.steps must rise"),
        (lambda o: o.update(schedule={"alpha_low": [1.0]}), r"pladis\[0\].schedule.alpha_low is no window"),
        (lambda o: o.update(schedule=None), r"pladis\[0\].schedule must name"),
    ],
)
def test_a_config_edited_so_that_operator_unit_or_schedule_is_wrong_is_refused(saved_gag, tmp_path, change, message):
    folder = shutil.copytree(saved_gag, tmp_path / "edited")
    config = json.loads((folder / "unet/config.json").read_text())
    change(config["pladis"][0])
    (folder / "unet/config.json").write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match=message):
        surgery.load(folder, quiet=True)


def test_a_config_and_weights_from_before_a_hyperparameter_mean_its_default_and_are_saved_whole(saved_gag, tmp_path):
    folder = shutil.copytree(saved_gag, tmp_path / "older") / "unet"
    config = json.loads((folder / "config.json").read_text())
    for name in ("sparse_temperature", "parallel"):
        del config["pladis"][0][name]
    (folder / "config.json").write_text(json.dumps(config))
    weights = next(folder.glob("*.safetensors"))
    older = {key: value for key, value in load_file(weights).items() if not key.endswith(("_temperature", "_parallel"))}
    older |= {key: value for key, value in load_file(weights).items() if key.endswith("pladis_temperature")}
    assert len(load_file(weights)) - len(older) == 14
    save_file(older, weights, metadata={"format": "pt"})
    for low_memory in (True, False):
        unet = PladisUNet2DConditionModel.from_pretrained(folder, low_cpu_mem_usage=low_memory)
        setting = {**OPERATORS["gag"].defaults, "operator": "gag", "unit": "head"}
        assert all(module.setting() == setting for module in unet.modules() if is_pladis(module))
        unet.save_pretrained(tmp_path / f"again {low_memory}")
        again = json.loads((tmp_path / f"again {low_memory}" / "config.json").read_text())["pladis"][0]
        assert again["sparse_temperature"] == again["parallel"] == 1.0
    config["pladis"][0]["parallel"] = 0.5  # said, so the weights have to hold it
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="7 PLADIS buffers are not in the weights"):
        PladisUNet2DConditionModel.from_pretrained(folder)


@pytest.fixture(scope="module")
def saved_gag(tmp_path_factory):
    """A patched pipeline as save_pretrained writes it: without a manifest that would notice every edit."""
    folder = tmp_path_factory.mktemp("saved")
    surgery.patch(load_shapes(), operator="gag").save_pretrained(folder)
    return folder


def test_an_edit_of_unit_or_schedule_in_the_manifest_is_noticed(artifacts, tmp_path):
    for number, change in enumerate(({"unit": "head"}, {"schedule": {"steps": [0, 1]}}, {"eta": 3.0})):
        folder = shutil.copytree(artifacts["gag"], tmp_path / str(number))
        manifest = json.loads((folder / "surgery.json").read_text())
        manifest["operations"][0].update(change)
        (folder / "surgery.json").write_text(json.dumps(manifest))
        with pytest.raises(ArtifactError, match="its hash does not fit"):
            surgery.load(folder, quiet=True)


def test_a_manifests_hash_is_over_the_operations_as_they_stand(artifacts):
    manifest = json.loads((artifacts["pladis"] / "surgery.json").read_text())
    assert set(manifest["operations"][0]) == {"operator", *SETTINGS["pladis"], "layers"}
    files = {
        path: file["sha256"] for path, file in manifest["files"].items() if path not in ("README.md", "recipe.yaml")
    }
    use = {key: manifest[key] for key in ("component", "code", "buffers", "operations", "sampling")}
    hashed = {**files, "use": {**use, "variant": None}}
    assert manifest["hash"] == hashlib.sha256(json.dumps(hashed, sort_keys=True).encode()).hexdigest()
    surgery.load(artifacts["pladis"], verify=True, quiet=True)


def test_a_manifest_keeps_a_schedule_as_it_is_and_writes_nothing_that_is_not_there():
    schedule = {"steps": [5, None], "scale": [0, 1.5]}
    data = {"operator": "pladis", "alpha": 1.5, "scale": 0.0, "temperature": 1.0, "schedule": schedule, "layers": ["a"]}
    for mode in ("json", "python"):
        assert Operation.model_validate(data).model_dump(mode=mode) == data
