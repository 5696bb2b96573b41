"""`PladisMochiTransformer3DModel`: Mochi 1."""

import torch
import torch.nn.functional as F
from diffusers import MochiTransformer3DModel, ModelMixin  # noqa: F401  diffusers looks for ModelMixin in this module
from diffusers.models.attention_processor import MochiAttention

from ..additions import negative_count, shown_in
from ..joint import attend_jointly
from ..model import PladisModel
from ..module import PladisModule, warn_of_unknown
from .record import Backbone, video_grid


class PladisMochiAttention(PladisModule, MochiAttention):
    """Joint attention of Mochi over [image, text].

    diffusers takes the padding out of the text of each batch entry in turn, and pads what comes back with zeros. Here
    padding is masked and its own output set to zero: the same for text that stands before its padding, as a tokenizer
    writes it, all entries at once and in one graph. Text with padding inside would come back closed up from diffusers,
    token for token in another place than it went in; here every token stays in its place.
    """

    stock = MochiAttention
    kind = "joint"
    processors = ("MochiAttnProcessor2_0",)

    def set_processor(self, processor):
        """Refuses all but MochiAttnProcessor2_0, as PladisModule's; the stock class takes none at all."""
        self.check_processor(processor)
        self.processor = processor

    def forward(self, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb=None, **kwargs):
        """As `MochiAttention.forward`: (batch, image tokens, channels), (batch, text tokens, channels); out as in.

        attention_mask: (batch, text tokens), True or 1 keeps a token. image_rotary_emb: (cos, sin) of the image
        tokens, each (image tokens, heads, head_dim / 2).
        """
        warn_of_unknown(kwargs)
        query = self._rotated(self.norm_q(self._heads(self.to_q, hidden_states)), image_rotary_emb)
        key = self._rotated(self.norm_k(self._heads(self.to_k, hidden_states)), image_rotary_emb)
        text_query = self.norm_added_q(self._heads(self.add_q_proj, encoder_hidden_states))
        text_key = self.norm_added_k(self._heads(self.add_k_proj, encoder_hidden_states))
        value = self._heads(self.to_v, hidden_states)
        text_value = self._heads(self.add_v_proj, encoder_hidden_states)
        # (batch, heads, image and text tokens, head_dim)
        query, key, value = (
            torch.cat(pair, dim=1).transpose(1, 2)
            for pair in ((query, text_query), (key, text_key), (value, text_value))
        )
        image_length, text_length = hidden_states.shape[1], encoder_hidden_states.shape[1]
        is_text = attention_mask.bool()
        if count := negative_count(self):
            keys = shown_in(is_text[:, None, None], self.pladis_teller.told, slice(-count, None), len(is_text))
            assert keys is not None  # as there was a mask
            is_text = keys[:, 0, 0]
        mask = F.pad(is_text, (image_length, 0), value=True)[:, None, None]  # (batch, 1, 1, image and text tokens)
        output = attend_jointly(
            self, query, key, value, text_length, text_first=False, mask=mask, only_text_is_masked=True
        )
        output = self._merge_heads(output, query)
        image, text = output.split((image_length, text_length), dim=1)
        text = text.masked_fill(~is_text[..., None], 0.0)
        image = self.to_out[1](self.to_out[0](image))
        return image, text if self.context_pre_only else self.to_add_out(text)

    def _heads(self, projection, hidden_states):
        return projection(hidden_states).unflatten(2, (self.heads, -1))  # (batch, length, heads, head_dim)

    def _rotated(self, states, rotary):
        if rotary is None:
            return states
        cos, sin = rotary
        even, odd = states[..., 0::2].float(), states[..., 1::2].float()
        turned = ((even * cos - odd * sin), (even * sin + odd * cos))
        return torch.stack([part.to(states.dtype) for part in turned], dim=-1).flatten(-2)


class PladisMochiTransformer3DModel(PladisModel, MochiTransformer3DModel):
    """MochiTransformer3DModel with some of its attention modules (attn1) turned into PladisMochiAttention."""

    stock = MochiTransformer3DModel
    forms = (PladisMochiAttention,)
    hides_negative = True


BACKBONE = Backbone(patched=PladisMochiTransformer3DModel, attention="attn1", grid=video_grid, text_first=False)
