"""Perturbed-attention guidance: CFG + scale (C - W), where in W some self-attention's map is the identity.

Each token keeps its own value. Source: Ahn et al., arXiv 2403.17377. Defaults: scale 3, the middle block's modules.
Cost: one evaluation more a step. Layers: modules of self-attention; joint attention, where image and text share a map,
is refused. (diffusers has it in pipelines of its own, for some models, and as a guider of its modular pipelines.)
"""

from torch import nn

from surgery.errors import UnsupportedModelError

from ..layers import chosen_layers
from .base import Method, placed


class IdentityAttention(nn.Module):
    """In place of a self-attention module: its values through its output projection."""

    def __init__(self, attention):
        super().__init__()
        self.attention = attention

    def forward(self, hidden_states, *args, **kwargs):
        """(batch, tokens, channels), out as in; all else that the module may be given is for its map."""
        attention = self.attention
        return attention.to_out[1](attention.to_out[0](attention.to_v(hidden_states)))


class Pag(Method):
    """As the module says."""

    def __init__(self, settings, model, pipeline):
        super().__init__(settings, model, pipeline)
        layers = chosen_layers(model, settings.layers, ("self",), "self-attention")
        self.replacements = [identity_in(model, layer.path) for layer in layers]


def identity_in(model, path):
    """(parent, name, IdentityAttention) for the module at a path; UnsupportedModelError where that would be wrong."""
    attention = model.get_submodule(path)
    unusual = getattr(attention, "group_norm", None) or getattr(attention, "spatial_norm", None)
    if unusual or getattr(attention, "residual_connection", False) or not hasattr(attention, "to_v"):
        raise UnsupportedModelError(f"guidance: {path} does more than attention, so its map cannot be the identity")
    return (*placed(model, path), IdentityAttention(attention))
