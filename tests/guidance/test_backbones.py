"""Every method on every backbone: it composes with PLADIS and GAG, or is refused by name."""

import re

import pytest
import torch

import surgery
from surgery.errors import InputError, UnsupportedModelError
from surgery.guidance.attaching import driver_of
from surgery.guidance.layers import attention_layers, chosen_layers
from surgery.guidance.methods import METHODS
from surgery.nn import backbone_of, is_pladis

from ..nn.backbones import FAMILIES
from ..nn.backbones.checks import denoiser
from ..nn.backbones.family import Family
from ..quick import quick
from .oracles import sampled, weakened_by_hand
from .svd import svd

_ABLE = dict.fromkeys(("pag", "slg"), lambda module: True) | dict.fromkeys(
    ("seg", "oseg"), lambda m: hasattr(m, "to_q")
)
# What the tiny models need to show a method: FreSca's least cutoff takes in all of their frequencies, and windows of
# two tokens do not overlap.
SETTINGS = {"cfg-zero": {"zero_init": 0}, "fresca": {"low": 0.8}, "swg": {"masked": False}}
# CFG where the call that they are built with has none.
WITH_CFG = {
    "flux": {"negative_prompt": ["bad", "worse"], "true_cfg_scale": 3.0},
    "hunyuan_video": {"negative_prompt": ["bad", "worse"], "true_cfg_scale": 3.0},
    "mochi": {"guidance_scale": 4.0},  # there so that diffusers attends to it as one entry
}
GUIDED = [
    *(family for family in FAMILIES if family.draws),
    Family("svd", "UNetSpatioTemporalConditionModel", svd, modules=0),
]


# Each of these has a class, or calls that come as those, of one that is tested always.
_LIKE_OTHERS = ("sdxl", "wan_from_image", "ovis_image", "bria", "bria_fibo")


def by_methods(methods, share=3):
    """Parametrize by backbone and method: quick are all methods on shapes, and of each one in `share` on the others."""
    pairs = [(family, method) for family in GUIDED for method in methods]
    places = [at for at in range(len(pairs)) if (at // len(methods) + at % len(methods)) % share == 0]
    often = {pairs[at] for at in places} | {pair for pair in pairs if pair[0].name == "shapes"}
    wanted = [pair for pair in pairs if pair in often and pair[0].name not in _LIKE_OTHERS]
    return pytest.mark.parametrize(("built", "method"), quick(pairs, *wanted), ids=str, indirect=["built"])


def refusal(family, pipeline, method):
    """A part of the message with which a method is refused on a backbone, by its record, or None."""
    backbone = backbone_of(family.model_class)
    if backbone.unguided:
        return re.escape(backbone.unguided)
    if method in ("sag", "nag") and method not in backbone.own_methods:
        return f"{method} is for"
    if method == "rectified-cfg++" and "FlowMatch" not in type(pipeline.scheduler).__name__:
        return "is for rectified flows"
    if method == "erg" and "Sana" in family.model_class:
        return "no self-attention by softmax"
    return None


@pytest.fixture(scope="module")
def built(request):
    """(Family, its pipeline, the arguments of a call that draws two steps of latents)."""
    pipeline, arguments = request.param.build()
    return request.param, pipeline, {**arguments, "output_type": "latent"}


@pytest.fixture
def tiny(built, request, record_property):
    """As `built`, as it was after each test; what ran is recorded for benchmarks/matrix.py."""
    family, pipeline, _ = built
    record_property("guided_backbone", family.name)
    record_property("method", request.node.callspec.params["method"])
    yield built
    if driver_of(pipeline):
        surgery.unguide(pipeline)
    if any(is_pladis(module) for module in denoiser(pipeline).modules()):
        surgery.unpatch(pipeline)


@pytest.fixture(scope="module")
def unguided():
    """{(backbone, operator): what it draws without guidance}, drawn by the first method that asks."""
    return {}


@by_methods([*METHODS])
def test_it_runs_with_pladis_and_gag_or_is_refused_by_name(tiny, method, record_property, unguided):
    family, pipeline, arguments = tiny
    message = refusal(family, pipeline, method)
    if message:
        record_property("refused", message)
        with pytest.raises((InputError, UnsupportedModelError), match=message):
            surgery.guide(pipeline, method)
        return
    arguments = {**arguments, **WITH_CFG.get(family.name, {})}
    settings = SETTINGS.get(method, {}) if family.name != "shapes" else {}
    for operator in ("pladis", "gag") if family.modules else (None,):
        if operator:
            surgery.patch(pipeline, operator=operator)
        if (family.name, operator) not in unguided:
            unguided[family.name, operator] = sampled(pipeline, arguments)[0]
        plain = unguided[family.name, operator]
        if method == "nag" and operator == "gag":
            with pytest.warns(UserWarning, match="score below GAG alone"):
                surgery.guide(pipeline, method)
        else:
            surgery.guide(pipeline, method, **settings)
        found, _ = sampled(pipeline, arguments)
        assert found.isfinite().all()
        assert torch.equal(found, plain) if method == "cfg" else not torch.equal(found, plain)
        surgery.unguide(pipeline)
        assert torch.equal(sampled(pipeline, arguments)[0], plain)
        if operator:
            surgery.unpatch(pipeline)


@by_methods(["pag", "seg", "oseg", "slg"])
def test_the_weak_branch_has_perturbed_self_attention_and_patched_attention_to_text_at_once(tiny, method):
    """Against the same done by hand, on the patched model and on the stock one."""
    family, pipeline, arguments = tiny
    if method == "pag" and any(layer.kind == "joint" for layer in attention_layers(denoiser(pipeline))):
        pytest.skip("test_loops.py has PAG in joint attention")
    if refusal(family, pipeline, method) or not family.modules:
        pytest.skip("refused there, or there is nothing to patch")
    arguments = {**arguments, "true_cfg_scale": 1.0} if "true_cfg_scale" in arguments else arguments
    layers = ["all"] if method != "slg" else ["mid"]
    outputs, predictions = {}, {}
    for operator in (None, "pladis", "gag"):
        if operator:  # a short step: the paper's scale of 10 multiplies rounding by as much in every layer
            surgery.patch(pipeline, operator=operator, scale=1.0)
        kinds = ("self",) if method == "pag" else ("self", "joint")
        chosen = chosen_layers(denoiser(pipeline), layers, kinds, "self-attention", _ABLE[method])
        told = 4.5 if family.name == "pixart" else None
        outputs[operator] = weakened_by_hand(pipeline, arguments, method, chosen, told)
        if operator:
            surgery.guide(pipeline, method, layers=layers)
            _, predictions[operator] = sampled(pipeline, arguments)
            surgery.unguide(pipeline)
            surgery.unpatch(pipeline)
    for operator, found in predictions.items():
        expected, plain = outputs[operator]["guided"], outputs[operator]["plain"]
        size = expected.square().mean().sqrt()
        assert (found[0] - expected).abs().max() / size < 2e-4
        assert (expected - plain).abs().max() / size > 1e-4  # the perturbation does something
        other = expected - outputs[None]["guided"]
        assert other.abs().max() / size > 1e-4  # and so does the surgery
        assert (outputs[operator]["weak"] - outputs[None]["weak"]).abs().max() / size > 1e-5
