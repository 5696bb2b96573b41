"""The modules that stand in others' place while a model is weakened or led away, and the blur that some need."""

import inspect
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import TimestepEmbedding
from torch import Tensor, nn

from surgery.compat import block_streams
from surgery.errors import UnsupportedModelError
from surgery.nn.kernels.reference import without_autocast

from .base import Grid, Step
from .layers import guided_backbone

INFINITE = 9999.0  # as in the SEG authors' code: from here on the mean takes the blur's place


def blur_matrix(length: int, sigma: float) -> Tensor:
    """(length, length) float32: row i holds the weights of a Gaussian about i, reflected at the ends as F.pad does.

    As the SEG authors' code has it (github.com/SusungHong/SEG-SDXL, gaussian_blur_2d), whose kernel of ceil(6 sigma)
    tokens, made odd, is no longer than the grid, made odd: 33 at 32 x 32. That code knows square grids alone; here each
    side of another is capped by itself.
    """
    if length == 1:
        return torch.ones(1, 1)
    size = math.ceil(6 * sigma) + 1 - math.ceil(6 * sigma) % 2
    reach = min(size, length + 1 - length % 2) // 2
    offsets = torch.arange(-reach, reach + 1, dtype=torch.float64)
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    kernel /= kernel.sum()
    positions = (torch.arange(length)[:, None] + offsets[None].long()).abs()
    positions = torch.where(positions >= length, 2 * (length - 1) - positions, positions)
    matrix = torch.zeros(length, length, dtype=torch.float64)
    return matrix.scatter_add_(1, positions, kernel.expand(length, -1)).float()


@without_autocast
def blurred(states: Tensor, frames: int, height: int, width: int, sigma: float) -> Tensor:
    """Tokens (batch, frames * height * width, channels), each frame blurred by itself; sigma in tokens.

    From INFINITE on every token is its frame's mean.
    """
    grid = states.unflatten(1, (frames, height, width))
    if sigma >= INFINITE:
        return grid.mean(dim=(2, 3), keepdim=True).expand_as(grid).flatten(1, 3)
    across = blur_matrix(width, sigma).to(states)
    down = blur_matrix(height, sigma).to(states)
    grid = torch.matmul(across, grid)  # over width, for each frame and row
    grid = torch.einsum("ij,bfjwc->bfiwc", down, grid)
    return grid.flatten(1, 3)


class BlurredQueries(nn.Module):
    """In place of the projection of queries. head_dim: for the orthogonal part alone; to_key: the keys' projection.

    joined: how many channels are queries' where one projection makes queries, as many channels of keys, and more.
    """

    def __init__(
        self,
        to_query: nn.Module,
        sigma: float,
        to_key: nn.Module | None = None,
        head_dim: int | None = None,
        keep_parallel: bool = True,
        joined: int | None = None,
    ) -> None:
        super().__init__()
        self.to_query, self.to_key, self.joined = to_query, to_key, joined
        self.sigma, self.head_dim, self.keep_parallel = sigma, head_dim, keep_parallel
        self.grid: Grid | None = None  # of the call that is to come

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(batch, tokens, channels) -> queries; text among the tokens keeps its own."""
        projected = self.to_query(hidden_states)
        if self.joined is None:
            return self._changed(projected, hidden_states)
        queries, keys, more = projected.split([self.joined, self.joined, projected.shape[-1] - 2 * self.joined], dim=-1)
        return torch.cat([self._changed(queries, hidden_states, keys), keys, more], dim=-1)

    def _changed(self, queries, hidden_states, keys=None):
        assert self.grid is not None
        place = self.grid.at(queries.shape[1])
        if place is None:
            return queries
        *shape, first = place
        rows = image_rows(first, self.grid.count if not self.grid.has_levels else queries.shape[1], queries)
        image = queries.gather(1, rows.expand(*rows.shape[:2], queries.shape[2]))
        if self.head_dim is None:
            image = blurred(image, *shape, self.sigma)
        else:
            states = hidden_states if keys is None else keys
            states = states.gather(1, rows.expand(*rows.shape[:2], states.shape[2]))
            image = self._orthogonal_blurred(image, self.to_key(states) if self.to_key else states, shape)
        if image.shape[1] == queries.shape[1]:
            return image
        return queries.scatter(1, rows.expand(*rows.shape[:2], queries.shape[2]), image.to(queries.dtype))

    def _orthogonal_blurred(self, queries, keys, shape):
        queries, keys = (states.unflatten(-1, (-1, self.head_dim)) for states in (queries, keys))
        keys = keys.repeat_interleave(queries.shape[-2] // keys.shape[-2], dim=-2)  # heads that several others share
        parallel = along(queries, keys).flatten(-2)
        orthogonal = blurred(queries.flatten(-2) - parallel, *shape, self.sigma)
        return parallel + orthogonal if self.keep_parallel else orthogonal


def image_rows(first: "int | Tensor", count: int, states: Tensor) -> Tensor:
    """(batch, count, 1): where in (batch, tokens, ...) the image's tokens are, from `first` on, or (batch,) of them."""
    rows = torch.arange(count, device=states.device)[None].expand(states.shape[0], -1)
    return (rows + (first.to(states.device)[:, None] if torch.is_tensor(first) else first))[..., None]


