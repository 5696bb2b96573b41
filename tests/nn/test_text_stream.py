"""Prompt Reinjection, weighted text and noise on it, held to the papers' formulas in float64 around diffusers' own."""

import pytest
import torch

import surgery
from surgery.nn.text_stream import reinjected, with_noise

from .backbones import FAMILIES
from .backbones.checks import denoiser, draw, forward, recorded_call


def family_of(name):
    return next(one for one in FAMILIES if one.name == name)


def reinjection(text, origin, weight):
    """As the authors' code: token-wise z-scores, one added to the other, a layer norm, the target's scale again."""

    def z(states):
        return (states - states.mean(-1, keepdim=True)) / states.std(-1, keepdim=True)

    mixed = z(text) + weight * z(origin)
    mixed = torch.nn.functional.layer_norm(mixed, mixed.shape[-1:], eps=1e-12)
    channels = text.shape[-1]
    further = (channels / (channels - 1)) ** 0.5  # from a layer norm's standard deviation to std()'s
    return mixed * text.std(-1, keepdim=True) / further + text.mean(-1, keepdim=True)


def test_reinjection_is_the_released_code_but_for_its_two_standard_deviations():
    text, origin = 3 * torch.randn(2, 2, 5, 16, dtype=torch.float64) + 1
    for weight in (0.025, 0.7, -0.5):
        found = reinjected(text, origin, torch.tensor(weight))
        assert (found - reinjection(text, origin, weight)).abs().max() < 1e-4
    assert torch.equal(reinjected(text.float(), origin.float(), torch.tensor(0.0)), text.float())


@pytest.mark.parametrize("name", ["flux", "sd3", "hunyuan_video"])
def test_blocks_are_given_the_text_that_the_paper_says(name):
    pipeline, arguments = family_of(name).build()
    call, model = recorded_call(pipeline, arguments), denoiser(pipeline)
    base = forward(pipeline, call)
    stacks = [getattr(model, stack, ()) for stack in ("transformer_blocks", "single_transformer_blocks")]
    blocks = [block for stack in stacks for block in stack]
    if len(blocks) < 3:  # the origin is the second, what changes the third
        blocks = blocks * 2
    origin, handles = [], []

    def change(index):
        def hook(block, args, kwargs):
            names = ("hidden_states", "encoder_hidden_states")
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            text = given["encoder_hidden_states"]
            if index == 1:
                origin.append(text)
            if index > 1:
                text = reinjection(text.double(), origin[-1].double(), 0.5).to(text)
            given["encoder_hidden_states"] = 1.2 * text
            return args[2:] and (given.pop("hidden_states"), given.pop("encoder_hidden_states"), *args[2:]), given

        return hook

    for index, block in enumerate(dict.fromkeys(blocks)):
        handles.append(block.register_forward_pre_hook(change(index), with_kwargs=True))
    expected = forward(pipeline, call)
    for handle in handles:
        handle.remove()
    surgery.patch(pipeline, operator="reinject", weight=0.5)
    surgery.patch(pipeline, operator="rebalance", gain=1.2)
    assert (forward(pipeline, call) - expected).abs().max() < 1e-4 < (expected - base).abs().max()
    dense = pipeline
    surgery.tune(dense, weight=0.0, gain=1.0)
    assert (forward(pipeline, call) - base).abs().max() < 1e-4
    surgery.unpatch(pipeline)
    assert torch.equal(forward(pipeline, call), base)


@pytest.mark.parametrize(
    ("name", "operator", "message"),
    [
        ("pixart", "reinject", "every block reads the same text"),
        ("krea2", "rebalance", "in one stream, with no text apart"),
        ("chroma", "reinject", "single_transformer_blocks.0.attn is given text and image in one stream"),
    ],
)
def test_what_has_no_text_of_its_own_says_why(name, operator, message):
    pipeline, _ = family_of(name).build()
    with pytest.raises(surgery.InputError, match=message):
        surgery.patch(pipeline, operator=operator)


def test_noise_is_of_the_texts_size_and_in_the_portion_that_is_asked_for():
    text = torch.randn(2, 40, 32, dtype=torch.float64) * torch.tensor([1.0, 5.0]).reshape(2, 1, 1)
    noise = torch.stack([torch.randn(2, 40, 32), torch.rand(2, 40, 32)]).double()
    found = with_noise(text, noise, torch.tensor(2.0), torch.tensor(0.25)) - text
    sizes = text.flatten(1).std(1).reshape(2, 1, 1)
    assert (found - torch.where(noise[1] < 0.25, 2.0 * sizes * noise[0], 0.0)).abs().max() < 1e-4
    listed = with_noise([text[0], text[1, :7]], noise, torch.tensor(2.0), torch.tensor(0.25))
    assert [len(one) for one in listed] == [40, 7] and (listed[0] - (text + found)[0]).abs().max() < 1e-6


def test_noise_is_each_seeds_own_and_ends_with_its_window():
    pipeline, arguments = family_of("pixart").build()
    arguments = {**arguments, "num_inference_steps": 2}
    surgery.patch(pipeline, scale=0.0)
    base = [draw(pipeline, arguments, seed) for seed in (0, 1)]
    surgery.patch(pipeline, operator="diversity", strength=2.0, schedule={"steps": [0, 1]})
    found = [draw(pipeline, arguments, seed) for seed in (0, 1)]
    assert all((one - plain).abs().max() > 1e-4 for one, plain in zip(found, base, strict=True))
    assert torch.equal(draw(pipeline, arguments, 1), found[1])
    with denoiser(pipeline).scheduled(pipeline, 2) as callback:
        early = draw(pipeline, {**arguments, "callback": lambda *given: callback(pipeline, *given[:2], {})}, 0)
    assert (early - found[0]).abs().max() > 1e-6 and (early - base[0]).abs().max() > 1e-6
    surgery.tune(pipeline, strength=0.0)
    assert torch.equal(draw(pipeline, arguments, 0), base[0])
