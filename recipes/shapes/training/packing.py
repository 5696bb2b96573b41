"""The pipeline of the trained parts, in half precision, with the facts of its training beside it."""

import json
import math

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel

from surgery.artifact.manifest import write_json
from surgery.recipes.shapes.training.autoencoder import encode
from surgery.recipes.shapes.training.scenes import Scenes
from surgery.recipes.shapes.training.tokenizer import shapes_tokenizer

_FRESH = {"most": 1000, "seed": 1_000_003}  # scenes that no part was trained on, as many as there are of the others


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
    packed = AutoencoderKL.from_pretrained(folder / "pipeline" / "vae", dtype=torch.float32)
    facts["psnr_db"] = round(_psnr(packed, Scenes(min(_FRESH["most"], scenes.count), _FRESH["seed"])), 2)
    write_json(folder / "pipeline" / "training.json", facts)
    print(json.dumps(facts, indent=2))


def is_packed(folder, stages):
    """Whether `folder`/pipeline was written of these stages' results."""
    path = folder / "pipeline" / "training.json"
    if not path.is_file():
        return False
    found = json.loads(path.read_text())["stages"]
    return found == {stage: json.loads((folder / f"{stage}.json").read_text()) for stage in stages}


@torch.no_grad()
def _psnr(autoencoder, scenes):
    """dB, of what the autoencoder makes of fresh scenes, with the mean square over all of them; a peak is 255."""
    squares = []
    for start in range(0, scenes.count, 100):
        images = scenes.images(range(start, min(start + 100, scenes.count)))
        decoded = autoencoder.decode(encode(autoencoder, images)).sample.clamp(-1, 1)
        squares.append((decoded - torch.from_numpy(images)).square().mean((1, 2, 3)) / 4)
    return -10 * math.log10(float(torch.cat(squares).mean()))
