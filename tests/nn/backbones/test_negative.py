"""Negative prompts in attention on every backbone that has them, and the reason on those that do not."""

import pytest
import torch

import surgery
from surgery.nn import backbone_of
from surgery.nn.prompts import Prompts

from ...quick import quick
from . import FAMILIES
from .checks import denoiser, draw, forward, predicted, recorded_call
from .test_backbones import gap

JOINT = [one for one in FAMILIES if one.is_joint and one.compiles and one.name not in ("z_image", "qwen_image")]
QUICK = ("flux", "sd3", "qwen_image", "ltx", "wan_from_image", "pixart", "chroma")
PARAMETERS = [one if one.name in QUICK else pytest.param(one, marks=pytest.mark.slow) for one in FAMILIES]


@pytest.mark.parametrize("family", PARAMETERS, ids=str)
def test_a_negative_prompt_goes_the_prompts_way_through_the_model(family):
    """As the prompt itself it changes nothing, by whatever projections, places, masks and blocks; another one does."""
    pipeline, arguments = family.build()
    call = recorded_call(pipeline, arguments) if family.draws else arguments
    base, model = forward(pipeline, call), denoiser(pipeline)
    if isinstance(call.get("encoder_hidden_states"), tuple):  # Cosmos 2.5's, of text and image
        text = call["encoder_hidden_states"][0]
        surgery.patch(pipeline, operator="nag")
        model.tell(Prompts(negative=text, active=torch.ones(len(text), dtype=torch.bool)))
        with pytest.raises(ValueError, match="two parts"):
            forward(pipeline, call)
        return
    same, other, short = said_again(family, call)
    active = same.active
    surgery.patch(pipeline, operator="nag", phi=8.0, blend=1.0)
    assert gap(forward(pipeline, call), base) < 2e-5
    model.tell(same)
    assert gap(forward(pipeline, call), base) < 1e-4
    for negative in (other, short):
        model.tell(negative)
        assert gap(forward(pipeline, call), base) > 1e-3
    model.tell(other._replace(active=~active))
    assert gap(forward(pipeline, call), base) < 2e-5
    surgery.unpatch(pipeline)
    surgery.patch(pipeline, operator="vsf", flip=0.0, offset=1e30)
    model.tell(other)
    assert gap(forward(pipeline, call), base) < 2e-5
    surgery.tune(pipeline, flip=2.0, offset=0.1)
    assert gap(forward(pipeline, call), base) > 1e-3
    surgery.unpatch(pipeline)
    assert torch.equal(forward(pipeline, call), base)


@pytest.mark.parametrize("family", quick(JOINT, *(one for one in JOINT if one.name == "flux")), ids=str)
def test_another_negative_prompt_of_its_length_needs_no_other_graph(family):
    pipeline, arguments = family.build()
    call = recorded_call(pipeline, arguments) if family.draws else arguments
    _, other, _ = said_again(family, call)
    surgery.patch(pipeline, operator="nag", phi=8.0, blend=1.0)
    model = denoiser(pipeline)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    model.tell(other)
    first = predicted(compiled, call)
    assert gap(first, forward(pipeline, call)) < 1e-4
    model.tell(other._replace(negative=-other.negative))
    with torch.compiler.set_stance("fail_on_recompile"):
        second = predicted(compiled, call)
    assert gap(second, forward(pipeline, call)) < 1e-4 < 1e-3 < gap(second, first)


