"""`PladisAttention`: diffusers' `Attention` as cross-attention, with one of our operators in place of its softmax.

UNets, PixArt and SANA.
"""

from diffusers.models.attention_processor import Attention

from .ip_adapter import image_attention, split_image_tokens
from .module import PladisModule, warn_of_unknown


class PladisAttention(PladisModule, Attention):
    """Cross-attention by PLADIS (arXiv 2503.07677, eq. 15), GAG or another of OPERATORS, hyperparameters in buffers."""

    stock = Attention
    # They compute plain attention, or add an IP-Adapter to it: forward() below computes what they would.
    processors = (
        "AttnProcessor",
        "AttnProcessor2_0",
        "AttnProcessorNPU",
        "FusedAttnProcessor2_0",
        "IPAdapterAttnProcessor",
        "IPAdapterAttnProcessor2_0",
        "IPAdapterXFormersAttnProcessor",
        "SanaAttnProcessor2_0",
        "SlicedAttnProcessor",
        "XFormersAttnProcessor",
    )

    @classmethod
    def own_refusal(cls, module):
        """As PladisModule's: self-attention and joint attention."""
        if not module.is_cross_attention:
            return "it is self-attention; sparsifying it destroys the image, so it stays dense"
        if module.added_kv_proj_dim is not None or module.to_k is None:
            return "it attends to image and text in one softmax (added key/value projections); not supported yet"
        if module.to_out is None or module.context_pre_only is not None:
            return "it is joint attention without an output of its own; not supported yet"
        return None

    def revert(self):
        """As PladisModule's."""
        super().revert()
        if type(self.processor).__name__ == "FusedAttnProcessor2_0" and not hasattr(self, "to_kv"):
            self.fuse_projections()  # asked for while this class ignored it
        return self

    def forward(self, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None, **kwargs):
        """As `Attention.forward`: (batch, queries, channels) or (batch, channels, height, width), out as in.

        encoder_hidden_states: (batch, keys, cross_attention_dim), or IP-Adapter's (text, [image tokens]).
        attention_mask: additive, (batch, 1 or queries, keys). `ip_adapter_masks` is taken from the keyword arguments.
        """
        masks = kwargs.pop("ip_adapter_masks", None)
        kwargs.pop("scale", None)  # the LoRA scale; peft has applied it before the call
        warn_of_unknown(kwargs)
        text, image_tokens = split_image_tokens(self.processor, encoder_hidden_states)

        residual = hidden_states
        if self.spatial_norm is not None:
            hidden_states = self.spatial_norm(hidden_states, temb)
        image_shape = hidden_states.shape if hidden_states.ndim == 4 else None
        if image_shape is not None:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)  # (batch, height * width, channels)
        if self.group_norm is not None:
            hidden_states = self.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        if text is None:
            text = hidden_states
        elif self.norm_cross is not None:
            text = self.norm_encoder_hidden_states(text)

        query, key = self.to_q(hidden_states), self.to_k(text)
        query = self._normed(self.norm_q, query)
        key = self._normed(self.norm_k, key)
        value = self._split_heads(self.to_v(text))
        output = self.attend(query, key, value, self._mask_per_head(attention_mask, text), self.scale)
        if image_tokens:
            output = output + image_attention(self.processor, query, image_tokens, masks)
        output = self._merge_heads(output, query)

        output = self.to_out[1](self.to_out[0](output))
        if image_shape is not None:
            output = output.transpose(-1, -2).reshape(image_shape)
        if self.residual_connection:
            output = output + residual
        return output if self.rescale_output_factor == 1.0 else output / self.rescale_output_factor

    def _normed(self, norm, projected):
        """A projection split into heads and normed: (batch, heads, length, head_dim)."""
        if norm is None:
            return self._split_heads(projected)
        if type(self.processor).__name__ == "SanaAttnProcessor2_0":  # whose norms are over all heads together
            return self._split_heads(norm(projected))
        return norm(self._split_heads(projected))