def along(queries: Tensor, keys: Tensor) -> Tensor:
    """The part of each query along the key of the same token and head, (..., head_dim); 0 where the key is 0."""
    length = keys.square().sum(-1, keepdim=True)
    share = (queries * keys).sum(-1, keepdim=True) / length.clamp_min(1e-20)
    return share.where(length > 0, 0.0) * keys


class RecordingAttention(nn.Module):
    """In place of an attention module: as it, and keeps what came in."""

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.attention = attention
        self.seen: Tensor | None = None

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As the module's."""
        self.seen = hidden_states
        return self.attention(hidden_states, *args, **kwargs)

    def looked_at(self, rows: slice) -> Tensor:
        """(batch, tokens): how much the queries of some rows of the batch attend to each token, mean of the heads.

        What came in is forgotten.
        """
        assert self.seen is not None, "it tells of a call that was"
        attention, seen, self.seen = self.attention, self.seen[rows], None
        heads = attention.heads
        query, key = (to(seen).unflatten(-1, (heads, -1)).transpose(1, 2) for to in (attention.to_q, attention.to_k))
        scores = without_autocast(torch.matmul)(query.float(), key.float().transpose(-1, -2)) * attention.scale
        return scores.softmax(dim=-1).mean(dim=1).sum(dim=1)


def blurred_where_seen(
    sample: Tensor,
    output: Tensor,
    looked_at: Tensor,
    grid: Grid,
    sigma: float,
    alpha: float,
    prediction_type: str,
) -> Tensor:
    """SAG's degraded sample, (batch, channels, height, width): its image blurred where `looked_at` is above even.

    output: the model's for the sample. alpha: the signal's share of the sample's variance.
    """
    image, noise = image_and_noise(sample, output, alpha, prediction_type)
    place = grid.at(looked_at.shape[1])
    assert place is not None, "a UNet's self-attention is among its image's tokens"
    frames, height, width, _ = place
    mask = (looked_at > 1.0).to(sample.dtype).view(-1, frames, height, width)
    mask = F.interpolate(mask, sample.shape[-2:])
    smooth = blurred(image.flatten(2).transpose(1, 2), 1, *sample.shape[-2:], sigma)
    smooth = smooth.transpose(1, 2).unflatten(2, sample.shape[-2:])
    degraded = alpha**0.5 * (smooth * mask + image * (1 - mask)) + (1 - alpha) ** 0.5 * noise
    return degraded.to(sample.dtype)


def image_and_noise(sample: Tensor, output: Tensor, alpha: float, prediction_type: str) -> tuple[Tensor, Tensor]:
    """(predicted image, predicted noise) from a model's output; alpha: the signal's share of the variance."""
    signal, spread = alpha**0.5, (1 - alpha) ** 0.5
    if prediction_type == "v_prediction":
        return signal * sample - spread * output, signal * output + spread * sample
    if prediction_type == "sample":
        return output, (sample - signal * output) / spread
    return (sample - spread * output) / signal, output


