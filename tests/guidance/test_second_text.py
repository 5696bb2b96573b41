"""ERG's part in the text encoders: what they give at another temperature, and what W is given of it."""

import copy

import pytest
import torch
import torch.nn.functional as F

import surgery
from surgery.errors import InputError, UnsupportedModelError
from surgery.guidance.attaching import driver_of, guided
from surgery.models.tempered import second_text, tempered, text_attention, text_encoders
from surgery.models.twofold import Twofold, is_twofold

from ..conftest import PROMPTS
from ..models import test_encoders as several
from ..nn.backbones import FAMILIES
from ..nn.backbones.checks import denoiser
from ..nn.backbones.parts import t5_text
from ..nn.backbones.video import wan22
from ..quick import quick
from ..tiny import clip_text, with_controlnet
from .oracles import calls_of_first_step, sampled
from .test_methods import CALL
from .test_perturbing import of_prompt

TAU = 0.2
BUILT = {family.name: family.build for family in FAMILIES if family.draws}
READ = ("sdxl", "pixart", "flux", "flux2", "sd3", "qwen_image", "ltx", "wan", "mochi", "hunyuan_video")  # prompts


def attended(layer, states, heads, names, scale, added):
    """A layer's self-attention in float64 by its four projections. added: to the scores, (heads, tokens, tokens)."""
    query, key, value = (getattr(layer, name)(states).unflatten(-1, (heads, -1)).transpose(1, 2) for name in names[:3])
    weights = (scale * query @ key.transpose(-1, -2) + added).softmax(-1)
    return getattr(layer, names[3])((weights @ value).transpose(1, 2).flatten(2))


