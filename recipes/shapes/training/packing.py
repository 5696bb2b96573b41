"""The pipeline of the trained parts, in half precision, with the facts of its training beside it."""

import json
import math

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel

from surgery.artifact.manifest import write_json

from .autoencoder import encode
from .scenes import Scenes
from .tokenizer import shapes_tokenizer

_FRESH = Scenes(count=1000, seed=1_000_003)  # scenes that no part was trained on


def pack(folder, stages, scenes):
    """Write `folder`/pipeline, standard diffusers classes, float16 safetensors, and training.json in it.

    stages: the names of the stages in their order, each of which left a `<stage>.json` in `folder`.
    """
    autoencoder = AutoencoderKL.from_pretrained(folder / "vae")
    pipeline = StableDiffusionPipeline(
        vae=autoencoder,
        text_encoder=CLIPTextModel.from_pretrained(folder / "text_encoder"),
        tokenizer=shapes_tokenizer(),
        unet=UNet2DConditionModel.from_pretrained(folder / "unet"),
        scheduler=DDIMScheduler.from_pretrained(folder / "scheduler"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    facts = {
        "scenes": {"count": scenes.count, "seed": scenes.seed},
        "parameters": {
            name: sum(parameter.numel() for parameter in getattr(pipeline, name).parameters())
            for name in ("vae", "text_encoder", "unet")
        },
        "stages": {stage: json.loads((folder / f"{stage}.json").read_text()) for stage in stages},
    }
    pipeline.to(torch.float16).save_pretrained(folder / "pipeline")
    facts["psnr_db"] = round(_psnr(AutoencoderKL.from_pretrained(folder / "pipeline" / "vae", dtype=torch.float32)), 2)
    write_json(folder / "pipeline" / "training.json", facts)
    print(json.dumps(facts, indent=2))


@torch.no_grad()
def _psnr(autoencoder):
    """dB, of what the autoencoder makes of fresh scenes, with the mean square over all of them; a peak is 255."""
    squares = []
    for start in range(0, _FRESH.count, 100):
        images = _FRESH.images(range(start, start + 100))
        decoded = autoencoder.decode(encode(autoencoder, images)).sample.clamp(-1, 1)
        squares.append((decoded - torch.from_numpy(images)).square().mean().item() / 4)
    return -10 * math.log10(float(np.mean(squares)))
