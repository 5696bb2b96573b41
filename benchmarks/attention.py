"""Time and memory of one attention call beside its peers, in one run: medians, and ratios to dense attention.

    python benchmarks/attention.py                     # CPU, or the GPU where there is one
    python benchmarks/attention.py --device cpu --rounds 15 --out attention.json
    python benchmarks/attention.py --grouped           # heads that share keys beside keys repeated for each

Peers: torch's scaled_dot_product_attention, eager and compiled; the papers' formulation with the entmax package
(entmax15 for alpha 1.5, sparsemax for 2, entmax_bisect for any other); on a GPU, where it is installed and takes the
shape, adasplash, which is the sparse part alone. Every round calls each of them once, in turn, so
that a machine that slows down slows all of them. Memory is the peak above what was held before the call, the output
included: on a CPU of a process of its own, by the kernel's high-water mark.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from surgery.artifact.manifest import write_json
from surgery.nn import attention
from surgery.nn.functional import for_all_heads
from surgery.nn.joint import joint_attention

# name: (batch, heads, queries, keys, head_dim)
SHAPES = {
    "SDXL 64x64": (2, 10, 4096, 77, 64),
    "SDXL 32x32": (2, 20, 1024, 77, 64),
    "SD1.5 64x64": (2, 8, 4096, 77, 40),
    "FLUX text block": (1, 24, 4096, 512, 128),
}
CPU_SHAPES = ("SDXL 64x64", "SDXL 32x32")
ALPHAS = (1.5, 2.0, 1.25, 1.75, 1.1)
# name: the same and the heads of keys; joint attention has the queries' tokens as keys besides
GROUPED = {"Krea 2 512x512": (1, 48, 1024, 512, 128, 12)}
SDPA = "scaled_dot_product_attention"
REPEATED = ", keys repeated"


def tensors(shape, dtype, device):
    """query, key, value as a module's projections lie in memory: (batch, length, heads, head_dim), transposed."""
    batch, heads, queries, keys, head_dim, *shared = shape
    generator = torch.Generator().manual_seed(0)
    key_heads = shared[0] if shared else heads
    sizes = ((queries, heads), (keys, key_heads), (keys, key_heads))
    made = [torch.randn(batch, *size, head_dim, generator=generator) for size in sizes]
    return [tensor.to(device, dtype).transpose(1, 2) for tensor in made]


def candidates(query, key, value, entmax):
    """{label: function without arguments}; the first is what the others are compared with."""
    device = query.device
    numbers = {name: torch.tensor(number, device=device) for name, number in (("scale", 2.0), ("temperature", 1.0))}
    alphas = {alpha: torch.tensor(alpha, device=device) for alpha in ALPHAS}
    gag = {
        name: torch.tensor(number, device=device)
        for name, number in (("scale", 10.0), ("temperature", 1.0), ("zeta", 0.0), ("eta", 15.0))
    }
    compiled_dense = torch.compile(lambda q, k, v: F.scaled_dot_product_attention(q, k, v), fullgraph=True)
    compiled = torch.compile(lambda q, k, v, alpha: attention(q, k, v, alpha=alpha, **numbers), fullgraph=True)

    made = {
        SDPA: lambda: F.scaled_dot_product_attention(query, key, value),
        f"{SDPA}, compiled": lambda: compiled_dense(query, key, value),
    }
    for alpha, held in alphas.items():
        made[f"PLADIS alpha {alpha:g}"] = lambda held=held: attention(query, key, value, alpha=held, **numbers)
    made["PLADIS alpha 1.5, compiled"] = lambda: compiled(query, key, value, alphas[1.5])
    made["GAG per head"] = lambda: attention(query, key, value, operator="gag", alpha=alphas[1.5], **gag)
    made["GAG per token"] = lambda: attention(query, key, value, operator="gag", unit="token", alpha=alphas[1.5], **gag)
    made["PLADIS scale 0 (switched off)"] = lambda: attention(query, key, value, scale=0.0)
    if device.type == "cuda":
        made["sparse alone alpha 1.5"] = lambda: attention(query, key, value, operator="sparse", alpha=alphas[1.5])
        made.update(_adasplash(query, key, value))
    for alpha in ALPHAS[:3] if entmax else ():
        made[f"entmax package alpha {alpha:g}"] = lambda alpha=alpha: attention(
            query, key, value, alpha=alpha, implementation="entmax"
        )
    return made


def grouped_candidates(query, key, value):
    """As `candidates`, each with shared heads of keys, and behind it with keys repeated as diffusers' processors do."""
    text = key.shape[2]
    image = torch.randn(*key.shape[:2], query.shape[2], key.shape[3], generator=torch.Generator().manual_seed(1))
    image = image.to(key.device, key.dtype)
    query_of_all = torch.cat([query[:, :, :text], query], dim=2)

    def dense(key, value):
        return F.scaled_dot_product_attention(query, key, value, enable_gqa=key.shape[1] != query.shape[1])

    def jointly(key, value):
        return joint_attention(query_of_all, key, value, text_length=text)

    of_text, of_all = (key, value), [torch.cat([states, image], dim=2) for states in (key, value)]
    made = {
        SDPA: (dense, of_text),
        "PLADIS alpha 1.5": (lambda key, value: attention(query, key, value), of_text),
        "GAG per head": (lambda key, value: attention(query, key, value, operator="gag"), of_text),
        "PLADIS in joint attention": (jointly, of_all),
    }
    functions = {}
    for label, (function, given) in made.items():
        functions[label] = lambda function=function, given=given: function(*given)
        functions[label + REPEATED] = lambda function=function, given=given: function(
            *(for_all_heads(states, query.shape[1]) for states in given)
        )
    return functions


