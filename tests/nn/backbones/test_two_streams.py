"""What SD3 and Qwen-Image have of their own: other attention in the block, adapters, masks, refusals."""

import pytest
import torch

import surgery
from surgery.errors import InputError
from surgery.models.anatomy import attention_sites
from surgery.nn import is_pladis

from .checks import denoiser, forward, recorded_call
from .test_backbones import gap
from .two_streams import qwen_image, sd3


@pytest.fixture(scope="module")
def built():
    pipelines = {}
    for build in (sd3, qwen_image):
        pipeline, arguments = build()
        pipelines[build.__name__] = pipeline, recorded_call(pipeline, arguments)
    return pipelines


@pytest.fixture
def pipelines(built):
    yield built
    for pipeline, _ in built.values():
        if any(is_pladis(module) for module in denoiser(pipeline).modules()):
            surgery.unpatch(pipeline)


def test_the_self_attention_of_sd35_medium_stays_dense_and_says_why(pipelines):
    pipeline, _ = pipelines["sd3"]
    (site,) = [site for site in attention_sites(pipeline.transformer) if site.path.endswith("attn2")]
    assert site.kind == "self" and "self-attention among image tokens" in site.refusal
    with pytest.raises(InputError, match="self-attention modules and no cross-attention"):
        surgery.patch(pipeline, layers=["*.attn2"])
    surgery.patch(pipeline)
    assert not is_pladis(pipeline.transformer.transformer_blocks[0].attn2)
    assert all(is_pladis(block.attn) for block in pipeline.transformer.transformer_blocks)


@pytest.mark.parametrize("block", [1, 2])  # the last one drops the text
def test_the_module_of_sd3_gives_both_streams_as_diffusers_does(pipelines, block):
    pipeline, _ = pipelines["sd3"]
    attention = pipeline.transformer.transformer_blocks[block].attn
    assert attention.context_pre_only is (block == 2)
    image, text = torch.randn(2, 16, 32), torch.randn(2, 9, 32)
    with torch.no_grad():
        expected = attention(image, encoder_hidden_states=text)
        surgery.patch(pipeline, scale=0.0, layers=[f"*.{block}.attn"])
        for found, wanted in zip(attention(image, encoder_hidden_states=text), expected, strict=True):
            assert found.shape == wanted.shape and gap(found, wanted) < 1e-5
        surgery.tune(pipeline, scale=3.0)
        changed = attention(image, encoder_hidden_states=text)
    assert gap(changed[0], expected[0]) > 1e-3 and gap(changed[1], expected[1]) < 1e-5  # text's rows stay dense


def test_an_ip_adapter_adds_what_it_adds_without_the_patch(pipelines):
    from diffusers.models.attention_processor import SD3IPAdapterJointAttnProcessor2_0

    pipeline, call = pipelines["sd3"]
    torch.manual_seed(0)
    model = pipeline.transformer
    before = dict(model.attn_processors)
    adapters = {name: SD3IPAdapterJointAttnProcessor2_0(32, 24, 8, timesteps_emb_dim=12, scale=0.7) for name in before}
    prompt = {"ip_hidden_states": torch.randn(2, 5, 24), "temb": torch.randn(2, 12)}
    with_image = {**call, "joint_attention_kwargs": prompt}
    base = forward(pipeline, call)
    surgery.patch(pipeline, scale=0.0)
    model.set_attn_processor(dict(adapters))  # set_attn_processor empties what it is given
    try:
        found = forward(pipeline, with_image)
        surgery.unpatch(pipeline)
        assert model.attn_processors == adapters
        expected = forward(pipeline, with_image)
    finally:
        model.set_attn_processor(before)
    assert gap(found, expected) < 2e-5 and gap(expected, base) > 1e-2


def test_projections_fused_meanwhile_leave_sd3_as_it_was():
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(0)
    sizes = {"caption_projection_dim": 16, "joint_attention_dim": 16, "pooled_projection_dim": 16}
    model = SD3Transformer2DModel(
        sample_size=8, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2, **sizes
    ).eval()
    call = {
        "hidden_states": torch.randn(1, 4, 8, 8),
        "encoder_hidden_states": torch.randn(1, 20, 16),
        "pooled_projections": torch.randn(1, 16),
        "timestep": torch.tensor([3.0]),
    }
    with torch.no_grad():
        base = model(**call).sample
        surgery.patch(model, scale=0.0)
        model.fuse_qkv_projections()
        assert gap(model(**call).sample, base) < 1e-5
        surgery.unpatch(model)
        assert gap(model(**call).sample, base) < 1e-5
        model.unfuse_qkv_projections()
        assert torch.equal(model(**call).sample, base)


def test_a_padded_prompt_of_qwen_image_draws_as_it_does_alone(pipelines):
    pipeline, call = pipelines["qwen_image"]
    mask = call["encoder_hidden_states_mask"]
    length = int(mask[0].sum())
    assert 0 < length < int(mask[1].sum()) == mask.shape[1]
    surgery.patch(pipeline, scale=2.0)
    together = forward(pipeline, call)
    alone = {name: value[:1] if isinstance(value, torch.Tensor) else value for name, value in call.items()}
    alone |= {
        "encoder_hidden_states": call["encoder_hidden_states"][:1, :length],
        "encoder_hidden_states_mask": None,
        "img_shapes": call["img_shapes"][:1],
    }
    assert gap(together[:1], forward(pipeline, alone)) < 2e-5


def test_qwen_image_refuses_what_it_would_get_wrong(pipelines):
    pipeline, call = pipelines["qwen_image"]
    attention = pipeline.transformer.transformer_blocks[1].attn
    surgery.patch(pipeline)
    with pytest.raises(ValueError, match="does not accept an external attention_mask"):
        forward(pipeline, {**call, "attention_kwargs": {"attention_mask": torch.ones(2, 1, 1, 4)}})
    attention.processor._parallel_config = object()  # as enable_parallelism sets it
    try:
        with pytest.raises(ValueError, match="context parallelism splits"):
            forward(pipeline, call)
        surgery.unpatch(pipeline)
        (site,) = [site for site in attention_sites(pipeline.transformer) if site.refusal]
        assert site.path == "transformer_blocks.1.attn" and "context parallelism" in site.refusal
    finally:
        del attention.processor._parallel_config


@pytest.mark.parametrize("name", ["sd3", "qwen_image"])
def test_in_bfloat16_it_is_near_diffusers_own(pipelines, name):
    pipeline, call = pipelines[name]
    model = denoiser(pipeline)
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}

    def as_bfloat16(value):
        return value.bfloat16() if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    low = {key: as_bfloat16(value) for key, value in call.items()}
    try:
        model.bfloat16()
        base = forward(pipeline, low)
        surgery.patch(pipeline, scale=0.0)
        found = forward(pipeline, low)
        assert found.dtype == torch.bfloat16 and gap(found.float(), base.float()) < 0.1
        surgery.unpatch(pipeline)
    finally:
        model.float().load_state_dict(state)
