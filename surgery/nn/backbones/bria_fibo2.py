"""`PladisBriaFibo2Transformer2DModel`: FIBO 2, with cross-attention to text in some of its blocks."""

from collections.abc import Mapping

from diffusers import BriaFibo2Transformer2DModel, ModelMixin  # noqa: F401  diffusers looks for ModelMixin in this module
from diffusers.models.transformers.transformer_bria_fibo2 import (
    BriaFibo2Attention,
    BriaFibo2AttnProcessor,
    compute_gist_count,
)
from torch import nn

from ..model import PladisModel
from .processors import CrossAttention
from .record import OTHER_IMAGES, Backbone, image_grid


class PladisBriaFibo2Attention(CrossAttention, BriaFibo2Attention):
    """Gated cross-attention to text in the blocks of FIBO 2 that have it.

    What the model distils of the text into its own stream, the gist tokens, is attended to as before.
    """

    stock = BriaFibo2Attention
    own_processors = (BriaFibo2AttnProcessor,)


class PladisBriaFibo2Transformer2DModel(PladisModel, BriaFibo2Transformer2DModel):
    """BriaFibo2Transformer2DModel with some of its attention modules turned into PladisBriaFibo2Attention."""

    stock = BriaFibo2Transformer2DModel
    forms = (PladisBriaFibo2Attention,)
    marked_key = "n_layers"
    text_dim = 2
    hides_negative = True

    @classmethod
    def refusal_of(cls, module: nn.Module, path: str, self_attention: bool = False) -> str | None:
        """As PladisModel's. The kinds of attention are alike in all but their place."""
        if not path.startswith("layers.") or path.rpartition(".")[2] != "cross_attention":
            return "it is attention among tokens of the image, or distils the text; it stays dense"
        return super().refusal_of(module, path, self_attention)


def _grid(config: Mapping, given: Mapping) -> tuple[int, int, int]:
    if given.get("context_latents"):
        raise ValueError(OTHER_IMAGES)
    return image_grid(config, given)


def _image_start(config: Mapping, given: Mapping) -> int | None:
    """Behind the gist tokens, unless entries have different numbers of those."""
    mask = given.get("encoder_attention_mask")
    if mask is None:
        return None
    sizes = {"min_gist": "min_num_gist_tokens", "max_gist": "max_num_gist_tokens", "gist_step": "gist_step"}
    sizes |= {"min_text_len": "gist_min_text_len", "max_text_len": "gist_max_text_len"}
    counts = compute_gist_count(mask.sum(dim=1).tolist(), **{name: config[key] for name, key in sizes.items()})
    return 0 if min(counts) < max(counts) else None


BACKBONE = Backbone(
    patched=PladisBriaFibo2Transformer2DModel,
    attention="cross_attention",
    blocks=("layers",),
    grid=_grid,
    batches_cfg=False,
    streams={"layers": ("x",)},
    image_start=_image_start,
    time_embedding="t_embedder",
    reads_lengths=True,
)
