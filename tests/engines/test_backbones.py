"""Every backbone's blocks, and the whole of it, as exported programs that compute what eager does."""

import pytest
import torch

import surgery
from surgery.engines.calls import put_together, take_result_apart
from surgery.engines.told import TEXT, called
from surgery.errors import InputError
from surgery.export.engines import inductor, onnx
from surgery.export.engines.capture import capture_calls
from surgery.export.engines.program import export_program, groups_of

from ..nn.backbones import FAMILIES
from ..nn.backbones.checks import recorded_call
from ..quick import quick

# One whose blocks are told a number, and one whose are told a length for each entry.
SAMPLE = ("krea2", "lumina2")


@pytest.fixture(scope="module", params=quick(FAMILIES, *(one for one in FAMILIES if one.name in SAMPLE)), ids=str)
def captured(request):
    """(Family, its patched denoiser with a call of it and of its blocks)."""
    family = request.param
    pipeline, arguments = family.build()
    call = recorded_call(pipeline, arguments) if family.draws else arguments
    surgery.patch(pipeline, operator="gag", scale=1.0)
    model = getattr(pipeline, "transformer", None) or pipeline.unet
    return family, capture_calls(model, [call], regional=True)


def gap(found, wanted):
    """The largest difference over the root mean square, of the worst of two lists of tensors."""
    return max(
        ((a - b).abs().max() / b.square().mean().sqrt()).item() for a, b in zip(found, wanted, strict=True) if b.any()
    )


def test_each_kind_of_block_is_exported_once_and_computes_what_eager_does(captured):
    _, captured = captured
    groups = groups_of(captured.module, captured.blocks)
    assert sorted(path for paths in groups for path in paths) == sorted(captured.blocks)
    for paths in groups:
        block, calls = captured.module.get_submodule(paths[0]), captured.blocks[paths[0]]
        program, call = export_program(block, "forward", calls), calls["usual"]
        with torch.no_grad():
            found = program.module()(*call.tensors.values())
            wanted, _ = take_result_apart(called(block, "forward", put_together(call.template, call.tensors)))
        assert gap(found, wanted.values()) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("target", ["inductor", "onnx"])
def test_the_whole_is_compiled_and_computes_what_eager_does_before_and_after_a_change(captured, target, tmp_path):
    """Fixed hyperparameters are those of `benchmarks/exports.py`, which also builds by block."""
