"""Queries of the image's tokens, blurred: what SEG and OSEG have in common."""

from abc import ABC, abstractmethod

from torch import nn

from surgery.errors import UnsupportedModelError

from ..blur import blurred
from ..layers import chosen_layers
from .base import Method


class BlurredQueries(nn.Module):
    """In place of a `to_q`. heads: None, or, for the orthogonal part alone, how many; to_key: the keys' projection."""

    def __init__(self, to_query, sigma, to_key=None, heads=None, keep_parallel=True):
        super().__init__()
        self.to_query, self.to_key = to_query, to_key
        self.sigma, self.heads, self.keep_parallel = sigma, heads, keep_parallel
        self.grid = None

    def forward(self, hidden_states):
        """(batch, tokens, channels) -> queries; text among the tokens keeps its own."""
        queries = self.to_query(hidden_states)
        place = self.grid.at(queries.shape[1])
        if place is None:
            return queries
        *shape, first = place
        count = shape[0] * shape[1] * shape[2]
        image = queries[:, first : first + count]
        if self.to_key is None:
            image = blurred(image, *shape, self.sigma)
        else:
            image = self._orthogonal_blurred(image, self.to_key(hidden_states[:, first : first + count]), shape)
        if count == queries.shape[1]:
            return image
        queries = queries.clone()
        queries[:, first : first + count] = image
        return queries

    def _orthogonal_blurred(self, queries, keys, shape):
        parallel = along(queries.unflatten(-1, (self.heads, -1)), keys.unflatten(-1, (self.heads, -1))).flatten(-2)
        orthogonal = blurred(queries - parallel, *shape, self.sigma)
        return parallel + orthogonal if self.keep_parallel else orthogonal


def along(queries, keys):
    """The part of each query along the key of the same token and head, (..., head_dim); 0 where the key is 0."""
    length = keys.square().sum(-1, keepdim=True)
    share = (queries * keys).sum(-1, keepdim=True) / length.clamp_min(1e-20)
    return share.where(length > 0, 0.0) * keys


class ByQueries(Method, ABC):
    """A method that weakens the model by other queries in self-attention, or of the image in joint attention."""

    needs_grid = True

    def __init__(self, settings, model, pipeline):
        super().__init__(settings, model, pipeline)
        layers = chosen_layers(model, settings.layers, ("self", "joint"), "self-attention", _has_queries)
        self.replacements = []
        for layer in layers:
            attention = model.get_submodule(layer.path)
            if getattr(attention, "fused_projections", False):
                raise UnsupportedModelError(
                    f"guidance: {layer.path} has its projections fused; unfuse_qkv_projections() first"
                )
            self.replacements.append((attention, "to_q", self.queries(attention)))

    @abstractmethod
    def queries(self, attention):
        """The module to stand in an attention module's `to_q`."""

    def weakened(self, moment):
        """As Method's."""
        for _, _, queries in self.replacements:
            queries.grid = moment.grid
        return super().weakened(moment)


def _has_queries(attention):
    """Not so in FLUX.2's blocks of one stream, where one Linear makes queries, keys, values and more."""
    return getattr(attention, "to_q", None) is not None
