"""Patched attention that runs diffusers' own processor, with the one attention call inside it answered by an operator.

So nothing of a model's projections, norms, rotary embeddings and gates is copied here: a backbone whose attention is a
processor around one call of `dispatch_attention_fn` or `scaled_dot_product_attention` is a class with the processors'
names and where its text is. What a module is told beside its tensors travels by thread: calls in several threads keep
apart, and a compiled graph reads it while it is traced, dynamic shapes included.
"""

import functools
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor, nn

from ..additions import negative_count
from ..compat import as_scaled, is_context_parallel, with_attention
from ..joint import attend_jointly
from ..model import PladisModel
from ..module import PladisModule, warn_of_unknown


class Text(NamedTuple):
    """Where the text's tokens are in a joint sequence: `length` of them, or all but `image` ones; first, or last.

    lengths: (batch,), where each entry has its own number of text tokens, first, then the image's and then padding.
    """

    length: int | None
    first: bool = True
    image: int | None = None
    lengths: Tensor | None = None


class TextNotToldError(ValueError):
    """A block was called outside the model that tells it where its text is."""


class _Now(threading.local):
    """What is going on in this thread: the module whose processor runs, its text, and that of the model's sequence.

    asked: the latter where a module asked for it, until `asked_text`.
    """

    module: "ByProcessor | None" = None
    text: Text | None = None
    of_model: Text | None = None
    asked: Text | None = None


_NOW = _Now()


