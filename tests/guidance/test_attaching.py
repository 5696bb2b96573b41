"""Guidance is the pipeline's: the denoiser stays free to be compiled, shared and saved, in whatever order."""

import json

import pytest
import torch
from diffusers import AutoPipelineForImage2Image
from diffusers.callbacks import SDCFGCutoffCallback

import surgery
from surgery.errors import InputError, UnsupportedModelError
from surgery.guidance.attaching import driver_of

from ..conftest import PROMPTS
from ..nn.backbones.checks import recorded_call
from ..nn.backbones.cross import pixart
from ..nn.backbones.flux import flux
from .oracles import sampled

CALL = {"prompt": PROMPTS, "num_inference_steps": 4, "guidance_scale": 4.0, "height": 64, "width": 64}


def compile_in_place(pipeline):
    pipeline.transformer.compile(backend="eager")


def compile_around(pipeline):
    pipeline.transformer = torch.compile(pipeline.transformer, backend="eager")


@pytest.mark.parametrize("compiled", [compile_in_place, compile_around])
def test_compiling_and_guiding_go_in_any_order_and_each_is_taken_away_alone(compiled):
    pipeline, arguments = pixart()
    call = {**arguments, "output_type": "latent"}
    plain = sampled(pipeline, call)[0]
    surgery.guide(pipeline, "pag", layers="all")
    guided = sampled(pipeline, call)[0]
    assert not torch.allclose(guided, plain, atol=1e-2)
    compiled(pipeline)
    part, slot = pipeline.transformer, pipeline.transformer._compiled_call_impl
    assert torch.allclose(sampled(pipeline, call)[0], guided, atol=1e-3)
    surgery.unguide(pipeline)
    assert pipeline.transformer is part and part._compiled_call_impl is slot  # still compiled
    assert torch.allclose(sampled(pipeline, call)[0], plain, atol=1e-3)
    surgery.guide(pipeline, "pag", layers="all")  # and now the other way round
    assert torch.allclose(sampled(pipeline, call)[0], guided, atol=1e-3)
    surgery.unguide(pipeline)
    assert pipeline.transformer is part and part._compiled_call_impl is slot


def test_what_takes_torchs_slot_for_compiled_calls_in_the_middle_of_a_run_keeps_it_and_is_guided(pipeline):
    surgery.guide(pipeline, "pag", layers="all")
    guided = sampled(pipeline, {**CALL, "output_type": "latent"})[0]
    rows = []

    def compiled(sample, **given):
        rows.append(len(sample))
        return pipeline.unet._call_impl(sample, **given)

    def take(pipe, step, timestep, tensors):
        pipe.unet._compiled_call_impl = compiled
        return tensors

    found = sampled(pipeline, {**CALL, "output_type": "latent", "callback_on_step_end": take})[0]
    assert torch.equal(found, guided) and rows == [4, 2] * 3
    surgery.unguide(pipeline)
    assert pipeline.unet._compiled_call_impl is not None


def test_a_guided_pipeline_is_of_its_class_saves_as_it_and_shares_its_unguided_parts(pipeline, tmp_path):
    kind, components = type(pipeline), dict(pipeline.components)
    surgery.guide(pipeline, "pag", layers="all")
    during = []

    def look(pipe, step, timestep, tensors):
        during.append(pipe.components["unet"] is components["unet"] and isinstance(pipe.unet, type(components["unet"])))
        return tensors

    sampled(pipeline, {**CALL, "output_type": "latent", "callback_on_step_end": look})
    assert during == [True] * 4
    assert isinstance(pipeline, kind) and type(pipeline).__name__ == kind.__name__
    pipeline.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["_class_name"] == kind.__name__
    other = AutoPipelineForImage2Image.from_pipe(pipeline)
    assert other.unet is components["unet"] and driver_of(other) is None
    surgery.unguide(pipeline)
    assert type(pipeline) is kind and dict(pipeline.components) == components


def test_after_an_error_in_a_run_the_denoiser_is_back_and_another_one_is_refused(pipeline):
    surgery.guide(pipeline, "pag", layers="all")
    unet = pipeline.unet

    def fail(*_):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        sampled(pipeline, {**CALL, "callback_on_step_end": fail})
    assert pipeline.unet is unet
    pipeline.unet = type(unet).from_config(unet.config)
    with pytest.raises(InputError, match="guide again"):
        sampled(pipeline, CALL)


@pytest.mark.parametrize(
    "settings",
    [{"method": "apg"}, {"method": "apg", "steps": [3, 4]}, {"method": "cfg-zero"}, {"method": "cfg", "steps": [0, 9]}],
)
def test_where_a_callback_turns_cfg_off_the_conditional_prediction_is_left(pipeline, settings):
    call = {**CALL, "prompt": PROMPTS[0], "output_type": "latent"}  # that callback is for one prompt
    call["callback_on_step_end_tensor_inputs"] = ["prompt_embeds"]
    call["callback_on_step_end"] = SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=1)
    outputs, forward = [], pipeline.unet.forward
    pipeline.unet.forward = lambda *args, **kwargs: outputs.append(forward(*args, **kwargs)) or outputs[-1]
    surgery.guide(pipeline, settings)
    try:
        _, predictions = sampled(pipeline, call)
    finally:
        del pipeline.unet.forward
    assert [len(output[0]) for output in outputs] == [2, 2, 1, 1]
    assert all(torch.equal(*pair) for pair in zip(predictions[2:], (one[0] for one in outputs[2:]), strict=True))
    with pytest.raises(InputError, match="above 1"):  # where it was never on, there is nothing to do
        sampled(pipeline, {**CALL, "guidance_scale": 1.0})


def test_where_the_images_tokens_cannot_be_told_nothing_is_blurred_in_a_wrong_place():
    pipeline, arguments = flux()
    call = recorded_call(pipeline, {**arguments, "output_type": "latent"})
    surgery.guide(pipeline, "seg")
    with driver_of(pipeline).running({}):
        pipeline.scheduler.set_timesteps(2)
        without = {name: value for name, value in call.items() if name != "img_ids"}
        with pytest.raises(UnsupportedModelError, match="where the image's tokens are cannot be told .*img_ids"):
            pipeline.transformer(**without)
        more = {**call, "hidden_states": call["hidden_states"].repeat(1, 2, 1)}  # as Kontext brings another image
        with pytest.raises(UnsupportedModelError, match="takes no images beside the one that is drawn"):
            pipeline.transformer(**more)
