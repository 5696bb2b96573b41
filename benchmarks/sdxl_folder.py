"""Write a folder of SDXL's real configs and sizes with random bfloat16 weights, for the benchmarks.

    python benchmarks/sdxl_folder.py DIR

The configs' values are those of stabilityai/stable-diffusion-xl-base-1.0; the weights are noise, so it draws nothing,
and its tokenizers know letters alone.
"""

import argparse
import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel
from tokenizers import pre_tokenizers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from surgery.artifact.weights import write_tensors

UNET = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "cross_attention_dim": 2048,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "layers_per_block": 2,
    "projection_class_embeddings_input_dim": 2816,
    "sample_size": 128,
    "transformer_layers_per_block": [1, 2, 10],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "use_linear_projection": True,
}
VAE = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 1024,
    "scaling_factor": 0.13025,
}
TEXT = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
TEXT_2 = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
# The same at a quarter of its width and a few layers, to be run on a CPU.
SMALL_UNET = {
    **UNET,
    "attention_head_dim": [2, 4, 8],
    "block_out_channels": [80, 160, 320],
    "sample_size": 32,
    "transformer_layers_per_block": [1, 1, 2],
    "norm_num_groups": 16,
}
SMALL = {
    "unet": SMALL_UNET,
    "vae": {**VAE, "block_out_channels": [32, 32, 64, 64], "sample_size": 256},
    "text": {**TEXT, "num_hidden_layers": 2},
    "text_2": {**TEXT_2, "num_hidden_layers": 2},
}
FULL = {"unet": UNET, "vae": VAE, "text": TEXT, "text_2": TEXT_2}
CLIP = {"vocab_size": 49408, "max_position_embeddings": 77, "projection_dim": 1280}


def main():
    """Write the folder named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    write_folder(folder, FULL)
    print(f"{sum(path.stat().st_size for path in folder.rglob('*') if path.is_file()) / 1e9:.2f} GB in {folder}")


def write_folder(folder, parts):
    """Write a pipeline's folder; parts: FULL or SMALL."""
    with torch.device("meta"):
        models = {
            "unet": UNet2DConditionModel(**parts["unet"]),
            "vae": AutoencoderKL(**parts["vae"]),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**parts["text"], **CLIP)),
            "text_encoder_2": CLIPTextModelWithProjection(CLIPTextConfig(**parts["text_2"], **CLIP)),
        }
    noise = torch.randn(1 << 24).to(torch.bfloat16) * 0.02
    for name, model in models.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        if name in ("unet", "vae"):
            model.save_config(folder / name)
        else:
            (folder / name / "config.json").write_text(model.config.to_json_string())
        shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
        layout = {key: (torch.bfloat16, shape) for key, shape in shapes.items()}
        file = "model.safetensors" if name.startswith("text") else "diffusion_pytorch_model.safetensors"
        write_tensors(folder / name / file, layout, ((key, cut(noise, shape)) for key, shape in shapes.items()))
    EulerDiscreteScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012).save_config(
        folder / "scheduler"
    )
    for name in ("tokenizer", "tokenizer_2"):
        _tokenizer().save_pretrained(folder / name)
    index = {"_class_name": "StableDiffusionXLPipeline", "scheduler": ["diffusers", "EulerDiscreteScheduler"]}
    index |= {name: [type(m).__module__.split(".")[0], type(m).__name__] for name, m in models.items()}
    index |= {name: ["transformers", "CLIPTokenizer"] for name in ("tokenizer", "tokenizer_2")}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))


def _tokenizer():
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], pad_token="<|endoftext|>", model_max_length=77)


def cut(noise, shape):
    """A tensor of a shape, filled from a block of noise."""
    count = 1
    for side in shape:
        count *= side
    return noise.repeat(-(-count // noise.numel()))[:count].reshape(shape)


if __name__ == "__main__":
    main()
