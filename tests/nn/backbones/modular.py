"""The pipelines that diffusers has as modular ones alone, tiny, from configs."""

import torch

from .flux import _qwen3, _qwen3_tokenizer
from .parts import flow_scheduler, qwen_vae, t5_tokenizer


def anima():
    """(AnimaModularPipeline, arguments of a call)."""
    from diffusers import AnimaAutoBlocks, AnimaTextConditioner, CosmosTransformer3DModel

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
        concat_padding_mask=False,  # which would need torchvision
        extra_pos_embed_type=None,
    )
    pipeline = AnimaAutoBlocks().init_pipeline()
    pipeline.update_components(
        text_encoder=_qwen3().model,
        tokenizer=_qwen3_tokenizer(),
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
    return pipeline, {"prompt": "a cat", "height": 32, "width": 32, "num_inference_steps": 2, "output": "images"}
