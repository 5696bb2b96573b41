"""Tiny denoisers with cross-attention to text, with their calls."""

import torch

from .family import Family
from .hosted import OfLength, hosted, noise, padded, shaken


def kandinsky5():
    """Kandinsky 5."""
    from diffusers import Kandinsky5Transformer3DModel

    torch.manual_seed(0)
    transformer = Kandinsky5Transformer3DModel(
        in_text_dim=16,
        in_text_dim2=8,
        time_dim=16,
        model_dim=32,
        ff_dim=32,
        num_text_blocks=1,
        num_visual_blocks=2,
        axes_dims=(4, 6, 6),
    )
    shaken(transformer, "modulation", "out_layer")  # zeros otherwise, and no picture
    return hosted(
        transformer,
        {
            "hidden_states": noise(2, 1, 8, 8, 4),
            "encoder_hidden_states": noise(2, 12, 16, seed=1),
            "timestep": torch.tensor([300.0, 300.0]),
            "pooled_projections": noise(2, 8, seed=2),
            "visual_rope_pos": (torch.arange(1), torch.arange(4), torch.arange(4)),
            "text_rope_pos": torch.arange(12),
        },
    )


def sana_video():
    """SANA-Video."""
    from diffusers import SanaVideoTransformer3DModel

    torch.manual_seed(0)
    transformer = SanaVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=12,
        cross_attention_dim=24,
        caption_channels=16,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )
    return hosted(
        transformer,
        {
            "hidden_states": noise(2, 4, 2, 8, 8),
            "encoder_hidden_states": noise(2, 12, 16, seed=1),
            "timestep": torch.tensor([300, 300]),
            "encoder_attention_mask": padded(12, 9),
        },
    )


def sana_sprint():
    """SANA-Sprint, whose guidance is an input."""
    from diffusers import SanaTransformer2DModel

    torch.manual_seed(0)
    transformer = SanaTransformer2DModel(
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=16,
        sample_size=8,
        qk_norm="rms_norm_across_heads",
        guidance_embeds=True,
    )
    return hosted(
        transformer,
        {
            "hidden_states": noise(2, 4, 8, 8),
            "encoder_hidden_states": noise(2, 12, 16, seed=1),
            "timestep": torch.tensor([0.3, 0.3]),
            "guidance": torch.tensor([4.5, 4.5]),
            "encoder_attention_mask": padded(12, 9),
        },
    )


def ltx2():
    """LTX-2, whose sound has four tokens and twelve of text."""
    from diffusers import LTX2VideoTransformer3DModel

    torch.manual_seed(0)
    transformer = LTX2VideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        audio_in_channels=4,
        audio_out_channels=4,
        audio_num_attention_heads=2,
        audio_attention_head_dim=8,
        audio_cross_attention_dim=16,
        num_layers=2,
        caption_channels=16,
        use_prompt_embeddings=True,
    )
    text, mask = noise(2, 12, 16, seed=1), padded(12, 9, torch.float32)
    return hosted(
        transformer,
        {
            "hidden_states": noise(2, 2 * 3 * 3, 4),
            "audio_hidden_states": noise(2, 4, 4, seed=2),
            "encoder_hidden_states": text,
            "audio_encoder_hidden_states": noise(2, 12, 16, seed=3),
            "timestep": torch.tensor([300.0, 300.0]),
            "encoder_attention_mask": mask,
            "audio_encoder_attention_mask": mask,
            "num_frames": 2,
            "height": 3,
            "width": 3,
            "audio_num_frames": 4,
        },
    )


def cosmos():
    """Cosmos 2, and so Anima."""
    return _cosmos(noise(2, 12, 16, seed=1))


def cosmos25():
    """Cosmos 2.5, which has an image beside its text."""
    image = noise(2, 4, 8, seed=2)
    return _cosmos(
        (noise(2, 12, 16, seed=1), image), img_context_dim_in=8, img_context_num_tokens=4, img_context_dim_out=32
    )


def cosmos_transformer(**settings):
    """The denoiser of Cosmos."""
    from diffusers import CosmosTransformer3DModel

    torch.manual_seed(0)
    sizes = {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_layers": 2,
        "text_embed_dim": 16,
        "adaln_lora_dim": 4,
        "max_size": (4, 16, 16),
        "concat_padding_mask": False,  # which would need torchvision
        "extra_pos_embed_type": None,
    }
    return CosmosTransformer3DModel(**{**sizes, **settings})


def _cosmos(text, **settings):
    return hosted(
        cosmos_transformer(**settings),
        {"hidden_states": noise(2, 4, 2, 8, 8), "timestep": torch.tensor([0.3, 0.3]), "encoder_hidden_states": text},
    )


def bria_fibo2():
    """FIBO 2, with cross-attention in both of its blocks."""
    from diffusers import BriaFibo2Transformer2DModel

    torch.manual_seed(0)
    transformer = BriaFibo2Transformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        cap_feat_dim=16,
        injection_layer_ids=(0, 1),
        perceiver_num_layers=1,
        min_num_gist_tokens=4,
        max_num_gist_tokens=8,
        gist_step=4,
        gist_min_text_len=4,
        gist_max_text_len=16,
        axes_dims=(4, 6, 6),
        axes_lens=(32, 32, 32),
    )
    for block in transformer.layers:
        torch.nn.init.ones_(block.cross_attn_gate)  # zero otherwise
    return hosted(
        transformer,
        {
            "hidden_states": noise(2, 4, 8, 8),
            "timestep": torch.tensor([0.3, 0.3]),
            "encoder_hidden_states": noise(2, 3, 12, 16, seed=1),
            "encoder_attention_mask": padded(12, 9),
        },
    )


class _Distilled(OfLength):
    """FIBO 2, which distils the text into 4 or 8 tokens and attends to it from those and 16 of the image."""

    def is_to_text(self, length, queries, keys):
        return keys == length and queries > 16


FAMILIES = [
    Family("kandinsky5", "Kandinsky5Transformer3DModel", kandinsky5, modules=2, draws=False),
    Family(
        "sana_video",
        "SanaVideoTransformer3DModel",
        sana_video,
        modules=2,
        mask="encoder_attention_mask",
        draws=False,
    ),
    Family(
        "sana_sprint",
        "SanaTransformer2DModel",
        sana_sprint,
        modules=2,
        mask="encoder_attention_mask",
        draws=False,
    ),
    Family("ltx2", "LTX2VideoTransformer3DModel", ltx2, modules=4, mask="encoder_attention_mask", draws=False),
    Family("cosmos", "CosmosTransformer3DModel", cosmos, modules=2, draws=False),
    OfLength("cosmos25", "CosmosTransformer3DModel", cosmos25, modules=2, draws=False),
    _Distilled("bria_fibo2", "BriaFibo2Transformer2DModel", bria_fibo2, modules=2, draws=False, compiles=False),
]
