"""What main.cpp needs and gives, by diffusers alone: the run of a prompt, and the image of the latents that come back.

    python examples/cpp/prepare.py out/shapes "two green stars" --out run.pt
    python examples/cpp/prepare.py out/shapes --latents latents.pt --image stars.png

For artifacts of Stable Diffusion's kind with a scheduler that has alphas, stepped as DDIM.
"""

import argparse
import json
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline


def loaded(artifact):
    """The pipeline without its denoiser."""
    return StableDiffusionPipeline.from_pretrained(artifact, unet=None, torch_dtype=torch.float32)


@torch.no_grad()
def run_of(artifact, prompt, seed=0, steps=8, guidance_scale=5.0, size=None):
    """The dictionary that main.cpp reads. size: (height, width) in pixels, those of the engine unless given."""
    (record,) = (path for path in Path(artifact).glob("engines/*/engine.json") if "inductor" in path.parent.name)
    (region,) = json.loads(record.read_text())["regions"]
    channels, *sides = (high for _, high in region["inputs"][0]["shape"][1:])
    pipeline = loaded(artifact)
    scheduler = pipeline.scheduler
    scheduler.set_timesteps(steps)
    sides = [side // pipeline.vae_scale_factor for side in size] if size else sides
    text, no_text = pipeline.encode_prompt(prompt, "cpu", 1, True)
    apart = scheduler.config.num_train_timesteps // steps
    last = [step - apart for step in scheduler.timesteps.tolist()][-1]
    alphas = scheduler.alphas_cumprod[scheduler.timesteps].tolist()
    alphas.append((scheduler.alphas_cumprod[last] if last >= 0 else scheduler.final_alpha_cumprod).item())
    return {
        "latents": torch.randn((1, channels, *sides), generator=torch.Generator().manual_seed(seed)),
        "text": torch.cat([no_text, text]),
        "timesteps": scheduler.timesteps,
        "alphas": torch.tensor(alphas, dtype=torch.float64),
        "guidance_scale": torch.tensor(guidance_scale),
        "predicts_velocity": torch.tensor(scheduler.config.prediction_type == "v_prediction"),
        "hyperparameters": [torch.tensor(values) for values in region["values"].values()],
    }


@torch.no_grad()
def image_of(artifact, latents):
    """The PIL image of denoised latents."""
    pipeline = loaded(artifact)
    decoded = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample
    return pipeline.image_processor.postprocess(decoded, output_type="pil")[0]


def main():
    """Write a run, or the image of latents."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact")
    parser.add_argument("prompt", nargs="?", default="")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--guidance-scale", type=float, default=5.0)
    parser.add_argument("--out", default="run.pt")
    parser.add_argument("--latents")
    parser.add_argument("--image", default="drawn.png")
    given = parser.parse_args()
    if given.latents:
        image_of(given.artifact, torch.load(given.latents)).save(given.image)
    else:
        torch.save(run_of(given.artifact, given.prompt, given.seed, given.steps, given.guidance_scale), given.out)


if __name__ == "__main__":
    main()
