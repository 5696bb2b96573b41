"""Draw with an ONNX engine by ONNX Runtime and diffusers' scheduler, text encoders and VAE, without this package.

    surgery export out/sdxl-pladis --target onnx
    python examples/onnx_runtime.py out/sdxl-pladis "two green stars" --scale 1.5

For artifacts of SDXL and its relatives; another model differs in the names that its denoiser's call has, which
`engine.json` and the graph's own metadata list in order.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from diffusers import StableDiffusionXLPipeline


class Denoiser:
    """An ONNX engine. hyperparameters: {"pladis_scale": one value for each patched module}, to be changed at will."""

    def __init__(self, artifact):
        (record,) = (path for path in Path(artifact).glob("engines/*/engine.json") if "onnx" in path.parent.name)
        (region,) = json.loads(record.read_text())["regions"]
        self.session = onnxruntime.InferenceSession(str(record.parent / region["file"]))
        self.inputs = list(zip(region["input_names"], region["inputs"], strict=False))
        self.hyperparameters = region["values"]

    def __call__(self, given):
        """The prediction for {name: tensor}, each cast to what the graph takes: a timestep is float32 there."""
        fed = {name: given[name].numpy().astype(tensor["dtype"]) for name, tensor in self.inputs}
        fed |= {name: np.float32(values) for name, values in self.hyperparameters.items()}
        return torch.from_numpy(self.session.run(None, fed)[0])


@torch.no_grad()
def draw(artifact, prompt, seed=0, steps=30, guidance_scale=5.0, height=1024, width=1024, **hyperparameters):
    """A PIL image. hyperparameters: scale=1.5 and so on, of every patched module."""
    denoiser = Denoiser(artifact)
    for name, value in hyperparameters.items():
        values = denoiser.hyperparameters[f"pladis_{name}"]
        values[:] = [value] * len(values)
    pipeline = StableDiffusionXLPipeline.from_pretrained(artifact, unet=None, torch_dtype=torch.float32)
    encoded = pipeline.encode_prompt(prompt, device="cpu", do_classifier_free_guidance=True)
    text, no_text, pooled, no_pooled = encoded
    scheduler = pipeline.scheduler
    scheduler.set_timesteps(steps)
    channels = denoiser.inputs[0][1]["shape"][1][0]
    side = pipeline.vae_scale_factor
    shape = (1, channels, height // side, width // side)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scheduler.init_noise_sigma
    sizes = torch.tensor([[height, width, 0, 0, height, width]] * 2)
    for timestep in scheduler.timesteps:
        prediction = denoiser(
            {
                "sample": scheduler.scale_model_input(torch.cat([latents] * 2), timestep),
                "timestep": timestep,
                "encoder_hidden_states": torch.cat([no_text, text]),
                "added_cond_kwargs_text_embeds": torch.cat([no_pooled, pooled]),
                "added_cond_kwargs_time_ids": sizes,
            }
        )
        uncond, cond = prediction.chunk(2)
        latents = scheduler.step(uncond + guidance_scale * (cond - uncond), timestep, latents, return_dict=False)[0]
    decoded = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample
    return pipeline.image_processor.postprocess(decoded, output_type="pil")[0]


def main():
    """Draw, and write a PNG."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact")
    parser.add_argument("prompt")
    parser.add_argument("--out", default="drawn.png")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--scale", type=float, default=2.0)
    given = parser.parse_args()
    draw(
        given.artifact, given.prompt, given.seed, given.steps, height=given.size, width=given.size, scale=given.scale
    ).save(given.out)


if __name__ == "__main__":
    main()
