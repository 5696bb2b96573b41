"""Attention whose map among the image's tokens is the identity, for `pag` and `stg`: alone, or with text kept."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgery.errors import UnsupportedModelError
from surgery.nn import is_pladis
from surgery.nn.backbones.flux_streams import TEXT_LENGTH
from surgery.nn.compat import as_scaled, with_attention
from surgery.nn.functional import for_all_heads
from surgery.nn.kernels.reference import without_autocast

from .base import Grid
from .layers import Layer, placed


class IdentityAttention(nn.Module):
    """In place of a self-attention module: its values through its output projection."""

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(batch, tokens, channels), out as in; all else that the module may be given is for its map."""
        attention = self.attention
        return attention.to_out[1](attention.to_out[0](attention.to_v(hidden_states)))


def identity_in(model: nn.Module, layer: Layer) -> "tuple[list[tuple[nn.Module, str, Any]], AmongImage | None]":
    """([(parent, name, what stands there)] for a Layer, what has to be told the grid of a call, or None).

    Raises UnsupportedModelError where the identity would be wrong.
    """
    attention: Any = model.get_submodule(layer.path)
    unusual = getattr(attention, "group_norm", None) or getattr(attention, "spatial_norm", None)
    if unusual or getattr(attention, "residual_connection", False):
        raise UnsupportedModelError(
            f"guidance: {layer.path} does more than attention, so its map cannot be the identity"
        )
    if layer.kind == "self" and hasattr(attention, "to_v") and len(attention.to_out) == 2:
        return [(*placed(model, layer.path), IdentityAttention(attention))], None
    among = AmongImage(attention)
    replacements: list = [(attention, "processor", among.processor)]
    if is_pladis(attention):
        replacements.append((*placed(model, layer.path), _AsStock(attention)))
    return replacements, among


class _AsStock(nn.Module):
    """In place of a patched module: it by the stock class's forward, which runs whatever processor it has."""

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the stock module's."""
        kwargs.pop(TEXT_LENGTH, None)
        return self.attention.stock.forward(self.attention, *args, **kwargs)

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.attention, name)  # a block may ask its attention for what it is


class AmongImage:
    """An attention module's processor in which each token of the image attends, of the image, to itself alone.

    That is the softmax over the token's own key and all that is no image, as of a map whose entries from image to image
    are left out but for the diagonal; the operator of a patched module acts on the text within, with the share that
    text has there. The text's own queries are as before. grid: of the call that is to come.
    """

    def __init__(self, attention: Any) -> None:
        self.attention, self.grid = attention, None
        stock = type(attention.processor)
        try:
            call = with_attention(stock.__call__, self._dispatched, self._scaled)
        except RuntimeError as error:
            raise UnsupportedModelError(
                f"guidance: attention by {stock.__name__} cannot be the identity; set another processor"
            ) from error
        self.processor: Any = object.__new__(type(stock.__name__, (stock,), {"__call__": call}))
        self.processor.__dict__ = attention.processor.__dict__
        self.grid: Grid | None

    def _dispatched(self, query: Tensor, key: Tensor, value: Tensor, **how: Any) -> Tensor:
        """In the place of dispatch_attention_fn: tensors are (batch, length, heads, head_dim)."""
        return as_scaled(self._scaled, query, key, value, how)

    def _scaled(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """In the place of scaled_dot_product_attention: tensors are (batch, heads, length, head_dim)."""
        key, value = (for_all_heads(part, query.shape[1]) for part in (key, value))
        if attn_mask is not None and attn_mask.ndim == 2:
            attn_mask = attn_mask[:, None, None]
        assert self.grid is not None
        queries, keys, place = query.shape[2], key.shape[2], self.grid.at(key.shape[2])
        count = self.grid.filled
        if place is None or queries not in (keys, count) or count > keys:  # an IP-Adapter's part, or the text's alone
            return F.scaled_dot_product_attention(query, key, value, attn_mask, scale=scale)
        first = place[3] if torch.is_tensor(place[3]) else torch.full((query.shape[0],), place[3], device=query.device)
        image = first[:, None] + torch.arange(count, device=query.device)  # (batch, count)
        is_image = torch.zeros(query.shape[0], keys, dtype=torch.bool, device=query.device).scatter(1, image, True)
        others = is_image.int().argsort(dim=1, stable=True)[:, : keys - count]  # (batch, keys - count)
        asking = image if queries == keys else torch.arange(count, device=query.device).expand(image.shape)
        of_image = _cut(attn_mask, asking, 2, queries)
        mask = _cut(of_image, others, 3, keys)
        found = _of_image(
            *(_rows(*part) for part in ((query, asking), (key, image), (value, image), (key, others), (value, others))),
            mask,
            _of_own(of_image, image, keys),
            query.shape[3] ** -0.5 if scale is None else scale,
            self.attention,
        )
        if queries == count:
            return found
        text_mask = _cut(attn_mask, others, 2, queries)
        text = F.scaled_dot_product_attention(_rows(query, others), key, value, text_mask, scale=scale)
        output = query.new_empty(*query.shape[:3], value.shape[3])
        for part, rows in ((found, image), (text, others)):
            output = output.scatter(2, _index(rows, output), part.to(output.dtype))
        return output


@without_autocast
def _of_image(query, own_key, own_value, key, value, mask, own_mask, scale, attention):
    """Each query's attention to its own key and to other ones, by the operator of a patched module or dense.

    query, own_key, own_value: (batch, heads, queries, head_dim); key, value: (batch, heads, keys, head_dim). own_mask:
    what a mask adds to the own scores, broadcastable to (batch, heads, queries).
    """
    if key.shape[2] == 0:
        return own_value
    own = (query.float() * own_key.float()).sum(-1) * scale + own_mask
    scores = torch.matmul(query.float(), key.float().transpose(-1, -2)) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.float()
    if is_pladis(attention):
        attended = attention.attend(query, key, value, mask, scale)
    else:
        attended = F.scaled_dot_product_attention(query, key, value, mask, scale=scale)
    share = (scores.logsumexp(dim=-1) - own).sigmoid()[..., None].to(attended.dtype)
    return torch.lerp(own_value.to(attended.dtype), attended.nan_to_num(), share)


def _index(rows, states):
    """Rows (batch, n) as an index of (batch, heads, length, channels) states along their length."""
    return rows[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3])


def _rows(states, rows):
    return states.gather(2, _index(rows, states))


def _cut(mask, rows, dim, length):
    """The chosen rows (dim 2) or columns (3) of a mask, (batch or 1, heads or 1, length or 1, length or 1)."""
    if mask is None or mask.shape[dim] != length or length == 1:
        return mask
    mask = mask.expand(rows.shape[0], *mask.shape[1:])
    index = rows[:, None, :, None] if dim == 2 else rows[:, None, None]
    shape = list(mask.shape)
    shape[dim] = rows.shape[1]
    return mask.gather(dim, index.expand(shape))


def _of_own(mask, image, keys):
    """What an additive mask of the image's rows adds to each token's own score; 0 of a boolean one, which keeps it."""
    if mask is None or mask.dtype == torch.bool or mask.shape[3] != keys:
        return 0.0 if mask is None or mask.dtype == torch.bool else mask.float().squeeze(3)
    mask = mask.float().expand(image.shape[0], -1, -1, -1)
    if mask.shape[2] == 1:  # one row for all queries
        return mask.gather(3, image[:, None, None].expand(-1, mask.shape[1], -1, -1)).squeeze(2)
    return mask.gather(3, image[:, None, :, None].expand(-1, mask.shape[1], -1, -1)).squeeze(3)
