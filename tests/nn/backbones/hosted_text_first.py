"""Tiny denoisers whose joint attention has the text first, with their calls."""

import torch

from .family import Family
from .hosted import ImageAsks, OfLength, hosted, noise, padded, shaken


def longcat_image():
    """LongCat-Image, whose pipeline takes no embeddings without a prompt."""
    from diffusers import LongCatImageTransformer2DModel

    torch.manual_seed(0)
    transformer = LongCatImageTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=[4, 4, 8],
    )
    return hosted(
        transformer,
        {
            "hidden_states": noise(2, 36, 16),
            "encoder_hidden_states": noise(2, 12, 32, seed=1),
            "timestep": torch.tensor([0.3, 0.3]),
            "txt_ids": torch.zeros(12, 3),
            "img_ids": torch.cartesian_prod(torch.zeros(1), torch.arange(6.0), torch.arange(6.0)),
        },
    )


def lumina2():
    """Lumina 2, whose four heads of queries share two of keys, with texts of 12 and 9 tokens."""
    from diffusers import Lumina2Transformer2DModel

    torch.manual_seed(0)
    transformer = Lumina2Transformer2DModel(
        sample_size=16,
        in_channels=4,
        hidden_size=32,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=4,
        num_kv_heads=2,
        multiple_of=16,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(64, 32, 32),
        cap_feat_dim=16,
    )
    return hosted(
        transformer,
        {
            "hidden_states": noise(2, 4, 8, 8),
            "timestep": torch.tensor([0.3, 0.3]),
            "encoder_hidden_states": noise(2, 12, 16, seed=1),
            "encoder_attention_mask": padded(12, 9),
        },
    )


def cogview4():
    """CogView4."""
    from diffusers import CogView4Transformer2DModel

    torch.manual_seed(0)
    transformer = CogView4Transformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        text_embed_dim=16,
        time_embed_dim=8,
        condition_dim=4,
    )
    size = torch.tensor([[64.0, 64.0]] * 2)
    return hosted(
        transformer,
        {
            "hidden_states": noise(2, 4, 16, 16),
            "encoder_hidden_states": noise(2, 12, 16, seed=1),
            "timestep": torch.tensor([300, 300]),
            "original_size": size,
            "target_size": size,
            "crop_coords": torch.zeros(2, 2),
        },
    )


def aura_flow():
    """AuraFlow, with its eight registers before the text."""
    from diffusers import AuraFlowTransformer2DModel

    torch.manual_seed(0)
    transformer = AuraFlowTransformer2DModel(
        sample_size=16,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=16,
        caption_projection_dim=32,
        pos_embed_max_size=64,
    )
    shaken(transformer, "norm1", "to_q", "to_k", "to_v", "context_embedder")  # so that text means something
    return hosted(
        transformer,
        {
            "hidden_states": noise(2, 4, 16, 16),
            "encoder_hidden_states": noise(2, 12, 16, seed=1),
            "timestep": torch.tensor([0.3, 0.3]),
        },
    )


def prx():
    """PRX."""
    from diffusers import PRXTransformer2DModel

    torch.manual_seed(0)
    transformer = PRXTransformer2DModel(
        in_channels=4, context_in_dim=16, hidden_size=32, num_heads=4, depth=2, axes_dim=[4, 4]
    )
    shaken(transformer, "modulation", "final_layer")  # zeros otherwise, and no picture
    return hosted(
        transformer,
        {
            "hidden_states": noise(2, 4, 16, 16),
            "timestep": torch.tensor([0.3, 0.3]),
            "encoder_hidden_states": noise(2, 12, 16, seed=1),
            "attention_mask": padded(12, 9),
        },
    )


def glm_image():
    """GLM-Image."""
    from diffusers import GlmImageTransformer2DModel

    torch.manual_seed(0)
    transformer = GlmImageTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        text_embed_dim=16,
        time_embed_dim=8,
        condition_dim=4,
        prior_vq_quantizer_codebook_size=16,
    )
    return hosted(
        transformer,
        {
            "hidden_states": noise(2, 4, 16, 16),
            "encoder_hidden_states": noise(2, 12, 16, seed=1),
            "prior_token_id": torch.arange(64).remainder(16).repeat(2, 1),
            "prior_token_drop": torch.zeros(2, 64, dtype=torch.bool),
            "timestep": torch.tensor([300, 300]),
            "target_size": torch.tensor([[64.0, 64.0]] * 2),
            "crop_coords": torch.zeros(2, 2),
        },
    )


def flux3():
    """FLUX.3 with an image to edit behind the one that is drawn."""
    from diffusers import Flux3Transformer2DModel

    torch.manual_seed(0)
    transformer = Flux3Transformer2DModel(
        in_channels=4,
        cond_in_channels=4,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        timestep_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
    )
    places = torch.cartesian_prod(torch.zeros(1), torch.arange(5.0), torch.arange(5.0), torch.zeros(1))
    words = torch.zeros(12, 4)
    words[:, 3] = torch.arange(12)
    return hosted(
        transformer,
        {
            "hidden_states": noise(2, 25, 4),
            "encoder_hidden_states": noise(2, 12, 16, seed=1),
            "timestep": torch.tensor([0.3, 0.3]),
            "img_ids": places,
            "txt_ids": words,
            "image_cond_hidden_states": noise(2, 25, 4, seed=2),
            "image_cond_ids": places + torch.tensor([10.0, 0.0, 0.0, 0.0]),
        },
    )


class _WithImage(Family):
    """FLUX.3, which attends to the image of 25 tokens alone first, then to the text and the image, or both images."""

    def is_to_text(self, length, queries, keys):
        return keys in (length + 25, length + 2 * 25)


class _Ragged(Family):
    """Lumina 2, whose image stands behind as many tokens of text as each entry has."""

    def entries(self, call):
        mask = call[self.mask]
        for entry in range(len(mask)):
            one = {name: value[entry : entry + 1] for name, value in call.items()}
            kept = slice(0, int(mask[entry].sum()))
            yield {**one, self.embeds: one[self.embeds][:, kept], self.mask: one[self.mask][:, kept]}

    def is_to_text(self, length, queries, keys):
        return keys == length + 16


FAMILIES = [
    Family("longcat_image", "LongCatImageTransformer2DModel", longcat_image, modules=2, text_first=True, draws=False),
    _Ragged(
        "lumina2",
        "Lumina2Transformer2DModel",
        lumina2,
        modules=2,
        text_first=True,
        mask="encoder_attention_mask",
        draws=False,
        compiles=False,
    ),
    Family("cogview4", "CogView4Transformer2DModel", cogview4, modules=2, text_first=True, draws=False),
    OfLength("aura_flow", "AuraFlowTransformer2DModel", aura_flow, modules=2, text_first=True, draws=False),
    ImageAsks("prx", "PRXTransformer2DModel", prx, modules=2, text_first=True, mask="attention_mask", draws=False),
    Family("glm_image", "GlmImageTransformer2DModel", glm_image, modules=2, text_first=True, draws=False),
    _WithImage("flux3", "Flux3Transformer2DModel", flux3, modules=2, text_first=True, draws=False),
]
