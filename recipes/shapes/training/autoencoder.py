"""The autoencoder: 64 x 64 pixels to 16 x 16 latents of four channels and back."""

import math

import numpy as np
import torch
from diffusers import AutoencoderKL

from surgery.recipes.shapes.training.loop import precision, train

_RATE_WEIGHT = 2e-5  # of the divergence: enough to keep latents bounded, too little to blur
_ROWS = 200  # images that are encoded at once


def new_autoencoder(seed):
    """0.7 M parameters."""
    torch.manual_seed(seed)
    return AutoencoderKL(
        block_out_channels=(16, 32, 64),
        down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
        scaling_factor=1.0,
    )


def train_autoencoder(workers, scenes, training, folder):
    """Train one and write it to `folder`/vae, its latents with mean 0 and deviation 1 in every channel."""
    autoencoder = new_autoencoder(training.seed).to(workers.device, memory_format=torch.channels_last)

    def loss_of(random, generator, count):
        numbers = random.integers(scenes.count, size=count)
        images = torch.from_numpy(scenes.images(numbers)).to(workers.device, memory_format=torch.channels_last)
        with precision(workers.device):
            posterior = autoencoder.encode(images).latent_dist
            mean, variance = posterior.mean.float(), posterior.logvar.float()
            noise = torch.randn(mean.shape, generator=generator, device=workers.device)
            decoded = autoencoder.decode(mean + noise * (0.5 * variance).exp()).sample.float()
        difference = decoded - images
        square = difference.square().mean()
        divergence = 0.5 * (mean.square() + variance.exp() - 1 - variance).mean()
        loss = difference.abs().mean() + 4 * square + _RATE_WEIGHT * divergence
        return loss, {"psnr": -10 * math.log10(square.item() / 4), "divergence": divergence.item()}

    seconds = train("autoencoder", autoencoder.parameters(), loss_of, training, workers, folder)
    if workers.is_first:
        normalise(autoencoder, scenes.images(range(min(2000, scenes.count))))
        autoencoder.to(memory_format=torch.contiguous_format).save_pretrained(folder / "vae")
    return seconds


@torch.no_grad()
def normalise(autoencoder, images):
    """Fold the mean and deviation of every latent channel into the two 1 x 1 convolutions at the latents.

    The pipeline knows one scaling factor for all channels only, and channels of unlike spread train badly.
    """
    latents = encode(autoencoder, images)
    mean, deviation = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    inner, outer = autoencoder.quant_conv, autoencoder.post_quant_conv
    channels = len(mean)
    inner.bias[:channels] -= mean
    inner.weight[:channels] /= deviation.view(-1, 1, 1, 1)
    inner.bias[:channels] /= deviation
    inner.bias[channels:] -= 2 * deviation.log()
    outer.bias += outer.weight[:, :, 0, 0] @ mean
    outer.weight *= deviation.view(1, -1, 1, 1)


@torch.no_grad()
def encode(autoencoder, images):
    """(n, 4, 16, 16) float32 on the CPU: the most likely latents of (n, 3, 64, 64) images."""
    parameter = next(autoencoder.parameters())
    encoded = []
    for start in range(0, len(images), _ROWS):
        rows = torch.from_numpy(images[start : start + _ROWS]).to(parameter.device)
        encoded.append(autoencoder.encode(rows).latent_dist.mean.float().cpu())
    return torch.cat(encoded)


def write_latents(workers, scenes, folder, start=None):
    """`folder`/latents-<rank>.npy: float16, of every scene whose number leaves this rank.

    start: a pipeline's folder, whose autoencoder then becomes `folder`/vae.
    """
    if start and workers.is_first:
        AutoencoderKL.from_pretrained(start / "vae", dtype=torch.float32).save_pretrained(folder / "vae")
    workers.wait()
    autoencoder = AutoencoderKL.from_pretrained(folder / "vae").to(workers.device, memory_format=torch.channels_last)
    numbers = range(workers.rank, scenes.count, workers.count)
    latents = np.empty((len(numbers), 4, 16, 16), np.float16)
    for start in range(0, len(numbers), _ROWS):
        rows = slice(start, start + _ROWS)
        latents[rows] = encode(autoencoder, scenes.images(numbers[rows])).numpy()
        if workers.is_first and start % (50 * _ROWS) == 0:
            print(f"latents: {start * workers.count} of {scenes.count} scenes", flush=True)
    np.save(folder / f"latents-{workers.rank}.npy", latents)


def read_latents(scenes, folder):
    """(count, 4, 16, 16) float16: what the workers of `write_latents` wrote, in the order of the scenes."""
    parts = [np.load(path) for path in sorted(folder.glob("latents-*.npy"))]
    latents = np.empty((scenes.count, 4, 16, 16), np.float16)
    for rank, part in enumerate(parts):
        latents[rank :: len(parts)] = part
    return latents
