"""IP-Adapters as pipelines load and feed them, real projections among it: dense beside a patch, and as without one."""

import pytest
import torch

import surgery

from ...conftest import load_shapes
from ...guidance.oracles import sampled
from ...models.test_patch_survives import ip_adapter_state
from ...quick import quick
from .flux import flux

DIM = 16  # of an image's embedding


def flux_state(transformer, seed=0):
    """A random IP-Adapter of four tokens an image, in the layout that FLUX's load_ip_adapter reads."""
    generator = torch.Generator().manual_seed(seed)
    context = transformer.config.joint_attention_dim
    width = transformer.config.num_attention_heads * transformer.config.attention_head_dim
    layers = {}
    for block in range(transformer.config.num_layers):
        for kind in ("to_k_ip", "to_v_ip"):
            layers[f"{block}.{kind}.weight"] = torch.randn(width, context, generator=generator)
            layers[f"{block}.{kind}.bias"] = torch.randn(width, generator=generator)
    projection = {
        "proj.weight": torch.randn(4 * context, DIM, generator=generator),
        "proj.bias": torch.zeros(4 * context),
        "norm.weight": torch.ones(context),
        "norm.bias": torch.zeros(context),
    }
    return {"image_proj": projection, "ip_adapter": layers}


def embeds(images, batch):
    """(batch, images, DIM): another image for each."""
    return torch.randn(batch, images, DIM, generator=torch.Generator().manual_seed(images))


def unet(adapters):
    """(a function that makes a UNet's pipeline, one that loads adapters, the arguments of a call)."""

    def load(pipeline):
        states = [ip_adapter_state(pipeline.unet, seed=seed) for seed in range(len(adapters))]
        names = [""] * len(states)
        pipeline.load_ip_adapter(states, subfolder=names, weight_name=names, image_encoder_folder=None)

    call = {"prompt": "two green stars", "guidance_scale": 4.0, "height": 64, "width": 64}
    return load_shapes, load, {**call, "ip_adapter_image_embeds": [embeds(images, 2) for images in adapters]}


def flux1(adapters):
    """As `unet`, FLUX.1."""

    def load(pipeline):
        states = [flux_state(pipeline.transformer, seed=seed) for seed in range(len(adapters))]
        names = [""] * len(states)
        pipeline.load_ip_adapter(
            states, weight_name=names, subfolder=names, image_encoder_pretrained_model_name_or_path=None
        )

    call = {"prompt": "a cat", "height": 32, "width": 32, "max_sequence_length": 24}
    images = [embeds(images, 1) for images in adapters]
    negative = [torch.zeros_like(image) for image in images]
    call |= {"ip_adapter_image_embeds": images, "negative_ip_adapter_image_embeds": negative}
    return lambda: flux()[0], load, call


def drawn(pipeline, call):
    """The latents of two steps."""
    return sampled(pipeline, {**call, "num_inference_steps": 2, "output_type": "latent"})[0]


def half_masks(adapters):
    """For each adapter a mask for each image: the upper half of the picture, then the lower."""
    masks = []
    for images in adapters:
        mask = torch.zeros(1, images, 64, 64)
        mask[:, 0, :32] = 1.0
        mask[:, 1:, 32:] = 1.0
        masks.append(mask)
    return masks


@pytest.mark.parametrize("adapters", quick([[1], [3], [2, 1]], [2, 1]), ids=str)  # how many images each is given
@pytest.mark.parametrize("family", [unet, flux1])
def test_adapters_add_what_they_add_without_a_patch_whichever_is_first(family, adapters):
    make, load, call = family(adapters)
    stock, before, after = make(), surgery.patch(make(), scale=0.0), make()
    for pipeline in (stock, before, after):
        load(pipeline)
        pipeline.set_ip_adapter_scale([0.9, 0.4] if len(adapters) == 2 else 0.9)
    surgery.patch(after, scale=0.0)
    expected = drawn(stock, call)
    for pipeline in (before, after):
        assert (drawn(pipeline, call) - expected).abs().max() < 1e-3
    surgery.tune(before, scale=2.0)
    surgery.tune(after, scale=2.0)
    sparse = drawn(before, call)
    assert torch.equal(sparse, drawn(after, call)) and (sparse - expected).abs().max() > 1e-2
    before.set_ip_adapter_scale([0.0, 0.0] if len(adapters) == 2 else 0.0)
    assert (drawn(before, call) - sparse).abs().max() > 1e-2  # they do something
    surgery.unpatch(after)
    assert torch.equal(drawn(after, call), expected)


def test_an_adapter_of_a_unet_keeps_masks_and_a_scale_for_each_image():
    adapters = [2, 1]
    make, load, call = unet(adapters)
    stock, patched = make(), surgery.patch(make(), scale=0.0)
    images = []
    for masks in (half_masks(adapters), None):
        found = []
        for pipeline in (stock, patched):
            load(pipeline)
            pipeline.set_ip_adapter_scale([[0.9, 0.4], 0.7] if masks else [0.9, 0.7])
            found.append(
                drawn(pipeline, {**call, **({"cross_attention_kwargs": {"ip_adapter_masks": masks}} if masks else {})})
            )
        assert (found[0] - found[1]).abs().max() < 1e-3
        images.append(found[0])
    assert (images[0] - images[1]).abs().max() > 1e-2


def test_flux_with_an_adapter_and_no_image_draws_from_the_text_alone():
    make, load, call = flux1([1])
    text = {key: value for key, value in call.items() if "ip_adapter" not in key}
    pipeline = surgery.patch(make(), scale=2.0)
    expected = drawn(pipeline, text)
    load(pipeline)
    assert torch.equal(drawn(pipeline, text), expected)


def test_flux_with_adapters_is_guided():
    make, load, call = flux1([2])
    pipeline = surgery.patch(make())
    load(pipeline)
    plain = drawn(pipeline, call)
    surgery.guide(pipeline, "slg", scale=0.0)
    assert torch.equal(drawn(pipeline, call), plain)
    surgery.unguide(pipeline)
    surgery.guide(pipeline, "slg", scale=3.0)
    assert (drawn(pipeline, call) - plain).abs().max() > 1e-3
