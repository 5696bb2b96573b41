"""What FLUX.1 and FLUX.2 have of their own: blocks of one stream, arguments of attention, adapters, caches, hooks."""

import copy
import itertools
import logging
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F

import surgery
from surgery.errors import InputError
from surgery.models.anatomy import attention_sites
from surgery.nn import is_pladis
from surgery.nn.backbones.flux_streams import TEXT_LENGTH

from ...quick import quick
from .checks import brute_force, denoiser, draw, forward, recorded_call
from .flux import flux, flux2_klein
from .test_backbones import gap

BUILDS = {"flux": flux, "flux2": flux2_klein}


@pytest.fixture(scope="module")
def pipelines():
    found = {}
    for name, build in BUILDS.items():
        pipeline, arguments = build()
        found[name] = pipeline, arguments, recorded_call(pipeline, arguments)
    return found


@pytest.fixture
def built(pipelines):
    """{name: (pipeline, the arguments of a call, the denoiser's arguments in it)}; what a test patches is taken out."""
    yield pipelines
    for pipeline, _, _ in pipelines.values():
        if any(is_pladis(module) for module in denoiser(pipeline).modules()):
            surgery.unpatch(pipeline)
        assert not any(module._forward_pre_hooks for module in denoiser(pipeline).modules())


@pytest.fixture(params=BUILDS)
def tiny(request, built):
    return built[request.param]


@pytest.fixture
def heard(monkeypatch, caplog):
    """What diffusers and this project log."""
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    return caplog


def forward_by_brute_force(monkeypatch, pipeline, call, kind="all", **settings):
    """The stock denoiser's output where the attention in blocks of a kind is `brute_force`, and how often it was."""
    sites = [site for site in attention_sites(denoiser(pipeline)) if kind in ("all", site.block)]
    modules = [denoiser(pipeline).get_submodule(site.path) for site in sites]
    inside, used = [], []
    hooks = [module.register_forward_pre_hook(lambda *_: inside.append(True)) for module in modules]
    hooks += [module.register_forward_hook(lambda *_: inside.clear()) for module in modules]
    text_length = call["encoder_hidden_states"].shape[1]

    def text(query, key):
        if not inside or query.shape[2] != key.shape[2]:
            return None
        used.append(query.shape)
        return text_length

    stock = F.scaled_dot_product_attention
    with monkeypatch.context() as patched:
        patched.setattr(F, "scaled_dot_product_attention", brute_force(stock, text, True, **settings))
        try:
            return forward(pipeline, call), len(used)
        finally:
            for hook in hooks:
                hook.remove()


@pytest.mark.parametrize("kind", ["double", "single", "all"])
def test_the_formula_holds_in_the_blocks_of_a_kind_and_the_others_stay_stock_without_a_word(
    monkeypatch, heard, tiny, kind
):
    pipeline, _, call = tiny
    base = forward(pipeline, call)
    expected, times = forward_by_brute_force(monkeypatch, pipeline, call, kind)
    assert times == (4 if kind == "all" else 2) and gap(expected, base) > 1e-3
    surgery.patch(pipeline, layers=kind, scale=2.0)
    assert gap(forward(pipeline, call), expected) < 1e-4
    assert not heard.records
    surgery.unpatch(pipeline)
    surgery.patch(pipeline, blocks=kind, scale=2.0)
    assert gap(forward(pipeline, call), expected) < 1e-4
    surgery.unpatch(pipeline)
    assert torch.equal(forward(pipeline, call), base)


@pytest.mark.parametrize("build,guided", [(flux, False), (flux2_klein, True)])
def test_models_with_and_without_embedded_guidance(monkeypatch, build, guided):
    # the other of the two is what the families have: FLUX.1-schnell and FLUX.2-dev here
    pipeline, arguments = build(guidance_embeds=guided)
    call = recorded_call(pipeline, arguments)
    call["guidance"] = torch.full([2], 4.0) if guided else None
    expected, _ = forward_by_brute_force(monkeypatch, pipeline, call)
    surgery.patch(pipeline, scale=2.0)
    assert gap(forward(pipeline, call), expected) < 1e-4
    if guided:
        assert gap(forward(pipeline, {**call, "guidance": torch.full([2], 1.0)}), expected) > 1e-3


