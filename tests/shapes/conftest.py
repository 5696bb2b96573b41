"""Fixtures: what the tiny pipeline's autoencoder makes of an image, and scenes that prompts are true of or not."""

import numpy as np
import pytest
import torch

from ..conftest import SHAPES


@pytest.fixture(scope="session")
def reconstruct():
    """A function: uint8 images (n, 64, 64, 3) -> what is left of them after the autoencoder of recipes/shapes."""
    from diffusers import AutoencoderKL

    autoencoder = AutoencoderKL.from_pretrained(SHAPES, subfolder="vae", dtype=torch.float32)
    autoencoder.to(memory_format=torch.channels_last)  # a fifth faster on a CPU

    def reconstructed(images):
        pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
        with torch.no_grad():
            latents = [autoencoder.encode(batch).latent_dist.mean for batch in pixels.split(10)]
            decoded = torch.cat([autoencoder.decode(batch).sample for batch in latents])
        return ((decoded.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()

    return reconstructed
