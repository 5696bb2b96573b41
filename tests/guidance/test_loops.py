"""Models without a tiny pipeline of their own, in diffusers' loops: every method, and what two calls come to."""

import pytest
import torch

import surgery
from surgery.errors import InputError, UnsupportedModelError
from surgery.guidance.attaching import driver_of
from surgery.guidance.base import Grid, Step
from surgery.guidance.methods import METHODS, guidance_of
from surgery.nn import backbone_of

from ..nn.backbones import FAMILIES
from ..nn.backbones.checks import brute_force, denoiser, forward, recorded_call
from ..nn.backbones.family import Family
from ..quick import taking_turns
from .loops import LOOPS
from .oracles import calls_of_first_step, sampled
from .test_backbones import SETTINGS, refusal

OWN = ("sag", "nag")  # methods of UNets
DISTILLED = "sana_sprint"


def drawn(pipeline, arguments):
    torch.manual_seed(0)  # a scheduler that adds noise of its own
    return sampled(pipeline, arguments)


@pytest.fixture(scope="module")
def built(request):
    """(Name, its pipeline, the arguments of a call)."""
    return request.param, *LOOPS[request.param]()


@pytest.fixture
def looped(built, request, record_property):
    """As `built`, unguided after each test; what ran is recorded for benchmarks/matrix.py."""
    record_property("guided_backbone", built[0])
    record_property("method", request.node.callspec.params["method"])
    yield built
    if driver_of(built[1]):
        surgery.unguide(built[1])
    if type(denoiser(built[1])).__name__.startswith("Pladis"):
        surgery.unpatch(denoiser(built[1]))


@pytest.fixture(scope="module")
def unguided():
    """{backbone: what it draws without guidance}, drawn by the first method that asks."""
    return {}


@pytest.mark.parametrize(
    ("built", "method"), taking_turns(3, [*LOOPS], [name for name in METHODS if name not in OWN]), indirect=["built"]
)
def test_it_runs_in_its_pipelines_loop(looped, method, record_property, unguided):
    name, pipeline, arguments = looped
    model = denoiser(pipeline)
    if message := refusal(Family(name, type(model).__name__, None, modules=0), pipeline, method):
        record_property("refused", message)
        with pytest.raises((InputError, UnsupportedModelError), match=message):
            surgery.guide(pipeline, method)
        return
    if name == "cosmos" and method == "rectified-cfg++":  # whose time is no flow's
        record_property("refused", "another noise level")
        surgery.guide(pipeline, method)
        with pytest.raises(UnsupportedModelError, match="another noise level"):
            drawn(pipeline, arguments)
        return
    if name == DISTILLED and METHODS[method](method=method).needs_pair:
        record_property("refused", "it is distilled, so there is no CFG")
        surgery.guide(pipeline, method, **SETTINGS.get(method, {}))
        with pytest.raises(InputError, match="needs classifier-free guidance"):
            drawn(pipeline, arguments)
        return
    surgery.patch(model, scale=1.0)
    if name not in unguided:
        unguided[name] = drawn(pipeline, arguments)[0]
    plain = unguided[name]
    surgery.guide(pipeline, method, **SETTINGS.get(method, {}))
    found = drawn(pipeline, arguments)[0]
    assert found.isfinite().all()
    # What a guider of the pipeline's own makes of both is not plain CFG.
    assert torch.equal(found, plain) if method == "cfg" else not torch.equal(found, plain)
    made = METHODS[method](method=method)
    evaluations = made.evaluations(name != DISTILLED)
    evaluations += made.asks_with_prompt_alone and backbone_of(type(model).__name__).predicts_sound  # of all rows
    assert driver_of(pipeline).evaluations == evaluations * len(plain) * 2
    surgery.unguide(pipeline)
    assert torch.equal(drawn(pipeline, arguments)[0], plain)


# One of each way: two calls with names and without, C + w (C - U), guiders, one batch, one of lists.
WAYS = (
    "cogview4",
    "glm_image",
    "hunyuan_image",
    "hunyuan_video15",
    "hidream",
    "krea2",
    "z_image",
    "chroma",
)


def way(name):
    """(Pipeline, arguments) of one of WAYS."""
    families = {family.name: family for family in FAMILIES if family.draws}
    if name in families:
        pipeline, arguments = families[name].build()
        return pipeline, {**arguments, "guidance_scale": 3.0}
    return LOOPS[name]()


@pytest.mark.parametrize("name", WAYS)
def test_what_the_scheduler_is_given_is_the_methods_output_whatever_calls_cfg_is(name):
    """SMC-CFG's first step, U + w (C - U - 0.2 sign(C - U)), from the outputs of the plain model."""
    pipeline, arguments = way(name)
    calls = calls_of_first_step(pipeline, arguments)
    with torch.no_grad():
        outputs = [denoiser(pipeline)(**{**call, "return_dict": False})[0] for call in calls]
    outputs = [torch.stack(output) if isinstance(output, list) else output for output in outputs]
    first, second = outputs if len(outputs) == 2 else outputs[0].chunk(2)
    with_first = len(outputs) == 2 or name == "z_image"
    cond, uncond = (one.double() for one in ((first, second) if with_first else (second, first)))
    w = 4.0 if name in ("krea2", "z_image") else 3.0
    away = cond - uncond
    expected = uncond + w * (away - 0.2 * torch.sign(away))
    expected = -expected if name in ("hidream", "z_image") else expected
    surgery.guide(pipeline, "smc-cfg")
    found = sampled(pipeline, arguments)[1][0].double()
    expected = expected.reshape(found.shape)
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


