"""What a compiler makes of the Triton kernels in a graph: which tensors they write, and how those lie in memory.

inductor reads that off a kernel's code. Where it cannot, it takes every input to be written and copies it before, and
masks that are views then come out wrong. Looked at in a process of its own, as Triton interprets everything in this.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SHAPES = [(77, 64), (16, 8), (1, 40), (128, 160), (300, 72), (512, 128), (1000, 48)]  # keys, head_dim
MASKS = ["", "keys", "rows", "bytes"]
KINDS = [("pladis", "head"), ("sparse", "head"), ("anderson", "head"), ("gag", "head"), ("gag", "token")]


def test_a_kernel_writes_its_results_and_nothing_else():
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(rows) == len(SHAPES)
    for row in rows:
        written = {name for launch in row["launches"] for name in launch["written"]}
        sums = {"sums"} if len(row["launches"]) == 2 else set()  # of each head first, then the output
        assert written == {"output", *sums, *(["lse"] if row["lse"] else [])}, row
        assert all(launch["mask is dense"] for launch in row["launches"]), row


def cases():
    """(keys, head_dim, mask, operator, unit, with_lse, dtype): every shape with one, the rest taking turns."""
    for number, (keys, head_dim) in enumerate(SHAPES):
        dtype = ("bfloat16", "float16", "float32")[number % 3]
        yield keys, head_dim, MASKS[number % 4], *KINDS[-number % 5], number % 2 == 0, dtype


def main():
    """Print what inductor's analysis finds of every launch, as JSON lines."""
    import torch
    import triton
    from triton.backends.compiler import GPUTarget

    class Driver:
        def get_current_target(self):
            return GPUTarget("cuda", 90, 32)

    triton.runtime.driver.set_active(Driver())
    from torch._subclasses.fake_tensor import FakeTensorMode

    from surgery.nn.kernels import triton_kernel
    from surgery.nn.operators import OPERATORS

    recorded = []
    torch.library.wrap_triton = lambda kernel: Recorder(kernel, recorded)
    for keys, head_dim, mask, operator, unit, with_lse, dtype in cases():
        recorded.clear()
        with FakeTensorMode():
            query, key, value = (
                torch.empty(2, n, 3, head_dim, dtype=getattr(torch, dtype)).transpose(1, 2) for n in (70, keys, keys)
            )
            given = {
                "": None,
                "keys": torch.empty(2, 1, 1, keys, dtype=torch.bool),
                "rows": torch.empty(2, 3, 70, keys, dtype=getattr(torch, dtype)),
                "bytes": torch.empty(2, 1, 1, keys, dtype=getattr(torch, dtype)),
            }[mask]
            settings = [torch.empty(()) for _ in OPERATORS[operator].defaults]
            triton_kernel._traced(query, key, value, given, settings, operator, unit, 0.125, with_lse)
        row = {"case": [keys, head_dim, mask, operator, unit, dtype], "lse": with_lse}
        print(json.dumps({**row, "launches": [seen_by_inductor(*launch) for launch in recorded]}), flush=True)


class Recorder:
    """Stands for a wrapped kernel, and keeps what it is launched with."""

    def __init__(self, kernel, recorded):
        self.kernel, self.recorded = kernel, recorded

    def __getitem__(self, grid):
        def launch(*positional, **fixed):
            names = [name for name in self.kernel.arg_names if name not in fixed]
            fixed = {name: value for name, value in fixed.items() if name in self.kernel.arg_names}
            self.recorded.append((self.kernel, {**dict(zip(names, positional, strict=True)), **fixed}))

        return launch


def seen_by_inductor(kernel, arguments):
    """What it takes a launch to write; that it parses as torch 2.11 does, for which every number is a constant."""
    from torch._higher_order_ops import triton_kernel_wrap

    if hasattr(triton_kernel_wrap, "identify_accessed_tensors"):
        accesses = triton_kernel_wrap.identify_accessed_tensors(kernel, dict(arguments), {})
        written = [access.name for access in accesses.read_writes.writes]
    else:
        written = triton_kernel_wrap.identify_mutated_tensors(kernel, dict(arguments), {})
    parse_with_constants(kernel, arguments)
    mask = arguments["mask"]
    dense = mask.is_contiguous() if arguments["MASKED"] else mask is arguments["query"]
    return {"written": written, "mask is dense": dense}


def parse_with_constants(kernel, arguments):
    """Raises where the kernel is no Triton code once its numbers are constants."""
    import torch
    import triton
    from triton.compiler.compiler import ASTSource, make_backend

    types = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.uint8: "u8"}
    signature, constants = {}, {}
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor):
            signature[name] = f"*{types[value.dtype]}"
        else:
            signature[name], constants[name] = "constexpr", value
    signature = {name: signature[name] for name in kernel.arg_names}
    target = triton.runtime.driver.active.get_current_target()
    backend = make_backend(target)
    options = backend.parse_options({})
    context = triton._C.libtriton.ir.context()
    triton._C.libtriton.ir.load_dialects(context)
    backend.load_dialects(context)
    source = ASTSource(kernel, signature, constants, {})
    source.make_ir(target, options, backend.get_codegen_implementation(options), backend.get_module_map(), context)


if __name__ == "__main__":
    main()
