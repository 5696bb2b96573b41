"""Anderson acceleration over denoising steps: what a module keeps of the step before, and when it does not."""

import copy

import pytest
import torch
from diffusers.models.attention_processor import Attention
from torch._dynamo.testing import CompileCounter

import surgery
from surgery.nn import PladisAttention, is_pladis
from surgery.nn.backbones import backbone_of
from surgery.nn.history import Clock
from surgery.nn.operators import UNITS

from ..conftest import draw, load_shapes
from .backbones.two_streams import qwen_image
from .backbones.video import wan
from .oracle import entmax_oracle

HEADS, DIM = 4, 8
SUMMED = {"head": (3,), "token": (1, 3), "image": (1, 2, 3)}  # of (batch, heads, queries, head_dim)


def module_of(unit="head", **settings):
    """A patched module without projections of its own to the output, and its clock."""
    torch.manual_seed(0)
    module = Attention(query_dim=HEADS * DIM, cross_attention_dim=24, heads=HEADS, dim_head=DIM, bias=False).eval()
    with torch.no_grad():
        module.to_out[0].weight.copy_(torch.eye(HEADS * DIM))
        module.to_out[0].bias.zero_()
    PladisAttention.convert(module, "anderson_history", unit=unit, **settings)
    return module, module.pladis_history.clock


def inputs(step, batch=2, queries=6):
    generator = torch.Generator().manual_seed(100 * step + 7)
    text = torch.randn(batch, 11, 24, generator=torch.Generator().manual_seed(1))
    return torch.randn(batch, queries, HEADS * DIM, generator=generator), text


def call(module, clock, timestep, step, **sizes):
    clock(module, (torch.tensor(timestep),), {})
    with torch.no_grad():
        return module(*inputs(step, **sizes))


def iterate(module, step, alpha=1.5, **sizes):
    """(x, T_s(x)) of a step in float64: (batch, heads, queries, head_dim)."""
    hidden, text = (tensor.double() for tensor in inputs(step, **sizes))
    query, key, value = (
        (given @ projection.weight.double().T).unflatten(-1, (HEADS, DIM)).transpose(1, 2)
        for given, projection in ((hidden, module.to_q), (text, module.to_k), (text, module.to_v))
    )
    scores = query @ key.transpose(-1, -2) / DIM**0.5
    return query.detach(), (entmax_oracle(scores, alpha) @ value).detach()


def anderson(now, before, unit, scale=1.0):
    """GAG eq. 6 with m = 1: the weights, of 0 or above and sum 1, that minimise the residual, by looking at 200,001."""
    dims = SUMMED[unit]
    residual, residual_before = now[1] - now[0], before[1] - before[0]
    # |(1 - w) r + w r'|^2 is a parabola of w: three sums make all of it.
    square, cross, last = (
        (a * b).sum(dims, keepdim=True)
        for a, b in ((residual, residual), (residual, residual_before), (residual_before, residual_before))
    )
    shares = torch.linspace(0.0, 1.0, 200_001, dtype=torch.float64)
    lengths = (1 - shares) ** 2 * square[..., None] + 2 * shares * (1 - shares) * cross[..., None]
    share = shares[(lengths + shares**2 * last[..., None]).argmin(-1)]
    return now[1] + scale * share * (before[1] - now[1])


def merged(output):
    return output.transpose(1, 2).flatten(2)


@pytest.mark.parametrize("unit", UNITS)
def test_three_steps_are_the_papers_acceleration_and_each_knows_the_one_before(unit):
    module, clock = module_of(unit, scale=0.7)
    found = [call(module, clock, time, step) for step, time in enumerate((900.0, 600.0, 300.0))]
    iterates = [iterate(module, step) for step in range(3)]
    assert torch.allclose(found[0].double(), merged(iterates[0][1]), atol=1e-5)
    for step in (1, 2):
        expected = merged(anderson(iterates[step], iterates[step - 1], unit, 0.7))
        assert torch.allclose(found[step].double(), expected, atol=3e-5)
        assert (found[step].double() - merged(iterates[step][1])).abs().max() > 1e-3


def test_a_run_that_begins_anew_a_second_call_of_a_step_and_another_batch_know_nothing_of_the_last():
    module, clock = module_of()
    plain = [merged(iterate(module, step)[1]) for step in range(4)]

    def is_plain(found, step):
        return torch.allclose(found.double(), plain[step], atol=1e-5)

    assert is_plain(call(module, clock, 500.0, 0), 0)
    assert is_plain(call(module, clock, 999.0, 1), 1)  # up
    assert is_plain(call(module, clock, 999.0, 2), 2)  # the same step's second call, which is not kept either
    third = call(module, clock, 400.0, 3)
    expected = merged(anderson(iterate(module, 3), iterate(module, 1), "head"))
    assert torch.allclose(third.double(), expected, atol=3e-5)
    alone = call(module, clock, 300.0, 3, batch=1)
    assert torch.allclose(alone.double(), merged(iterate(module, 3, batch=1)[1]), atol=1e-5)
    unknown, _ = module_of()
    with torch.no_grad():  # nobody says at what timestep it is
        assert is_plain(unknown(*inputs(0)), 0) and is_plain(unknown(*inputs(1)), 1)


