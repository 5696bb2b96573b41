"""NAG, VSF, TACA, words and shares, held to the papers' formulas in float64."""

import pytest
import torch
from diffusers.models.attention_processor import Attention, JointAttnProcessor2_0
from entmax import entmax_bisect

from surgery.nn.additions import PADDING, START, WORD, Teller, Told, led_away
from surgery.nn.backbones.cross import PladisAttention
from surgery.nn.backbones.sd3 import PladisSD3Attention
from surgery.nn.joint import attend_jointly
from surgery.nn.operators import ADDITIONS

BATCH, HEADS, QUERIES, PROMPT, NEGATIVE, CHANNELS = 3, 2, 5, 6, 4, 8
START_ROW = 1  # the first row is CFG's without a prompt
ACTIVE = torch.tensor([True, False])
ATTENDED = torch.tensor([[True, True, True, False]]).expand(BATCH, -1)
KINDS = torch.tensor([[START, WORD, WORD, PADDING, PADDING, PADDING, START, WORD, PADDING, PADDING]]).expand(BATCH, -1)


NOW = Teller()  # that of every module here


@pytest.fixture(autouse=True)
def told():
    """The negative prompt of each test."""
    NOW.told = Told(NEGATIVE, START_ROW, ACTIVE, ATTENDED, KINDS)


def tensors(queries=QUERIES, keys=PROMPT + NEGATIVE):
    generator = torch.Generator().manual_seed(0)
    return [2 * torch.randn(BATCH, HEADS, length, CHANNELS, generator=generator) for length in (queries, keys, keys)]


def cross(scale=0.0, **additions):
    module = Attention(query_dim=16, cross_attention_dim=12, heads=HEADS, dim_head=CHANNELS)
    module = PladisAttention.convert(module, "pladis", scale=scale)
    for name, settings in additions.items():
        module.add(name, **settings)
    module.pladis_teller = NOW
    return module


def joint(scale=0.0, **additions):
    module = Attention(
        query_dim=16, added_kv_proj_dim=16, heads=HEADS, dim_head=CHANNELS, context_pre_only=False, out_dim=16
    )
    module.set_processor(JointAttnProcessor2_0())
    module = PladisSD3Attention.convert(module, "pladis", scale=scale)
    for name, settings in additions.items():
        module.add(name, **settings)
    module.pladis_teller = NOW
    return module


def attention(query, key, value, bias=0.0, scale=0.0):
    """Softmax attention in float64, and PLADIS by the entmax package where it has a scale."""
    z = query.double() @ key.double().transpose(-1, -2) * CHANNELS**-0.5 + bias
    dense = z.softmax(-1) @ value.double()
    if not scale:
        return dense
    return dense + scale * (entmax_bisect(z, 1.5, n_iter=60) @ value.double() - dense)


def nag(positive, negative, phi, tau, blend):
    """NAG's method section: extrapolate, bound by the ratio of L1 norms over a token's channels, blend."""
    positive, negative = (z.transpose(1, 2).flatten(2) for z in (positive, negative))
    led = positive + phi * (positive - negative)
    ratio = led.abs().sum(-1, keepdim=True) / positive.abs().sum(-1, keepdim=True)
    led = led * ratio.clamp(max=tau) / ratio
    return (blend * led + (1 - blend) * positive).unflatten(-1, (HEADS, CHANNELS)).transpose(1, 2)


def released_nag(positive, negative, nag_scale, tau, alpha):
    """As the authors' released code has it, whose scale is one more, with the L1 norm of the paper."""
    guidance = positive * nag_scale - negative * (nag_scale - 1)
    scale = guidance.norm(p=1, dim=-1, keepdim=True) / positive.norm(p=1, dim=-1, keepdim=True)
    guidance = guidance * torch.minimum(scale, scale.new_ones(1) * tau) / scale
    return guidance * alpha + positive * (1 - alpha)


def of_rows(changed, plain):
    """The one row with a negative prompt changed: of three the second, as the first has no prompt at all."""
    return torch.cat([plain[:1], changed[1:2], plain[2:]])


