"""The Triton kernels compile for GPUs, without one, and in half precision no tile spills registers.

Compiled in a process of its own, as Triton interprets everything in this one. `make test` takes a tenth of
a sample that has every size of keys and of channels, `make test-all` every tile; benchmarks/triton_registers.py shows
what they compile to.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ..quick import one_in

triton = pytest.importorskip("triton")

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "triton_registers.py"
SPECIFICATION = importlib.util.spec_from_file_location("triton_registers", BENCHMARK)
registers = importlib.util.module_from_spec(SPECIFICATION)
sys.modules["triton_registers"] = registers  # where dataclasses look for their module
SPECIFICATION.loader.exec_module(registers)
pytestmark = pytest.mark.skipif(not registers.assembler_is_available(), reason="Triton's assembler is not here")

CAPABILITIES = (80, 90)
FIELDS = ("keys", "head_dim", "dtype", "kernel", "mask", "extra", "group")
EVERY = 149  # a prime: one after the other differ in everything


def all_jobs():
    """[case, capability, launcher] of every tile, the launchers taking turns."""
    cases = registers.quick_cases()
    return [
        (case, capability, registers.LAUNCHERS[(index + turn) % 2])
        for index, case in enumerate(cases)
        for turn, capability in enumerate(CAPABILITIES)
    ]


def sampled_jobs():
    """As many of them as it takes to have seen everything: keys, channels, operators, and every way on every GPU."""
    jobs, seen, sampled = all_jobs(), set(), []
    for index in range(len(jobs)):
        case, capability, launcher = job = jobs[index * EVERY % len(jobs)]
        short = case.keys <= registers.MOST_SHORT_KEYS and case.extra != "joined"
        kept = short or case.keys > registers.MOST_HELD_KEYS
        new = {(name, getattr(case, name)) for name in FIELDS}
        new |= {launcher, (capability, case.dtype == "float32", short, kept)}
        if not new <= seen:
            seen |= new
            sampled.append(job)
    return sampled


def compile_in_a_process(jobs):
    """What `Compiled` holds of each job, as dictionaries."""
    environment = {**os.environ, "PYTHONPATH": str(BENCHMARK.parents[1])}
    environment.pop("TRITON_INTERPRET", None)
    fields = [({name: getattr(case, name) for name in case.__dataclass_fields__}, *how) for case, *how in jobs]
    done = subprocess.run(
        [sys.executable, BENCHMARK, "--cases"],
        input=json.dumps(fields),
        capture_output=True,
        text=True,
        env=environment,
        timeout=3000,
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == len(jobs)
    return rows


def check(rows):
    """Fail with every tile that did not compile, or spilled in half precision."""
    bad = []
    for row in rows:
        if row["error"]:
            bad.append(f"{row['case']}: {row['error']}")
        elif row["bad"]:
            bad.append(f"{row['case']} ({row['tile']}): {row['spilled']} spills, {row['stack']} bytes on the stack")
        else:
            assert 0 < row["registers"] <= 255 and row["shared"] > 0 and row["in_all"] > 0
    assert not bad, "\n".join(bad)


@pytest.mark.parametrize("part", one_in(10, range(10)))
def test_a_sample_of_tiles_compiles_without_spills(part):
    check(compile_in_a_process(sampled_jobs()[part::10]))


@pytest.mark.slow
@pytest.mark.parametrize("part", range(16))
def test_every_tile_compiles_without_spills(part):
    check(compile_in_a_process(all_jobs()[part::16]))
