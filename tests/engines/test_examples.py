"""examples/: engines used without this package give what it gives."""

import ast
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import surgery
from surgery.engines.calls import take_apart, take_result_apart
from surgery.export.engines import inductor
from surgery.export.engines.program import region_of
from surgery.export.engines.recording import RecordedCall

EXAMPLES = Path(__file__).parent.parent.parent / "examples"


def example(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("name", "without"), [("onnx_runtime", {"surgery"}), ("aotinductor", {"surgery", "diffusers"})]
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