def _adasplash(query, key, value):
    try:
        from adasplash import adasplash_no_block_mask

        adasplash_no_block_mask(query, key, value, alpha=1.5, is_causal=False)
    except Exception as error:  # not installed, or a shape that it does not take
        print(f"adasplash is left out: {type(error).__name__}: {error}".splitlines()[0], file=sys.stderr)
        return {}
    return {"adasplash alpha 1.5": lambda: adasplash_no_block_mask(query, key, value, alpha=1.5, is_causal=False)}


def measure(functions, rounds, device):
    """{label: median seconds}, every function once a round after two calls that are not counted."""
    for function in functions.values():
        function()
        function()
    times = {label: [] for label in functions}
    for done in range(rounds):
        for label, function in functions.items():
            times[label].append(_seconds(function, device))
        print(f"\r  round {done + 1} of {rounds}", end="", file=sys.stderr, flush=True)
    print("\r" + " " * 30 + "\r", end="", file=sys.stderr)
    return {label: statistics.median(values) for label, values in times.items()}


def _seconds(function, device):
    if device == "cpu":
        start = time.perf_counter()
        function()
        return time.perf_counter() - start
    calls = 20  # as a graph of its own, so that launching from Python is not what is timed
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    for _ in range(calls):
        function()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000 / calls


def peak_bytes(label, shape, dtype, device):
    """The peak above what was held before the call, in bytes."""
    if device == "cpu":
        arguments = json.dumps([label, shape, str(dtype).removeprefix("torch.")])
        command = [sys.executable, __file__, "--peak-of", arguments]
        # What is freed goes back at once, or memory freed by the warm-up would hide what the call takes.
        freeing = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=freeing)
        return int(done.stdout.split()[-1])
    function = _candidates(shape, tensors(shape, dtype, device))[label]
    function()
    return peak_of_call(function, device)


def peak_of_call(function, device):
    """The peak above what was held before a call, in bytes; on a CPU of this whole process."""
    if device == "cpu":
        Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark to what is held now
        before = _status_bytes("VmRSS")
        result = function()
        peak = _status_bytes("VmHWM")
        del result
        return peak - before
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _peak_here(label, shape, dtype):
    query, key, value = tensors(shape, getattr(torch, dtype), "cpu")
    # Load everything on a part of the same work, large enough to take the same code.
    few = 8 * key.shape[1] // query.shape[1]
    _candidates(shape, (query[:1, :8], key[:1, :few], value[:1, :few]))[label]()
    function = _candidates(shape, (query, key, value))[label]
    print(peak_of_call(function, "cpu"), end="")


def _candidates(shape, made):
    return grouped_candidates(*made) if len(shape) > 5 else candidates(*made, entmax=True)


def _status_bytes(key):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def machine(device):
    """What the figures were measured on, in words."""
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.machine(),
    )
    return f"{model}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def main():
    """Measure, print a table for each shape and dtype, and write them as JSON if told where."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, help="a JSON file to write")
    parser.add_argument("--grouped", action="store_true", help="heads that share keys beside keys repeated for each")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_grad_enabled(False)
    if arguments.peak_of:
        _peak_here(*json.loads(arguments.peak_of))
        return
    device = arguments.device
    results = {"schema_version": 1, "machine": machine(device), "rounds": arguments.rounds, "tables": []}
    print(f"{results['machine']}; medians of {arguments.rounds} rounds")
    shapes = GROUPED if arguments.grouped else SHAPES
    for name in CPU_SHAPES if device == "cpu" and not arguments.grouped else shapes:
        for dtype in (torch.float32,) if device == "cpu" else (torch.bfloat16, torch.float16):
            shape = shapes[name]
            functions = _candidates(shape, tensors(shape, dtype, device))
            medians = measure(functions, arguments.rounds, device)
            measured = [SDPA, "PLADIS alpha 1.5", "PLADIS alpha 1.75", "GAG per head", "entmax package alpha 1.5"]
            if arguments.grouped:
                measured = [label for label in functions if label.startswith("PLADIS")]
            peaks = {label: peak_bytes(label, shape, dtype, device) for label in measured}
            rows = [
                {
                    "what": label,
                    "milliseconds": round(seconds * 1000, 4),
                    "ratio": round(seconds / medians[label + REPEATED if label + REPEATED in medians else SDPA], 3),
                    "peak_mb": round(peaks[label] / 1e6, 1) if label in peaks else None,
                }
                for label, seconds in medians.items()
            ]
            results["tables"].append({"name": name, "shape": shape, "dtype": str(dtype), "rows": rows})
            print(f"\n{name} {shape}, {str(dtype).removeprefix('torch.')}")
            for row in rows:
                peak = f"{row['peak_mb']:8.1f} MB" if row["peak_mb"] is not None else ""
                print(f"  {row['what']:42s} {row['milliseconds']:10.3f} ms {row['ratio']:7.2f}x {peak}")
    if arguments.out:
        write_json(arguments.out, results)


if __name__ == "__main__":
    main()
