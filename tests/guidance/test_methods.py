"""What single methods compute, against formulas written out, diffusers' own guiders and its retired pipeline."""

import math
from typing import get_args

import pytest
import torch

import surgery
from surgery.errors import InputError, UnsupportedModelError
from surgery.guidance.attaching import driver_of, guided
from surgery.guidance.layers import chosen_layers
from surgery.guidance.methods import METHODS, MethodName
from surgery.guidance.standins import along, blur_matrix, blurred, normalized
from surgery.nn.schedule import sigma_at

from ..conftest import PROMPTS, draw
from ..nn.backbones.cross import pixart
from ..tiny import with_controlnet
from .oracles import sampled, seg_blur, weakened_by_hand

CALL = {
    "prompt": PROMPTS,
    "num_inference_steps": 3,
    "guidance_scale": 4.0,
    "height": 64,
    "width": 64,
    "output_type": "latent",
}


@pytest.fixture
def outputs(pipeline):
    """[(U, C)] of each step of an unguided run, and the predictions that followed."""
    found, forward = [], pipeline.unet.forward

    def recording(*args, **kwargs):
        result = forward(*args, **kwargs)
        found.append(result[0].chunk(2))
        return result

    pipeline.unet.forward = recording
    try:
        _, predictions = sampled(pipeline, CALL)
    finally:
        del pipeline.unet.forward
    return found, predictions


def first_prediction(pipeline, method, **settings):
    surgery.guide(pipeline, method, **settings)
    try:
        return sampled(pipeline, {**CALL, "num_inference_steps": 1})[1][0]
    finally:
        surgery.unguide(pipeline)


def test_apg_and_cfg_zero_are_diffusers_guiders_arithmetic(pipeline):
    from diffusers import AdaptiveProjectedGuidance, ClassifierFreeZeroStarGuidance

    short = {**CALL, "num_inference_steps": 1}
    pairs, forward = [], pipeline.unet.forward
    pipeline.unet.forward = lambda *a, **k: pairs.append(forward(*a, **k)) or pairs[-1]
    sampled(pipeline, short)
    del pipeline.unet.forward
    unguided, plain = pairs[0][0].chunk(2)
    apg = AdaptiveProjectedGuidance(
        guidance_scale=3.0, adaptive_projected_guidance_rescale=5.0, eta=0.25, use_original_formulation=True
    )
    apg.set_state(0, 1, None)
    expected = (
        apg(plain, unguided) if callable(getattr(apg, "forward", None)) is False else apg.forward(plain, unguided)
    )
    found = first_prediction(pipeline, "apg", eta=0.25, momentum=0.0, rescale=5.0)
    assert torch.allclose(found, expected.pred, atol=1e-5)  # its scale 3 in C + 3 d is 4 in U + 4 d
    zero = ClassifierFreeZeroStarGuidance(guidance_scale=4.0, zero_init_steps=0)
    zero.set_state(0, 1, None)
    found = first_prediction(pipeline, "cfg-zero", zero_init=0)
    assert torch.allclose(found, zero.forward(plain, unguided).pred, atol=1e-5)
    assert first_prediction(pipeline, "cfg-zero").abs().max() == 0


def test_apg_averages_over_steps_and_forgets_between_runs(pipeline):
    surgery.guide(pipeline, "apg", momentum=-0.75)
    first, second = (sampled(pipeline, CALL)[0] for _ in range(2))
    surgery.unguide(pipeline)
    surgery.guide(pipeline, "apg", momentum=0.0)
    assert torch.equal(first, second) and not torch.equal(sampled(pipeline, CALL)[0], first)


def test_a_window_of_cfg_samples_without_it_outside_and_one_of_another_method_with_plain_cfg(pipeline, outputs):
    found, predictions = outputs
    surgery.guide(pipeline, "cfg", steps=[1, None])
    _, limited = sampled(pipeline, CALL)
    assert torch.equal(limited[0], found[0][1])
    surgery.unguide(pipeline)
    surgery.guide(pipeline, "seg", fraction=[0.5, 1.0])
    drawn = sampled(pipeline, CALL)[1]
    assert torch.equal(drawn[0], predictions[0]) and torch.equal(drawn[1], predictions[1])
    assert not torch.equal(drawn[2], predictions[2])
    assert driver_of(pipeline).evaluations == 2 * (2 + 2 + 3)
    surgery.unguide(pipeline)
    pipeline.scheduler.set_timesteps(3)
    middle = sigma_at(pipeline.scheduler, 1)
    surgery.guide(pipeline, "seg", sigma=[middle * 0.99, math.inf])
    sampled(pipeline, CALL)
    assert driver_of(pipeline).evaluations == 2 * (3 + 3 + 2)


