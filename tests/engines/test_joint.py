"""Joint attention in exported programs: FLUX whole as ONNX, FLUX.2 by block, and the length of the text in both."""

from dataclasses import replace

import pytest
import torch

import surgery
from surgery.engines.calls import put_together, take_result_apart
from surgery.engines.compiling import repeated_blocks
from surgery.engines.running import OnnxRunner
from surgery.errors import InputError
from surgery.export.engines import onnx
from surgery.export.engines.program import (
    export_program,
    groups_of,
    hyperparameter_buffers,
    refuse_changing_constants,
    refuse_changing_tensors,
    region_of,
)
from surgery.export.engines.recording import watched
from surgery.nn.backbones.flux_streams import TEXT_LENGTH

from ..nn.backbones.flux import flux2_klein
from . import front

CONSTANT = f"joint_attention_kwargs.{TEXT_LENGTH}"


def test_flux_as_an_onnx_graph_computes_what_eager_does_and_follows_its_hyperparameters(monkeypatch, tmp_path):
    monkeypatch.setattr(front._ENTMAX, "newton_steps", lambda keys: 1)  # the same kinds of operations, fewer of them
    model = front.joint([("pladis", {})])
    inputs = front.joint_inputs(2, 4, 4)
    calls = {"usual": front.call_of(model, inputs)}
    path = tmp_path / "whole-0.onnx"
    onnx.build(model, "forward", calls, path, {})
    region = region_of(path.name, [""], "forward", calls, hyperparameter_buffers(model))
    runner = OnnxRunner(path, None, region, model, model)
    apart = front.difference(runner, region, calls["usual"])
    moved, after = front.after_change(model, runner, region, inputs)
    print(apart, moved, after)
    assert apart < 1e-5 and after < 1e-5
    assert moved > 1e-3


@pytest.fixture(scope="module")
def klein():
    """(a patched FLUX.2 Klein in miniature, {path: {"usual": Call, "low": Call}} of its blocks), of 16 and 9 texts."""
    model = surgery.patch(flux2_klein()[0].transformer, scale=2.0)
    blocks = {}
    with torch.no_grad():
        for corner, (height, width, text) in {"usual": (4, 6, 16), "low": (4, 4, 16), "shortest": (4, 6, 9)}.items():
            image_ids = torch.cartesian_prod(*(torch.arange(n).float() for n in (1, height, width, 1)))
            text_ids = torch.cartesian_prod(*(torch.arange(n).float() for n in (1, 1, 1, text)))
            with watched(repeated_blocks(model), blocks, corner):
                model(
                    hidden_states=torch.randn(2, height * width, 16),
                    encoder_hidden_states=torch.randn(2, text, 32),
                    timestep=torch.full((2,), 0.5),
                    img_ids=image_ids.expand(2, -1, -1),
                    txt_ids=text_ids.expand(2, -1, -1),
                )
    return model, blocks


def test_a_block_of_flux_2_is_exported_once_for_all_of_its_kind_and_for_a_range_of_image_sizes(klein):
    model, blocks = klein
    blocks = {path: {corner: calls[corner] for corner in ("usual", "low")} for path, calls in blocks.items()}
    groups = groups_of(model, blocks)
    assert groups == [[f"{kind}.{i}" for i in (0, 1)] for kind in ("transformer_blocks", "single_transformer_blocks")]
    for paths in groups:
        block, calls = model.get_submodule(paths[0]), blocks[paths[0]]
        refuse_changing_constants(block, calls)
        region = region_of("block.pt2", paths, "forward", calls)
        assert region.constants[CONSTANT] == 16  # FLUX pads every text to one length
        assert region.inputs[0].name == "hidden_states" and region.inputs[0].shape[1][0] < region.inputs[0].shape[1][1]
        program = export_program(block, "forward", calls)
        kinds = [str(node.target) for node in program.graph.nodes]
        assert kinds.count("pladis.joint_attention_v3.default") == 1
        call = calls["usual"]
        with torch.no_grad():
            given = put_together(call.template, call.tensors)
            wanted = take_result_apart(block(**{"encoder_hidden_states": None, **given}))[0]
            found = program.module()(*call.tensors.values())
        for one, other in zip(found, wanted.values(), strict=True):
            assert (one - other).abs().max() < 1e-5


def test_a_length_of_text_that_changes_is_refused_where_a_block_of_one_stream_is_told_it_as_a_number(klein):
    model, blocks = klein
    path = "single_transformer_blocks.0"
    with pytest.raises(InputError, match=rf"{CONSTANT} \(16 or 9 in this range\)"):
        refuse_changing_constants(model.get_submodule(path), blocks[path])


def test_tensors_that_are_there_for_some_sizes_alone_are_refused(klein):
    model, blocks = klein
    calls = blocks["transformer_blocks.0"]
    refuse_changing_tensors(model, calls)
    more = replace(calls["low"], tensors={**calls["low"].tensors, "x.1": torch.zeros(1)})
    with pytest.raises(InputError, match=r"is given x\.1 for some of this range's sizes alone.*give one size"):
        refuse_changing_tensors(model, {**calls, "low": more})