class ByProcessor(PladisModule):
    """Attention as one of a class's own processors computes it, but for the operator.

    A class has `own_processors`, processor classes of diffusers', and `as_first`, names of those that compute what the
    first of them does, from fused projections or on a package's kernels; or `processors`, their names, and a forward()
    of its own. The first attention call of a processor is the one to text; what it calls after that, an IP-Adapter's
    part or an image prompt's, stays dense. The backend that `set_attention_backend` names means nothing here. Context
    parallelism is refused: it splits the text.
    """

    own_processors: tuple[type, ...] = ()
    as_first: tuple[str, ...] = ()
    _calls: Mapping[str, tuple[Callable, tuple[str, ...]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        calls = [
            (with_attention(processor.__call__, _dispatched, _scaled), _keywords(processor))
            for processor in cls.own_processors
        ]
        names = [processor.__name__ for processor in cls.own_processors]
        cls._calls = dict(zip(names, calls, strict=True)) | dict.fromkeys(cls.as_first, *calls[:1])
        cls.processors = tuple(cls._calls) or cls.processors

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the stock class's, whose arguments are its processor's."""
        call, names = self._calls[type(self.processor).__name__]
        given = {**dict(zip(names, args, strict=False)), **kwargs} if args else kwargs
        unknown = [name for name in given if name not in names]
        if unknown:
            warn_of_unknown({name: given[name] for name in unknown})
            given = {name: given[name] for name in names if name in given}
        before = _NOW.module, _NOW.text
        _NOW.module, _NOW.text = self, self.text_of(given)
        try:
            return call(self.processor, self, **given)
        finally:
            _NOW.module, _NOW.text = before

    def text_of(self, given: Mapping[str, Any]) -> Text | None:
        """Where the text is in the sequence of a call, {argument of the processor: value}; None where all keys are."""
        return None

    def by_operator(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None, text: Text | None
    ) -> Tensor:
        """The answer to the processor's attention call. query: (batch, heads, queries, head_dim); the others alike,
        but that several heads may share one of keys.
        """
        if is_context_parallel(self.processor):
            raise ValueError("context parallelism splits the text between devices, and the operators need all of it")
        return self.attend(query, key, value, mask, scale)


class CrossAttention(ByProcessor):
    """Cross-attention to text by one of diffusers' own processors."""

    kind = "cross"

    def text_of(self, given: Mapping[str, Any]) -> Text | None:
        """All keys are text. Raises ValueError for self-attention, which has no text."""
        if given.get("encoder_hidden_states") is None:
            raise ValueError("this is cross-attention to text; self-attention stays diffusers' own")
        return None


class JointAttention(ByProcessor):
    """Joint attention of text and image by one of diffusers' own processors.

    text_first: where the text is. masks_queries: that a boolean mask leaves out padding's own rows too, which nothing
    reads: the row of an image token then says it all. No boolean mask may leave out tokens of the image.
    """

    kind = "joint"
    text_first: bool = True
    masks_queries: bool = False

    def text_of(self, given: Mapping[str, Any]) -> Text | None:
        """The text that the module is given beside the image; else as the model told, or TextNotToldError."""
        text = given.get("encoder_hidden_states")
        if text is not None:
            return Text(text.shape[1], self.text_first)
        if _NOW.of_model is None:
            raise TextNotToldError(
                "this block of one stream was not told how many of its tokens are text: it was called outside its "
                "model, or something replaced the forward() of the model (take that out)"
            )
        _NOW.asked = _NOW.of_model
        return _NOW.of_model

    def by_operator(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None, text: Text | None
    ) -> Tensor:
        """As ByProcessor's. Where the queries are the image's alone, all other keys are text."""
        queries, keys = query.shape[2], key.shape[2]
        assert text is not None
        if scale is not None and scale != query.shape[3] ** -0.5:  # attend_jointly has the usual one
            query = query * (scale * query.shape[3] ** 0.5)
        if mask is not None and mask.ndim == 2:
            mask = mask[:, None, None]
        if text.lengths is not None:
            return self._ragged(query, key, value, text)
        length = keys - queries if queries != keys else text.length
        if length is None:
            assert text.image is not None
            length = keys - text.image
        if mask is not None and self.masks_queries and mask.dtype == torch.bool:
            row = length if text.first else 0
            mask = mask[:, :, row : row + 1]
        if queries == keys:
            return self._jointly(query, key, value, length, text.first, mask)
        none = query.new_zeros(*query.shape[:2], length, query.shape[3])  # no token of text asks
        parts = (none, query) if text.first else (query, none)
        output = self._jointly(torch.cat(parts, dim=2), key, value, length, text.first, mask)
        return output[:, :, length:] if text.first else output[:, :, :queries]

    def attended(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        """The answer where a class computes itself what its processor does, which would repeat keys for each head.

        query: (batch, length, heads, head_dim); key, value: (batch, keys, key_heads, head_dim). Returns (batch, length,
        channels).
        """
        query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
        return self.by_operator(query, key, value, mask, None, self.text_of({})).transpose(1, 2).flatten(2)

    def _jointly(self, query, key, value, length, first, mask):
        text_alone = mask is not None and mask.dtype == torch.bool
        return attend_jointly(
            self, query, key, value, length, text_first=first, mask=mask, only_text_is_masked=text_alone
        )

    def _ragged(self, query, key, value, text):
        """[text, image, padding] of lengths of their own for each entry, turned to [image, text, padding] and back."""
        count = negative_count(self)  # of those behind everything, which stay there
        length, lengths, image = query.shape[2], text.lengths[:, None], text.image
        place = torch.arange(length, device=query.device)[None]  # (1, length)
        whole = lengths + image  # (batch, 1)
        lasting = place >= length - count
        turned = torch.where(place < image, place + lengths, torch.where(place < whole, place - image, place))
        back = torch.where(place < lengths, place + image, torch.where(place < whole, place - lengths, place))
        query, key, value = (_gathered(tensor, turned) for tensor in (query, key, value))
        mask = ((place < whole) | lasting)[
            :, None, None
        ]  # which diffusers' is too, where it has one: every token but padding
        return _gathered(self._jointly(query, key, value, length - image, False, mask), back)


def rotated(states: Tensor, turns: Any, **how: Any) -> Tensor:
    """diffusers' apply_rotary_emb, which returns one tensor whatever its annotation says."""
    found: Any = apply_rotary_emb(states, turns, **how)
    return found


def _gathered(tensor, order):
    """(batch, heads, length, head_dim) with its tokens in an order of (batch, length)."""
    return torch.gather(tensor, 2, order[:, None, :, None].expand(tensor.shape))


def _keywords(processor):
    """The names of what a processor is called with, behind itself and the module."""
    parameters = list(inspect.signature(processor.__call__).parameters.values())[2:]
    return tuple(parameter.name for parameter in parameters if parameter.kind is parameter.POSITIONAL_OR_KEYWORD)


def _scaled(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """In the place of scaled_dot_product_attention within a processor."""
    module, text = _NOW.module, _NOW.text
    if module is None:
        return nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    _NOW.module = None  # what the processor calls after this stays dense
    return module.by_operator(query, key, value, attn_mask, scale, text)


def _dispatched(query: Tensor, key: Tensor, value: Tensor, **how: Any) -> Tensor:
    """In the place of dispatch_attention_fn within a processor: tensors are (batch, length, heads, head_dim)."""
    if _NOW.module is None:
        return dispatch_attention_fn(query, key, value, **how)
    return as_scaled(_scaled, query, key, value, how)


@contextmanager
def told_text(text: Text | None) -> Iterator[None]:
    """While it lasts, the modules that ask are told that the text of the model's sequence is there."""
    before, _NOW.of_model = _NOW.of_model, text
    try:
        yield
    finally:
        _NOW.of_model = before


def text_told() -> Text | None:
    """Where the text is in the sequence of the call of a model that goes on in this thread, as its modules are told."""
    return _NOW.of_model


def asked_text() -> Text | None:
    """The same, where a module has asked for it since this was called last."""
    found, _NOW.asked = _NOW.asked, None
    return found


class JointModel(PladisModel):
    """A model whose joint attention is in some stacks of its blocks, one stream or two; all else attends to one kind.

    joint_blocks: the first parts of paths of those stacks. `text_of_model(config, given)`: where the text is in the
    sequence of a call, {argument of forward(): value}, told to blocks of one stream; None where no block needs it.
    """

    joint_blocks: tuple[str, ...] = ("transformer_blocks", "single_transformer_blocks")

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "stock" in cls.__dict__:
            cls.forward = _telling(cls.stock.forward)

    @classmethod
    def refusal_of(cls, module: nn.Module, path: str, self_attention: bool = False) -> str | None:
        """As PladisModel's."""
        if path.partition(".")[0] not in cls.joint_blocks:
            return "it is self-attention among tokens of text or of the image alone; it stays dense"
        return super().refusal_of(module, path, self_attention)

    def text_of_model(self, given: Mapping[str, Any]) -> Text | None:
        """The text that stands first, one token for each of encoder_hidden_states, (batch, tokens, ...)."""
        return Text(given["encoder_hidden_states"].shape[1])


def _telling(stock):
    names = tuple(inspect.signature(stock).parameters)[1:]

    @functools.wraps(stock)
    def forward(self, *args, **kwargs):
        with told_text(self.text_of_model({**dict(zip(names, args, strict=False)), **kwargs})):
            return stock(self, *args, **kwargs)

    return forward
