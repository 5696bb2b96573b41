"""The pipelines that diffusers has as modular ones alone, tiny, from configs."""

import torch

from .flux import qwen3_text, qwen3_tokenizer
from .hosted_cross import cosmos_transformer
from .parts import flow_scheduler, qwen_vae, t5_tokenizer


def anima():
    """AnimaModularPipeline."""
    from diffusers import AnimaAutoBlocks, AnimaTextConditioner

    transformer = cosmos_transformer()
    pipeline = AnimaAutoBlocks().init_pipeline()
    pipeline.update_components(
        text_encoder=qwen3_text().model,
        tokenizer=qwen3_tokenizer(),
        t5_tokenizer=t5_tokenizer(),
        text_conditioner=AnimaTextConditioner(
            source_dim=16,
            target_dim=16,
            model_dim=16,
            num_layers=1,
            num_attention_heads=2,
            target_vocab_size=128,
            min_sequence_length=12,
        ).eval(),
        transformer=transformer.eval(),
        vae=qwen_vae(),
        scheduler=flow_scheduler(),
    )
    return pipeline


def ltx():
    """LTXModularPipeline, which draws videos."""
    from diffusers import LTXAutoBlocks

    from .video import ltx as stock

    pipeline, parts = LTXAutoBlocks().init_pipeline(), stock()[0].components
    names = ("text_encoder", "tokenizer", "transformer", "vae", "scheduler")
    pipeline.update_components(**{name: parts[name] for name in names})
    return pipeline


def flux3():
    """Flux3ModularPipeline that takes its prompt as it is given, without the upsampler."""
    from diffusers import AutoencoderKLFlux2, Flux3AutoBlocks, Flux3Transformer2DModel

    torch.manual_seed(0)
    transformer = Flux3Transformer2DModel(
        in_channels=16,
        cond_in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=8 * 16,
        timestep_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
    )
    vae = AutoencoderKLFlux2(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        block_out_channels=(4,),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    blocks = Flux3AutoBlocks()
    blocks.sub_blocks.pop("prompt_upsampler")
    pipeline = blocks.init_pipeline()
    pipeline.update_components(
        text_encoder=_qwen3_vl(), tokenizer=_processor(), transformer=transformer.eval(), vae=vae.eval()
    )
    return pipeline


def _qwen3_vl():
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    torch.manual_seed(0)
    text = {
        "vocab_size": 266,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 33,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "rope_scaling": {"mrope_section": [1, 1, 2], "rope_type": "default"},
    }
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    vision |= {"deepstack_visual_indexes": [0], "num_position_embeddings": 16}
    return Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=text, vision_config=vision)).eval()


def _processor():
    """What FLUX.3 calls a tokenizer is a processor, which would need torchvision: of it only this is asked."""
    tokenizer = qwen3_tokenizer()
    tokenizer.tokenizer = tokenizer
    return tokenizer
