"""The TensorRT target without TensorRT: converters, partitions, profiles, saving and loading are the real ones."""

import importlib.util
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from types import SimpleNamespace

import pytest
import torch

from surgery.engines import fitting as backends
from surgery.errors import InputError
from surgery.export.engines import tensorrt
from surgery.export.engines.build import Wanted, _compile
from surgery.export.engines.recording import RecordedCall

from . import front

COMMAND = "pip install --no-deps torch-tensorrt==2.13.0"
needs_torch_tensorrt = pytest.mark.skipif(
    importlib.util.find_spec("torch_tensorrt") is None or not hasattr(os, "fork") or torch.cuda.is_available(),
    reason=f"for a machine without an NVIDIA GPU, with the 4 MB of {COMMAND}",
)


@pytest.fixture(scope="module")
def process():
    """A process in which torch_tensorrt is imported over a stand-in for tensorrt, which nothing else should see."""
    fork = multiprocessing.get_context("fork")  # torch and diffusers are imported already
    with ProcessPoolExecutor(1, mp_context=fork, initializer=front.prepare) as executor:
        yield executor


@needs_torch_tensorrt
@pytest.mark.parametrize(
    ("kind", "operators", "sizes", "dtype", "steps"),
    [
        ("unet", [("anderson", {})], [(2, 8, 8)], torch.float32, 1),
        pytest.param(
            *("unet", [("gag", {"unit": "token"})], [(4, 16, 16), (1, 8, 8), (8, 32, 24)], torch.float32, 1),
            marks=pytest.mark.slow,
        ),
        ("transformer", [("gag", {})], [(2,)], torch.float16, None),
        pytest.param(*("transformer", [("pladis", {})], [(4,), (1,), (8,)], torch.float32, 1), marks=pytest.mark.slow),
        ("joint", [("pladis", {})], [(2, 4, 4), (1, 2, 4), (4, 6, 4)], torch.float32, 1),
    ],
    ids=["unet-static", "unet-dynamic", "transformer-static", "transformer-dynamic", "joint-dynamic"],
)
def test_a_patched_model_becomes_one_engine_that_is_written_and_read_and_computes_it(
    process, kind, operators, sizes, dtype, steps
):
    found = process.submit(front.report, kind, operators, sizes, dtype, steps).result()
    tolerance = 1e-5 if dtype == torch.float32 else 5e-3
    print({key: value for key, value in found.items() if key not in ("kinds", "wanted", "usual")})
    assert found["operations"] > 100 and found["without_converter"] == 0
    assert found["engines"] == found["engines_by_the_global_partitioner"] == 1
    assert found["left_to_torch_by_the_global_partitioner"] == []
    assert not {kind for kind in found["kinds"] if "log1p" in kind or "expm1" in kind or "pladis" in kind}
    assert found["unknown_arguments"] == set()
    assert max(found["differences"]) < tolerance
    moved, apart = found["difference_after_change"]
    assert moved > 1e-3 and apart < tolerance

    assert list(found["shapes"]) == found["inputs"] and found["outputs"] == ["output0"]
    assert sorted(found["inputs"]) == sorted([*found["wanted"], *found["hyperparameters"]])
    for name, bounds in found["wanted"].items():
        shape, usual = found["shapes"][name], found["usual"][name] or [1]
        low, high = [a for a, _ in bounds] or [1], [b for _, b in bounds] or [1]
        if low == high:
            assert list(shape) == usual
        else:
            assert [list(shape[f"{end}_shape"]) for end in ("min", "opt", "max")] == [low, usual, high]
    assert all(shape != () for shape in found["shapes"].values())  # no input without a dimension


@needs_torch_tensorrt
def test_an_engines_names_are_in_its_own_order_and_what_is_left_around_it_is_refused(process):
    names = {"input_names": ["b", "a"], "output_names": ["output1", "output0"]}
    assert process.submit(front.around_report, does_more=False).result() == (b"ftrt", names)
    assert "call_function <built-in method relu" in process.submit(front.around_report, does_more=True).result()


def test_an_engines_names_outlive_a_build_that_was_cut_short(tmp_path):
    call = RecordedCall({"a.b": torch.ones(1)}, {}, {}, {"0": torch.ones(1)}, "")
    recorded = SimpleNamespace(method="forward", first_calls={"usual": call})
    captured = SimpleNamespace(module=torch.nn.Linear(1, 1), recorded=recorded)
    built, said = [], []

    def write(module, method, calls, path, options):
        built.append(path.name)
        path.write_bytes(b"an engine")
        return {"input_names": ["b"], "output_names": ["output0"]}

    backend = SimpleNamespace(SUFFIX=".engine", build=write)
    given = (backend, captured, Wanted("tensorrt"), {"weights": "engine"}, tmp_path, {}, said.append)
    regions = [_compile(*given) for _ in range(2)]
    assert regions[0] == regions[1] and built == ["whole-0.engine"] and "there from before" in said[-1]
    assert regions[0][0].input_names == ["b"] and regions[0][0].output_names == ["output0"]
    backend.build = lambda *_: None  # one whose names are the program's
    (tmp_path / "whole-0.engine").unlink()
    assert _compile(*given)[0].input_names == ["a_b"]


@needs_torch_tensorrt
def test_an_entmax_that_sorts_is_split_and_refused(process):
    parts, message = process.submit(front.sorted_report).result()
    print(parts, message)
    assert parts["torch"] >= 1 and parts["engines"] + parts["torch"] >= 3
    assert "does not become one TensorRT engine" in message and "no converter" in message


def test_without_torch_tensorrt_or_tensorrt_the_error_names_the_extra_and_the_index(monkeypatch):
    command = "pip install 'pladis-surgery[tensorrt]' --extra-index-url https://download.pytorch.org/whl/cu130"
    installed = {}
    monkeypatch.setattr(backends, "backend_version", installed.get)
    with pytest.raises(InputError) as raised:
        tensorrt.needs()
    assert command in str(raised.value) and "torch-tensorrt is not installed" in str(raised.value)
    installed["torch-tensorrt"] = "2.13.0"
    with pytest.raises(InputError) as raised:
        tensorrt.needs()
    assert command in str(raised.value) and ": TensorRT is not installed" in str(raised.value)
    installed["tensorrt-cu13"] = "11.0.0.114"
    assert tensorrt.needs() == {"torch-tensorrt": "2.13.0", "tensorrt-cu13": "11.0.0.114"}

    monkeypatch.setitem(sys.modules, "torch_tensorrt", None)  # it cannot be imported
    with pytest.raises(InputError, match="cannot be imported") as raised:
        backends.import_torch_tensorrt()
    assert command in str(raised.value)
