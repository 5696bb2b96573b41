"""benchmarks/gpu.py without a GPU: its sections on tiny inputs, what it keeps when one fails or hangs, its tables."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

FOLDER = Path(__file__).parent.parent / "benchmarks"

STUBS = """
import os, time

def good(report):
    report.row(what="scaled_dot_product_attention", shape="s", dtype="float32", us=10.0)
    report.row(what="PLADIS", shape="s", dtype="float32", us=12.5, error=1e-7)

def bad(report):
    report.row(what="unpatched", how="eager", ms=3.0)
    report.attempt("PLADIS", lambda: 1 / 0, how="eager")
    raise RuntimeError("CUDA error: an illegal | address\\nmore of it")

def hangs(report):
    report.row(what="unpatched", how="eager", ms=4.0)
    time.sleep(600)

def dies(report):
    os.abort()
"""


@pytest.fixture
def gpu(monkeypatch):
    """The module, importable with those beside it."""
    monkeypatch.syspath_prepend(str(FOLDER))
    import gpu

    return gpu


@pytest.fixture
def run_stubs(gpu, monkeypatch, tmp_path):
    """Run gpu.main() over sections that are stubs: {name: (function, cap)}; returns the results."""
    (tmp_path / "stub_sections.py").write_text(STUBS)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{FOLDER.parent}")
    out = tmp_path / "docs" / "gpu.json"

    def run(sections, *options):
        made = {
            name: gpu.Section(f"Title of {name}", f"stub_sections:{function}", cap, 1)
            for name, (function, cap) in sections.items()
        }
        monkeypatch.setattr(gpu, "SECTIONS", made)
        monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "cpu", "--out", str(out), *options])
        assert gpu.main() == 0
        return json.loads(out.read_text())["sections"]

    run.out = out
    return run


def test_a_section_that_fails_dies_or_hangs_ends_alone_and_keeps_its_rows(run_stubs, capfd):
    sections = {"unet": ("bad", 60), "flux": ("hangs", 6), "engine": ("dies", 60), "kernels": ("good", 60)}
    found = run_stubs(sections)
    assert {name: section["status"] for name, section in found.items()} == {
        "unet": "failed",
        "flux": "stopped",
        "engine": "failed",
        "kernels": "done",
    }
    assert found["unet"]["why"] == "RuntimeError: CUDA error: an illegal | address / more of it"
    assert [row["what"] for row in found["unet"]["rows"]] == ["unpatched", "PLADIS"]
    assert "ZeroDivisionError" in found["unet"]["rows"][1]["error_text"]
    assert found["flux"]["rows"] == [{"what": "unpatched", "how": "eager", "ms": 4.0}]
    assert "its 6 s were over" in found["flux"]["why"] and found["flux"]["machine"]["versions"]["torch"]
    table = run_stubs.out.with_suffix(".md").read_text()
    assert "| s | float32 | PLADIS | 12.5 | 1.25 | 1.0e-07 |" in table
    assert "**Failed** after" in table and "**failed**: ZeroDivisionError" in table
    assert table.strip() in capfd.readouterr().out


def test_what_is_not_run_or_not_reached_keeps_its_older_results(run_stubs):
    sections = {"kernels": ("good", 60), "unet": ("good", 60), "flux": ("good", 60)}
    first = run_stubs(sections, "--only", "kernels")
    assert list(first) == ["kernels"]
    late = run_stubs(sections, "--only", "unet,kernels", "flux", "--minutes", "0.001")
    assert late["kernels"]["rows"] == first["kernels"]["rows"] and "not reached again" in late["kernels"]["later"]
    assert late["kernels"]["date"] == first["kernels"]["date"]
    assert late["unet"]["status"] == "not reached" and "were left of 0.001 minutes" in late["unet"]["why"]
    again = run_stubs(sections, "--only", "flux")
    assert again["flux"]["status"] == "done" and again["kernels"] == late["kernels"]


def test_without_a_gpu_it_says_so_and_unknown_sections_are_refused():
    def run(*options):
        command = [sys.executable, FOLDER / "gpu.py", *options]
        return subprocess.run(command, capture_output=True, text=True, env={"CUDA_VISIBLE_DEVICES": ""}, timeout=120)

    done = run()
    assert done.returncode == 2 and "finds no GPU here; --device cpu shows" in done.stderr
    done = run("--only", "kernels,unit")
    assert done.returncode == 2 and "there is no section unit; there are correctness, kernels" in done.stderr


def report_of(tmp_path):
    from gpu_report import Report

    return Report(tmp_path / "section.json", "cpu", time.time() + 600)


def test_the_kernels_section_times_every_operator_and_says_its_error(gpu, tmp_path):
    import gpu_kernels
    import gpu_table

    with torch.no_grad():
        gpu_kernels.kernels(report_of(tmp_path))
    section = json.loads((tmp_path / "section.json").read_text())
    assert len(section["rows"]) == 2 * (2 + len(gpu_kernels.OPERATIONS))
    assert all(row["us"] > 0 and row["error"] < 5e-3 for row in section["rows"])
    assert {row["dtype"] for row in section["rows"]} == {"bfloat16", "float32"}
    lines = gpu_table.table("kernels", section["rows"])
    assert len(lines) == 2 + len(section["rows"]) and "| 1.00 |" in lines[2]


def test_the_first_cases_meet_every_two_values_of_two_axes(gpu):
    import gpu_cases

    cases = gpu_cases.items("cuda")
    assert len(cases) == gpu_cases.MOST and cases == gpu_cases.items("cuda")
    for one, other in ((0, 1), (1, 4), (2, 5), (3, 6)):
        axes = list(gpu_cases.AXES.items())
        (first, values), (second, others) = axes[one], axes[other]
        met = {(case[first], case[second]) for case in cases[:120]}
        assert len(met) == len(values) * len(others)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernel is run by Triton's interpreter")
def test_a_case_is_held_to_float64_and_a_wrong_result_is_told(gpu, monkeypatch):
    pytest.importorskip("triton")
    import gpu_cases

    case = {name: values[0] for name, values in gpu_cases.AXES.items()}
    case |= {"keys": 13, "head_dim": 16, "queries": 5, "dtype": "float32", "mask": "boolean per row"}
    with torch.no_grad():
        found = gpu_cases.work(case, "cpu")
        assert found["off"] == "" and found["error"] < 2e-6 and found["lse_error"] < 1e-6
        refused = gpu_cases.work({**case, "head_dim": 512}, "cpu")
        assert "head_dim 512" in refused["refused"]
        right = gpu_cases.attention

        def wrong(*tensors, implementation, **how):
            made = right(*tensors, implementation="reference", **how)
            return made if implementation == "reference" else (made[0] * 1.01, made[1] + 1)

        monkeypatch.setattr(gpu_cases, "attention", wrong)
        assert gpu_cases.work(case, "cpu")["off"] == "output, log-sum-exp"


@pytest.mark.slow
def test_the_whole_command_on_tiny_inputs(tmp_path):
    out = tmp_path / "gpu.json"
    command = [sys.executable, FOLDER / "gpu.py", "--device", "cpu", "--minutes", "3", "--out", out]
    done = subprocess.run([*command, "--only", "correctness,kernels"], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    sections = json.loads(out.read_text())["sections"]
    assert [section["status"] for section in sections.values()] == ["done", "done"]
    assert sections["correctness"]["facts"]["done"] == 4 and not sections["correctness"]["facts"]["bad"]
    shown = subprocess.run([sys.executable, FOLDER / "gpu.py", "--table", out], capture_output=True, text=True)
    assert shown.stdout == out.with_suffix(".md").read_text()


def test_figures_belong_to_all_the_code_of_the_kernels(gpu, monkeypatch, tmp_path):
    import gpu_report

    folder = tmp_path / "surgery"
    shutil.copytree(FOLDER.parent / "surgery" / "nn", folder / "nn")
    monkeypatch.setattr(gpu_report, "find_spec", lambda name: SimpleNamespace(submodule_search_locations=[folder]))
    before = gpu_report.code_hash()
    for path in ("module.py", "kernels/triton_short.py", "kernels/cpu.cpp", "kernels/cpu_solver.h"):
        with (folder / "nn" / path).open("a") as file:
            file.write("\n")
        assert before != (before := gpu_report.code_hash()), path