class _Block(nn.Module):
    """In place of a transformer block. Knows where hidden states are in what it takes and gives back.

    streams: names of the arguments that hold them, in the order in which they come back; None for what diffusers lists.
    """

    def __init__(self, block: nn.Module, streams: Sequence[str] | None) -> None:
        super().__init__()
        self.block = block
        self.parameter_names = list(inspect.signature(type(block).forward).parameters)[1:]
        known = streams or block_streams(type(block))
        if known is None:
            raise UnsupportedModelError(f"guidance: what a {type(block).__name__} gives back is not known")
        self.streams = known

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.block, name)  # a model may ask a block for what it is

    def taken(self, args: tuple, kwargs: dict[str, Any]) -> list[Tensor]:
        """The tensors that go in as the stream or streams."""
        given = dict(zip(self.parameter_names, args, strict=False)) | kwargs
        return [given[name] for name in self.streams]

    def given_back(self, streams: Sequence[Tensor | None]) -> Any:
        """As the block gives them back."""
        return tuple(streams) if len(self.streams) > 1 else streams[0]


class SkippedBlock(_Block):
    """What goes in comes out."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the block's."""
        return self.given_back(self.taken(args, kwargs))


class DroppedBlock(_Block):
    """What the block changes, a share of it dropped: the same for all images of a batch, another at each step."""

    def __init__(self, block: nn.Module, streams: Sequence[str] | None, dropout: float, seed: int) -> None:
        super().__init__(block, streams)
        self.dropout, self.seed, self.step = dropout, seed, 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the block's."""
        before = self.taken(args, kwargs)
        after = self.block(*args, **kwargs)
        after = list(after) if len(self.streams) > 1 else [after]
        return self.given_back([self._dropped(*pair) for pair in zip(before, after, strict=True)])

    def _dropped(self, before, after):
        if after is None:  # the last block of SD3 gives back no text
            return None
        generator = torch.Generator(after.device).manual_seed((self.seed * 1_000_003 + self.step) % 2**62)
        kept = torch.rand(after.shape[1:], generator=generator, device=after.device) >= self.dropout
        return before + (after - before) * kept / max(1.0 - self.dropout, 1e-6)


class ShuffledBlock(_Block):
    """A block to which a share of the image's tokens come in another order, the same for all images of a batch.

    keeps_order: what it adds to its input is given back, in the places where it came out, on the input as it was; else
    what it gives back. step, grid: of the call that is to come; without a grid every token is the image's.
    """

    def __init__(
        self, block: nn.Module, streams: Sequence[str] | None, share: float, seed: int, keeps_order: bool
    ) -> None:
        super().__init__(block, streams)
        self.share, self.seed, self.keeps_order, self.step = share, seed, keeps_order, 0
        self.grid: Grid | None = None
        self.image = next(name for name in self.streams if not name.startswith(("encoder_", "audio_")))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the block's."""
        given = dict(zip(self.parameter_names, args, strict=False)) | kwargs
        states = given[self.image]
        shuffled = self._shuffled(states)
        after = self.block(**{**given, self.image: shuffled})
        if not self.keeps_order:
            return after
        after = list(after) if len(self.streams) > 1 else [after]
        at = list(self.streams).index(self.image)
        after[at] = states + (after[at] - shuffled)
        return self.given_back(after)

    def _shuffled(self, states):
        tokens, first = states.shape[1], 0
        count = tokens
        if self.grid is not None:
            place = self.grid.at(tokens)
            if place is None:
                return states
            count, first = self.grid.count, place[3]
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.step) % 2**62)
        moving = torch.randperm(count, generator=generator)[: max(2, round(self.share * count))].sort().values
        order = torch.arange(count)
        order[moving] = moving[torch.randperm(len(moving), generator=generator)]
        rows = image_rows(first, count, states).expand(-1, -1, states.shape[2])
        return states.scatter(1, rows, states.gather(1, rows)[:, order.to(states.device)])