@pytest.mark.parametrize(
    ("additive", "of_keys"),
    quick([(False, True), (False, False), (True, True), (True, False)], (False, True), (True, False)),
)
def test_a_mask_among_the_attention_arguments_takes_text_out_as_it_does_in_diffusers(
    monkeypatch, tiny, additive, of_keys
):
    pipeline, _, call = tiny
    text_length, image_length = call["encoder_hidden_states"].shape[1], call["hidden_states"].shape[1]
    mask = torch.ones(2, text_length + image_length, dtype=torch.bool)
    mask[1, text_length - 7 : text_length] = False
    mask = mask if of_keys else mask[:, None, None]
    if additive:
        mask = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    masked = {**call, "joint_attention_kwargs": {"attention_mask": mask}}
    expected, _ = forward_by_brute_force(monkeypatch, pipeline, masked)
    surgery.patch(pipeline, scale=2.0)
    found = forward(pipeline, masked)
    assert gap(found, expected) < 1e-4 and gap(found, forward(pipeline, call)) > 1e-3
    other = call["encoder_hidden_states"].clone()
    other[1, -7:] += 5.0
    assert gap(forward(pipeline, {**masked, "encoder_hidden_states": other}), found) < 1e-5


def test_a_loras_scale_and_unknown_arguments_pass_through_and_the_callers_dict_is_left_alone(monkeypatch, heard, built):
    from peft import LoraConfig

    for pipeline, _, call in built.values():
        pipeline = copy.deepcopy(pipeline)
        targets = ["to_q", "to_qkv_mlp_proj"]
        pipeline.transformer.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
        given = {"scale": 0.5}
        scaled = {**call, "joint_attention_kwargs": given}
        expected, _ = forward_by_brute_force(monkeypatch, pipeline, scaled)
        surgery.patch(pipeline, scale=2.0)
        found = forward(pipeline, scaled)
        assert gap(found, expected) < 1e-4 and gap(found, forward(pipeline, call)) > 1e-3
        assert given == {"scale": 0.5} and not heard.records
        assert torch.equal(forward(pipeline, {**call, "joint_attention_kwargs": {"scale": 0.5, "odd": 1}}), found)
        assert "attention arguments odd mean nothing here" in heard.text
        heard.clear()


def test_arguments_by_position_mean_the_same(tiny):
    import inspect

    pipeline, _, call = tiny
    surgery.patch(pipeline, scale=2.0)
    names = list(inspect.signature(type(pipeline.transformer).forward).parameters)[1:]
    with torch.no_grad():
        found = pipeline.transformer(*(call.get(name, False if name == "return_dict" else None) for name in names[:8]))
    assert torch.equal(found.sample if hasattr(found, "sample") else found[0], forward(pipeline, call))


def test_calls_in_several_threads_with_texts_of_different_lengths_keep_apart(built):
    jobs = []
    for pipeline, _, call in built.values():
        surgery.patch(pipeline, scale=2.0)
        for length in (5, 9, 17):
            shorter = {**call, "encoder_hidden_states": call["encoder_hidden_states"][:, :length]}
            shorter["txt_ids"] = call["txt_ids"][..., :length, :]
            jobs.append((pipeline, shorter, forward(pipeline, shorter)))
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda job: forward(job[0], job[1]), jobs * 5))
    assert all(torch.equal(drawn, expected) for drawn, (_, _, expected) in zip(found, jobs * 5, strict=True))

    images = [draw(pipeline, {**arguments, "max_sequence_length": 20}) for pipeline, arguments, _ in built.values()]
    with ThreadPoolExecutor(2) as pool:
        at_once = pool.map(lambda one: draw(one[0], {**one[1], "max_sequence_length": 20}), built.values())
        assert all(torch.equal(one, other) for one, other in zip(at_once, images, strict=True))


