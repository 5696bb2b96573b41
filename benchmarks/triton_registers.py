"""What the Triton kernel compiles to for a GPU, without one: registers, spills and shared memory per configuration.

    python benchmarks/triton_registers.py [--capability 90]

Compiles every tile that the kernel can choose, for bfloat16 and float32 and for PLADIS and GAG, with the assembler that
comes with Triton. Bytes on the stack are registers that spilled. Minutes; prints a line each.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from surgery.nn import triton_kernel
from surgery.nn.entmax import newton_steps

POINTERS_OF_FLOATS = ("lse", "row_sums", "row_sparse", "row_residual")
CASES = [(20, 64), (50, 64), (77, 64), (77, 160), (256, 128), (512, 128)]  # (keys, head_dim)
TYPES = {torch.bfloat16: "bf16", torch.float32: "fp32"}


def compiled(keys, head_dim, dtype, kind, capability):
    """(tile sizes, bytes of machine code's resource usage as cuobjdump prints it, shared memory in bytes)."""
    rows, columns, channels, warps = triton_kernel.tile_sizes(keys, head_dim, dtype)
    fixed = {
        "KIND": kind,
        "HAS_MASK": False,
        "BOOLEAN_MASK": False,
        "HAS_LSE": False,
        "STEPS": newton_steps(keys),
        "ROWS": rows,
        "COLUMNS": columns,
        "CHANNELS": channels,
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
        "WIDEN": False,
    }
    kernel = triton_kernel._jitted()
    signature, constants, attributes = {}, {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in fixed:
            signature[name], constants[(index,)] = "constexpr", fixed[name]
        elif name.endswith("_d") or name == "mask_k":  # the stride of a channel, which launching finds to be one
            signature[name], constants[(index,)] = "constexpr", 1
        elif name == "qk_scale":
            signature[name] = "fp32"
        elif name in ("heads", "queries", "keys", "head_dim"):
            signature[name] = "i32"
        else:
            attributes[(index,)] = [["tt.divisibility", 16]]
            if name in POINTERS_OF_FLOATS or name.endswith("_pointer"):
                signature[name] = "*fp32"
            else:
                signature[name] = f"*{TYPES[dtype]}" if name in ("query", "key", "value", "mask", "output") else "i32"
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    target = GPUTarget("cuda", capability, 32)
    made = triton.compile(source, target=target, options={"num_warps": warps, "num_stages": 1})
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(made.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        usage = subprocess.run([tool, "-res-usage", binary], capture_output=True, text=True, check=True).stdout
    return (rows, columns, channels, warps), usage, made.metadata.shared


def main():
    """Compile every case and print what it takes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--capability", type=int, default=90, help="90 is H100 and H200, 80 is A100")
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("unset TRITON_INTERPRET: interpreted, nothing is compiled")
    print(f"Triton {triton.__version__}, compute capability {arguments.capability / 10}")
    print("dtype  keys  dim operator  rows x keys x channels, warps: registers, bytes spilled, shared memory")
    for dtype, name in TYPES.items():
        for keys, head_dim in CASES:
            for operator in ("pladis", "gag"):
                kind = triton_kernel._KINDS[operator]
                tile, usage, shared = compiled(keys, head_dim, dtype, kind, arguments.capability)
                registers, stack = (int(re.search(rf"{what}:(\d+)", usage)[1]) for what in ("REG", "STACK"))
                sizes = " x ".join(map(str, tile[:3]))
                print(
                    f"{name:6s} {keys:4d} {head_dim:4d} {operator:9s} {sizes}, {tile[3]}: {registers}, {stack} B, "
                    f"{shared // 1024} KiB",
                    flush=True,
                )


if __name__ == "__main__":
    main()
