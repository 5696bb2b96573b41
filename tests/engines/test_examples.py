"""examples/: engines used without this package give what it gives."""

import ast
import importlib.util
import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

import surgery
from surgery.engines.calls import take_apart, take_result_apart
from surgery.engines.record import parse_profile
from surgery.export.engines import inductor
from surgery.export.engines.build import Wanted, build_engine
from surgery.export.engines.program import region_of
from surgery.export.engines.recording import RecordedCall

from ..frozen.make import tiny_pipeline

EXAMPLES = Path(__file__).parent.parent.parent / "examples"


def example(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("name", "without"),
    [
        ("onnx_runtime", {"surgery"}),
        ("aotinductor", {"surgery", "diffusers"}),
        ("cpp/prepare", {"surgery"}),
        ("hosting/litserve_server", {"surgery"}),
        ("hosting/bentoml_service", {"surgery"}),
        ("hosting/triton/pladis/1/model", {"surgery"}),
        ("hosting/cog/predict", {"surgery"}),
    ],
)
def test_an_example_imports_nothing_of_this_package(name, without):
    tree = ast.parse((EXAMPLES / f"{name}.py").read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not without & {one.split(".")[0] for one in imported}


def test_onnx_runtime_and_diffusers_scheduler_draw_what_this_package_draws(artifact):
    from surgery.runtime.draw import draw

    size = {"height": 64, "width": 64}
    sampling = {"steps": 2, "guidance_scale": 4.0, **size}
    pipeline = surgery.load(artifact, quiet=True)
    for change in ({}, {"scale": -6.0, "alpha": 1.2}):
        surgery.tune(pipeline, **(change or {"scale": 2.0}))
        expected = draw(pipeline, [("a cat", 3)], sampling)[0]
        drawn = example("onnx_runtime").draw(artifact, "a cat", 3, 2, 4.0, **size, **change)
        assert np.abs(np.asarray(drawn, int) - np.asarray(expected, int)).max() <= 2, change


@pytest.mark.slow
def test_torch_alone_runs_a_package_with_weights_of_its_own_and_refuses_other_sizes(tmp_path):
    class Shrunk(torch.nn.Module):
        """Stands for a denoiser."""

        def __init__(self):
            super().__init__()
            self.linear, self.scale = torch.nn.Linear(4, 4), torch.nn.Parameter(torch.ones(4))

        def forward(self, sample, timestep):
            return self.linear(sample) * self.scale + timestep

    torch.manual_seed(0)
    module = Shrunk().eval()
    given = {"sample": torch.rand(2, 4), "timestep": torch.tensor(3.0)}
    calls = {"usual": RecordedCall(*take_apart(list(given), (), given), *take_result_apart(module(**given)))}
    inductor.build(module, "forward", calls, tmp_path / "whole-0.pt2", {"weights": "engine", "operator": "decomposed"})
    region = region_of("whole-0.pt2", [""], "forward", calls)
    (tmp_path / "engine.json").write_text(json.dumps({"regions": [region.model_dump()]}))
    engine = example("aotinductor").Engine(tmp_path)
    (result,) = engine(sample=given["sample"], timestep=torch.tensor(3)).values()  # an integer, as schedulers have it
    torch.testing.assert_close(result, module(**given))
    with pytest.raises(ValueError, match=r"sample is \(3, 4\)"):
        engine(sample=torch.rand(3, 4), timestep=given["timestep"])


def test_trtexec_is_given_the_sizes_of_the_engine(tmp_path):
    given = [("sample", "float32", [[2, 8], [4, 4], [64, 128]]), ("timestep", "float32", [])]
    region = {
        "file": "whole-0.onnx",
        "input_names": ["sample", "timestep", "pladis_scale"],
        "inputs": [{"name": name, "dtype": dtype, "shape": shape} for name, dtype, shape in given],
        "values": {"pladis_scale": [1.0, 1.0, 1.0]},
    }
    (tmp_path / "engine.json").write_text(json.dumps({"regions": [region]}))
    words = example("trtexec").command(tmp_path)
    assert words[:2] == ["trtexec", f"--onnx={tmp_path / 'whole-0.onnx'}"]
    assert "--minShapes=sample:2x4x64,pladis_scale:3" in words and "--maxShapes=sample:8x4x128,pladis_scale:3" in words


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("cmake") and shutil.which("c++")), reason="needs cmake and a C++ compiler")
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_libtorch_denoises_as_the_pipeline_does(tmp_path, tmp_path_factory, prediction_type):
    pipeline = tiny_pipeline()
    pipeline.scheduler.register_to_config(prediction_type=prediction_type)
    pipeline.save_pretrained(tmp_path / "base")
    operations = "operations: [{replace: cross-attention, with: {operator: pladis}}]\n"
    (tmp_path / "recipe.yaml").write_text("schema: 1\nname: cpp\nbase: {pipeline: ./base}\n" + operations)
    artifact = surgery.apply(tmp_path / "recipe.yaml", tmp_path / "artifact").folder
    wanted = Wanted("inductor", profile=parse_profile("1x16x16"), device="cpu", weights="engine", operator="decomposed")
    _, place, _ = build_engine(artifact, wanted)
    prepare = example("cpp/prepare")
    torch.save(prepare.run_of(artifact, "a cat", seed=3, steps=2, guidance_scale=4.0), tmp_path / "run.pt")
    built = tmp_path_factory.getbasetemp() / "denoise"
    here = ["cmake", "-S", EXAMPLES / "cpp", "-B", built, f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"]
    for command in (here, ["cmake", "--build", built]):
        subprocess.run(command, check=True, capture_output=True)
    denoised = [built / "denoise", place / "whole-0.pt2", tmp_path / "run.pt"]
    subprocess.run([*denoised, tmp_path / "latents.pt"], check=True)
    pipeline = surgery.load(artifact, quiet=True, device="cpu")
    given = {"num_inference_steps": 2, "guidance_scale": 4.0, "height": 16, "width": 16, "output_type": "latent"}
    with torch.no_grad():
        expected = pipeline("a cat", generator=torch.Generator().manual_seed(3), **given).images
        surgery.tune(pipeline, scale=8.0)
        other = pipeline("a cat", generator=torch.Generator().manual_seed(3), **given).images
    latents = torch.load(tmp_path / "latents.pt")
    assert (latents - expected).abs().max() < 1e-4 < (other - expected).abs().max()
    assert prepare.image_of(artifact, latents).size == (16, 16)
    failed = subprocess.run([*denoised[:2], tmp_path / "none.pt", tmp_path / "x.pt"], capture_output=True, text=True)
    assert failed.returncode == 1 and "cannot be opened" in failed.stderr
