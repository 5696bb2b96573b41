"""Tiny denoisers of models whose pipelines need much beside, in a pipeline that saves and loads any."""

import torch

from ...tiny import tiny_vae
from .family import Family


def hosted(transformer, call):
    """(A pipeline of transformer, autoencoder and scheduler, the arguments of the transformer's call)."""
    from diffusers import DDIMScheduler, DiTPipeline

    return DiTPipeline(transformer.eval(), tiny_vae(), DDIMScheduler()), call


def noise(*shape, seed=0):
    """Normal numbers of a shape."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def shaken(transformer, *names):
    """Random weights for the linear layers whose path has one of the names."""
    for path, module in transformer.named_modules():
        if isinstance(module, torch.nn.Linear) and any(name in path for name in names):
            torch.nn.init.normal_(module.weight, std=0.3)


def padded(length, kept, dtype=torch.bool):
    """The mask of two texts of `length` tokens, the first of which has `kept`."""
    mask = torch.ones(2, length, dtype=dtype)
    mask[0, kept:] = 0
    return mask


class OfLength(Family):
    """A model whose text is longer or shorter than what its argument has."""

    lengths = {"aura_flow": 8 + 12, "hidream": 12, "hunyuan_video15": 4 + 5 + 12, "bria_fibo2": 12, "cosmos25": 12}

    def text_length(self, call):
        return self.lengths[self.name]


class ImageAsks(Family):
    """A model where the image's tokens alone ask."""

    def is_to_text(self, length, queries, keys):
        return keys == queries + length