@pytest.mark.parametrize("tau", [1.2, 100.0])
def test_nag_is_the_released_code_with_a_scale_one_larger(tau):
    positive, negative = torch.randn(2, 2, 1, 5, 8, dtype=torch.float64)
    numbers = [torch.tensor(number) for number in (4.0, tau, 0.25)]
    expected = released_nag(positive[:, 0], negative[:, 0], 5.0, tau, 0.25)
    assert (led_away(positive, negative, *numbers)[:, 0] - expected).abs().max() < 1e-6


@pytest.mark.parametrize("scale", [0.0, 1.5])
def test_nag_in_cross_attention_leads_the_rows_that_have_a_negative_prompt(scale):
    query, key, value = tensors()
    module = cross(scale, nag={"phi": 4.0, "tau": 1.5, "blend": 0.5})
    found = module.attend(query, key, value)
    positive = attention(query, key[:, :, :PROMPT], value[:, :, :PROMPT], scale=scale)
    negative = attention(query, key[:, :, PROMPT:], value[:, :, PROMPT:], scale=scale)
    expected = of_rows(nag(positive, negative, 4.0, 1.5, 0.5), positive)
    assert (found - expected).abs().max() < 1e-4 < (found - positive).abs().max()
    NOW.told = Told()
    alone = module.attend(query, key[:, :, :PROMPT].contiguous(), value[:, :, :PROMPT].contiguous())
    assert torch.equal(found[[0, 2]], alone[[0, 2]])  # to the bit


@pytest.mark.parametrize("scale", [0.0, 1.5])
def test_vsf_turns_the_values_of_negative_tokens_but_padding(scale):
    query, key, value = tensors()
    found = cross(scale, vsf={"flip": 2.0, "offset": 0.3}).attend(query, key, value)
    turned = torch.cat([value[:, :, :PROMPT], -2.0 * value[:, :, PROMPT:]], dim=2)
    bias = torch.tensor([0.0] * PROMPT + [-0.3] * 3 + [-torch.inf], dtype=torch.float64)
    plain = attention(query, key[:, :, :PROMPT], value[:, :, :PROMPT], scale=scale)
    expected = of_rows(attention(query, key, turned, bias, scale), plain)
    assert (found - expected).abs().max() < 1e-4 < (found - plain).abs().max()


AREAS = torch.tensor([[True, True, False, False, True], [False, True, True, False, False]])  # of two tokens each


def regional(z, value, base, prompt):
    """Softmax over the prompt's keys, led to that over its regions' by 1 - base where a query lies in one."""
    seen = AREAS.repeat_interleave(2, 0).T  # (queries, the regions' tokens)
    plain = z[..., :prompt].softmax(-1) @ value[:, :, :prompt]
    own = torch.where(seen, z[..., prompt:], -torch.inf).softmax(-1).nan_to_num() @ value[:, :, prompt:]
    inside = AREAS.any(0)[:, None]
    return torch.where(inside, base * plain + (1 - base) * own, plain), plain


def test_regions_in_cross_attention_are_their_own_prompts():
    NOW.told = Told(NEGATIVE, START_ROW, torch.ones(2, dtype=torch.bool), lengths=(2, 2), areas=(AREAS,))
    query, key, value = tensors()
    found = cross(regions={"base": 0.3}).attend(query, key, value)
    z = query.double() @ key.double().transpose(-1, -2) * CHANNELS**-0.5
    expected, plain = regional(z, value.double(), 0.3, PROMPT)
    expected = torch.cat([plain[:START_ROW], expected[START_ROW:]])
    assert (found - expected).abs().max() < 1e-5 < (found - plain).abs().max()


