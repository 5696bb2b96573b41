"""Transformer blocks that do less: what SLG, STG and AutoGuidance have in common."""

import torch
from diffusers.hooks._helpers import TransformerBlockRegistry
from torch import nn

from surgery.errors import UnsupportedModelError

from ..layers import chosen_layers
from .base import placed

# Blocks that give back hidden_states alone and that diffusers' registry does not list.
_ALONE = ("SanaTransformerBlock",)


class _Block(nn.Module):
    """In place of a transformer block. Knows where hidden states are in what it takes and gives back."""

    def __init__(self, block):
        super().__init__()
        self.block = block
        self.streams = streams_of(block)

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.block, name)  # a model may ask a block for what it is

    def taken(self, args, kwargs):
        """The tensors that go in as the stream or streams, in the order in which they come out."""
        given = dict(zip(self.streams.parameters, args, strict=False)) | kwargs
        return [given[name] for name in self.streams.names]

    def given_back(self, streams):
        """As the block gives them back."""
        return tuple(streams) if self.streams.is_tuple else streams[0]


class SkippedBlock(_Block):
    """What goes in comes out."""

    def forward(self, *args, **kwargs):
        """As the block's."""
        return self.given_back(self.taken(args, kwargs))


class DroppedBlock(_Block):
    """What the block changes, a share of it dropped: the same for all images of a batch, another at each step."""

    def __init__(self, block, dropout, seed):
        super().__init__(block)
        self.dropout, self.seed, self.step = dropout, seed, 0

    def forward(self, *args, **kwargs):
        """As the block's."""
        before = self.taken(args, kwargs)
        after = self.block(*args, **kwargs)
        after = list(after) if self.streams.is_tuple else [after]
        return self.given_back([self._dropped(*pair) for pair in zip(before, after, strict=True)])

    def _dropped(self, before, after):
        if after is None:  # the last block of SD3 gives back no text
            return None
        generator = torch.Generator(after.device).manual_seed((self.seed * 1_000_003 + self.step) % 2**62)
        kept = torch.rand(after.shape[1:], generator=generator, device=after.device) >= self.dropout
        return before + (after - before) * kept / max(1.0 - self.dropout, 1e-6)


class Streams:
    """Where a block's streams are: names of its arguments, in the order in which they come back."""

    def __init__(self, parameters, names, is_tuple):
        self.parameters, self.names, self.is_tuple = parameters, names, is_tuple


def streams_of(block):
    """The Streams of a block; UnsupportedModelError for a class that is not known."""
    import inspect

    kind = type(block)
    parameters = list(inspect.signature(kind.forward).parameters)[1:]
    if kind.__name__ in _ALONE:
        return Streams(parameters, ["hidden_states"], False)
    try:
        known = TransformerBlockRegistry.get(kind)
    except ValueError:
        raise UnsupportedModelError(f"guidance: what a {kind.__name__} gives back is not known") from None
    names = {known.return_hidden_states_index: known.hidden_states_argument_name}
    if known.return_encoder_hidden_states_index is not None:
        names[known.return_encoder_hidden_states_index] = known.encoder_hidden_states_argument_name
    return Streams(parameters, [names[index] for index in sorted(names)], len(names) > 1)


def replaced_blocks(model, selectors, make):
    """[(parent, name, make(block))] for the blocks of the attention modules that selectors name."""
    layers = chosen_layers(model, selectors, ("self", "joint", "cross"), "transformer block")
    paths = dict.fromkeys(layer.block for layer in layers)
    return [(*placed(model, path), make(model.get_submodule(path))) for path in paths]
