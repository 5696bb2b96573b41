"""Engines of models that are told of a run's texts: another negative prompt needs no other engine."""

import pytest
import torch

import surgery
from surgery.engines.record import parse_profile
from surgery.errors import InputError
from surgery.export.engines.build import Wanted, build_engine
from surgery.export.engines.capture import recorded
from surgery.export.engines.program import export_program, inputs_of, refuse_changing_constants
from surgery.models.negative import always_tell

from ..nn.backbones.flux import flux
from ..quick import quick
from ..tiny import tiny_sdxl
from .test_backbones import gap

SDXL = {"num_inference_steps": 1, "height": 64, "width": 64, "output_type": "latent", "guidance_scale": 4.0}


def sdxl():
    return tiny_sdxl(blocks=1, up=False)[0], {**SDXL, "prompt": "a cat"}


def calls_with(pipeline, arguments, negative):
    """The calls of a pipeline's denoiser, which is told that its negative prompt is another."""
    surgery.negative(pipeline, negative)
    model = getattr(pipeline, "transformer", None) or pipeline.unet
    pipeline.set_progress_bar_config(disable=True)
    with torch.no_grad(), recorded(model) as calls:
        pipeline(generator=torch.Generator().manual_seed(0), **arguments)
    return model, calls


@pytest.mark.parametrize("operator", ["nag", "vsf"])
@pytest.mark.parametrize("make", [sdxl, flux], ids=["sdxl", "flux"])
def test_one_program_computes_every_negative_prompt_and_none(make, operator):
    pipeline, arguments = make()
    surgery.patch(pipeline, operator=operator)
    always_tell(pipeline)
    model, (usual, *_) = calls_with(pipeline, arguments, "bad")
    program = export_program(model, "forward", {"usual": usual})
    names = [tensor.name for tensor in inputs_of({"usual": usual})]
    assert "pladis_texts.active" in names and usual.constants["pladis_texts.negative"] > 0
    outputs = [next(iter(usual.results.values()))]
    for negative in ("ugly, worse", ""):
        _, (call, *_) = calls_with(pipeline, arguments, negative)
        refuse_changing_constants(model, {"usual": usual, "other": call})
        found = program.module()(*(call.tensors[name] for name in names))
        assert gap(found, call.results.values()) < 1e-5
        outputs.append(found[0])
    surgery.unpatch(pipeline)
    with torch.no_grad(), recorded(model) as calls:
        pipeline(generator=torch.Generator().manual_seed(0), **arguments)
    assert gap([outputs[2]], calls[0].results.values()) < 1e-4  # an empty one is none
    assert min(gap([outputs[one]], [outputs[other]]) for one, other in ((0, 1), (0, 2), (1, 2))) > 1e-4
