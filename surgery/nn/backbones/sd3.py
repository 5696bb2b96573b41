"""`PladisSD3Transformer2DModel`: Stable Diffusion 3 and 3.5, where the image comes first in joint attention."""

from diffusers import ModelMixin, SD3Transformer2DModel  # noqa: F401  diffusers looks for ModelMixin in this module
from diffusers.models.attention_processor import (
    Attention,
    JointAttnProcessor2_0,
    SD3IPAdapterJointAttnProcessor2_0,
)
from torch import nn

from ..model import PladisModel
from .processors import JointAttention
from .record import Backbone, image_grid


class PladisSD3Attention(JointAttention, Attention):
    """Joint attention of image and text as in SD3, the image's attention to the text by one of OPERATORS."""

    stock = Attention
    own_processors = (JointAttnProcessor2_0, SD3IPAdapterJointAttnProcessor2_0)
    as_first = ("FusedJointAttnProcessor2_0", "XFormersJointAttnProcessor")
    text_first = False

    @classmethod
    def own_refusal(cls, module: nn.Module) -> str | None:
        """As PladisModule's: SD3.5-medium's attn2, and what has no queries of the text's own."""
        if module.added_kv_proj_dim is None:
            return (
                "it is self-attention among image tokens, which SD3.5-medium has beside the joint attention; "
                "sparsifying it destroys the image, so it stays dense"
            )
        if module.context_pre_only is None or module.to_k is None or module.to_out is None:
            return "it is not joint attention as in SD3: text or image lacks projections of its own"
        return None

    def revert(self) -> nn.Module:
        """As PladisModule's."""
        super().revert()
        if type(self.processor).__name__ == "FusedJointAttnProcessor2_0" and not hasattr(self, "to_qkv"):
            self.fuse_projections()  # asked for while this class ignored it
        return self


class PladisSD3Transformer2DModel(PladisModel, SD3Transformer2DModel):
    """SD3Transformer2DModel with some of its joint attention modules turned into PladisSD3Attention."""

    stock = SD3Transformer2DModel
    forms = (PladisSD3Attention,)


BACKBONE = Backbone(patched=PladisSD3Transformer2DModel, attention="attn", grid=image_grid, text_first=False)