class ScaledQueries(nn.Module):
    """In place of what makes queries ready for attention: they are `factor` times as long."""

    def __init__(self, to_query: nn.Module, factor: float) -> None:
        super().__init__()
        self.to_query, self.factor = to_query, factor

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """As the module's, scaled."""
        return self.to_query(*args, **kwargs) * self.factor


class NoisyEmbedding(nn.Module):
    """In place of the module that embeds the time: as it, with noise. step: the Step of the call."""

    def __init__(self, embedding: nn.Module, noise: float, power: float, seed: int) -> None:
        super().__init__()
        self.embedding, self.noise, self.power, self.seed = embedding, noise, power, seed
        self.step: Step | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """(batch, ..., channels)."""
        assert self.step is not None
        embedded = self.embedding(*args, **kwargs)
        seed = (self.seed * 1_000_003 + self.step.index) % 2**62
        noise = torch.randn(embedded.shape[1:], generator=torch.Generator().manual_seed(seed)).to(embedded)
        size = embedded.float().square().mean(-1, keepdim=True).sqrt().to(embedded.dtype)
        return embedded + self.noise * self.step.level**self.power * size * noise


def time_embedding_in(model: nn.Module) -> str:
    """The path of the module that embeds the time; UnsupportedModelError for a model without."""
    if (known := guided_backbone(model).time_embedding) is not None:
        return known
    embeddings = [path for path, module in model.named_modules() if isinstance(module, TimestepEmbedding)]
    # A distilled guidance has an embedding of the same class, and so has what refines text.
    others = ("guidance_embedder", "refiner", "context_embedder")
    found = [path for path in embeddings if not any(other in path for other in others)]
    if not found:
        raise UnsupportedModelError(f"guidance: {type(model).__name__} has no embedding of the time")
    return found[0]


class NormalizedOutput(nn.Module):
    """In place of a `to_out[0]`: keeps what it gets for the negative prompt, then leads the prompt's away from it.

    rows: of the batch that have the prompt. text: the negative prompt, (1, tokens, channels).
    """

    def __init__(self, to_out: nn.Module, scale: float, tau: float, alpha: float) -> None:
        super().__init__()
        self.to_out, self.scale, self.tau, self.alpha = to_out, scale, tau, alpha
        self.negative: Tensor | None = None
        self.text: Tensor | None = None
        self.rows = slice(None)

    def forward(self, output: Tensor) -> Tensor:
        """(batch, queries, channels), as the module's."""
        if self.negative is None:
            self.negative = output
            return self.to_out(output)
        positive, output = output[self.rows], output.clone()
        output[self.rows] = normalized(positive, self.negative, self.scale, self.tau, self.alpha)
        self.negative = None
        return self.to_out(output)


class GuidedAttention(nn.Module):
    """In place of a cross-attention module: runs it for the negative prompt, and then as it is called."""

    def __init__(self, attention: nn.Module, output: NormalizedOutput) -> None:
        super().__init__()
        self.attention, self.output = attention, output

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Any = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As the module's. attention_mask: of the prompt's tokens alone."""
        assert self.output.text is not None
        rows = hidden_states[self.output.rows]
        text = self.output.text.expand(rows.shape[0], -1, -1)
        if isinstance(encoder_hidden_states, tuple):  # with an IP-Adapter's image tokens beside the text
            images = [tokens[self.output.rows] for tokens in encoder_hidden_states[1]]
            text = (text, images)
        self.output.negative = None
        self.attention(rows, encoder_hidden_states=text, **kwargs)
        return self.attention(
            hidden_states, encoder_hidden_states=encoder_hidden_states, attention_mask=attention_mask, **kwargs
        )


def normalized(positive: Tensor, negative: Tensor, scale: float, tau: float, alpha: float) -> Tensor:
    """NAG's formula; positive, negative: (batch, queries, channels)."""
    led = positive + scale * (positive - negative)
    size, length = (states.float().abs().sum(-1, keepdim=True) for states in (positive, led))
    led = led * (tau * size / length.clamp_min(1e-20)).clamp_max(1.0).to(led.dtype)
    return alpha * led + (1 - alpha) * positive
