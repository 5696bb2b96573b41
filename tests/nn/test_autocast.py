"""Under torch.autocast a patched model runs as the stock one does, and what is float32 stays float32."""

import pytest
import torch

import surgery
from surgery.models.patching import denoiser
from surgery.nn import attention
from surgery.nn.joint import joint_attention
from surgery.nn.operators import OPERATORS

from ..quick import one_in
from .backbones import FAMILIES
from .backbones.checks import predicted, recorded_call

HALVES = (torch.bfloat16, torch.float16)


@pytest.mark.parametrize("implementation", ["auto", "reference", "blocked", "cpp", "entmax"])
@pytest.mark.parametrize("operator", OPERATORS)
def test_float32_stays_float32(implementation, operator):
    generator = torch.Generator().manual_seed(0)
    for queries in (16, 4096):
        query, key, value = (torch.randn(1, 2, n, 8, generator=generator) for n in (queries, 7, 7))
        wanted = attention(query, key, value, operator=operator, implementation=implementation)
        for dtype in HALVES:
            with torch.autocast("cpu", dtype=dtype):
                found = attention(query, key, value, operator=operator, implementation=implementation)
            assert torch.equal(found, wanted)


@pytest.mark.parametrize("implementation", ["auto", "reference", "entmax"])
def test_float32_stays_float32_in_joint_attention(implementation):
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, 70, 8, generator=generator) for _ in range(3))
    how = {"text_length": 6, "implementation": implementation}
    wanted = joint_attention(query, key, value, **how)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(joint_attention(query, key, value, **how), wanted)
        # A norm in float32 leaves two of three in float32, and scaled_dot_product_attention then takes the half of all.
        mixed = joint_attention(query, key, value.bfloat16(), **how)
    assert (mixed.float() - wanted).abs().max() < 3e-2


@pytest.mark.parametrize("implementation", ["auto", "reference"])
def test_a_compiled_call_is_the_eager_one(implementation):
    query, key, value = (torch.randn(1, 2, n, 8, generator=torch.Generator().manual_seed(n)) for n in (40, 7, 9))
    how = {"backend": "eager", "fullgraph": True}
    call = torch.compile(lambda *given: attention(*given, implementation=implementation), **how)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (call(query, key, value[:, :, :7]) - attention(query, key, value[:, :, :7])).abs().max() < 1e-6


@pytest.mark.parametrize("family", one_in(3, FAMILIES), ids=lambda family: family.name)
def test_every_backbone_at_scale_0_is_the_stock_model(family):
    pipeline, arguments = family.build()
    call = recorded_call(pipeline, arguments) if family.draws else arguments
    model = denoiser(pipeline)

    def output():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return predicted(model, call).float()

    stock = output()
    surgery.patch(model, scale=0.0)
    assert (output() - stock).abs().max() <= 0.05 * stock.abs().max()
    surgery.unpatch(model)
    assert torch.equal(output(), stock)


def test_a_model_is_trained(pipeline):
    model = surgery.patch(pipeline.unet)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        drawn = model(torch.randn(1, 4, 16, 16), torch.tensor([10]), torch.randn(1, 77, 128)).sample
    drawn.float().square().mean().backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert len(gradients) > 50 and all(gradient.isfinite().all() for gradient in gradients)
