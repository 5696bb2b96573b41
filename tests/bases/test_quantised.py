"""Denoisers whose projections are quantised: patched, loaded and unpatched; what cannot be is refused by name."""

import json
import shutil
from typing import Any

import pytest
import torch
from diffusers import GGUFQuantizationConfig, SD3Transformer2DModel, UNet2DConditionModel

import surgery
from surgery.errors import InputError, UnsupportedModelError
from surgery.recipe.plan import make_plan

from ..conftest import SHAPES, draw, load_shapes
from ..nn.backbones.two_streams import sd3
from . import single_files


def projection(unet):
    return unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_q


def test_an_artifact_is_quantised_while_it_is_loaded(shapes_artifact):
    """As a quantised model that is patched after."""
    pytest.importorskip("torchao")
    from diffusers import TorchAoConfig
    from diffusers.quantizers import PipelineQuantizationConfig
    from torchao.quantization import Int8WeightOnlyConfig

    own: dict = {"quantization_config": TorchAoConfig(Int8WeightOnlyConfig())}
    loaded = surgery.load(shapes_artifact, quiet=True, **own)
    assert type(projection(loaded.unet).weight.data) is not torch.Tensor
    pipe: Any = load_shapes()
    pipe.unet = UNet2DConditionModel.from_pretrained(SHAPES, subfolder="unet", torch_dtype=torch.float32, **own)
    stock = draw(pipe)
    patched = draw(surgery.patch(pipe, scale=float(loaded.unet.config["pladis"][0]["scale"])))
    assert torch.equal(draw(loaded), patched) and not torch.equal(patched, stock)
    assert torch.equal(draw(surgery.unpatch(pipe)), stock)
    mapped = PipelineQuantizationConfig(quant_mapping={"unet": own["quantization_config"]})
    assert torch.equal(draw(surgery.load(shapes_artifact, quiet=True, quantization_config=mapped)), patched)
    mapped.quant_mapping = None
    with pytest.raises(InputError, match="told by component here: quant_mapping={'unet'"):
        surgery.load(shapes_artifact, quiet=True, quantization_config=mapped)


def write_gguf(path, state):
    """A GGUF file: what is a matrix of whole blocks in 8 bits, the rest as it is."""
    import gguf

    writer = gguf.GGUFWriter(str(path), "sd3")
    for key, tensor in state.items():
        values = tensor.float().contiguous().numpy()
        if values.ndim == 2 and values.shape[1] % 32 == 0:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(key, gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(key, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_transformer_is_patched(tmp_path):
    pytest.importorskip("gguf")
    pipe: Any
    pipe, arguments = sd3()
    pipe.transformer.save_pretrained(tmp_path / "transformer")
    state = single_files.original_sd3(pipe.transformer.state_dict())
    write_gguf(tmp_path / "x.gguf", {key.removeprefix("model.diffusion_model."): t for key, t in state.items()})
    pipe.transformer = SD3Transformer2DModel.from_single_file(
        str(tmp_path / "x.gguf"),
        config=str(tmp_path),
        subfolder="transformer",
        quantization_config=GGUFQuantizationConfig(compute_dtype=torch.float32),
        torch_dtype=torch.float32,
        local_files_only=True,
    )
    assert type(pipe.transformer.transformer_blocks[0].attn.to_q).__name__ == "GGUFLinear"

    def latents():
        given = {**arguments, "output_type": "latent"}
        return pipe(generator=torch.Generator().manual_seed(0), **given).images

    stock = latents()
    surgery.patch(pipe, scale=0.0)
    torch.testing.assert_close(latents(), stock, atol=1e-4, rtol=1e-4)
    surgery.tune(pipe, scale=2.0)
    assert (latents() - stock).abs().max() > 1e-2
    surgery.unpatch(pipe)
    assert torch.equal(latents(), stock)


@pytest.mark.parametrize("bits", [4, 8])
def test_bitsandbytes_projections_are_patched(bits):
    """The modules that diffusers' BitsAndBytesConfig puts in place on a GPU, put there by hand."""
    bnb = pytest.importorskip("bitsandbytes")
    pipe: Any = load_shapes()
    for path, module in list(pipe.unet.named_modules()):
        if isinstance(module, torch.nn.Linear) and ".attn2.to_" in path:
            sizes, bias = (module.in_features, module.out_features), module.bias is not None
            if bits == 4:
                made = bnb.nn.Linear4bit(*sizes, bias=bias, compute_dtype=torch.float32, quant_type="nf4")
                made.weight = bnb.nn.Params4bit(module.weight.data, requires_grad=False, quant_type="nf4")
            else:
                made = bnb.nn.Linear8bitLt(*sizes, bias=bias, has_fp16_weights=False)
                made.weight = bnb.nn.Int8Params(module.weight.data, requires_grad=False, has_fp16_weights=False)
            made.bias = module.bias
            pipe.unet.set_submodule(path, made.to("cpu"))
    stock = draw(pipe)
    surgery.patch(pipe, scale=0.0)
    assert (draw(pipe) - stock).abs().max() < 1e-2
    surgery.tune(pipe, scale=1.0)
    assert (draw(pipe) - stock).abs().max() > 1e-2
    assert torch.equal(draw(surgery.unpatch(pipe)), stock)


def test_a_base_that_was_saved_quantised_is_refused_with_the_way_out(tmp_path):
    shutil.copytree(SHAPES, tmp_path / "base", ignore=shutil.ignore_patterns("*.py", "training"))
    path = tmp_path / "base/unet/config.json"
    config = {**json.loads(path.read_text()), "quantization_config": {"quant_method": "bitsandbytes"}}
    path.write_text(json.dumps(config))
    (tmp_path / "r.yaml").write_text(
        "schema: 1\nname: q\nbase: {pipeline: ./base}\n"
        "operations: [{replace: cross-attention, with: {operator: pladis}}]\n"
    )
    with pytest.raises(UnsupportedModelError, match=r"quantised already \(bitsandbytes\).*quantization_config="):
        make_plan(tmp_path / "r.yaml")
