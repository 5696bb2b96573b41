"""Sections `unet` and `flux` of benchmarks/gpu.py: a step of a whole model, unpatched beside patched, random weights.

Eager, as a CUDA graph (what the GPU does, without Python and launches), compiled, and compiled with CUDA graphs. The
model is one object, patched and unpatched between, so weights and memory are the same. Compiling is timed apart.
"""

import statistics
import time

import joint
import torch
import torch._dynamo
from diffusers import UNet2DConditionModel
from sdxl_folder import UNET as SDXL
from unet import inputs as unet_inputs

import surgery

UNPATCHED = "unpatched"
PLADIS, GAG = {"operator": "pladis"}, {"operator": "gag"}
GRAPHS = "reduce-overhead"
TINY_UNET = {
    "sample_size": 8,
    "cross_attention_dim": 16,
    "attention_head_dim": 2,
    "block_out_channels": [16, 16],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
}


def unet(report):
    """The full SDXL UNet."""
    dtype = torch.float32 if report.is_tiny else torch.bfloat16
    torch.manual_seed(0)
    with torch.device(report.device):
        model = UNet2DConditionModel(**(TINY_UNET if report.is_tiny else SDXL)).to(dtype).eval()
    given = unet_inputs(model, dtype, report.device)
    settings = {UNPATCHED: None, "PLADIS alpha 1.5": PLADIS}
    steps(report, model, given, {**settings, "GAG": GAG})
    compiled_steps(report, model, given, settings, "default")
    if not report.is_tiny:  # the patched one first: that a change reaches a replay matters more than the figure
        compiled_steps(report, model, given, dict(reversed(settings.items())), GRAPHS)


def flux(report):
    """FLUX.1's two kinds of block at full width, 4,096 image and 512 text tokens."""
    dtype = torch.float32 if report.is_tiny else torch.bfloat16
    model = joint.transformer(dtype, report.device, heads=2 if report.is_tiny else 24)
    given = {**joint.inputs(model, dtype, report.device, 64 if report.is_tiny else 4096), "return_dict": False}
    settings = {UNPATCHED: None, "PLADIS alpha 1.5": PLADIS, "GAG": GAG}
    steps(report, model, given, settings)
    compiled_steps(report, model, given, settings, "default")


def steps(report, model, given, settings):
    """Rows of eager calls and of CUDA graphs."""
    for what, patch in settings.items():
        if patch:
            surgery.patch(model, **patch)
        call = call_of(model, given)
        report.attempt(what, lambda what=what, call=call: _eager_row(report, what, call), how="eager")
        if not report.is_tiny:
            report.attempt(
                what, lambda what=what, call=call: report.row(what=what, how="graph", ms=graph_ms(call)), how="graph"
            )
        if patch:
            surgery.unpatch(model)


def _eager_row(report, what, call):
    report.row(what=what, how="eager", ms=median_ms(call, report), peak_mb=peak_mb(call))


def compiled_steps(report, model, given, settings, mode):
    """Rows of compiled calls; with CUDA graphs, whether a change of scale reaches the next replay."""
    how = "compiled" if mode == "default" else f"compiled, {mode}"
    for what, patch in settings.items():
        if report.left() < 20:
            report.fact("left_out", f"from {what}, {how} on: no time left")
            return
        torch._dynamo.reset()
        if patch:
            surgery.patch(model, **patch)
        report.attempt(
            what, lambda what=what, p=patch: _compiled_row(report, model, given, what, how, mode, p), how=how
        )
        if patch:
            surgery.unpatch(model)


def _compiled_row(report, model, given, what, how, mode, patch):
    wanted = call_of(model, given)()
    compiled = torch.compile(model, mode=mode, fullgraph=True)
    call = call_of(compiled, given)
    start = time.perf_counter()
    call()
    _wait()
    compile_seconds = time.perf_counter() - start
    for _ in range(3):  # CUDA graphs are recorded at the second call
        got = call()
    skipped = torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]
    report.row(
        what=what,
        how=how,
        ms=median_ms(call, report),
        compile_s=compile_seconds,
        error=relative(got, wanted),
        graphs_skipped=skipped or None,
    )
    if mode == "default" and not report.is_tiny:
        # Without Python: two blocks are launched in the time that they take, where a whole model's lie far ahead.
        in_graph = f"{how}, as a graph"
        report.attempt(what, lambda: report.row(what=what, how=in_graph, ms=graph_ms(call)), how=in_graph)
    if patch:
        _tune_row(report, model, what, how, call, got, lambda: call_of(model, given)())


def _tune_row(report, model, what, how, compiled, before, eager):
    """Whether a change of scale changes what the compiled graph draws, into what eager draws, with no new graph."""
    graphs = _graphs()
    scale = model.pladis_operations()[0]["scale"]
    surgery.tune(model, scale=scale + 3.0)
    after, wanted = compiled(), eager()
    report.row(
        what=f"{what}, tuned",
        how=how,
        changed=relative(after, before),
        error=relative(after, wanted),
        new_graphs=_graphs() - graphs,
    )
    surgery.tune(model, scale=scale)


def _graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def call_of(model, given):
    """A function of no arguments: one call, its first output as a tensor of its own."""
    given = {"return_dict": False, **given}

    def call():
        if torch.cuda.is_available():
            torch.compiler.cudagraph_mark_step_begin()  # the output of the last replay may be overwritten
        return model(**given)[0].clone()

    return call


def median_ms(call, report, rounds=10):
    """Milliseconds of a call, Python included."""
    times = []
    for number in range(-2, 1 if report.is_tiny else rounds):
        _wait()
        start = time.perf_counter()
        call()
        _wait()
        if number >= 0:
            times.append((time.perf_counter() - start) * 1000)
    return statistics.median(times)


def graph_ms(call, replays=10):
    """Milliseconds of a call as a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    times = []
    for _ in range(replays + 1):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[1:])


def peak_mb(call):
    """Megabytes at a call's peak above what was held before it; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def relative(found, wanted):
    """The root mean square of a difference over that of what was wanted."""
    return ((found.double() - wanted.double()).norm() / wanted.double().norm()).item()


def _wait():
    if torch.cuda.is_available():
        torch.cuda.synchronize()
