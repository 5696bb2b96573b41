"""Normalized attention guidance: in cross-attention's output, away from what a negative prompt attends to.

    Z = Z+ + scale (Z+ - Z-);  Z *= min(1, tau |Z+|_1 / |Z|_1);  alpha Z + (1 - alpha) Z+

Z+ and Z- are a module's outputs for the prompt and the negative prompt, before its output projection. Source: Chen et
al., arXiv 2505.21179. Defaults: scale 5, tau 2.5, alpha 0.25. Cost: no evaluation more; the cross-attention modules run
twice, and the negative prompt is encoded once a run. It works without CFG, on distilled models. Layers: cross-attention
of UNets, whose text comes to it as it was encoded. The GAG paper (arXiv 2603.02531, Remark 2.1, Figure 5b) finds that
it does not go with GAG.
"""

import warnings

from torch import nn

from surgery.errors import UnsupportedModelError
from surgery.models.patching import patched_modules

from ..layers import chosen_layers
from .base import Method, placed, swapped


class NormalizedOutput(nn.Module):
    """In place of a `to_out[0]`: keeps what it gets for the negative prompt, then leads the prompt's away from it."""

    def __init__(self, to_out, settings):
        super().__init__()
        self.to_out, self.settings = to_out, settings
        self.negative = None
        self.rows = slice(None)

    def forward(self, output):
        """(batch, queries, channels), as the module's."""
        settings = self.settings
        if self.negative is None:
            self.negative = output
            return self.to_out(output)
        positive, output = output[self.rows], output.clone()
        output[self.rows] = normalized(positive, self.negative, settings.scale, settings.tau, settings.alpha)
        self.negative = None
        return self.to_out(output)


class GuidedAttention(nn.Module):
    """In place of a cross-attention module: runs it for the negative prompt, and then as it is called."""

    def __init__(self, attention, output):
        super().__init__()
        self.attention, self.output = attention, output
        self.text = None  # (1, tokens, channels)

    def forward(self, hidden_states, encoder_hidden_states=None, attention_mask=None, **kwargs):
        """As the module's. attention_mask: of the prompt's tokens alone."""
        rows = hidden_states[self.output.rows]
        text = self.text.expand(rows.shape[0], -1, -1)
        if isinstance(encoder_hidden_states, tuple):  # with an IP-Adapter's image tokens beside the text
            images = [tokens[self.output.rows] for tokens in encoder_hidden_states[1]]
            text = (text, images)
        self.output.negative = None
        self.attention(rows, encoder_hidden_states=text, **kwargs)
        return self.attention(
            hidden_states, encoder_hidden_states=encoder_hidden_states, attention_mask=attention_mask, **kwargs
        )


class Nag(Method):
    """As the module says."""

    def __init__(self, settings, model, pipeline):
        super().__init__(settings, model, pipeline)
        if type(model).__name__.removeprefix("Pladis") != "UNet2DConditionModel":
            raise UnsupportedModelError("guidance: nag is for UNets, whose text comes to cross-attention as encoded")
        if any(module.pladis_operator == "gag" for module in patched_modules(model).values()):
            warnings.warn(
                "NAG with GAG: the GAG paper (arXiv 2603.02531, Figure 5b) measured that the two together score below "
                "GAG alone",
                stacklevel=4,
            )
        self.attentions, self.outputs = [], []
        for layer in chosen_layers(model, settings.layers, ("cross",), "cross-attention"):
            attention = model.get_submodule(layer.path)
            output = NormalizedOutput(attention.to_out[0], settings)
            self.outputs.append((attention.to_out, "0", output))
            self.attentions.append((*placed(model, layer.path), GuidedAttention(attention, output)))

    def begin(self):
        """As Method's."""
        self._text = None

    def around(self, call, moment):
        """As Method's."""
        if self._text is None:
            self._text = self._encoded(call)
        for _, _, guided in self.attentions:
            guided.text = self._text
        for _, _, output in self.outputs:
            output.rows = call.slice(call.second)
        return swapped([*self.outputs, *self.attentions])

    def _encoded(self, call):
        text = call.arguments["encoder_hidden_states"]
        encoded = self.pipeline.encode_prompt(
            self.settings.negative_prompt,
            device=text.device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=False,
        )
        return encoded[0].to(text)


def normalized(positive, negative, scale, tau, alpha):
    """The formula of the module's docstring; positive, negative: (batch, queries, channels)."""
    led = positive + scale * (positive - negative)
    size, length = (states.float().abs().sum(-1, keepdim=True) for states in (positive, led))
    led = led * (tau * size / length.clamp_min(1e-20)).clamp_max(1.0).to(led.dtype)
    return alpha * led + (1 - alpha) * positive