def clip_by_hand(encoder, ids, tau, layers):
    """CLIP's last hidden state, (batch, tokens, channels) float64; tau in the layers of that range."""
    model = copy.deepcopy(encoder).double()
    model = getattr(model, "text_model", model)
    states = model.embeddings.token_embedding(ids) + model.embeddings.position_embedding.weight[: ids.shape[1]]
    causal = torch.full((ids.shape[1], ids.shape[1]), -torch.inf).double().triu(1)
    for number, layer in enumerate(model.encoder.layers):
        heads = layer.self_attn.num_heads
        scale = (states.shape[-1] // heads) ** -0.5 * (tau if number in layers else 1.0)
        names = ("q_proj", "k_proj", "v_proj", "out_proj")
        states = states + attended(layer.self_attn, layer.layer_norm1(states), heads, names, scale, causal)
        hidden = layer.mlp.fc1(layer.layer_norm2(states))
        quick_gelu = model.config.hidden_act == "quick_gelu"
        states = states + layer.mlp.fc2(hidden * torch.sigmoid(1.702 * hidden) if quick_gelu else F.gelu(hidden))
    return model.final_layer_norm(states)


def t5_by_hand(encoder, ids, tau, layers):
    """T5's; its places are added to the scores as they are, whatever tau."""
    model = copy.deepcopy(encoder).double()
    config, states, bias = model.config, model.shared(ids), None

    def normed(norm, given):
        return norm.weight * given * (given.square().mean(-1, keepdim=True) + config.layer_norm_epsilon).rsqrt()

    for number, block in enumerate(model.encoder.block):
        attention, feed = block.layer[0].SelfAttention, block.layer[1]
        bias = attention.compute_bias(ids.shape[1], ids.shape[1])[0] if bias is None else bias
        scale = tau if number in layers else 1.0
        given = normed(block.layer[0].layer_norm, states)
        states = states + attended(attention, given, config.num_heads, "qkvo", scale, bias)
        given, dense = normed(feed.layer_norm, states), feed.DenseReluDense
        states = states + dense.wo(F.gelu(dense.wi_0(given), approximate="tanh") * dense.wi_1(given))
    return normed(model.encoder.final_layer_norm, states)


class Pipeline:
    """What of a pipeline second_text asks."""

    def __init__(self, **components):
        self.components = components


@pytest.mark.parametrize("layers", [None, [1, None], [0, 1]], ids=str)
@pytest.mark.parametrize(("build", "by_hand"), [(clip_text, clip_by_hand), (t5_text, t5_by_hand)])
def test_a_tempered_encoder_is_the_brute_force_and_none_besides_is_changed(build, by_hand, layers):
    encoder, ids = build(), torch.randint(1, 90, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in encoder.parameters():  # scores that a temperature shows in
            parameter.mul_(3.0 if parameter.ndim == 2 else 1.0)
        chosen = range(*(layers or [0, 2])[:1], (layers or [0, 2])[1] or 2)
        before = encoder(ids).last_hidden_state
        with second_text(Pipeline(text_encoder=encoder), TAU, layers):
            found = encoder(ids).last_hidden_state
        expected = by_hand(encoder, ids, TAU, chosen)
        assert torch.equal(found.plain, before) and torch.equal(encoder(ids).last_hidden_state, before)
    size = expected.square().mean().sqrt()
    assert (found.other - expected).abs().max() < 1e-5 * size
    assert (by_hand(encoder, ids, 1.0, chosen) - before).abs().max() < 1e-5 * size
    assert (found.other - before).abs().max() > 1e-2 * size


def test_chatglms_queries_are_scaled_since_it_has_no_factor(monkeypatch):
    """Kolors' encoder, against the same with the factor that torch takes."""
    from diffusers.pipelines.kolors.text_encoder import ChatGLMConfig, ChatGLMModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "ffn_hidden_size": 16, "kv_channels": 8, "num_attention_heads": 2, "seq_length": 8}
    config = ChatGLMConfig(**sizes, num_layers=2, padded_vocab_size=64, original_rope=True, add_qkv_bias=True)
    encoder, ids = ChatGLMModel(config).eval(), torch.arange(12).view(2, 6)
    for parameter in encoder.parameters():  # it leaves its norms as memory has them
        torch.nn.init.normal_(parameter, std=0.5)
    given = {"attention_mask": torch.ones_like(ids), "output_hidden_states": True}
    given["position_ids"] = torch.arange(6).expand(2, 6)
    stock = F.scaled_dot_product_attention
    with torch.no_grad():
        with second_text(Pipeline(text_encoder=encoder), TAU):
            found = encoder(input_ids=ids, **given).hidden_states[-1]
        monkeypatch.setattr(
            F, "scaled_dot_product_attention", lambda *a, **k: stock(*a, **k, scale=TAU * a[0].shape[-1] ** -0.5)
        )
        expected = encoder(input_ids=ids, **given).hidden_states[-1]
    assert torch.allclose(found.other, expected, atol=1e-6) and not torch.allclose(found.plain, expected, atol=1e-4)


def factors(pipeline):
    """Of every text encoder: its layers' factors, its tensors and its hooks."""
    for encoder in text_encoders(pipeline).values():
        for modules in text_attention(encoder).values():
            yield from (getattr(one, "scaling", getattr(one, "scale", None)) for one in modules)
        yield from encoder.state_dict().values()
        yield from (len(one._forward_hooks) + len(one._forward_pre_hooks) for one in encoder.modules())


@pytest.fixture
def untouched(pipeline):
    """The shapes pipeline, whose encoders are bit for bit what they were when the test ends."""
    before = [copy.deepcopy(one) for one in factors(pipeline)]
    yield pipeline
    after = list(factors(pipeline))
    assert len(after) == len(before) > 50
    pairs = list(zip(before, after, strict=True))
    assert all(torch.equal(*pair) if torch.is_tensor(pair[0]) else pair[0] == pair[1] for pair in pairs)


def given_to(model, action):
    """The arguments of each of a model's calls while `action` runs, with what it gave."""
    calls, forward = [], model.forward

    def recording(*args, **kwargs):
        assert not is_twofold([args, kwargs])
        calls.append((args, kwargs, forward(*args, **kwargs)))
        return calls[-1][2]

    model.forward = recording
    try:
        action()
    finally:
        del model.forward
    return calls


def test_tau_c_of_one_is_none_and_what_fails_leaves_the_encoders_as_they_were(untouched):
    with guided(untouched, {"method": "erg"}):
        plain = sampled(untouched, CALL)[0]
    with guided(untouched, {"method": "erg", "tau_c": 1.0, "text_layers": [0, 1]}):
        assert torch.equal(sampled(untouched, CALL)[0], plain)
    with guided(untouched, {"method": "erg", "tau_c": TAU}):
        assert not torch.equal(sampled(untouched, CALL)[0], plain)
        with pytest.raises(ValueError, match="height"):
            sampled(untouched, {**CALL, "height": 63})
    with guided(untouched, {"method": "erg"}):
        assert torch.equal(sampled(untouched, CALL)[0], plain)


@pytest.mark.parametrize("guidance_scale", [4.0, 1.0])
def test_w_is_given_each_images_prompt_so_encoded_and_all_else_as_ever(untouched, guidance_scale):
    """With negative prompts of each image's own, and two images a prompt, in CFG's one batch."""
    call = {**CALL, "num_inference_steps": 1, "guidance_scale": guidance_scale, "num_images_per_prompt": 2}
    call |= {"negative_prompt": ["a blue circle", "a green square"]} if guidance_scale > 1 else {}
    pipeline, unet = untouched, untouched.unet
    given = calls_of_first_step(pipeline, call)[0]
    plain = sampled(pipeline, call)[1][0]
    found = []
    with guided(pipeline, {"method": "erg", "tau_c": TAU, "tau": 1.0, "scale": 2.0}) as driver:
        calls = given_to(unet, lambda: found.append(sampled(pipeline, call)[1][0]))
        assert driver.evaluations == 4 * (3 if guidance_scale > 1 else 2)
    assert len(calls) == 2
    ids = pipeline.tokenizer(PROMPTS, padding="max_length", max_length=77, return_tensors="pt").input_ids
    depth = range(pipeline.text_encoder.config.num_hidden_layers)
    text = clip_by_hand(pipeline.text_encoder, ids, TAU, depth).repeat_interleave(2, 0).float()
    ordinary, weak = (kwargs["encoder_hidden_states"] for _, kwargs, _ in calls)
    assert torch.equal(ordinary, given["encoder_hidden_states"])
    assert torch.allclose(weak, text, atol=1e-4) and not torch.allclose(weak, ordinary[-4:], atol=1e-2)
    of_cond = of_prompt(given) if guidance_scale > 1 else given
    with torch.no_grad():
        away = unet(**of_cond)[0] - unet(**{**of_cond, "encoder_hidden_states": text})[0]
    assert away.abs().max() > 1e-2 and torch.allclose(found[0], plain + 2.0 * away, atol=1e-3)


def test_where_cfg_is_two_calls_the_one_without_the_prompt_is_as_ever():
    """Wan, whose negative prompts its T5 reads beside the prompts."""
    pipeline, arguments = BUILT["wan"]()
    arguments = {**arguments, "output_type": "latent", "num_inference_steps": 1, "guidance_scale": 3.0}
    model, given = denoiser(pipeline), calls_of_first_step(pipeline, arguments)
    plain, found = sampled(pipeline, arguments)[1][0], []
    with guided(pipeline, {"method": "erg", "tau_c": TAU, "tau": 1.0, "scale": 2.0}):
        calls = given_to(model, lambda: found.append(sampled(pipeline, arguments)[1][0]))
    texts = [kwargs["encoder_hidden_states"] for _, kwargs, _ in calls]
    with_prompt, without = (call["encoder_hidden_states"] for call in given)
    assert len(texts) == 3 and torch.equal(texts[0], with_prompt) and torch.equal(texts[2], without)
    with torch.no_grad(), tempered(pipeline.text_encoder, TAU):
        expected = calls_of_first_step(pipeline, arguments)[0]["encoder_hidden_states"]
    assert torch.equal(texts[1], expected) and not torch.equal(expected, with_prompt)
    outputs = [torch.as_tensor(result[0]) for _, _, result in calls]
    assert torch.allclose(found[0], plain + 2.0 * (outputs[0] - outputs[1]), atol=1e-4)


PIPELINES = {name: BUILT[name] for name in READ} | {made.__name__: made for made in several.PIPELINES}
PIPELINES |= {"wan22": wan22}


@pytest.mark.parametrize("name", quick([*PIPELINES], "sdxl", "flux", "hidream", "ltx2", "wan22"))
def test_every_kind_of_encoder_is_tempered_and_what_it_gives_comes_to_w_alone(name):
    """What is given of each encoder is that of the pipeline's own run with all of them tempered."""
    pipeline, arguments, *_ = PIPELINES[name]()
    arguments = {**arguments, "output_type": "latent"}
    model = denoiser(pipeline)
    (normal, *_), encoders = calls_of_first_step(pipeline, arguments), text_encoders(pipeline)
    with guided(pipeline, {"method": "erg", "tau_c": TAU, "tau": 1.0, "layers": "all"}):
        (_, ordinary, _), (_, weak, _), *_ = given_to(model, lambda: sampled(pipeline, arguments))
    for encoder in encoders.values():
        assert text_attention(encoder)
        for modules in text_attention(encoder).values():
            for module in modules:
                factor = "scaling" if hasattr(module, "scaling") else "scale"
                setattr(module, factor, TAU * getattr(module, factor))
    expected = calls_of_first_step(pipeline, arguments)[0]
    alike, other = [], []
    for key, value in expected.items():
        for place, tensor in enumerate(tensors_in(value)):
            mine, its, before = (tensors_in(one[key])[place] for one in (weak, ordinary, normal))
            assert torch.equal(its, before)
            tensor, before = (one[-len(mine) :] if one.shape != mine.shape else one for one in (tensor, before))
            assert torch.allclose(mine, tensor, atol=1e-5), key
            (alike if torch.equal(mine, before) else other).append(key)
    assert alike and other


def tensors_in(value):
    """The tensors in an argument of a denoiser, in order."""
    if torch.is_tensor(value):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [tensor for part in parts for tensor in tensors_in(part)]


def test_what_else_reads_the_text_reads_both(untouched):
    """A ControlNet gives W the residuals of W's text."""
    pipeline = with_controlnet(untouched)
    call = {**CALL, "image": torch.rand(2, 3, 64, 64), "num_inference_steps": 1, "guidance_scale": 1.0}
    with guided(pipeline, {"method": "erg", "tau_c": TAU, "tau": 1.0}):
        (_, ordinary, _), (_, weak, _) = given_to(untouched.unet, lambda: sampled(pipeline, call))
    with tempered(untouched.text_encoder, TAU):
        expected = calls_of_first_step(pipeline, call)[0]
    mine, its, before = (one["down_block_additional_residuals"] for one in (weak, expected, ordinary))
    assert all(torch.allclose(*pair, atol=1e-5) for pair in zip(mine, its, strict=True))
    assert not torch.allclose(mine[-1], before[-1], atol=1e-4)  # the first come before the text


def test_what_the_encoders_read_for_operations_is_the_ordinary_text(untouched):
    """An operation's negative prompt and its words are told as without erg, and go to W as well."""
    surgery.patch(untouched, operator="words")
    told, unet = [], untouched.unet
    tell = unet.tell
    unet.tell = lambda prompts: told.append(prompts) or tell(prompts)
    sampled(untouched, CALL)
    with guided(untouched, {"method": "erg", "tau_c": TAU}):
        given_to(unet, lambda: sampled(untouched, CALL))
    del unet.tell
    before, _, with_erg, _ = told
    assert torch.equal(before.kinds, with_erg.kinds) and type(with_erg.kinds) is torch.Tensor
    surgery.unpatch(untouched)


def test_what_has_no_second_text_is_refused_by_name(untouched):
    with torch.no_grad():
        embeds, negative = untouched.encode_prompt(PROMPTS, "cpu", 1, True)
    given = {**CALL, "prompt": None, "prompt_embeds": embeds, "negative_prompt_embeds": negative}
    with guided(untouched, {"method": "erg", "tau_c": TAU}), pytest.raises(InputError, match="not prompt_embeds"):
        sampled(untouched, given)
    with pytest.raises(InputError, match=r"begins behind the last of \d+ layers"):
        surgery.guide(untouched, "erg", tau_c=TAU, text_layers=[90, None])
    for layers, message in (([3, 3], "holds no layer"), ([1], "at least 2"), ([-1, 2], "greater than or equal to 0")):
        with pytest.raises(InputError, match=message):
            surgery.guide(untouched, "erg", tau_c=TAU, text_layers=layers)
    encoder = untouched.text_encoder
    for other, message in ((torch.nn.Linear(2, 2), "text_encoder of .* is a Linear"), (None, "has none loaded")):
        untouched.text_encoder = other
        with pytest.raises(UnsupportedModelError, match=message):
            surgery.guide(untouched, "erg", tau_c=TAU)
    untouched.text_encoder = encoder
    assert driver_of(untouched) is None


def test_what_an_encoder_writes_is_what_it_writes_without():
    """FLUX.2's may reword the prompt, by its own generate()."""
    pipeline = BUILT["flux2"]()[0]
    encoder, ids = pipeline.text_encoder, torch.arange(5)[None]
    how = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        plain = encoder.generate(ids, **how)
        with second_text(pipeline, 0.01):
            found = encoder.generate(ids, **how)
    assert torch.equal(plain, found) and type(found) is torch.Tensor


def test_a_twofold_goes_through_whatever_a_pipeline_does():
    one, two = torch.randn(2, 3, 4), torch.randn(2, 3, 4)

    def prepared(text):
        whole = torch.cat([torch.zeros_like(text), text.repeat_interleave(2, 0)[::2]])
        parts = [row[:2].to(torch.float64) for row in whole.unbind(0)]
        stacked = F.layer_norm(torch.stack(parts), (4,)) @ torch.ones(4, 4, dtype=torch.float64)
        stacked[0] = stacked[1] if text.shape == whole.shape else 1.0
        stacked += 1.0
        return {"text": (stacked, [stacked.amax(1)]), "rows": len(stacked)}

    found = prepared(Twofold.of(one, two))
    for side, given in (("plain", one), ("other", two)):
        expected = prepared(given)
        assert torch.equal(getattr(found["text"][0], side), expected["text"][0])
        assert torch.equal(getattr(found["text"][1][0], side), expected["text"][1][0]) and found["rows"] == 4
    torch.manual_seed(0)
    noise = torch.randn_like(Twofold.of(one, two)), torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(noise[0], torch.randn_like(one)) and torch.equal(noise[1], torch.rand(1))
    for write in (lambda into, text: into.__setitem__(0, text[0]), lambda into, text: into.copy_(text)):
        with pytest.raises(UnsupportedModelError, match="tau_c: this pipeline writes"):
            write(torch.zeros(2, 3, 4), Twofold.of(one, two))
    with pytest.raises(UnsupportedModelError, match="writes"):
        torch.add(Twofold.of(one, two), 1.0, out=torch.zeros(2, 3, 4))