def test_each_row_of_cfg_in_one_batch_and_each_of_its_two_calls_has_its_own_history():
    module, clock = module_of()
    both = [call(module, clock, time, step) for step, time in enumerate((900.0, 600.0))]
    apart, clock = module_of()
    for step, time in enumerate((900.0, 600.0)):
        clock(apart, (torch.tensor(time),), {})
        for row, name in enumerate(("cond", "uncond")):
            clock.call = name
            with torch.no_grad():
                found = apart(*(tensor[row : row + 1] for tensor in inputs(step)))
            assert torch.allclose(found, both[step][row : row + 1], atol=1e-6)


def test_a_step_at_which_a_schedule_has_it_off_is_dense_and_becomes_no_history():
    module, clock = module_of()
    call(module, clock, 900.0, 0)
    module.set_hyperparameters({"scale": 0.0, "alpha": 1.0})
    hidden, text = inputs(1)
    dense = torch.nn.functional.scaled_dot_product_attention(
        *(module._split_heads(x) for x in (module.to_q(hidden), module.to_k(text), module.to_v(text)))
    )
    assert torch.allclose(call(module, clock, 800.0, 1), merged(dense), atol=1e-5)
    module.set_hyperparameters({"scale": 1.0, "alpha": 1.5})
    assert torch.allclose(call(module, clock, 700.0, 2).double(), merged(iterate(module, 2)[1]), atol=1e-5)
    expected = merged(anderson(iterate(module, 3), iterate(module, 2), "head"))
    assert torch.allclose(call(module, clock, 600.0, 3).double(), expected, atol=3e-5)


def test_a_compiled_graph_is_whole_and_keeps_the_history_in_place():
    module, clock = module_of()
    eager, eager_clock = copy.deepcopy(module), Clock(0)
    eager.pladis_history.clock = eager_clock
    counter = CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    for step, time in enumerate((900.0, 700.0, 500.0, 300.0, 999.0, 800.0)):
        expected = call(eager, eager_clock, time, step)
        clock(module, (torch.tensor(time),), {})
        with torch.no_grad():
            assert torch.allclose(compiled(*inputs(step)), expected, atol=1e-6)
    assert counter.frame_count <= 2  # once more when there are tensors to write to


@torch.no_grad()
def test_a_pipeline_draws_the_same_image_every_time_and_saves_nothing_of_its_history(tmp_path):
    pipeline = load_shapes()
    base = draw(pipeline, steps=3)
    surgery.patch(pipeline, operator="anderson_history")
    names = set(pipeline.unet.state_dict())
    first = draw(pipeline, steps=3)
    assert torch.equal(draw(pipeline, steps=3), first)
    plain = draw(surgery.patch(load_shapes(), operator="sparse"), steps=3)
    assert (first - plain).abs().max() > 1e-3 and (first - base).abs().max() > 1e-3
    assert set(pipeline.unet.state_dict()) == names
    pipeline.save_pretrained(tmp_path)
    assert torch.equal(draw(surgery.load(tmp_path, quiet=True), steps=3), first)
    surgery.unpatch(pipeline)
    assert torch.equal(draw(pipeline, steps=3), base) and not pipeline.unet._forward_pre_hooks


@torch.no_grad()
def test_where_cfg_takes_two_calls_the_model_says_which_of_them_it_is():
    pipeline, arguments = wan()
    pipeline.set_progress_bar_config(disable=True)
    surgery.patch(pipeline, operator="anderson_history")
    assert not backbone_of("WanTransformer3DModel").batches_cfg
    pipeline(**arguments, guidance_scale=4.0, generator=torch.Generator().manual_seed(0))
    module = next(m for m in pipeline.transformer.modules() if getattr(m, "pladis_history", None) is not None)
    assert {name for name, _ in module.pladis_history.kept} == {"cond", "uncond"}


@torch.no_grad()
def test_in_joint_attention_the_history_is_that_of_the_images_part():
    images = {}
    for operator in ("sparse", "anderson_history"):
        pipeline, arguments = qwen_image()
        pipeline.set_progress_bar_config(disable=True)
        surgery.patch(pipeline, operator=operator)
        for implementation in ("auto", "reference"):
            for module in pipeline.transformer.modules():
                if is_pladis(module):
                    module.pladis_implementation = implementation
            generator = torch.Generator().manual_seed(0)
            found = pipeline(**arguments, generator=generator).images
            images[operator, implementation] = torch.as_tensor(found)
    module = next(module for module in pipeline.transformer.modules() if is_pladis(module))
    (shape,) = {shape for _, shape in module.pladis_history.kept}
    assert shape[2] == 16  # the image's tokens alone
    by_kernels, plain = (images["anderson_history", how] for how in ("auto", "reference"))
    assert (by_kernels - plain).abs().max() < 1e-3 < (by_kernels - images["sparse", "auto"]).abs().max()
