"""Patched models through the TensorRT target, up to the engine: run in a process that `tensorrt_stub` has prepared."""

import copy
import inspect
import logging
import operator
import sys
import tempfile
from pathlib import Path
from unittest import mock

import torch

import surgery
from surgery.engines.calls import take_apart, take_result_apart
from surgery.engines.running import TensorRTRunner
from surgery.errors import InputError, SurgeryError
from surgery.export.engines import tensorrt
from surgery.export.engines.program import hyperparameter_buffers, region_of
from surgery.export.engines.recording import RecordedCall
from surgery.nn import PladisAttention, is_pladis

from . import tensorrt_stub

TOKENS, CHANNELS = 20, 16
_ENTMAX = sys.modules["surgery.nn.kernels.entmax"]
_STEPS = _ENTMAX.newton_steps


def prepare():
    """Make torch_tensorrt importable in this process, and have it say less."""
    tensorrt_stub.install()
    torch.set_num_threads(1)
    logging.disable(logging.ERROR)


def unet(operators):
    """A UNet of two levels with one patched module, in the middle: [(operator, {...})]."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    model = UNet2DConditionModel(
        block_out_channels=(16, 16),
        layers_per_block=1,
        sample_size=8,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        cross_attention_dim=CHANNELS,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    return _patched(model, operators)


def unet_inputs(images, height, width):
    """A call of it: latents, the time as a scalar, the text."""
    return {
        "sample": torch.randn(images, 4, height, width),
        "timestep": torch.tensor(5.0),
        "encoder_hidden_states": torch.randn(images, TOKENS, CHANNELS),
    }


def transformer(operators):
    """A PixArt of one block, its cross-attention patched."""
    from diffusers import PixArtTransformer2DModel

    torch.manual_seed(0)
    model = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        out_channels=8,
        num_layers=1,
        sample_size=8,
        cross_attention_dim=CHANNELS,
        caption_channels=CHANNELS,
        num_embeds_ada_norm=10,
    )
    return _patched(model, operators)


def transformer_inputs(images):
    """A call of it: latents, text half of which is padding, and the mask that says so."""
    mask = torch.ones(images, TOKENS)
    mask[:, TOKENS // 2 :] = 0
    return {
        "hidden_states": torch.randn(images, 4, 16, 16),
        "encoder_hidden_states": torch.randn(images, TOKENS, CHANNELS),
        "timestep": torch.full((images,), 5.0),
        "encoder_attention_mask": mask,
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


def joint(operators):
    """A FLUX of one block, of one stream, its joint attention patched."""
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        in_channels=8,
        num_layers=0,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=CHANNELS,
        pooled_projection_dim=CHANNELS,
        axes_dims_rope=(2, 2, 4),
    )
    ((operator, options),) = operators
    return surgery.patch(model.eval(), operator=operator, **options)


def joint_inputs(images, height, width):
    """A call of it: packed latents and the text, where each token of either is, the time, a pooled text."""
    image_ids = torch.cartesian_prod(torch.zeros(1), torch.arange(height).float(), torch.arange(width).float())
    return {
        "hidden_states": torch.randn(images, height * width, 8),
        "encoder_hidden_states": torch.randn(images, TOKENS, CHANNELS),
        "pooled_projections": torch.randn(images, CHANNELS),
        "timestep": torch.full((images,), 0.5),
        "img_ids": image_ids,
        "txt_ids": torch.zeros(TOKENS, 3),
    }


def report(kind, operators, sizes, dtype, steps):
    """What becomes of a model: built, written, read and run with a graph in the engine's place.

    kind: one of _KINDS. sizes: arguments of its inputs, the usual first, then the profile's ends. steps: of
    the solver, in the graph and in what it is compared with; None for as many as there are.
    """
    import torch_tensorrt
    from torch_tensorrt.dynamo import partitioning

    make, make_inputs = _KINDS[kind]
    model = make(operators).to(dtype)
    _set_solver_steps(steps)
    inputs = [_to(dtype, make_inputs(*size)) for size in sizes]
    calls = {corner: call_of(model, given) for corner, given in zip(("usual", "low", "high"), inputs, strict=False)}
    before = len(tensorrt_stub.ENGINES)
    dynamo = torch_tensorrt.dynamo
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"whole-0{tensorrt.SUFFIX}")
        with mock.patch.object(dynamo, "compile", wraps=dynamo.compile) as compile:
            names = tensorrt.build(model, "forward", calls, path, {"weights": "engine"})
        region = region_of(path.name, [""], "forward", calls, hyperparameter_buffers(model)).model_copy(update=names)
        content = path.read_bytes()
        runner = TensorRTRunner(path, None, region, model, model)
    graph, given = tensorrt_stub.ENGINES[content]  # the file is the engine, and nothing around it
    supported, total = partitioning.get_graph_converter_support(graph, set())
    parted, _ = partitioning.global_partition(copy.deepcopy(graph), min_block_size=1, torch_executed_ops=set())
    return {
        "engines": len(tensorrt_stub.ENGINES) - before,
        "operations": total,
        "without_converter": total - supported,
        "left_to_torch_by_the_global_partitioner": [
            str(node.target) for node in parted.graph.nodes if node.op in ("call_function", "call_method")
        ],
        "engines_by_the_global_partitioner": sum(node.op == "call_module" for node in parted.graph.nodes),
        "kinds": {str(node.target) for node in graph.graph.nodes if node.op == "call_function"},
        "unknown_arguments": _unknown(dynamo.compile, compile),
        "inputs": region.input_names,
        "outputs": region.output_names,
        "hyperparameters": list(region.hyperparameters),
        "shapes": {entry.name: entry.shape for entry in given},
        "wanted": {tensor.name: tensor.shape for tensor in region.inputs},
        "usual": {tensor.name: list(calls["usual"].tensors[tensor.name].shape) for tensor in region.inputs},
        "differences": [difference(runner, region, call) for call in calls.values()],
        "difference_after_change": after_change(model, runner, region, inputs[0]),
    }


_KINDS = {
    "unet": (unet, unet_inputs),
    "transformer": (transformer, transformer_inputs),
    "joint": (joint, joint_inputs),
}


def sorted_report():
    """Segments of an entmax that sorts, (engines, torch's), and what the target says of it."""
    import torch_tensorrt

    class Sorted(torch.nn.Module):
        def forward(self, scores):
            ordered = scores.sort(dim=-1, descending=True).values
            support = torch.arange(1, scores.shape[-1] + 1, dtype=scores.dtype)
            threshold = (ordered.cumsum(-1) - 1.0) / support
            count = (ordered > threshold).sum(-1, keepdim=True)
            return (scores - threshold.gather(-1, count - 1)).clamp_min(0.0) * 1.5 + 0.5

    calls = {c: RecordedCall({"scores": torch.randn(2, n, 7)}, {}, {}, {}, "") for c, n in (("usual", 8), ("low", 4))}
    for call in calls.values():
        _, _, call.template = take_apart(["scores"], (), call.tensors)
    real = torch_tensorrt.dynamo.compile
    parts = {}

    def compile_what_can_be(program, **arguments):
        made = real(program, **{**arguments, "require_full_compilation": False})
        names = [name for name, _ in made.named_children()]
        parts["engines"] = sum("_run_on_acc" in name for name in names)
        parts["torch"] = sum("_run_on_gpu" in name for name in names)
        return real(program, **arguments)

    with mock.patch.object(torch_tensorrt.dynamo, "compile", compile_what_can_be):
        try:
            tensorrt.build(Sorted(), "forward", calls, Path("never.pt2"), {})
        except InputError as error:
            return parts, str(error)
    return parts, None


def _patched(model, operators):
    modules = [module for path, module in model.eval().named_modules() if path.endswith("attn2")]
    for module, (name, options) in zip(modules, operators, strict=True):
        PladisAttention.convert(module, name, **options)
    return model


def _to(dtype, inputs):
    """Inputs as a pipeline of that dtype has them: times stay float32."""
    return {
        name: value.to(dtype) if isinstance(value, torch.Tensor) and name != "timestep" else value
        for name, value in inputs.items()
    }


def _set_solver_steps(steps):
    """Fewer steps are fewer operations of the same kinds, which take a fraction of the time to trace."""
    _ENTMAX.newton_steps = _STEPS if steps is None else lambda keys: steps


def _eager(model, inputs):
    """A model's results by plain operations, whose solver is the one that is traced."""
    patched = [module for module in model.modules() if is_pladis(module)]
    for module in patched:
        module.pladis_implementation = "reference"
    with torch.no_grad():
        results, output = take_result_apart(model(**inputs))
    for module in patched:
        module.pladis_implementation = "auto"
    return results, output


def call_of(model, inputs):
    """The Call of a model with these inputs, with what it gives by plain operations."""
    tensors, constants, template = take_apart(list(inputs), (), inputs)
    return RecordedCall(tensors, constants, template, *_eager(model, inputs))


def difference(runner, region, call):
    """The largest difference of what a runner gives from what a Call gave."""
    with torch.no_grad():
        found = runner.run([call.tensors[tensor.name] for tensor in region.inputs])
    wanted = [call.results[name] for name in region.outputs]
    return max((a - b).abs().max().item() for a, b in zip(found, wanted, strict=True))


def after_change(model, runner, region, inputs):
    """(how far the result moves, how far the engine is from it) when every alpha becomes 1 and every scale 0.5."""
    before = _eager(model, inputs)[0]
    for module in model.modules():
        if is_pladis(module):
            module.set_hyperparameters({"alpha": 1.0, "scale": 0.5})
    after = call_of(model, inputs)
    moved = max((a - b).abs().max().item() for a, b in zip(before.values(), after.results.values(), strict=True))
    return moved, difference(runner, region, after)


def around_report(does_more):
    """What the target says of a graph around an engine that only calls it, and of one that does more."""
    import torch_tensorrt

    engine = torch_tensorrt.runtime.TorchTensorRTModule(None, ["b", "a"], ["output0", "output1"])
    engine.serialized_engine = b"ftrt"
    graph = torch.fx.Graph()
    a, b = graph.placeholder("a"), graph.placeholder("b")
    called = graph.call_module("_run_on_acc_0", (b, a))
    first, second = (graph.call_function(operator.getitem, (called, at)) for at in (0, 1))
    results = (second, graph.call_function(torch.relu, (first,)) if does_more else first)
    graph.output(results)
    root = torch.nn.Module()
    root._run_on_acc_0 = engine
    try:
        return tensorrt.engine_of(torch.fx.GraphModule(root, graph))
    except SurgeryError as error:
        return str(error)


def _unknown(function, called):
    """Names of arguments of a call that went into a function's **kwargs."""
    function = inspect.unwrap(getattr(function, "_mock_wraps", None) or function)
    bound = inspect.signature(function).bind(*called.call_args.args, **called.call_args.kwargs)
    return set(bound.arguments.get("kwargs", ()))
