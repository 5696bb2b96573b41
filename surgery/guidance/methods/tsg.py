"""Time-step guidance: CFG + scale (C - W), where in W noise is added to the time's embedding.

    embedding + noise (t / T)^power rms(embedding) n,  n ~ N(0, I)

the same n for all images of a batch, another at each step. With `guidance_scale` 1 it is the paper's W + (1 + scale)
(C - W). Source: Sadat et al., arXiv 2407.02687, section 5; there the noise is s t^power n, with s chosen so that it
becomes comparable to the embedding, which the root mean square does here for any model. Defaults: scale 2, noise 1,
power 1 (ours). Cost: one evaluation more a step. Layers: the module that embeds the time, before any block.
"""

import torch
from diffusers.models.embeddings import TimestepEmbedding
from torch import nn

from surgery.errors import UnsupportedModelError

from .base import Method, placed


class NoisyEmbedding(nn.Module):
    """In place of the module that embeds the time."""

    def __init__(self, embedding, settings):
        super().__init__()
        self.embedding, self.settings = embedding, settings
        self.moment = None

    def forward(self, *args, **kwargs):
        """(batch, channels) as the module gives it, with noise."""
        embedded = self.embedding(*args, **kwargs)
        settings, moment = self.settings, self.moment
        seed = (settings.seed * 1_000_003 + moment.step) % 2**62
        noise = torch.randn(embedded.shape[-1:], generator=torch.Generator().manual_seed(seed)).to(embedded)
        size = embedded.float().square().mean(-1, keepdim=True).sqrt().to(embedded.dtype)
        return embedded + settings.noise * moment.level**settings.power * size * noise


class Tsg(Method):
    """As the module says."""

    def __init__(self, settings, model, pipeline):
        super().__init__(settings, model, pipeline)
        embeddings = [path for path, module in model.named_modules() if isinstance(module, TimestepEmbedding)]
        # A distilled guidance has an embedding of the same class, and so has what refines text.
        found = [path for path in embeddings if not path.endswith("guidance_embedder") and "refiner" not in path]
        if not found:
            raise UnsupportedModelError(f"guidance: {type(model).__name__} has no embedding of the time")
        self.noisy = NoisyEmbedding(model.get_submodule(found[0]), settings)
        self.replacements = [(*placed(model, found[0]), self.noisy)]

    def weakened(self, moment):
        """As Method's."""
        self.noisy.moment = moment
        return super().weakened(moment)