@pytest.mark.parametrize("text_first", [True, False])
def test_regions_in_joint_attention_see_themselves_and_their_part_of_the_image(text_first):
    NOW.told = Told(NEGATIVE, 0, torch.ones(BATCH, dtype=torch.bool), lengths=(2, 2), areas=(AREAS,))
    text, length = PROMPT + NEGATIVE, PROMPT + NEGATIVE + QUERIES
    query, key, value = tensors(length, length)
    found = attend_jointly(joint(regions={"base": 0.3}), query, key, value, text, text_first)
    order = list(range(length)) if text_first else [*range(QUERIES, length), *range(QUERIES)]  # text, then image
    query, key, value, found = (tensor[:, :, order].double() for tensor in (query, key, value, found))
    z = query @ key.transpose(-1, -2) * CHANNELS**-0.5
    region = torch.tensor([0] * PROMPT + [1, 1, 2, 2])
    allowed = torch.zeros(3, length, length, dtype=torch.bool)  # of the prompt's pass, and of the regions'
    allowed[0, :, text:] = allowed[0, :, :PROMPT] = True
    seen = AREAS.repeat_interleave(2, 0)  # (regions' tokens, image's tokens)
    allowed[1, PROMPT:text, PROMPT:text] = region[PROMPT:, None] == region[PROMPT:]
    allowed[1, PROMPT:text, text:], allowed[1, text:, PROMPT:text] = seen, seen.T
    allowed[1, text:, text:] = True
    plain, own = (torch.where(one, z, -torch.inf).softmax(-1).nan_to_num() @ value for one in allowed[:2])
    expected = torch.where(AREAS.any(0)[:, None], 0.3 * plain[:, :, text:] + 0.7 * own[:, :, text:], plain[:, :, text:])
    whole = torch.cat([plain[:, :, :PROMPT], own[:, :, PROMPT:text], expected], dim=2)
    assert (found - whole).abs().max() < 1e-5 < (found - plain).abs().max()


@pytest.mark.parametrize("kept", [0.0, 0.25])
def test_words_multiplies_the_weights_of_all_other_tokens(kept):
    NOW.told = Told(kinds=KINDS[:, :PROMPT])
    query, key, value = tensors(keys=PROMPT)
    found = cross(words={"kept": kept}).attend(query, key, value)
    weights = (query.double() @ key.double().transpose(-1, -2) * CHANNELS**-0.5).exp()
    weights = weights * torch.tensor([kept, 1, 1, kept, kept, kept], dtype=torch.float64)
    expected = weights / weights.sum(-1, keepdim=True) @ value.double()
    assert (found - expected).abs().max() < 1e-5


def test_shares_keeps_the_softmaxs_shares_and_is_sparse_within():
    NOW.told = Told(kinds=KINDS[:, :PROMPT])
    query, key, value = tensors(keys=PROMPT)
    found = cross(1.5, shares={}).attend(query, key, value)
    weights = (query.double() @ key.double().transpose(-1, -2) * CHANNELS**-0.5).softmax(-1)
    expected = 0.0
    for kind in (START, WORD, PADDING):
        at = KINDS[0, :PROMPT] == kind
        part = attention(query, key[:, :, at], value[:, :, at], scale=1.5)
        expected = expected + weights[..., at].sum(-1, keepdim=True) * part
    assert (found - expected).abs().max() < 1e-5
    dense = cross(0.0, shares={}).attend(query, key, value)
    assert (dense - attention(query, key, value)).abs().max() < 1e-5


IMAGE = 7


def parts(tensor, text_first):
    """(prompt, negative, image) of a joint sequence."""
    if text_first:
        return tensor.split((PROMPT, NEGATIVE, IMAGE), dim=2)
    image, prompt, negative = tensor.split((IMAGE, PROMPT, NEGATIVE), dim=2)
    return prompt, negative, image


def over(query, texts, image, bias=0.0):
    """Attention of `query` to the named parts; texts, image: (key, value) each."""
    key, value = (torch.cat([part[index] for part in (*texts, image)], dim=2) for index in (0, 1))
    return attention(query, key, value, bias)


