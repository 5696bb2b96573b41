"""Tiny pipelines with random weights, built from configs alone."""

import torch


def clip_tokenizer(length=77):
    """A byte-level CLIP tokenizer: 256 letters, the same at a word's end, and the two special tokens."""
    from tokenizers import pre_tokenizers
    from transformers import CLIPTokenizer

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], pad_token="<|endoftext|>", model_max_length=length)


def clip_text(with_projection=False, channels=32, seed=0):
    """A two-layer CLIP text encoder."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(seed)
    config = CLIPTextConfig(
        vocab_size=514,
        hidden_size=channels,
        intermediate_size=37,
        projection_dim=channels,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=512,
        eos_token_id=513,
        pad_token_id=513,
    )
    return (CLIPTextModelWithProjection if with_projection else CLIPTextModel)(config).eval()


def tiny_vae():
    """A two-level autoencoder."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        sample_size=64,
    ).eval()


def tiny_sdxl(blocks=2, up=True):
    """(StableDiffusionXLPipeline, arguments of a call); blocks: in each transformer; up: with two upwards."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        block_out_channels=(32, 64),
        layers_per_block=1,
        sample_size=32,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D" if up else "UpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        transformer_layers_per_block=(1, blocks),
        projection_class_embeddings_input_dim=80,  # 6 * 8 + 32
        cross_attention_dim=64,
    ).eval()
    pipeline = StableDiffusionXLPipeline(
        unet=unet,
        vae=tiny_vae(),
        scheduler=EulerDiscreteScheduler(timestep_spacing="leading", steps_offset=1),
        text_encoder=clip_text(),
        text_encoder_2=clip_text(with_projection=True),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        add_watermarker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, {"prompt": "a cat", "height": 64, "width": 64, "num_inference_steps": 2, "output_type": "np"}


def tiny_svd_unet():
    """The UNet of a Stable Video Diffusion."""
    from diffusers import UNetSpatioTemporalConditionModel

    return UNetSpatioTemporalConditionModel(
        block_out_channels=(32, 64),
        layers_per_block=1,
        sample_size=32,
        in_channels=8,
        out_channels=4,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        cross_attention_dim=32,
        num_attention_heads=8,
        projection_class_embeddings_input_dim=96,
        addition_time_embed_dim=32,
    )


def with_controlnet(pipeline):
    """A StableDiffusionControlNetPipeline of an unpatched pipeline's parts, whose ControlNet adds something."""
    from diffusers import ControlNetModel, StableDiffusionControlNetPipeline

    torch.manual_seed(0)
    controlnet = ControlNetModel.from_unet(pipeline.unet, conditioning_embedding_out_channels=(16, 16, 32))
    for block in controlnet.controlnet_down_blocks:
        torch.nn.init.normal_(block.weight, std=0.05)  # a new ControlNet adds zeros
    parts = {**pipeline.components, "controlnet": controlnet}
    return StableDiffusionControlNetPipeline(**parts, requires_safety_checker=False)
