"""Every backbone's blocks, and the whole of it, as exported programs that compute what eager does."""

import json

import pytest
import torch

import surgery
from surgery.engines.calls import put_together, take_result_apart
from surgery.engines.running import OnnxRunner
from surgery.engines.told import called
from surgery.errors import InputError
from surgery.export.engines import onnx
from surgery.export.engines.build import check_class
from surgery.export.engines.program import export_program, groups_of, hyperparameter_buffers, region_of
from surgery.export.engines.recording import capture_calls
from surgery.nn import backbone_of, is_pladis

from ..nn.backbones import FAMILIES
from ..nn.backbones.checks import recorded_call
from ..quick import quick
from . import front

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
def test_the_whole_is_one_program_or_refused_by_name(captured, tmp_path):
    family, captured = captured
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": family.model_class}))
    if backbone_of(family.model_class).reads_lengths:
        check_class(tmp_path, "inductor", regional=True)
        with pytest.raises(InputError, match=f"{family.model_class} reads the lengths.* --regional builds its blocks"):
            check_class(tmp_path, "inductor")
        return
    call = captured.recorded.first
    program = export_program(captured.module, "forward", {"usual": call})
    with torch.no_grad():
        assert gap(program.module()(*call.tensors.values()), call.results.values()) < 1e-5


@pytest.mark.slow
def test_the_whole_of_it_as_an_onnx_graph_computes_what_eager_does_and_follows_its_hyperparameters(
    captured, monkeypatch, tmp_path
):
    family, captured = captured
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": family.model_class}))
    backbone = backbone_of(family.model_class)
    if backbone.turns_complex or backbone.reads_lengths:
        with pytest.raises(InputError, match=f"{family.model_class} (turns .* complex|reads the lengths)"):
            check_class(tmp_path, "onnx")
        return
    monkeypatch.setattr(front._ENTMAX, "newton_steps", lambda keys: 1)  # the same kinds of operations, fewer of them
    model, call = captured.module, captured.recorded.first
    path = tmp_path / "whole-0.onnx"
    onnx.build(model, "forward", {"usual": call}, path, {})
    region = region_of(path.name, [""], "forward", {"usual": call}, hyperparameter_buffers(model))
    runner = OnnxRunner(path, None, region, model, model)
    given = put_together(call.template, call.tensors)
    for alpha in (1.5, 1.0):
        surgery.tune(model, alpha=alpha)
        wanted = by_plain_operations(model, given)
        assert gap(runner.run(list(call.tensors.values())), wanted) < 1e-4


def by_plain_operations(model, given):
    """What a model gives for a call by the operations that a graph has."""
    patched = [module for module in model.modules() if is_pladis(module)]
    for module in patched:
        module.pladis_implementation = "reference"
    with torch.no_grad():
        found, _ = take_result_apart(called(model, "forward", given))
    for module in patched:
        module.pladis_implementation = "auto"
    return list(found.values())