def test_in_a_window_of_cfg_two_calls_come_to_the_output_with_the_prompt():
    pipeline, arguments = LOOPS["cogview4"]()
    surgery.guide(pipeline, "cfg", steps=[1, None])
    limited = sampled(pipeline, arguments)[1]
    surgery.unguide(pipeline)
    plain = sampled(pipeline, arguments)[1]
    cond = forward(pipeline, calls_of_first_step(pipeline, arguments)[0])
    assert torch.allclose(limited[0], cond, atol=1e-5) and not torch.allclose(limited[0], plain[0], atol=1e-3)


def test_a_pipeline_that_runs_no_cfg_in_spite_of_its_scale_says_so():
    families = {family.name: family for family in FAMILIES}
    pipeline, arguments = families["flux"].build()
    arguments = {**arguments, "true_cfg_scale": 4.0}
    surgery.guide(pipeline, "apg")
    with pytest.raises(InputError, match="true_cfg_scale and a negative prompt"):
        sampled(pipeline, arguments)


JOINT = [family for family in FAMILIES if family.is_joint and not backbone_of(family.model_class).unguided]
OFTEN = ("flux", "sd3", "z_image", "prx", "mochi", "krea2")


def identity_among(image, attention):
    """An attention function whose entries from image to image are left out but for the diagonal, by one with a mask.

    image: (number of keys) -> the slice of them that is the image's, None for another attention.
    """

    def masked(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **more):
        where, queries, keys = image(query.shape[2], key.shape[2]), query.shape[2], key.shape[2]
        if where is None:
            return attention(query, key, value, attn_mask=attn_mask, is_causal=is_causal, **more)
        if key.shape[1] != query.shape[1]:
            key, value = (one.repeat_interleave(query.shape[1] // one.shape[1], 1) for one in (key, value))
            more.pop("enable_gqa", None)
        count = where.stop - where.start
        rows = where if queries == keys else slice(0, count)
        kept = torch.ones(queries, keys, dtype=torch.bool)
        kept[rows, where] = torch.eye(count, dtype=torch.bool)
        bias = torch.zeros(queries, keys, dtype=query.dtype).masked_fill(~kept, -torch.inf)
        if attn_mask is not None:
            added = attn_mask
            if attn_mask.dtype == torch.bool:
                added = torch.zeros(attn_mask.shape, dtype=query.dtype).masked_fill(~attn_mask, -torch.inf)
            bias = added + bias
        return attention(query, key, value, attn_mask=bias, **more)

    return masked


@pytest.mark.parametrize(
    "family", [one if one.name in OFTEN else pytest.param(one, marks=pytest.mark.slow) for one in JOINT], ids=str
)
@pytest.mark.parametrize("patched", [False, True])
def test_pags_weak_model_has_the_identity_among_image_tokens_and_text_as_it_was(monkeypatch, family, patched):
    """By brute force: diffusers' own code around softmax, or PLADIS in float64, with a mask from image to image."""
    pipeline, arguments = family.build()
    model, stock = denoiser(pipeline), torch.nn.functional.scaled_dot_product_attention
    call = recorded_call(pipeline, arguments) if family.draws else arguments
    call = {name: value for name, value in call.items() if not name.startswith("image_cond")}  # FLUX.3's: refused
    found, base = [], []
    for entry in family.entries(call):
        length = family.text_length(entry)

        def image(queries, keys, length=length):
            if family.name == "sd3" and keys == queries == 64:  # its self-attention, of the image alone
                return slice(0, keys)
            if not family.is_to_text(length, queries, keys):
                return None
            return slice(length, keys) if family.text_first else slice(0, keys - length)

        def text(query, key, length=length):
            return length if family.is_to_text(length, query.shape[2], key.shape[2]) else None

        attention = brute_force(stock, text, family.text_first, scale=2.0) if patched else stock
        base.append(forward(pipeline, entry))
        monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", identity_among(image, attention))
        found.append(forward(pipeline, entry))
        monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", stock)
    expected, base = torch.cat(found), torch.cat(base)
    if patched:
        surgery.patch(model, scale=2.0)
    weak = weak_output(pipeline, model, call, family)
    size = expected.square().mean().sqrt()
    assert (weak - expected).abs().max() < 1e-3 * size and (expected - base).abs().max() > 1e-3 * size


def weak_output(pipeline, model, call, family):
    """W of PAG on all layers for a call of the denoiser."""
    made = guidance_of({"method": "pag", "layers": "all"}).prepared(model, pipeline)
    backbone = backbone_of(family.model_class)
    start = backbone.image_start and backbone.image_start(model.config, call)
    shape = backbone.grid(model.config, call)
    grid = Grid(*shape, backbone.has_levels, backbone.text_first, start, backbone.fills_up_to)
    with made.weakened(Step(index=0, level=0.5, grid=grid)):
        return forward(pipeline, call)