def test_the_blur_is_seg_codes_whose_kernel_is_no_longer_than_the_grid_and_the_mean_where_it_is_infinite():
    torch.manual_seed(0)
    for height, width, sigma in ((7, 5, 0.6), (32, 32, 10.0), (8, 8, 5.0), (7, 5, 40.0), (1, 6, 2.0), (2, 3, 3.0)):
        tokens = torch.randn(2, 3 * height * width, 4)
        grid = tokens.view(2, 3, height, width, 4)
        expected = seg_blur(grid.permute(0, 1, 4, 2, 3), sigma).permute(0, 1, 3, 4, 2).flatten(1, 3)
        assert torch.allclose(blurred(tokens, 3, height, width, sigma).double(), expected, atol=2e-6)
        mean = grid.mean((2, 3), keepdim=True).expand_as(grid).flatten(1, 3)
        assert torch.allclose(blurred(tokens, 3, height, width, 1e30), mean)
    assert blur_matrix(64, 10.0)[32].count_nonzero() == 61 and blur_matrix(40, 10.0)[20].count_nonzero() == 40
    centre = blur_matrix(33, 10.0)[16]
    assert centre.count_nonzero() == 33 and torch.allclose(centre.sum(), torch.tensor(1.0))


def test_the_part_of_a_query_along_a_key():
    torch.manual_seed(0)
    queries, keys = torch.randn(2, 5, 3, 8), torch.randn(2, 5, 3, 8)
    keys[0, 0, 0] = 0.0
    part = along(queries, keys)
    assert ((queries - part) * keys).sum(-1).abs().max() < 1e-5 and part[0, 0, 0].abs().max() == 0
    assert torch.allclose(along(keys, keys), keys, atol=1e-6)


def test_oseg_weakens_both_rows_of_cfg_and_costs_no_more_than_seg(pipeline, outputs):
    unguided, plain = outputs[0][0]
    call = {**CALL, "num_inference_steps": 1}
    chosen = chosen_layers(pipeline.unet, ["all"], ("self",), "self-attention")
    by_hand = weakened_by_hand(pipeline, call, "oseg", chosen)
    expected = by_hand["guided"]  # C + (w - 1) (C - U') + 3 (C - C')
    assert torch.allclose(first_prediction(pipeline, "oseg", layers="all"), expected, atol=1e-4)
    seg_like = unguided + 4.0 * (plain - unguided) + 3.0 * (plain - by_hand["weak"])
    with_plain = first_prediction(pipeline, "oseg", layers="all", unconditional="plain")
    assert torch.allclose(with_plain, seg_like, atol=1e-4)
    unscaled = first_prediction(pipeline, "oseg", layers="all", scale=0.0)
    assert torch.allclose(unscaled, expected - 3.0 * (plain - by_hand["weak"]), atol=1e-4)
    orthogonal = first_prediction(pipeline, "oseg", layers="all", keep_parallel=False)
    assert all(not torch.allclose(expected, other, atol=1e-2) for other in (with_plain, unscaled, orthogonal))
    for settings in ({}, {"unconditional": "plain"}):
        surgery.guide(pipeline, "oseg", **settings)
        sampled(pipeline, CALL)
        assert driver_of(pipeline).evaluations == driver_of(pipeline).method.evaluations(True) * 2 * 3 == 18
        sampled(pipeline, {**CALL, "guidance_scale": 1.0})  # without CFG two
        assert driver_of(pipeline).evaluations == 18 + 12
        surgery.unguide(pipeline)


def test_sag_draws_what_diffusers_retired_pipeline_draws(pipeline):
    from diffusers import DDIMScheduler
    from diffusers.pipelines.deprecated.stable_diffusion_sag.pipeline_stable_diffusion_sag import (
        StableDiffusionSAGPipeline,
    )

    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, timestep_spacing="leading")
    latents = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    call = {**CALL, "latents": latents[:, : pipeline.unet.config.in_channels]}
    retired = StableDiffusionSAGPipeline(**pipeline.components, requires_safety_checker=False)
    retired.set_progress_bar_config(disable=True)
    with torch.no_grad():
        expected = retired(**{**call, "sag_scale": 0.75}).images
    pipeline.unet.set_default_attn_processor()  # it leaves its own behind
    with guided(pipeline, {"method": "sag"}):
        found = sampled(pipeline, call)[0]
    plain = sampled(pipeline, call)[0]
    # Its kernel reaches 9 pixels, ours 7, of a Gaussian of 1.
    assert (found - expected).abs().max() < 0.02 < (plain - expected).abs().max()


