"""TPG, ERG, SWG and Rectified-CFG++, each against the same done by hand on diffusers' own modules."""

import math

import pytest
import torch
import torch.nn.functional as F

import surgery
from surgery.errors import InputError, UnsupportedModelError
from surgery.guidance.attaching import driver_of
from surgery.guidance.layers import chosen_layers

from ..nn.backbones import FAMILIES
from ..nn.backbones.checks import denoiser
from .loops import LOOPS
from .oracles import calls_of_first_step, sampled
from .test_methods import CALL

BUILT = {family.name: family.build for family in FAMILIES if family.draws} | LOOPS


def outputs(model, calls):
    """(C, U) of the calls of a step, float64: two, or one with the prompt in the batch's second half."""
    with torch.no_grad():
        found = [model(**{**call, "return_dict": False})[0] for call in calls]
    found = [torch.stack(one) if isinstance(one, list) else one for one in found]
    first, second = found if len(found) == 2 else reversed(found[0].chunk(2))
    return first.double(), second.double()


def of_prompt(call):
    """A UNet's call for the rows with the prompt alone."""
    half = len(call["sample"]) // 2
    return {name: one[half:] if torch.is_tensor(one) and one.ndim > 1 else one for name, one in call.items()}


def order_of(before, after):
    """Where in `before` each row of `after`, (tokens, channels), stood."""
    distances = torch.cdist(after.double(), before.double())
    assert distances.min(1).values.max() < 1e-5  # of another batch
    return distances.argmin(1)


def seen_by(blocks, action):
    """{path: [what a block's stream of the image was]} while `action` runs."""
    seen = {path: [] for path in blocks}

    def recording(path):
        return lambda module, args, kwargs: seen[path].append((args[0] if args else kwargs["hidden_states"]).clone())

    handles = [block.register_forward_pre_hook(recording(path), with_kwargs=True) for path, block in blocks.items()]
    try:
        action()
    finally:
        for handle in handles:
            handle.remove()
    return seen


def test_tpg_gives_a_unets_blocks_on_the_way_down_tokens_in_another_order_each(pipeline):
    call = {**CALL, "num_inference_steps": 1}
    (given,) = calls_of_first_step(pipeline, call)
    plain, unet = sampled(pipeline, call)[1][0], pipeline.unet
    layers = chosen_layers(unet, ["down"], ("self",), "self-attention")
    blocks = {layer.block: unet.get_submodule(layer.block) for layer in layers}
    surgery.guide(pipeline, "tpg")
    found = []
    seen = seen_by(blocks, lambda: found.append(sampled(pipeline, call)[1][0]))
    assert driver_of(pipeline).evaluations == 2 * 3
    surgery.unguide(pipeline)
    handles, orders = [], []
    for path, block in blocks.items():
        weak = seen[path][1]  # the first call is the ordinary one

        def shuffled(module, args, weak=weak):
            order = order_of(args[0][0], weak[0])
            assert torch.allclose(args[0][1][order], weak[1], atol=1e-5)  # every image's tokens in one order
            assert sorted(order.tolist()) == list(range(len(order))) and order.tolist() != sorted(order.tolist())
            orders.append(tuple(order.tolist()))
            return (args[0][:, order], *args[1:])

        handles.append(block.register_forward_pre_hook(shuffled))
    with torch.no_grad():
        weak = unet(**of_prompt(given))[0]
    for handle in handles:
        handle.remove()
    with torch.no_grad():
        cond = unet(**of_prompt(given))[0]
    assert torch.allclose(found[0], plain + 3.0 * (cond - weak), atol=1e-4)
    assert len(orders) == len(blocks) and len(set(orders)) == len(orders)