def test_an_ip_adapter_on_flux_adds_what_it_adds_without_the_patch(monkeypatch, built):
    from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor

    pipeline, _, call = built["flux"]
    model = pipeline.transformer
    before = dict(model.attn_processors)
    torch.manual_seed(1)
    adapters = {
        name: before[name]
        if name.startswith("single_")
        else FluxIPAdapterAttnProcessor(32, 32, num_tokens=(4, 3), scale=[0.7, 0.4])
        for name in before
    }
    call = {**call, "joint_attention_kwargs": {"ip_hidden_states": [torch.randn(2, 4, 32), torch.randn(2, 3, 32)]}}
    without = forward(pipeline, call)
    surgery.patch(pipeline, scale=0.0)
    model.set_attn_processor(dict(adapters))  # on a patched model as on a stock one
    unchanged = forward(pipeline, call)
    surgery.tune(pipeline, scale=2.0)
    found = forward(pipeline, call)
    surgery.unpatch(pipeline)
    try:
        base = forward(pipeline, call)
        expected, times = forward_by_brute_force(monkeypatch, pipeline, call)
    finally:
        model.set_attn_processor(before)
    assert times == 4 and gap(base, without) > 1e-3
    assert gap(unchanged, base) < 2e-5 and gap(found, expected) < 1e-4 and gap(found, base) > 1e-3


def test_processors_that_cache_reference_images_are_refused_either_way_round(built):
    from diffusers.models.transformers.transformer_flux2 import Flux2KVAttnProcessor, Flux2KVParallelSelfAttnProcessor

    pipeline, _, _ = built["flux2"]
    double, single = (
        pipeline.transformer.transformer_blocks[0].attn,
        pipeline.transformer.single_transformer_blocks[0].attn,
    )
    for module, kind in ((double, Flux2KVAttnProcessor), (single, Flux2KVParallelSelfAttnProcessor)):
        before = module.processor
        module.set_processor(kind())
        site = next(s for s in attention_sites(pipeline.transformer) if s.refusal)
        assert site.kind == "joint" and f"processor {kind.__name__} computes attention in its own way" in site.refusal
        with pytest.raises(InputError, match=kind.__name__):
            surgery.patch(pipeline, layers=[site.path])
        module.set_processor(before)
        surgery.patch(pipeline)
        with pytest.raises(ValueError, match=rf"cannot run {kind.__name__}; call surgery\.unpatch"):
            module.set_processor(kind())
        surgery.unpatch(pipeline)


def test_fused_projections_are_never_read_and_come_back_as_they_were(tiny):
    pipeline, _, call = tiny
    model, base = pipeline.transformer, forward(pipeline, call)
    surgery.patch(pipeline, scale=2.0)
    changed = forward(pipeline, call)
    for toggle in (model.fuse_qkv_projections, model.unfuse_qkv_projections, model.fuse_qkv_projections):
        toggle()
        assert torch.equal(forward(pipeline, call), changed)
    surgery.unpatch(pipeline)
    assert torch.equal(forward(pipeline, call), base)

    model.fuse_qkv_projections()
    fused = forward(pipeline, call)
    surgery.patch(pipeline, scale=2.0)
    weight = model.transformer_blocks[0].attn.to_qkv.weight.data
    kept = weight.clone()
    weight.zero_()
    assert torch.equal(forward(pipeline, call), changed)
    weight.copy_(kept)
    surgery.unpatch(pipeline)
    assert torch.equal(forward(pipeline, call), fused)
    model.unfuse_qkv_projections()
    assert torch.equal(forward(pipeline, call), base)


