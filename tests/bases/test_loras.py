"""LoRAs fused into transformers: what diffusers computes with the same LoRA loaded beside the weights."""

import pytest
import torch
from safetensors.torch import save_file

import surgery
from surgery.errors import BaseError, RecipeError, UnsupportedModelError
from surgery.recipe.plan import make_plan

from ..nn.backbones.cross import pixart
from ..nn.backbones.flux import flux
from ..nn.backbones.two_streams import qwen_image, sd3
from ..nn.backbones.video import wan22

RECIPE = """\
schema: 1
name: fused
base: {pipeline: ./base, loras: [{file: lora.safetensors, scale: 0.7}]}
operations: [{replace: joint-attention, with: {operator: pladis, scale: 0.0}}]
"""


def lora_of(transformer, wanted=("to_q", "to_k", "add_v_proj", "net.2", "proj_mlp")):
    """A rank-3 LoRA on some projections of every block."""
    generator = torch.Generator().manual_seed(1)
    state = {}
    for path, module in transformer.named_modules():
        if isinstance(module, torch.nn.Linear) and path.endswith(wanted):
            out, into = module.weight.shape
            state[f"{path}.lora_A.weight"] = torch.randn(3, into, generator=generator) * 0.2
            state[f"{path}.lora_B.weight"] = torch.randn(out, 3, generator=generator) * 0.2
    return state


@pytest.mark.parametrize("family", [flux, sd3, qwen_image])
def test_a_fused_lora_draws_what_a_loaded_one_draws(family, tmp_path):
    pipe, arguments = family()
    pipe.save_pretrained(tmp_path / "base")
    state = {f"transformer.{key}": tensor for key, tensor in lora_of(pipe.transformer).items()}
    save_file(state, tmp_path / "lora.safetensors")
    (tmp_path / "r.yaml").write_text(RECIPE)
    artifact = surgery.apply(tmp_path / "r.yaml", tmp_path / "out")
    kinds = {file.origin.kind for path, file in artifact.manifest.files.items() if path.startswith("transformer/diff")}
    assert "fused" in kinds
    pipe.load_lora_weights(dict(state))
    pipe.set_adapters("default_0", 0.7)
    loaded = surgery.load(artifact.folder, quiet=True)
    arguments = {**arguments, "num_inference_steps": 1, "output_type": "latent"}
    images = [p(generator=torch.Generator().manual_seed(0), **arguments).images for p in (loaded, pipe)]
    torch.testing.assert_close(images[0], images[1], atol=1e-4, rtol=1e-4)
    pipe.unload_lora_weights()
    without = pipe(generator=torch.Generator().manual_seed(0), **arguments).images
    assert (without - images[0]).abs().max() > 1e-2


def test_a_second_denoiser_has_loras_of_its_own_patched_or_not(tmp_path):
    pipe, _ = wan22()
    pipe.save_pretrained(tmp_path / "base", max_shard_size="40KB")
    state = {f"transformer.{key}": tensor for key, tensor in lora_of(pipe.transformer_2, ("attn2.to_q",)).items()}
    save_file(state, tmp_path / "lora.safetensors")
    recipe = RECIPE.replace("scale: 0.7", "scale: 0.7, component: transformer_2").replace("joint-", "cross-")
    for layers in ("all", "blocks.*"):
        (tmp_path / "r.yaml").write_text(recipe.replace("with:", f'layers: "{layers}", with:'))
        artifact = surgery.apply(tmp_path / "r.yaml", tmp_path / "out", force=True)
        loaded = surgery.load(artifact.folder, quiet=True)
        for name in ("transformer", "transformer_2"):
            key = "blocks.1.attn2.to_q"
            wanted = getattr(pipe, name).get_submodule(key).weight
            if name == "transformer_2":
                up, down = (state[f"transformer.{key}.lora_{half}.weight"] for half in "BA")
                wanted = wanted + 0.7 * up @ down
            torch.testing.assert_close(getattr(loaded, name).get_submodule(key).weight, wanted)
        assert surgery.verify(artifact.folder).verified
    (tmp_path / "r.yaml").write_text(recipe.replace("transformer_2", "unet"))
    with pytest.raises(RecipeError, match="its transformer and its transformer_2"):
        make_plan(tmp_path / "r.yaml")


def test_another_tools_names_and_alpha_are_read(tmp_path):
    """kohya's: lora_up, lora_down and alpha; W + scale (alpha / rank) up down."""
    pipe, _ = flux()
    pipe.save_pretrained(tmp_path / "base")
    up, down = torch.randn(32, 4), torch.randn(4, 32)
    name = "lora_unet_double_blocks_0_img_attn_proj"
    state = {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down, f"{name}.alpha": torch.tensor(2.0)}
    save_file(state, tmp_path / "lora.safetensors")
    (tmp_path / "r.yaml").write_text(RECIPE)
    artifact = surgery.apply(tmp_path / "r.yaml", tmp_path / "out")
    key = "transformer_blocks.0.attn.to_out.0"
    found = surgery.load(artifact.folder, quiet=True).transformer.get_submodule(key).weight
    wanted = pipe.transformer.get_submodule(key).weight + 0.7 * 2.0 / 4 * up @ down
    torch.testing.assert_close(found, wanted)


def test_what_cannot_be_fused_is_refused(tmp_path):
    pipe, _ = sd3()
    pipe.save_pretrained(tmp_path / "base")
    (tmp_path / "r.yaml").write_text(RECIPE)
    path = "transformer.transformer_blocks.0.attn.to_q"
    halves = {f"{path}.lora_A.weight": torch.zeros(4, 32), f"{path}.lora_B.weight": torch.zeros(32, 4)}
    text = {"text_encoder.layers.0.q_proj.lora_A.weight": torch.zeros(4, 8)}
    for state, error, message in (
        ({**halves, **text}, UnsupportedModelError, "1 of its tensors are not the transformer's"),
        ({**halves, f"{path}.lora_B.bias": torch.zeros(32)}, UnsupportedModelError, "lora_B.bias is not plain LoRA"),
        ({k.replace("_blocks.0", "_blocks.9"): t for k, t in halves.items()}, BaseError, "has a layer .*blocks.9"),
    ):
        save_file(state, tmp_path / "lora.safetensors")
        with pytest.raises(error, match=message):
            surgery.apply(tmp_path / "r.yaml", tmp_path / "out")


def test_a_pipeline_that_reads_no_lora_says_so_in_its_plan(tmp_path):
    pixart()[0].save_pretrained(tmp_path / "base")
    (tmp_path / "r.yaml").write_text(RECIPE.replace("joint-attention", "cross-attention"))
    with pytest.raises(RecipeError, match="diffusers reads no LoRA for PixArtSigmaPipeline"):
        make_plan(tmp_path / "r.yaml")
