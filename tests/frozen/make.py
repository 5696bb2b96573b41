"""Freeze what this version publishes, so that later versions are held to loading it.

    python tests/frozen/make.py VERSION     writes tests/frozen/VERSION, once, when VERSION is released

A tiny random pipeline (fp16, 16 x 16 pixels) becomes an artifact by a recipe that uses what the version can do; beside
it lies `expected.safetensors`, an image of it in float32. A folder here is never written again. The sha256 that it
prints, of the code, goes into surgery/artifact/verify.py, that of handler.py into endpoint.py there.
"""

import hashlib
import shutil
import sys
import tempfile
from pathlib import Path

import torch

RECIPES = {
    "0.1.0": "[{replace: cross-attention, with: {operator: pladis, alpha: 1.3, scale: 2.5, temperature: 0.8}}]",
    "0.2.0": """
  - {replace: cross-attention, layers: down, with: {operator: gag, unit: token, zeta: 0.5, eta: .inf}}
  - {replace: cross-attention, layers: mid, with: {operator: sparse}}
  - replace: cross-attention
    layers: up
    with: {operator: anderson, alpha: 1.7}
    schedule: {fraction: [0.0, 0.6]}
""",
    "0.3.0.dev0": """
  - {replace: cross-attention, layers: down, with: {operator: gag, unit: head, zeta: 0.2, eta: 5}}
  - {replace: cross-attention, layers: mid, with: {operator: pladis, alpha: 2.0, scale: 0.5}}
  - replace: cross-attention
    layers: up
    with: {operator: pladis, alpha: 1.25}
    schedule: {steps: [0, 3], scale: [0.5, 1.5, 1.0]}
""",
}
DRAW = {"prompt": "a cat", "height": 16, "width": 16, "num_inference_steps": 3, "guidance_scale": 3.0}


def tiny_pipeline():
    """A Stable Diffusion pipeline of 60 thousand random parameters."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    from tests.tiny import clip_tokenizer

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        norm_num_groups=4,
        cross_attention_dim=16,
        attention_head_dim=2,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        sample_size=16,
    )
    text = CLIPTextConfig(
        vocab_size=514,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=20,
        bos_token_id=512,
        eos_token_id=513,
        pad_token_id=513,
    )
    return StableDiffusionPipeline(
        unet=unet,
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=clip_tokenizer(20),
        scheduler=DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def draw(pipeline):
    """The image that is compared, (1, 16, 16, 3) in float32."""
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline(**DRAW, generator=torch.Generator().manual_seed(0), output_type="np").images
    return torch.from_numpy(image).contiguous()


def main():
    """Write the folder of the version named on the command line."""
    from safetensors.torch import save_file

    import surgery
    from surgery import machine
    from surgery.artifact.endpoint import handler_text

    version = sys.argv[1]
    target = Path(__file__).parent / version
    if target.exists():
        sys.exit(f"{target} is frozen already")
    installed = machine.versions()
    machine.versions = lambda: {**installed, "pladis-surgery": version}
    with tempfile.TemporaryDirectory() as work:
        tiny_pipeline().to(dtype=torch.float16).save_pretrained(Path(work, "base"))
        recipe = Path(work, "frozen.yaml")
        recipe.write_text(
            f"schema: 1\nname: frozen\nbase: {{pipeline: ./base}}\noperations: {RECIPES[version]}\n"
            "sampling: {steps: 3}\npublish: {license: apache-2.0}\n"
        )
        artifact = surgery.apply(recipe, Path(work, "out"))
        expected = draw(surgery.load(artifact.folder, dtype=torch.float32, quiet=True))
        shutil.copytree(artifact.folder, target / "artifact")
    save_file({"image": expected}, target / "expected.safetensors")
    code = target / "artifact" / artifact.manifest.code
    print(f'RELEASES    "{version}": "{hashlib.sha256(code.read_bytes()).hexdigest()}",')
    print(f'HANDLERS    "{version}": "{hashlib.sha256(handler_text().encode()).hexdigest()}",')


if __name__ == "__main__":
    main()