def test_tpg_leaves_a_transformers_stream_in_its_order_and_text_alone():
    """FLUX's middle block: what it adds to its input comes out where the shuffled tokens were."""
    pipeline, arguments = BUILT["flux"]()
    arguments = {**arguments, "output_type": "latent"}
    model = denoiser(pipeline)
    (given,) = calls_of_first_step(pipeline, arguments)
    (layer,) = chosen_layers(model, ["mid"], ("joint",), "attention")
    block = model.get_submodule(layer.block)
    surgery.guide(pipeline, "tpg", share=0.5, seed=3)
    found = []
    seen = seen_by({"mid": block}, lambda: found.append(sampled(pipeline, arguments)[1][0]))["mid"]
    surgery.unguide(pipeline)
    plain, weak = seen[:2]
    order = order_of(plain[0], weak[0])
    moved = int((order != torch.arange(len(order))).sum())
    assert 2 <= moved <= round(0.5 * len(order)) and torch.allclose(plain[1][order], weak[1], atol=1e-5)

    def by_hand(module, args, kwargs):
        states = args[0] if args else kwargs["hidden_states"]
        kwargs = {**kwargs, "hidden_states": states[:, order]}
        text, image = original(*args[1:], **kwargs)
        return text, states + image - states[:, order]

    original = block.forward
    block.forward = lambda *args, **kwargs: by_hand(block, args, kwargs)
    with torch.no_grad():
        weak = model(**{**given, "return_dict": False})[0]
    del block.forward
    cond = sampled(pipeline, arguments)[1][0]
    assert torch.allclose(found[0], cond + 3.0 * (cond - weak), atol=1e-4)
    assert (found[0] - cond).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["shapes", "flux", "wan"])
