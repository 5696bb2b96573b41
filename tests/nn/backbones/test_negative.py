"""Negative prompts in attention on every backbone that has them, and the reason on those that do not."""

import pytest
import torch

import surgery
from surgery.nn import backbone_of
from surgery.nn.prompts import Prompts

from . import FAMILIES
from .checks import denoiser, forward, recorded_call
from .test_backbones import gap

QUICK = ("flux", "sd3", "qwen_image", "ltx", "wan_from_image", "pixart", "chroma")
PARAMETERS = [one if one.name in QUICK else pytest.param(one, marks=pytest.mark.slow) for one in FAMILIES]


@pytest.mark.parametrize("family", PARAMETERS, ids=str)
def test_a_negative_prompt_goes_the_prompts_way_through_the_model(family):
    """As the prompt itself it changes nothing, by whatever projections, places, masks and blocks; another one does."""
    pipeline, arguments = family.build()
    refusal = backbone_of(family.model_class).patched.no_negative
    if refusal:
        with pytest.raises(surgery.InputError, match=refusal):
            surgery.patch(pipeline, operator="nag")
        return
    call = recorded_call(pipeline, arguments) if family.draws else arguments
    base, model = forward(pipeline, call), denoiser(pipeline)
    text, mask = call["encoder_hidden_states"], call.get(family.mask or "attention_mask")
    if isinstance(text, tuple):  # Cosmos 2.5's, of text and image
        surgery.patch(pipeline, operator="nag")
        model.tell(Prompts(negative=text[0], active=torch.ones(len(text[0]), dtype=torch.bool)))
        with pytest.raises(ValueError, match="two parts"):
            forward(pipeline, call)
        return
    mask = mask if mask is None else mask[:, : text.shape[1]]
    active = torch.ones(text.shape[0], dtype=torch.bool)
    other, short = text.flip(-1), slice(0, max(1, text.shape[1] // 2))
    surgery.patch(pipeline, operator="nag", phi=8.0, blend=1.0)
    assert gap(forward(pipeline, call), base) < 2e-5
    model.tell(Prompts(negative=text, mask=mask, active=active))
    assert gap(forward(pipeline, call), base) < 1e-4
    shorter = mask if mask is None else mask[:, short]
    for negative in (Prompts(other, mask, active=active), Prompts(other[:, short], shorter, active=active)):
        model.tell(negative)
        assert gap(forward(pipeline, call), base) > 1e-3
    model.tell(Prompts(other, mask, active=~active))
    assert gap(forward(pipeline, call), base) < 2e-5
    surgery.unpatch(pipeline)
    surgery.patch(pipeline, operator="vsf", flip=0.0, offset=1e30)
    model.tell(Prompts(other, mask, active=active))
    assert gap(forward(pipeline, call), base) < 2e-5
    surgery.tune(pipeline, flip=2.0, offset=0.1)
    assert gap(forward(pipeline, call), base) > 1e-3
    surgery.unpatch(pipeline)
    assert torch.equal(forward(pipeline, call), base)


def test_in_joint_attention_every_block_has_it():
    family = next(one for one in FAMILIES if one.name == "flux")
    pipeline, _ = family.build()
    with pytest.raises(surgery.InputError, match="every block of joint attention"):
        surgery.patch(pipeline, operator="nag", blocks="double")
    surgery.patch(pipeline, operator="taca", blocks="double")
