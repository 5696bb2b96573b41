"""Calls taken apart and put together, and what no engine can be built of."""

import json

import pytest
import torch

from surgery.engines.calls import Slot, put_result_together, take_result_apart
from surgery.engines.running import Hyperparameters, InductorRunner
from surgery.errors import InputError
from surgery.export.engines.build import check_class, check_pipeline
from surgery.export.engines.program import export_program, refuse_changing_constants, region_of
from surgery.export.engines.recording import RecordedCall


@pytest.mark.parametrize(
    "result",
    [
        torch.ones(1),
        (torch.ones(1),),
        (None, torch.ones(2)),  # the last block of SD3 gives no text
        (torch.ones(1), None),
        (torch.ones(1), (torch.ones(2), torch.ones(3))),
    ],
)
def test_what_a_block_returns_is_put_together_as_it_was(result):
    tensors, output = take_result_apart(result)
    found = put_result_together(list(tensors), output, tensors.values(), True)
    assert type(found) is type(result) and repr(found) == repr(result)


def test_a_tuple_of_an_engine_that_an_older_version_built_is_read_as_it_was():
    one, two = torch.ones(1), torch.ones(2)
    assert put_result_together(["0", "1"], "", [one, two], True) == (one, two)


def test_a_pipeline_that_needs_an_image_is_refused_by_name(tmp_path):
    path = tmp_path / "model_index.json"
    path.write_text(json.dumps({"_class_name": "WanPipeline"}))
    check_pipeline(tmp_path)
    path.write_text(json.dumps({"_class_name": "WanImageToVideoPipeline"}))
    with pytest.raises(InputError, match="WanImageToVideoPipeline draws from image beside the prompt"):
        check_pipeline(tmp_path)


def test_complex_numbers_are_refused_where_a_target_has_none(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "PladisQwenImageTransformer2DModel"}))
    check_class(tmp_path, "inductor")
    with pytest.raises(InputError, match="PladisQwenImageTransformer2DModel turns .* --target onnx has no operations"):
        check_class(tmp_path, "onnx")


def test_a_size_told_by_a_number_is_refused_in_a_range(tmp_path):
    calls = {
        corner: RecordedCall({}, {"height": size, "guided": True}, {}, {}, "")
        for corner, size in (("usual", 4), ("low", 2))
    }
    with pytest.raises(InputError, match=r"Linear is told its size by a number, height \(4 or 2 in this range\)"):
        refuse_changing_constants(torch.nn.Linear(1, 1), calls)
    refuse_changing_constants(torch.nn.Linear(1, 1), {"usual": calls["usual"]})


def test_a_package_is_exported_for_contiguous_inputs_and_is_given_such():
    class Twice(torch.nn.Module):
        def forward(self, x):
            return x * 2

    transposed = torch.randn(3, 2).T
    call = RecordedCall({"x": transposed}, {}, {"x": Slot("x")}, {"0": transposed * 2}, "")
    ((example,), _) = export_program(Twice(), "forward", {"usual": call}).example_inputs
    assert not transposed.is_contiguous() and example.is_contiguous()
    runner = InductorRunner.__new__(InductorRunner)
    runner._owners, runner._shown, given = {}, [], []
    runner._hyperparameters = Hyperparameters(None, region_of("x.pt2", [""], "forward", {"usual": call}))
    runner._package = lambda *tensors: given.extend(tensors) or given[0]
    assert torch.equal(runner.run([transposed])[0], transposed) and given[0].is_contiguous()