def test_erg_has_softmax_of_tau_times_the_scores(name, monkeypatch):
    pipeline, arguments = BUILT[name]()
    arguments = {**arguments, "output_type": "latent", "num_inference_steps": 1}
    model = denoiser(pipeline)
    given = calls_of_first_step(pipeline, arguments)[0]
    given = of_prompt(given) if name == "shapes" else given
    kinds = ("self", "joint")
    layers = chosen_layers(model, ["all"], kinds, "self-attention")
    plain = sampled(pipeline, arguments)[1][0]
    surgery.guide(pipeline, "erg", layers="all", tau=0.25, scale=2.0)
    found = sampled(pipeline, arguments)[1][0]
    surgery.unguide(pipeline)
    with torch.no_grad():
        cond = model(**{**given, "return_dict": False})[0]
    inside, stock = [], F.scaled_dot_product_attention

    def tempered(query, key, value, attn_mask=None, scale=None, **how):
        if not inside:
            return stock(query, key, value, attn_mask=attn_mask, scale=scale, **how)
        scores = 0.25 * query.double() @ key.double().transpose(-1, -2) * (scale or query.shape[-1] ** -0.5)
        if attn_mask is not None:
            scores = scores.masked_fill(~attn_mask, -math.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
        return (scores.softmax(-1) @ value.double()).to(value.dtype)

    monkeypatch.setattr(F, "scaled_dot_product_attention", tempered)
    handles = []
    for layer in layers:
        attention = model.get_submodule(layer.path)
        handles.append(attention.register_forward_pre_hook(lambda *_: inside.append(None)))
        handles.append(attention.register_forward_hook(lambda *_: inside.clear()))
    with torch.no_grad():
        weak = model(**{**given, "return_dict": False})[0]
    for handle in handles:
        handle.remove()
    away = 2.0 * (cond - weak)
    assert away.abs().max() > 1e-3 and torch.allclose(found, plain + away.reshape(plain.shape), atol=2e-4)


def test_erg_says_why_linear_attention_has_no_temperature():
    with pytest.raises(InputError, match="no self-attention by softmax"):
        surgery.guide(BUILT["sana"]()[0], "erg")


@pytest.mark.parametrize("masked", [True, False])
def test_swg_puts_the_crops_outputs_together(pipeline, masked):
    """Crops of 10 of 16 rows and columns at 0 and 6, by the authors' arithmetic."""
    call = {**CALL, "num_inference_steps": 1}
    plain = sampled(pipeline, call)[1][0]
    given = of_prompt(calls_of_first_step(pipeline, call)[0])
    total, count = torch.zeros_like(plain), torch.zeros_like(plain)
    with torch.no_grad():
        cond = pipeline.unet(**given)[0]
        for top in (0, 6):
            for left in (0, 6):
                place = (slice(None), slice(None), slice(top, top + 10), slice(left, left + 10))
                total[place] += pipeline.unet(**{**given, "sample": given["sample"][place]})[0]
                count[place] += 1
    assert count.min() == 1 and count.max() == 4
    away = (cond - total / count) * ((count > 1) if masked else 1)
    surgery.guide(pipeline, "swg", scale=0.7, masked=masked)
    found = sampled(pipeline, call)[1][0]
    assert driver_of(pipeline).evaluations == 2 * (2 + 4)
    assert torch.allclose(found, plain + 0.7 * away, atol=1e-4) and away.abs().max() > 1e-2


def test_swg_cuts_packed_tokens_with_their_ids():
    """FLUX's 8 x 8 tokens in crops of 5 at 0 and 3."""
    pipeline, arguments = BUILT["flux"]()
    arguments = {**arguments, "output_type": "latent", "num_inference_steps": 1}
    (given,) = calls_of_first_step(pipeline, arguments)
    side = math.isqrt(given["hidden_states"].shape[1])
    size = math.ceil(0.625 * side)
    plain = sampled(pipeline, arguments)[1][0]
    total, count = torch.zeros_like(plain), torch.zeros_like(plain)
    for top in (0, side - size):
        for left in (0, side - size):
            rows = torch.arange(side * side).view(side, side)[top : top + size, left : left + size].flatten()
            cut = {"hidden_states": given["hidden_states"][:, rows], "img_ids": given["img_ids"][rows]}
            with torch.no_grad():
                total[:, rows] += denoiser(pipeline)(**{**given, **cut, "return_dict": False})[0]
            count[:, rows] += 1
    surgery.guide(pipeline, "swg", scale=2.0, masked=False)
    found = sampled(pipeline, arguments)[1][0]
    assert torch.allclose(found, plain + 2.0 * (plain - total / count), atol=1e-4) and count.max() > 1


@pytest.mark.parametrize("name", ["sd3", "cogview4", "lumina2", "z_image"])
def test_rectified_cfgpp_takes_the_difference_where_half_a_step_leads(name):
    """In one batch, in two calls, and where the model's time and velocity run the other way."""
    pipeline, arguments = BUILT[name]()
    # Not from pure noise, where the correction's weight is 0.
    arguments = {**arguments, "output_type": "latent", "guidance_scale": 3.0, "sigmas": [0.7, 0.3]}
    model, calls = denoiser(pipeline), calls_of_first_step(pipeline, arguments)
    surgery.guide(pipeline, "rectified-cfg++", decay=0.5, ahead=0.5)
    found = sampled(pipeline, arguments)[1][0].double()
    sigmas = pipeline.scheduler.sigmas.double()
    times, evaluations = pipeline.scheduler.timesteps.float(), driver_of(pipeline).evaluations
    surgery.unguide(pipeline)
    turned = -1 if name in ("lumina2", "z_image") else 1
    cond = outputs(model, calls)[0] if name != "z_image" else outputs(model, calls)[1]
    width = 0.5 * (sigmas[1] - sigmas[0])
    latents, moved = "x" if name == "z_image" else "hidden_states", []
    for call in calls:
        given, time = call[latents], "t" if name == "z_image" else "timestep"
        rate = {"sd3": 1.0, "cogview4": 1.0}.get(name, -0.001)
        stacked = torch.stack(given) if isinstance(given, list) else given
        ahead = stacked.double() + turned * width * cond.repeat(len(stacked) // len(cond), *[1] * (cond.ndim - 1))
        ahead = ahead.to(stacked.dtype)
        ahead = list(ahead) if isinstance(given, list) else ahead
        moved.append({**call, latents: ahead, time: call[time] + rate * 0.5 * (times[1] - times[0])})
    there = outputs(model, moved)
    with_prompt, without = there if name != "z_image" else reversed(there)
    w = 4.0 if name == "z_image" else 3.0
    expected = cond + (w - 1) * (1 - sigmas[0]).clamp_min(0) ** 0.5 * (with_prompt - without)
    if name == "lumina2":  # which gives the guided output the norm of C
        mine, own = expected.norm(dim=-1, keepdim=True), cond.norm(dim=-1, keepdim=True)
        expected = expected * own / mine
    expected = (turned * expected).reshape(found.shape)
    assert evaluations == 3 * len(cond) * 2 and (found - expected).abs().max() < 2e-3 * expected.abs().max()


def test_rectified_cfgpp_is_for_rectified_flows_with_cfg(pipeline):
    with pytest.raises(UnsupportedModelError, match="rectified flows"):
        surgery.guide(pipeline, "rectified-cfg++")
    flow, arguments = BUILT["cogview4"]()
    surgery.guide(flow, "rectified-cfg++")
    with pytest.raises(InputError, match="above 1"):
        sampled(flow, {**arguments, "guidance_scale": 1.0})