def test_nag_is_its_formula_on_each_modules_output_and_leads_away_from_the_negative_prompt(pipeline):
    torch.manual_seed(0)
    positive, negative = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    led = positive + 5.0 * (positive - negative)
    ratio = led.abs().sum(-1, keepdim=True) / positive.abs().sum(-1, keepdim=True)
    expected = 0.25 * led * torch.minimum(ratio, torch.tensor(2.5)) / ratio + 0.75 * positive
    assert torch.allclose(normalized(positive, negative, 5.0, 2.5, 0.25), expected, atol=1e-5)

    single = {**CALL, "guidance_scale": 1.0}
    plain = sampled(pipeline, single)[0]
    for negative_prompt in ("a red circle", ""):
        surgery.guide(pipeline, "nag", negative_prompt=negative_prompt)
        found = sampled(pipeline, single)[0]
        assert driver_of(pipeline).evaluations == 2 * 3 and (found - plain).abs().max() > 1e-2
        surgery.unguide(pipeline)
    surgery.guide(pipeline, "nag", scale=0.0)
    assert torch.allclose(sampled(pipeline, single)[0], plain, atol=1e-5)


def test_autoguidance_with_all_dropped_skips_its_blocks_and_draws_alike_in_any_batch(pipeline):
    dropped = first_prediction(pipeline, "autoguidance", layers="mid", dropout=1.0, scale=2.8)
    assert torch.allclose(dropped, first_prediction(pipeline, "slg", scale=2.8), atol=1e-4)
    for method in ("autoguidance", "tsg"):
        together = first_prediction(pipeline, method)
        assert not torch.equal(together, first_prediction(pipeline, method, seed=1))
        latents = torch.randn(2, pipeline.unet.config.in_channels, 16, 16, generator=torch.Generator().manual_seed(0))
        with guided(pipeline, {"method": method}):
            both = sampled(pipeline, {**CALL, "latents": latents})[0]
            alone = sampled(pipeline, {**CALL, "prompt": PROMPTS[1], "latents": latents[1:]})[0]
        assert torch.allclose(both[1:], alone, atol=2e-3)


def test_tsg_adds_noise_to_the_embedding_in_proportion_to_its_size(pipeline, outputs):
    without = first_prediction(pipeline, "tsg", noise=0.0)  # close, not equal: its batch has another size
    assert torch.allclose(without, first_prediction(pipeline, "cfg"), atol=1e-5)
    seen = []
    handle = (
        pipeline.unet.down_blocks[0]
        .resnets[0]
        .time_emb_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    )
    first_prediction(pipeline, "tsg", scale=1.0)
    handle.remove()
    plain, noisy = seen[0].chunk(2)[1], seen[1]
    assert not torch.allclose(plain, noisy, atol=0.1) and plain.shape == noisy.shape


def test_stg_skips_a_block_or_its_map(pipeline):
    assert torch.allclose(
        first_prediction(pipeline, "stg", scale=2.8), first_prediction(pipeline, "slg", scale=2.8), atol=1e-6
    )
    by_map = first_prediction(pipeline, "stg", mode="attention", scale=3.0)
    assert torch.allclose(by_map, first_prediction(pipeline, "pag"), atol=1e-6)


def test_guidance_rescale_still_acts(pipeline):
    call = {**CALL, "guidance_rescale": 0.7}
    plain = sampled(pipeline, call)[0]
    with guided(pipeline, {"method": "cfg"}):
        assert torch.allclose(sampled(pipeline, call)[0], plain, atol=1e-4)
    assert not torch.allclose(sampled(pipeline, CALL)[0], plain, atol=1e-2)
    with guided(pipeline, "cfg-zero"), pytest.raises(InputError, match="zero_init: guidance_rescale"):
        sampled(pipeline, call)
    with guided(pipeline, {"method": "cfg-zero", "zero_init": 0}):
        assert sampled(pipeline, call)[0].isfinite().all()


