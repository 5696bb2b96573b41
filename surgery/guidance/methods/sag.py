"""Self-attention guidance: CFG + scale (U - W), where W sees the predicted image blurred where self-attention looks.

From the model's output U (C without CFG) follow the predicted image and noise; the image is blurred wherever the tokens
of one self-attention module are attended to more than evenly, the same noise is put back, and W is the model's output
for that. Source: Hong et al., arXiv 2210.00939, and diffusers' retired pipeline of it (StableDiffusionSAGPipeline).
Defaults: scale 0.75, blur 1 latent pixel, the middle block's module. Cost: one evaluation more a step, and one map.
Layers: one module of self-attention of a UNet. Any scheduler of a variance-preserving process (`alphas_cumprod`).
"""

import torch
import torch.nn.functional as F
from torch import nn

from surgery.errors import InputError, UnsupportedModelError
from surgery.nn.kernels.reference import without_autocast

from ..blur import blurred
from ..layers import chosen_layers
from .base import Method, placed, swapped


class RecordingAttention(nn.Module):
    """In place of an attention module: as it, and keeps what came in."""

    def __init__(self, attention):
        super().__init__()
        self.attention = attention
        self.seen = None

    def forward(self, hidden_states, *args, **kwargs):
        """As the module's."""
        self.seen = hidden_states
        return self.attention(hidden_states, *args, **kwargs)

    def looked_at(self, rows):
        """(batch, tokens): how much the queries of some rows of the batch attend to each token, mean of the heads."""
        attention, seen = self.attention, self.seen[rows]
        heads = attention.heads
        query, key = (to(seen).unflatten(-1, (heads, -1)).transpose(1, 2) for to in (attention.to_q, attention.to_k))
        scores = without_autocast(torch.matmul)(query.float(), key.float().transpose(-1, -2)) * attention.scale
        return scores.softmax(dim=-1).mean(dim=1).sum(dim=1)


class Sag(Method):
    """As the module says."""

    needs_grid = True

    def __init__(self, settings, model, pipeline):
        super().__init__(settings, model, pipeline)
        if type(model).__name__.removeprefix("Pladis") != "UNet2DConditionModel":
            raise UnsupportedModelError("guidance: sag is for the UNets of Stable Diffusion and SDXL")
        if not hasattr(pipeline.scheduler, "alphas_cumprod"):
            raise InputError(
                f"guidance: sag needs a scheduler with alphas_cumprod, not {type(pipeline.scheduler).__name__}"
            )
        layer = chosen_layers(model, settings.layers, ("self",), "self-attention")[0]
        self.recorder = RecordingAttention(model.get_submodule(layer.path))
        self.replacements = [(*placed(model, layer.path), self.recorder)]

    def around(self, call, moment):
        """As Method's."""
        return swapped(self.replacements)

    def weak_output(self, driver, call, moment, plain, unguided):
        """As Method's, of the rows without the prompt where there are any."""
        rows = call.first if unguided is not None else call.all
        output = plain if unguided is None else unguided
        given = call.of(rows)
        sample, alpha = given.arguments["sample"], self._alpha(given.arguments["timestep"])
        image, noise = image_and_noise(sample, output, alpha, self.pipeline.scheduler.config.prediction_type)
        looked_at = self.recorder.looked_at(call.slice(rows))
        self.recorder.seen = None
        frames, height, width, _ = moment.grid.at(looked_at.shape[1])
        mask = (looked_at > 1.0).to(sample.dtype).view(-1, frames, height, width)
        mask = F.interpolate(mask, sample.shape[-2:])
        size = (1, *sample.shape[-2:])
        smooth = blurred(image.flatten(2).transpose(1, 2), *size, self.settings.blur)
        smooth = smooth.transpose(1, 2).unflatten(2, sample.shape[-2:])
        degraded = alpha**0.5 * (smooth * mask + image * (1 - mask)) + (1 - alpha) ** 0.5 * noise
        return driver.output_of(given.with_(sample=degraded.to(sample.dtype)))

    def away(self, plain, unguided, weak):
        """U - W, or C - W without CFG."""
        return (plain if unguided is None else unguided) - weak

    def _alpha(self, timestep):
        alphas = self.pipeline.scheduler.alphas_cumprod
        return float(alphas[int(timestep.flatten()[0] if torch.is_tensor(timestep) else timestep)])


def image_and_noise(sample, output, alpha, prediction_type):
    """(predicted image, predicted noise) from a model's output; alpha: the signal's share of the variance."""
    signal, spread = alpha**0.5, (1 - alpha) ** 0.5
    if prediction_type == "v_prediction":
        return signal * sample - spread * output, signal * output + spread * sample
    if prediction_type == "sample":
        return output, (sample - signal * output) / spread
    return (sample - spread * output) / signal, output
