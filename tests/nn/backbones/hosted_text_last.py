"""Tiny denoisers whose joint attention has the text last, with their calls."""

import torch

from .family import Family
from .hosted import ImageAsks, OfLength, hosted, noise, padded, shaken


def hunyuan_image():
    """HunyuanImage 2.1 without the glyphs' text."""
    from diffusers import HunyuanImageTransformer2DModel

    torch.manual_seed(0)
    transformer = HunyuanImageTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        text_embed_dim=16,
        rope_axes_dim=(8, 8),
    )
    return hosted(
        transformer,
        {
            "hidden_states": noise(2, 4, 6, 6),
            "timestep": torch.tensor([300.0, 300.0]),
            "encoder_hidden_states": noise(2, 12, 16, seed=1),
            "encoder_attention_mask": padded(12, 9),
        },
    )


def hunyuan_video15(channels=4):
    """HunyuanVideo 1.5 from an image, of which four tokens are before the text."""
    from diffusers import HunyuanVideo15Transformer3DModel

    torch.manual_seed(0)
    transformer = HunyuanVideo15Transformer3DModel(
        in_channels=channels,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_refiner_layers=1,
        text_embed_dim=16,
        text_embed_2_dim=8,
        image_embed_dim=8,
        rope_axes_dim=(4, 6, 6),
    )
    return hosted(
        transformer,
        {
            "hidden_states": noise(2, channels, 2, 5, 5),
            "timestep": torch.tensor([300.0, 300.0]),
            "encoder_hidden_states": noise(2, 12, 16, seed=1),
            "encoder_attention_mask": padded(12, 9),
            "encoder_hidden_states_2": noise(2, 5, 8, seed=2),
            "encoder_attention_mask_2": padded(5, 3),
            "image_embeds": noise(2, 4, 8, seed=3),
        },
    )


def hidream(size=(12, 12)):
    """HiDream-I1: T5's four tokens and twice Llama's four behind the image's."""
    from diffusers import HiDreamImageTransformer2DModel

    torch.manual_seed(0)
    transformer = HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_channels=[16, 16],
        text_emb_dim=8,
        num_routed_experts=0,
        axes_dims_rope=(4, 2, 2),
        max_resolution=(12, 12),
        llama_layers=[0, 1],
    )
    return hosted(
        transformer,
        {
            "hidden_states": noise(2, 4, *size),
            "timesteps": torch.tensor([300, 300]),
            "encoder_hidden_states_t5": noise(2, 4, 16, seed=1),
            "encoder_hidden_states_llama3": noise(2, 2, 4, 16, seed=2),
            "pooled_embeds": noise(2, 8, seed=3),
        },
    )


def ernie_image():
    """ERNIE-Image, with texts of 12 and 9 tokens."""
    from diffusers import ErnieImageTransformer2DModel

    torch.manual_seed(0)
    transformer = ErnieImageTransformer2DModel(
        hidden_size=32,
        num_attention_heads=2,
        num_layers=2,
        ffn_hidden_size=32,
        in_channels=4,
        out_channels=4,
        text_in_dim=16,
        rope_axes_dim=(4, 6, 6),
    )
    shaken(transformer, "adaLN_modulation", "final_linear")  # zeros otherwise, and no picture
    return hosted(
        transformer,
        {
            "hidden_states": noise(2, 4, 6, 6),
            "timestep": torch.tensor([300.0, 300.0]),
            "text_bth": noise(2, 12, 16, seed=1),
            "text_lens": torch.tensor([9, 12]),
        },
    )


def nucleus_moe():
    """NucleusMoE-Image, whose four heads of queries share two of keys."""
    from diffusers import NucleusMoEImageTransformer2DModel

    torch.manual_seed(0)
    transformer = NucleusMoEImageTransformer2DModel(
        in_channels=4,
        out_channels=1,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        num_key_value_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(4, 6, 6),
        mlp_ratio=6.0,
        moe_enabled=False,
    )
    return hosted(
        transformer,
        {
            "hidden_states": noise(2, 36, 4),
            "img_shapes": [(1, 6, 6)] * 2,
            "encoder_hidden_states": noise(2, 12, 16, seed=1),
            "encoder_hidden_states_mask": padded(12, 9),
            "timestep": torch.tensor([0.3, 0.3]),
        },
    )


FAMILIES = [
    Family(
        "hunyuan_image",
        "HunyuanImageTransformer2DModel",
        hunyuan_image,
        modules=2,
        text_first=False,
        mask="encoder_attention_mask",
        draws=False,
    ),
    OfLength(
        "hunyuan_video15",
        "HunyuanVideo15Transformer3DModel",
        hunyuan_video15,
        modules=2,
        text_first=False,
        mask="encoder_attention_mask",
        draws=False,
        compiles=False,
    ),
    OfLength("hidream", "HiDreamImageTransformer2DModel", hidream, modules=2, text_first=False, draws=False),
    Family(
        "ernie_image",
        "ErnieImageTransformer2DModel",
        ernie_image,
        modules=2,
        text_first=False,
        embeds="text_bth",
        draws=False,
    ),
    ImageAsks(
        "nucleus_moe",
        "NucleusMoEImageTransformer2DModel",
        nucleus_moe,
        modules=2,
        text_first=False,
        mask="encoder_hidden_states_mask",
        draws=False,
    ),
]
