"""What the diffusers backends of SGLang and vLLM-Omni do with a repository, done with an artifact."""

import pytest
import torch


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["sglang", "vllm-omni"])
def test_an_artifact_draws_the_same_under_their_calls(shapes_artifact, mode):
    from diffusers import DiffusionPipeline

    import surgery

    def images(pipeline):
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator("cpu").manual_seed(3)
        arguments = {"num_inference_steps": 2, "guidance_scale": 4.0, "height": 64, "width": 64, "output_type": "pt"}
        return pipeline(prompt="two green stars", generator=generator, **arguments).images

    theirs = DiffusionPipeline.from_pretrained(
        shapes_artifact, torch_dtype=torch.float32, trust_remote_code=True, revision=None
    )
    with torch.no_grad():
        expected = images(surgery.load(shapes_artifact, dtype=torch.float32, quiet=True))
    with mode():
        assert torch.equal(images(theirs), expected)
