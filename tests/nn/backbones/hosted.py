"""Tiny denoisers of models whose pipelines need much beside, in a pipeline that saves and loads any."""

import torch

from ...tiny import tiny_vae
from .family import Family


def hosted(transformer, call):
    """(A pipeline of transformer, autoencoder and scheduler, the arguments of the transformer's call)."""
    from diffusers import DDIMScheduler, DiTPipeline

    return DiTPipeline(transformer.eval(), tiny_vae(), DDIMScheduler()), call


def noise(*shape, seed=0):
    """Normal numbers of a shape."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def shaken(transformer, *names):
    """Random weights for the linear layers whose path has one of the names."""
    for path, module in transformer.named_modules():
        if isinstance(module, torch.nn.Linear) and any(name in path for name in names):
            torch.nn.init.normal_(module.weight, std=0.3)


def padded(length, kept, dtype=torch.bool):
    """The mask of two texts of `length` tokens, the first of which has `kept`."""
    mask = torch.ones(2, length, dtype=dtype)
    mask[0, kept:] = 0
    return mask


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


def hunyuan_video15():
    """HunyuanVideo 1.5 from an image, of which four tokens are before the text."""
    from diffusers import HunyuanVideo15Transformer3DModel

    torch.manual_seed(0)
    transformer = HunyuanVideo15Transformer3DModel(
        in_channels=4,
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
            "hidden_states": noise(2, 4, 2, 5, 5),
            "timestep": torch.tensor([300.0, 300.0]),
            "encoder_hidden_states": noise(2, 12, 16, seed=1),
            "encoder_attention_mask": padded(12, 9),
            "encoder_hidden_states_2": noise(2, 5, 8, seed=2),
            "encoder_attention_mask_2": padded(5, 3),
            "image_embeds": noise(2, 4, 8, seed=3),
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


def _cosmos(text, **settings):
    from diffusers import CosmosTransformer3DModel

    torch.manual_seed(0)
    transformer = CosmosTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        text_embed_dim=16,
        adaln_lora_dim=4,
        max_size=(4, 16, 16),
        concat_padding_mask=False,
        extra_pos_embed_type=None,
        **settings,
    )
    return hosted(
        transformer,
        {"hidden_states": noise(2, 4, 2, 8, 8), "timestep": torch.tensor([0.3, 0.3]), "encoder_hidden_states": text},
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


class _OfLength(Family):
    """A model whose text is longer or shorter than what its argument has."""

    lengths = {"aura_flow": 8 + 12, "hidream": 12, "hunyuan_video15": 4 + 5 + 12, "bria_fibo2": 12, "cosmos25": 12}

    def text_length(self, call):
        return self.lengths[self.name]


class _Distilled(_OfLength):
    """FIBO 2, which distils the text into 4 or 8 tokens and attends to it from those and 16 of the image."""

    def is_to_text(self, length, queries, keys):
        return keys == length and queries > 16


class _ImageAsks(Family):
    """A model where the image's tokens alone ask."""

    def is_to_text(self, length, queries, keys):
        return keys == queries + length


class _WithImage(Family):
    """FLUX.3, which attends to the image of 25 tokens alone first, then to both images and the text."""

    def is_to_text(self, length, queries, keys):
        return keys == length + 2 * 25


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
    _OfLength("aura_flow", "AuraFlowTransformer2DModel", aura_flow, modules=2, text_first=True, draws=False),
    Family(
        "hunyuan_image",
        "HunyuanImageTransformer2DModel",
        hunyuan_image,
        modules=2,
        text_first=False,
        mask="encoder_attention_mask",
        draws=False,
    ),
    _OfLength(
        "hunyuan_video15",
        "HunyuanVideo15Transformer3DModel",
        hunyuan_video15,
        modules=2,
        text_first=False,
        mask="encoder_attention_mask",
        draws=False,
        compiles=False,
    ),
    _ImageAsks("prx", "PRXTransformer2DModel", prx, modules=2, text_first=True, mask="attention_mask", draws=False),
    Family("kandinsky5", "Kandinsky5Transformer3DModel", kandinsky5, modules=2, draws=False),
    _OfLength("hidream", "HiDreamImageTransformer2DModel", hidream, modules=2, text_first=False, draws=False),
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
    _OfLength("cosmos25", "CosmosTransformer3DModel", cosmos25, modules=2, draws=False),
    Family(
        "ernie_image",
        "ErnieImageTransformer2DModel",
        ernie_image,
        modules=2,
        text_first=False,
        embeds="text_bth",
        draws=False,
    ),
    Family("glm_image", "GlmImageTransformer2DModel", glm_image, modules=2, text_first=True, draws=False),
    _ImageAsks(
        "nucleus_moe",
        "NucleusMoEImageTransformer2DModel",
        nucleus_moe,
        modules=2,
        text_first=False,
        mask="encoder_hidden_states_mask",
        draws=False,
    ),
    _WithImage("flux3", "Flux3Transformer2DModel", flux3, modules=2, text_first=True, draws=False),
    _Distilled("bria_fibo2", "BriaFibo2Transformer2DModel", bria_fibo2, modules=2, draws=False, compiles=False),
]