@pytest.mark.parametrize(
    ("library", "when", "name"),
    quick(
        list(itertools.product(("accelerate", "diffusers"), ("before", "after"), BUILDS)),
        ("accelerate", "before", "flux"),
        ("accelerate", "after", "flux2"),
        ("diffusers", "before", "flux2"),
        ("diffusers", "after", "flux"),
    ),
)
def test_hooks_on_the_model_and_its_blocks_work_before_and_after_the_patch(built, library, when, name):
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
    from diffusers.hooks import HookRegistry
    from diffusers.hooks import ModelHook as DiffusersHook

    def hook_up(modules):
        for module in modules:
            if library == "accelerate":
                add_hook_to_module(module, ModelHook())
            else:
                HookRegistry.check_if_exists_or_initialize(module).register_hook(DiffusersHook(), "nothing")

    for pipeline, _, call in [built[name]]:
        pipeline = copy.deepcopy(pipeline)
        model, base = pipeline.transformer, forward(pipeline, call)
        hooked = [model, *model.transformer_blocks, *model.single_transformer_blocks]
        surgery.patch(pipeline, scale=2.0)
        expected = forward(pipeline, call)
        if when == "before":
            surgery.unpatch(pipeline)
            hook_up(hooked)
            surgery.patch(pipeline, scale=2.0)
        else:
            hook_up(hooked)
        assert torch.equal(forward(pipeline, call), expected)
        surgery.unpatch(pipeline)
        assert torch.equal(forward(pipeline, call), base)
        for module in hooked:
            if library == "accelerate":
                remove_hook_from_module(module)
            else:
                module._diffusers_hook.remove_hook("nothing", recurse=False)
        surgery.patch(pipeline, scale=2.0)  # on what removed hooks leave behind
        assert torch.equal(forward(pipeline, call), expected)
        surgery.unpatch(pipeline)
        assert torch.equal(forward(pipeline, call), base)


def test_diffusers_block_cache_knows_the_blocks(built):
    from diffusers import FirstBlockCacheConfig

    pipeline, arguments, _ = built["flux"]  # on FLUX.2 it fails in diffusers' own code
    surgery.patch(pipeline, scale=2.0)
    expected = draw(pipeline, arguments)
    pipeline.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.0))
    try:
        assert gap(draw(pipeline, arguments), expected) < 1e-5
    finally:
        pipeline.transformer.disable_cache()


def test_a_block_that_is_not_told_the_texts_length_says_so(built):
    pipeline, _, call = built["flux2"]
    surgery.patch(pipeline)
    stock = pipeline.transformer.stock
    with pytest.raises(ValueError, match="not told how many of its tokens are text"):
        stock.forward(pipeline.transformer, **call)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_flows_through_as_in_diffusers(monkeypatch, tiny, dtype):
    pipeline, _, call = tiny
    pipeline = copy.deepcopy(pipeline)
    pipeline.transformer.to(dtype)
    half = {name: value.to(dtype) if torch.is_tensor(value) else value for name, value in call.items()}
    base = forward(pipeline, half)
    expected, _ = forward_by_brute_force(monkeypatch, pipeline, half)
    surgery.patch(pipeline, scale=2.0)
    found = forward(pipeline, half)
    assert found.dtype == base.dtype == dtype and gap(found, expected) < 0.25 * gap(found, base)


def test_gradients_flow_with_and_without_checkpointing(tiny):
    pipeline, _, call = tiny
    pipeline = copy.deepcopy(pipeline)
    surgery.patch(pipeline, scale=2.0)
    model = pipeline.transformer.train()
    gradients = []
    for checkpointing in (False, True):
        (model.enable_gradient_checkpointing if checkpointing else model.disable_gradient_checkpointing)()
        model.zero_grad()
        model(**{**call, "return_dict": False})[0].square().mean().backward()
        gradients.append(model.context_embedder.weight.grad.clone())
    assert gradients[0].abs().sum() > 0 and torch.allclose(*gradients, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("tiny", quick(list(BUILDS), "flux2"), indirect=True)
def test_it_exports_with_some_layers_left_stock_and_a_text_of_any_length(tiny):
    pipeline, _, call = tiny
    surgery.patch(pipeline, layers=["*.1.attn"], scale=2.0)
    given = {name: value for name, value in call.items() if torch.is_tensor(value)}
    text = torch.export.Dim("text", min=2, max=64)
    ids = 1 if given["txt_ids"].ndim == 3 else 0
    shapes = dict.fromkeys(given) | {"encoder_hidden_states": {1: text}, "txt_ids": {ids: text}}
    with torch.no_grad():
        program = torch.export.export(pipeline.transformer, (), given, dynamic_shapes=shapes, strict=False).module()
        for length in (call["encoder_hidden_states"].shape[1], 9):
            shorter = {**given, "encoder_hidden_states": given["encoder_hidden_states"][:, :length]}
            shorter["txt_ids"] = given["txt_ids"][..., :length, :]
            found = program(**shorter)
            assert gap(next(iter(found.values())), forward(pipeline, {**call, **shorter})) < 1e-4
    assert TEXT_LENGTH not in given
