"""Section `kernels` of benchmarks/gpu.py: a module's attention beside scaled_dot_product_attention, without launching.

Each call is timed in a CUDA graph of 20 calls over six sets of inputs in turn, so that neither Python nor a cache warm
from the call before is measured: the median of 15 replays. The relative error, against the same operator in float64,
and the peak of memory above the output stand in the same row. Everything is compiled before, in as many processes as
there are cores, and timed alone after.
"""

import statistics
import time

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from gpu_workers import spread

from surgery.nn import PladisAttention, attention

SHAPES = {  # (batch, heads, queries, keys, head_dim)
    "SDXL 64x64": (2, 10, 4096, 77, 64),
    "SDXL 32x32": (2, 20, 1024, 77, 64),
    "SD1.5 64x64": (2, 8, 4096, 77, 40),
    "FLUX text block": (1, 24, 4096, 512, 128),
    "PixArt": (2, 16, 4096, 300, 72),
}
TINY_SHAPES = {"tiny": (1, 2, 64, 77, 16)}
DENSE = "scaled_dot_product_attention"
OPERATIONS = {  # what a patched module is given
    "PLADIS alpha 1.5": {"operator": "pladis", "alpha": 1.5},
    "GAG per head": {"operator": "gag", "unit": "head"},
    "PLADIS alpha 2": {"operator": "pladis", "alpha": 2.0},
    "PLADIS alpha 1.25": {"operator": "pladis", "alpha": 1.25},
    "PLADIS alpha 1.75": {"operator": "pladis", "alpha": 1.75},
    "sparse alpha 1.5": {"operator": "sparse"},
    "GAG per token": {"operator": "gag", "unit": "token"},
}
EAGER = ("entmax package alpha 1.5", "adasplash alpha 1.5")  # no graph holds them
SETS, CALLS, REPLAYS = 6, 20, 15


def kernels(report):
    """The section."""
    if not report.is_tiny:
        found, total = spread(report, "gpu_kernels", report.left() * 0.6)
        report.say(f"{len(found)} of {total} calls compiled")
    for name, dtype in _inputs(report.device):
        if report.left() < 3:
            report.fact("left_out", f"from {name} {dtype} on: no time left")
            return
        time_shape(report, name, dtype)


def time_shape(report, name, dtype):
    """A row for each candidate of a shape."""
    shape = _shapes(report.device)[name]
    sets = [tensors(shape, dtype, report.device, seed) for seed in range(2 if report.is_tiny else SETS)]
    labels = {"shape": name, "dtype": dtype}
    dense = F.scaled_dot_product_attention
    wanted = dense(*(tensor.double() for tensor in sets[0]))
    report.row(what=DENSE, **labels, **measured(dense, sets, wanted, graph=not report.is_tiny))
    for what, settings in OPERATIONS.items():
        report.attempt(what, lambda settings=settings, what=what: _row(report, what, labels, settings, sets), **labels)
    for what in EAGER if dtype != "float32" else EAGER[:1]:
        if report.left() > 3:
            report.attempt(what, lambda what=what: _eager_row(report, what, labels, sets), **labels)


def _row(report, what, labels, settings, sets):
    wanted = attention(*(tensor.double() for tensor in sets[0]), **settings, implementation="reference")
    call = module_call(settings, report.device)
    report.row(what=what, **labels, **measured(call, sets, wanted, graph=not report.is_tiny))


def _eager_row(report, what, labels, sets):
    wide = [tensor.double() for tensor in sets[0]]
    if what.startswith("adasplash"):
        try:
            from adasplash import adasplash_no_block_mask
        except ImportError:
            return
        wanted = attention(*wide, operator="sparse", alpha=1.5, implementation="reference")

        def call(*given):
            return adasplash_no_block_mask(*(tensor.contiguous() for tensor in given), alpha=1.5, is_causal=False)
    else:
        wanted = attention(*wide, alpha=1.5, implementation="reference")

        def call(*given):
            return attention(*given, alpha=1.5, implementation="entmax")

    report.row(what=what, **labels, **measured(call, sets, wanted, graph=False))


def measured(call, sets, wanted, graph):
    """{"us", "error", "peak_mb", "how"} of a call."""
    got = call(*sets[0]).double()
    error = ((got - wanted).norm() / wanted.norm()).item()
    peak = peak_above_output(call, sets[0]) if sets[0][0].is_cuda else None
    took = graph_us(call, sets) if graph else eager_us(call, sets)
    return {"us": took, "error": error, "peak_mb": peak, "how": "graph" if graph else "eager"}


def graph_us(call, sets):
    """Microseconds of one call in a CUDA graph of CALLS calls: the median of REPLAYS."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what is compiled or allocated at a first call must not fall into the capture
        for given in sets[:2]:
            call(*given)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for number in range(CALLS):
            call(*sets[number % len(sets)])
    times = []
    for _ in range(REPLAYS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1000 / CALLS)
    return statistics.median(times)


def eager_us(call, sets, rounds=3):
    """Microseconds of one call as Python makes it: the median over rounds, each over all sets."""
    for given in sets[:2]:
        call(*given)
    times = []
    for _ in range(rounds):
        _wait(sets[0][0])
        start = time.perf_counter()
        for given in sets:
            call(*given)
        _wait(sets[0][0])
        times.append((time.perf_counter() - start) * 1e6 / len(sets))
    return statistics.median(times)


def peak_above_output(call, given):
    """Megabytes that a call holds at its peak beyond its inputs and its output."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    output = call(*given)
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before - output.untyped_storage().nbytes()) / 1e6


def module_call(settings, device):
    """A patched module's attention as a function of query, key and value: buffers and all, as a model calls it."""
    stock = Attention(query_dim=8, cross_attention_dim=8, heads=1, dim_head=8)
    return PladisAttention.convert(stock, **settings).to(device).attend


def tensors(shape, dtype, device, seed=0):
    """query, key, value as a module's projections lie in memory: (batch, length, heads, head_dim), transposed."""
    batch, heads, queries, keys, head_dim = shape
    generator = torch.Generator(device).manual_seed(seed)
    made = [
        torch.randn(batch, length, heads, head_dim, generator=generator, device=device)
        for length in (queries, keys, keys)
    ]
    return [tensor.to(getattr(torch, dtype)).transpose(1, 2) for tensor in made]


def items(device):
    """What is compiled before timing: (shape, dtype, operation)."""
    return [(name, dtype, what) for name, dtype in _inputs(device) for what in OPERATIONS]


def work(item, device):
    """Call it once."""
    name, dtype, what = item
    module_call(OPERATIONS[what], device)(*tensors(_shapes(device)[name], dtype, device))
    _wait(torch.empty(0, device=device))
    return {}


def _inputs(device):
    shapes = list(_shapes(device))
    more = ("float32",) if device == "cpu" else ("float16", "float32")
    return [*((name, "bfloat16") for name in shapes), *((shapes[0], dtype) for dtype in more)]


def _shapes(device):
    return TINY_SHAPES if device == "cpu" else SHAPES


def _wait(tensor):
    if tensor.is_cuda:
        torch.cuda.synchronize()