@pytest.mark.parametrize("text_first", [True, False])
@pytest.mark.parametrize("name", ["nag", "vsf"])
def test_joint_attention_has_two_texts_that_do_not_see_each_other(name, text_first):
    sequence = tensors(PROMPT + NEGATIVE + IMAGE, PROMPT + NEGATIVE + IMAGE)
    query, key, value = (parts(tensor, text_first) for tensor in sequence)
    settings = {"nag": {"phi": 4.0, "tau": 1.5, "blend": 0.5}, "vsf": {"flip": 2.0, "offset": 0.3}}[name]
    found = attend_jointly(joint(**{name: settings}), *sequence, PROMPT + NEGATIVE, text_first)
    prompt, negative, image = zip(key, value, strict=True)
    expected_prompt = over(query[0], [prompt], image)
    expected_negative = over(query[1], [negative], image)
    positive = over(query[2], [prompt], image)
    if name == "nag":
        changed = nag(positive, over(query[2], [negative], image), 4.0, 1.5, 0.5)
    else:
        bias = torch.tensor([0.0] * PROMPT + [-0.3] * 3 + [-torch.inf] + [0.0] * IMAGE, dtype=torch.float64)
        changed = over(query[2], [prompt, (negative[0], -2.0 * negative[1])], image, bias)
    of_prompt, of_negative, of_image = parts(found, text_first)
    assert (of_prompt - expected_prompt).abs().max() < 1e-5
    assert (of_negative - expected_negative)[START_ROW:].abs().max() < 1e-5
    assert (of_image - of_rows(changed, positive)).abs().max() < 1e-5 < (of_image - positive).abs().max()


@pytest.mark.parametrize("text_first", [True, False])
def test_taca_multiplies_the_images_scores_with_the_text_alone(text_first):
    NOW.told = Told(kinds=KINDS[:, :PROMPT])
    sequence = tensors(PROMPT + IMAGE, PROMPT + IMAGE)
    order = slice(0, PROMPT) if text_first else slice(IMAGE, None)
    is_text = torch.zeros(PROMPT + IMAGE, dtype=torch.bool)
    is_text[order] = True
    query, key, value = (tensor.double() for tensor in sequence)
    z = query @ key.transpose(-1, -2) * CHANNELS**-0.5
    z = torch.where(~is_text[:, None] & is_text, 1.3 * z, z)
    found = attend_jointly(joint(taca={"gamma": 1.3}), *sequence, PROMPT, text_first)
    assert (found - z.softmax(-1) @ value).abs().max() < 1e-5
    words = torch.zeros(PROMPT + IMAGE, dtype=torch.float64)
    words[order] = torch.where(KINDS[0, :PROMPT] == WORD, 0.0, -torch.inf)
    z = torch.where(is_text[:, None], z, z + words)
    found = attend_jointly(joint(taca={"gamma": 1.3}, words={}), *sequence, PROMPT, text_first)
    assert (found - z.softmax(-1) @ value).abs().max() < 1e-5


@pytest.mark.parametrize("name", ADDITIONS)
def test_its_off_values_are_attention_without_it(name):
    query, key, value = tensors()
    make = joint if name == "taca" else cross
    module = make(1.0, **{name: ADDITIONS[name].off})
    NOW.told = NOW.told if ADDITIONS[name].role == "negative" else Told(kinds=KINDS)
    if name == "taca":
        NOW.told = Told()
        sequence = tensors(PROMPT + IMAGE, PROMPT + IMAGE)
        expected = attend_jointly(joint(1.0), *sequence, PROMPT, True)
        found = attend_jointly(module, *sequence, PROMPT, True)
    else:
        length = PROMPT if ADDITIONS[name].role == "negative" else PROMPT + NEGATIVE
        expected = cross(1.0).attend(query, key[:, :, :length], value[:, :, :length])
        found = module.attend(query, key, value)
    assert (found - expected).abs().max() < 1e-5


def test_words_without_a_pipeline_that_tells_says_what_to_do():
    NOW.told = Told()
    with pytest.raises(ValueError, match="which tokens are words"):
        cross(words={}).attend(*tensors())


def test_settings_that_it_has_not_are_refused_and_nothing_is_added():
    module = cross()
    for settings, words in (({"tau": "much"}, "tau"), ({"tau": -1.0}, "tau"), ({"beta": 1.0}, "beta")):
        with pytest.raises(ValueError, match=words):
            module.add("nag", **settings)
    assert not module.pladis_additions and not any("tau" in name for name, _ in module.named_buffers())
