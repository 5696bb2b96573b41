"""Engines of models that are told of a run's texts: another negative prompt needs no other engine."""

import pytest
import torch

import surgery
from surgery.engines.record import parse_profile
from surgery.errors import InputError
from surgery.export.engines.build import Wanted, build_engine
from surgery.export.engines.program import export_program, inputs_of, refuse_changing_constants
from surgery.export.engines.recording import recorded
from surgery.models.negative import always_tell

from ..nn.backbones.flux import flux
from ..nn.backbones.video import wan
from ..quick import quick
from ..tiny import tiny_sdxl
from .test_backbones import gap

SDXL = {"num_inference_steps": 1, "height": 64, "width": 64, "output_type": "latent", "guidance_scale": 4.0}


def sdxl():
    return tiny_sdxl(blocks=1, up=False)[0], {**SDXL, "prompt": "a cat"}


def calls_with(pipeline, arguments, negative):
    """The calls of a pipeline's denoiser, which is told that its negative prompt is another."""
    surgery.negative(pipeline, negative)
    return calls_of(pipeline, arguments)


def calls_of(pipeline, arguments):
    """(A pipeline's denoiser, its calls)."""
    model = getattr(pipeline, "transformer", None) or pipeline.unet
    pipeline.set_progress_bar_config(disable=True)
    with torch.no_grad(), recorded(model) as calls:
        pipeline(generator=torch.Generator().manual_seed(0), **arguments)
    return model, calls


PAIRS = [(make, operator) for make in (sdxl, flux, wan) for operator in ("nag", "vsf")]


@pytest.mark.parametrize(("make", "operator"), quick(PAIRS, (sdxl, "vsf"), (flux, "nag")))
def test_one_program_computes_every_negative_prompt_and_none(make, operator):
    """Wan's calls without the prompt come by themselves, and are told that they have no negative one either."""
    pipeline, arguments = make()
    surgery.patch(pipeline, operator=operator)
    always_tell(pipeline)
    model, (usual, *_) = calls_with(pipeline, arguments, "bad")
    program = export_program(model, "forward", {"usual": usual})
    names = [tensor.name for tensor in inputs_of({"usual": usual})]
    assert "pladis_texts.active" in names and usual.constants["pladis_texts.negative"] > 0
    outputs = [next(iter(usual.results.values()))]
    for negative in ("ugly, worse", ""):
        _, calls = calls_with(pipeline, arguments, negative)
        for call in calls[::-1]:
            refuse_changing_constants(model, {"usual": usual, "other": call})
            found = program.module()(*(call.tensors[name] for name in names))
            assert gap(found, call.results.values()) < 1e-5
        outputs.append(found[0])
    surgery.unpatch(pipeline)
    with torch.no_grad(), recorded(model) as calls:
        pipeline(generator=torch.Generator().manual_seed(0), **arguments)
    assert gap([outputs[2]], calls[0].results.values()) < 1e-4  # an empty one is none
    assert min(gap([outputs[one]], [outputs[other]]) for one, other in ((0, 1), (0, 2), (1, 2))) > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("make", [sdxl, flux, wan])
def test_one_program_computes_other_regions_and_their_prompts(make):
    pipeline, arguments = make()
    surgery.patch(pipeline, operator="regions")
    always_tell(pipeline)
    found = []
    for prompt, box in (("a dog", [0, 0, 0.5, 1]), ("a red hat", [0, 0, 1, 0.5])):
        surgery.regions(pipeline, [{"prompt": prompt, "box": box}])
        model, calls = calls_of(pipeline, arguments)
        if not found:
            (usual, *_), names = calls, [tensor.name for tensor in inputs_of({"usual": calls[0]})]
            program = export_program(model, "forward", {"usual": usual})
        for call in calls[::-1]:
            refuse_changing_constants(model, {"usual": usual, "other": call})
            output = program.module()(*(call.tensors[name] for name in names))
            assert gap(output, call.results.values()) < 1e-5
        found.append(output[0])
    assert gap(found[:1], found[1:]) > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "operator"),
    [(sdxl, "words"), (sdxl, "shares"), *((flux, one) for one in ("taca", "reinject", "diversity"))],
)
def test_one_program_is_told_which_tokens_are_words_and_does_what_else_acts_on_the_text(make, operator):
    pipeline, arguments = make()
    surgery.patch(pipeline, operator=operator)
    model, (usual, *_) = calls_of(pipeline, arguments)
    program = export_program(model, "forward", {"usual": usual})
    other = ["two dogs on a mat"] * (len(arguments["prompt"]) if isinstance(arguments["prompt"], list) else 1)
    _, (call, *_) = calls_of(pipeline, {**arguments, "prompt": other})
    output = program.module()(*(call.tensors[tensor.name] for tensor in inputs_of({"usual": usual})))
    assert gap(output, call.results.values()) < 1e-5
    assert gap(output, usual.results.values()) > 1e-4
    if make is sdxl:
        assert not torch.equal(call.tensors["pladis_texts.kinds"], usual.tensors["pladis_texts.kinds"])


@pytest.mark.slow
def test_an_engine_follows_negative_prompts_and_refuses_one_of_another_length(tmp_path):
    pipeline, _ = sdxl()
    pipeline.save_pretrained(tmp_path / "base")
    (tmp_path / "recipe.yaml").write_text(
        "{schema: 1, name: tiny-nag, base: {pipeline: ./base}, operations: [{replace: cross-attention, "
        "with: {operator: nag}}], sampling: {steps: 1, guidance_scale: 4.0, height: 64, width: 64}}"
    )
    artifact = surgery.apply(tmp_path / "recipe.yaml", tmp_path / "artifact").folder
    wanted = Wanted(target="inductor", regional=True, profile=parse_profile("1x64x64"), device="cpu")
    engine, _, _ = build_engine(artifact, wanted)
    assert engine.difference.relative < 1e-4 and engine.difference.after_change < 1e-4
    eager, compiled = surgery.load(artifact, quiet=True), surgery.load(artifact, quiet=True, engine="auto")
    drawn = []
    for negative in ("bad", "ugly, worse", ""):
        images = []
        for one in (eager, compiled):
            surgery.negative(one, negative)
            one.set_progress_bar_config(disable=True)
            images.append(one(prompt="a cat", generator=torch.Generator().manual_seed(0), **SDXL).images)
        assert gap(images[:1], images[1:]) < 1e-4
        drawn.append(images[0])
    assert min(gap(drawn[:1], drawn[1:2]), gap(drawn[:1], drawn[2:])) > 1e-4
    told = compiled.unet.tell
    compiled.unet.tell = lambda prompts: told(prompts and prompts._replace(negative=prompts.negative[:, :5]))
    surgery.negative(compiled, "bad")
    with pytest.raises(InputError, match=r"\(2, 82, 64\), not \(2, 154, 64\); behind .* a negative prompt"):
        compiled(prompt="a cat", generator=torch.Generator().manual_seed(0), **SDXL)