def test_it_composes_with_freeu_a_controlnet_and_offloading(pipeline):
    from accelerate import cpu_offload

    controlled = with_controlnet(pipeline)
    surgery.patch(pipeline)
    call = {**CALL, "image": torch.rand(2, 3, 64, 64)}
    layers = {"layers": ["all"]}
    plain = sampled(controlled, call)[0]
    with guided(controlled, {"method": "seg", **layers}) as driver:
        found = sampled(controlled, call)[0]
        assert driver.evaluations == 2 * 3 * 3 and (found - plain).abs().max() > 1e-3
    pipeline.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    plain = sampled(pipeline, CALL)[0]
    with guided(pipeline, {"method": "pag", **layers}):
        assert (sampled(pipeline, CALL)[0] - plain).abs().max() > 1e-3
    pipeline.disable_freeu()
    with guided(pipeline, {"method": "oseg", **layers}):
        expected = sampled(pipeline, CALL)[0]
    cpu_offload(pipeline.unet, "cpu")
    with guided(pipeline, {"method": "oseg", **layers}):
        assert torch.equal(sampled(pipeline, CALL)[0], expected)


def test_the_methods_are_those_that_guide_is_typed_with():
    assert get_args(MethodName) == tuple(METHODS)


def test_what_is_wrong_is_said_before_the_first_step(pipeline):
    for method, settings, says in (
        ("segg", {}, "guidance.method"),
        ("seg", {"scal": 1.0}, "guidance.scal: extra inputs"),
        ("seg", {"layers": "middle"}, 'did you mean "mid"'),
        ("seg", {"blur": -1.0}, "guidance.blur"),
        ("cfg", {"layers": "mid"}, "guidance.layers: extra"),
        ("cfg", {"fraction": [0.5, 0.2]}, "guidance.fraction must rise"),
    ):
        with pytest.raises(InputError, match=says):
            surgery.guide(pipeline, method, **settings)
    surgery.guide(pipeline, "seg")
    with pytest.raises(InputError, match="guided already"):
        surgery.guide(pipeline, "pag")
    surgery.unguide(pipeline)
    with pytest.raises(InputError, match="not guided"):
        surgery.unguide(pipeline)
    surgery.guide(pipeline, "apg")
    with pytest.raises(InputError, match="above 1"):
        sampled(pipeline, {**CALL, "guidance_scale": 1.0})
    surgery.unguide(pipeline)
    pipeline.fuse_qkv_projections()
    with pytest.raises(UnsupportedModelError, match="unfuse_qkv_projections"):
        surgery.guide(pipeline, "seg")


def test_patching_and_guiding_go_in_either_order_and_leave_nothing(pipeline, tmp_path):
    plain = draw(pipeline)
    names = list(pipeline.unet.state_dict())
    surgery.guide(pipeline, "oseg", layers="all")
    surgery.patch(pipeline, operator="gag")
    guided_first = draw(pipeline)
    assert set(names) <= set(pipeline.unet.state_dict())  # nothing is in another's place between calls
    surgery.unguide(pipeline)
    surgery.guide(pipeline, "oseg", layers="all")
    assert torch.equal(draw(pipeline), guided_first)
    surgery.unpatch(pipeline)
    surgery.unguide(pipeline)
    assert torch.equal(draw(pipeline), plain)


def test_a_compiled_model_is_weakened_too_and_a_scale_compiles_nothing_again():
    pipeline, arguments = pixart()
    call = {**arguments, "output_type": "latent"}
    surgery.patch(pipeline)
    settings = {"method": "oseg", "layers": ["all"], "scale": 3.0}
    with guided(pipeline, settings):
        eager = sampled(pipeline, call)[0]
    torch._dynamo.reset()
    pipeline.transformer.compile(backend="eager", fullgraph=True)
    plain = sampled(pipeline, call)[0]
    with guided(pipeline, settings):
        assert torch.allclose(sampled(pipeline, call)[0], eager, atol=1e-4)
    with guided(pipeline, {**settings, "scale": 30.0}), torch.compiler.set_stance("fail_on_recompile"):
        other = sampled(pipeline, call)[0]
    assert not torch.allclose(other, eager, atol=1e-3) and not torch.allclose(plain, eager, atol=1e-5)
    assert torch.allclose(sampled(pipeline, call)[0], plain, atol=1e-6)
