"""Engines whose attention is plain operations, for use without Python: they follow the hyperparameters like any."""

import pytest
import torch

import surgery
from surgery.compat import load_package
from surgery.engines.calls import take_apart, take_result_apart
from surgery.engines.record import parse_profile
from surgery.export.engines import inductor
from surgery.export.engines.build import Wanted, build_engine
from surgery.export.engines.recording import RecordedCall

from .artifact import write_artifact
from .test_engines import assert_same_image, image, load


@pytest.mark.slow
def test_an_engine_of_plain_operations_is_kept_and_follows_tune(tmp_path):
    artifact = tmp_path / "artifact"
    write_artifact(tmp_path, artifact)
    wanted = Wanted(
        target="inductor", operator="decomposed", regional=True, profile=parse_profile("1x64x64"), device="cpu"
    )
    engine, _, is_new = build_engine(artifact, wanted)
    assert is_new and (engine.operator, engine.weights) == ("decomposed", "artifact")
    assert engine.difference.relative < 1e-4 and engine.difference.after_change < 1e-4
    eager, compiled = load(artifact), load(artifact, engine=engine.key)
    for pipeline in (eager, compiled):
        surgery.tune(pipeline, scale=-6.0, alpha=1.2)
    assert_same_image(image(compiled), image(eager))


class Power(torch.nn.Module):
    """What plain operations make of alpha: numbers that derive from one of the model's buffers."""

    def __init__(self):
        super().__init__()
        self.register_buffer("alpha", torch.tensor(1.5))

    def forward(self, x):
        return (x.clamp(min=0) * (self.alpha - 1)).pow(1 / (self.alpha - 1))


@pytest.mark.slow
def test_what_derives_from_a_hyperparameter_is_not_compiled_in(tmp_path):
    module, x = Power().eval(), torch.rand(4, 8)
    tensors, constants, template = take_apart(["x"], (x,), {})
    calls = {"usual": RecordedCall(tensors, constants, template, *take_result_apart(module(x)))}
    path = tmp_path / "power.pt2"
    inductor.build(module, "forward", calls, path, {"weights": "artifact", "operator": "decomposed"})
    package = load_package(path, -1)
    package.load_constants({"module.alpha": module.alpha}, check_full_update=True, user_managed=True)
    for alpha in (1.5, 1.2):
        module.alpha.fill_(alpha)
        torch.testing.assert_close(package(x)[0], module(x))