@pytest.mark.parametrize("family", PARAMETERS, ids=str)
def test_a_regional_prompt_goes_the_same_way_and_each_by_itself(family):
    """The prompt itself, everywhere, changes nothing; of two regions it is all one which is named first."""
    pipeline, arguments = family.build()
    call = recorded_call(pipeline, arguments) if family.draws else arguments
    call = {name: value for name, value in call.items() if not name.startswith("image_cond")}
    if isinstance(call.get("encoder_hidden_states"), tuple):
        pytest.skip("its text is of two parts, which is refused above")
    base, model = forward(pipeline, call), denoiser(pipeline)
    same, other, _ = said_again(family, call)
    layers = ["*.attn2"] if "audio_hidden_states" in call else "all"
    surgery.patch(pipeline, operator="regions", base=0.0, layers=layers)
    model.tell(same._replace(areas=torch.ones(1, 8, 8, dtype=torch.bool)))
    assert gap(forward(pipeline, call), base) < 1e-4
    left = torch.zeros(8, 8, dtype=torch.bool)
    left[:, :4] = True
    drawn = []
    for first, second, areas in ((same, other, [left, ~left]), (other, same, [~left, left])):
        dim = model.text_dim
        mask = None if same.mask is None else torch.cat([same.mask, same.mask], dim=1)
        more = tuple(torch.cat(pair, dim=pair[0].ndim - 2) for pair in zip(first.more, second.more, strict=True))
        both = torch.cat([first.negative, second.negative], dim=dim)
        model.tell(Prompts(both, mask, active=same.active, more=more, areas=torch.stack(areas)))
        drawn.append(forward(pipeline, call))
    assert gap(drawn[0], drawn[1]) < 1e-4 < 1e-3 < gap(drawn[0], base)
    surgery.tune(pipeline, base=1.0)
    assert gap(forward(pipeline, call), base) < 2e-5
    surgery.unpatch(pipeline)


PROMPTED = [
    pytest.param(one, marks=() if one.name == "flux" else pytest.mark.slow)
    for one in FAMILIES
    if one.name in ("flux", "flux2", "sd3", "qwen_image", "pixart", "sana", "ltx", "wan", "mochi", "hunyuan_video")
]


@pytest.mark.parametrize("family", PROMPTED, ids=str)
def test_a_pipeline_encodes_it_by_its_own_encoders(family):
    """An empty one changes nothing, another does."""
    pipeline, arguments = family.build()
    arguments = {name: value for name, value in arguments.items() if name != "negative_prompt"}
    surgery.patch(pipeline, operator="nag", phi=20.0, blend=1.0)
    base = draw(pipeline, arguments)
    surgery.negative(pipeline, "")
    assert torch.equal(draw(pipeline, arguments), base)
    surgery.negative(pipeline, "blurry, ugly")
    assert (draw(pipeline, arguments) - base).abs().max() > 1e-4


def said_again(family, call):
    """Prompts of a call: its own text, another one, and half of that."""
    patched = backbone_of(family.model_class).patched
    text, dim = call[patched.text], patched.text_dim
    mask = next((call[name] for name in (*patched.text_masks, "attention_mask") if name in call), None)
    more = [call["audio_encoder_hidden_states"]] if "audio_encoder_hidden_states" in call else []
    more = more or call.get("text_encoder_layers", [])
    if "encoder_hidden_states_llama3" in call:
        more = [call["encoder_hidden_states_llama3"].transpose(0, 1)]
    if isinstance(text, list):
        lengths = torch.tensor([len(one) for one in text])
        text = torch.nn.utils.rnn.pad_sequence(text, batch_first=True)
        mask = torch.arange(text.shape[1]) < lengths[:, None]
    if "text_lens" in call:
        mask = torch.arange(text.shape[1]) < call["text_lens"][:, None]
    keywords = call.get("joint_attention_kwargs") or {}
    if "attention_mask" in keywords:
        mask = keywords["attention_mask"][:, 0, 0]
    mask = mask if mask is None else mask[:, : text.shape[dim]]
    same = Prompts(text, mask, active=torch.ones(len(text), dtype=torch.bool), more=tuple(more))
    other = same._replace(negative=text.flip(-1), more=tuple(one.flip(-1) for one in more))
    half = max(1, text.shape[dim] // 2)
    short = other._replace(
        negative=other.negative.narrow(dim, text.shape[dim] - half, half),
        mask=mask if mask is None else mask[:, -half:],
        more=tuple(one.narrow(one.ndim - 2, text.shape[dim] - half, half) for one in other.more),
    )
    return same, other, short


def test_in_joint_attention_every_block_has_it():
    family = next(one for one in FAMILIES if one.name == "flux")
    pipeline, _ = family.build()
    with pytest.raises(surgery.InputError, match="every block of joint attention"):
        surgery.patch(pipeline, operator="nag", blocks="double")
    surgery.patch(pipeline, operator="taca", blocks="double")
