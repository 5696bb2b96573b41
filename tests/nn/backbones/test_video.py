"""What is special to the video transformers: twins of the patched modules, image keys, padding, blocks, dtypes."""

import pytest
import torch

import surgery
from surgery.errors import InputError
from surgery.models.anatomy import attention_sites

from ...quick import quick
from .checks import denoiser, forward, recorded_call
from .test_backbones import gap, patched_modules
from .video import FAMILIES, hunyuan_video, ltx, mochi, wan, wan_from_image

BUILDERS = {family.name: family.build for family in FAMILIES}


def built(build, **settings):
    """(pipeline, arguments of the denoiser's first call, its output)."""
    pipeline, arguments = build(**settings)
    call = recorded_call(pipeline, arguments)
    return pipeline, call, forward(pipeline, call)


@pytest.mark.parametrize("name", BUILDERS)
def test_in_half_precision_the_output_and_its_dtype_are_those_of_the_base(name):
    pipeline, call, _ = built(BUILDERS[name])
    model = denoiser(pipeline).to(torch.bfloat16)
    call = {
        key: value.bfloat16() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for key, value in call.items()
    }
    base = forward(pipeline, call)
    surgery.patch(pipeline, scale=0.0)
    found = forward(pipeline, call)
    assert found.dtype == base.dtype == torch.bfloat16 and gap(found.float(), base.float()) < 0.1
    assert all(module.pladis_scale.dtype == torch.float32 for module in patched_modules(pipeline).values())
    surgery.tune(pipeline, scale=3.0)
    assert forward(pipeline, call).isfinite().all()
    surgery.unpatch(pipeline)
    assert torch.equal(forward(pipeline, call), base) and model is denoiser(pipeline)


@pytest.mark.parametrize("name", quick(list(BUILDERS), "wan"))
def test_it_exports_whole(name):
    pipeline, call, _ = built(BUILDERS[name])
    surgery.patch(pipeline)
    expected = forward(pipeline, call)
    with torch.no_grad():
        program = torch.export.export(denoiser(pipeline), (), {**call, "return_dict": False})
        assert gap(program.module()(**{**call, "return_dict": False})[0], expected) < 1e-4


@pytest.mark.parametrize("name", ["ltx", "wan", "wan_from_image"])
def test_fused_projections_before_or_while_it_is_patched_change_nothing(name):
    pipeline, call, base = built(BUILDERS[name])
    model = denoiser(pipeline)
    surgery.patch(pipeline)
    expected = forward(pipeline, call)
    model.fuse_qkv_projections()
    assert gap(forward(pipeline, call), expected) < 1e-5
    surgery.unpatch(pipeline)
    assert gap(forward(pipeline, call), base) < 1e-5
    model.fuse_qkv_projections()  # of all of them now
    surgery.patch(pipeline)
    assert gap(forward(pipeline, call), expected) < 1e-5
    model.unfuse_qkv_projections()
    assert gap(forward(pipeline, call), expected) < 1e-5
    surgery.unpatch(pipeline)
    assert gap(forward(pipeline, call), base) < 1e-5


@pytest.mark.parametrize("build", [ltx, wan])
def test_self_attention_of_the_same_class_is_refused_wherever_it_is_named(build):
    pipeline, call, base = built(build)
    model = denoiser(pipeline)
    sites = {site.path: site for site in attention_sites(model)}
    twin = next(path for path in sites if path.endswith("0.attn1"))
    assert sites[twin].kind == "self" and sites[twin.replace("attn1", "attn2")].kind == "cross"
    with pytest.raises(InputError, match="2 self-attention modules and no cross-attention"):
        surgery.patch(pipeline, layers="*.attn1")
    surgery.patch(pipeline)
    patched, config = type(model), dict(model.config)
    surgery.unpatch(pipeline)
    operation = {**config["pladis"][0], "layers": [twin]}
    with pytest.raises(ValueError, match="it is self-attention"):
        patched.convert(model, [operation])
    with pytest.raises(ValueError, match="it is self-attention"):
        patched.from_config({**config, "pladis": [operation]})
    assert torch.equal(forward(pipeline, call), base)


def test_ltx_refuses_a_text_that_is_split_between_devices():
    pipeline, call, _ = built(ltx)
    surgery.patch(pipeline)
    denoiser(pipeline).transformer_blocks[0].attn2.processor._parallel_config = object()
    with pytest.raises(ValueError, match="splits the text between devices"):
        forward(pipeline, call)


def test_wan_goes_on_without_the_image_that_its_projections_are_for():
    pipeline, call, _ = built(wan_from_image)
    call = {**call, "encoder_hidden_states_image": None}
    base = forward(pipeline, call)
    surgery.patch(pipeline, scale=0.0)
    assert gap(forward(pipeline, call), base) < 2e-5


def test_mochi_pads_as_diffusers_does_after_dropping_padding_entry_by_entry():
    pipeline, _, _ = built(mochi)
    module = denoiser(pipeline).transformer_blocks[0].attn1
    generator = torch.Generator().manual_seed(0)
    image, text = torch.randn(3, 6, 16, generator=generator), torch.randn(3, 5, 16, generator=generator)
    turns = torch.randn(2, 6, 2, 4, generator=generator)
    mask = torch.arange(5) < torch.tensor([[5], [2], [0]])  # the last entry has no text at all
    call = {"hidden_states": image, "encoder_hidden_states": text, "attention_mask": mask}
    call["image_rotary_emb"] = (turns[0].cos(), turns[1].sin())
    with torch.no_grad():
        expected = module(**call)
        surgery.patch(pipeline, scale=0.0)
        found = module(**call)
        assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(found, expected, strict=True))
        assert torch.equal(found[1][1, 2:], module.to_add_out.bias.expand(3, -1))  # what comes of zeros
        surgery.tune(pipeline, scale=2.0)
        together = module(**call)
        for entry in range(3):
            alone = {key: value[entry : entry + 1] for key, value in call.items() if key != "image_rotary_emb"}
            alone = module(**alone, image_rotary_emb=call["image_rotary_emb"])
            assert all(torch.allclose(a[entry], b[0], atol=1e-6) for a, b in zip(together, alone, strict=True))
        assert torch.allclose(together[0][2], expected[0][2], atol=1e-6)  # nothing to change without text
    with pytest.raises(ValueError, match="cannot run object"):
        module.set_processor(object())
    module.set_processor(module.processor)


@pytest.mark.parametrize("settings", [{}, {"image_condition_type": "token_replace"}])
def test_hunyuan_video_has_blocks_of_both_kinds_and_its_refiner_stays(settings):
    pipeline, call, base = built(hunyuan_video, **settings)
    sites = attention_sites(denoiser(pipeline))
    refiner = next(site for site in sites if "refiner" in site.path)
    assert refiner.kind == "self" and "refines them" in refiner.refusal
    outputs = []
    for blocks, modules in (("double", 2), ("single", 2), ("all", 4)):
        surgery.patch(pipeline, blocks=blocks, scale=2.0)
        outputs.append(forward(pipeline, call))
        paths = patched_modules(pipeline)
        assert len(paths) == modules and refiner.path not in paths
        assert blocks == "all" or all(path.startswith("single_") == (blocks == "single") for path in paths)
        surgery.tune(pipeline, scale=0.0)
        assert gap(forward(pipeline, call), base) < 2e-5
        surgery.unpatch(pipeline)
    assert all(gap(one, other) > 1e-4 for one in outputs for other in (base, *outputs) if one is not other)
