"""Which files of a listing a pipeline loads."""

import pytest

from surgery.errors import BaseError
from surgery.hub.listing import components_of, index_of, license_of, select_files, specs_of

INDEX = {"_class_name": "P", "unet": ["diffusers", "U"], "text_encoder": ["transformers", "T"], "none": [None, None]}
CONFIGS = ["unet/config.json", "text_encoder/config.json"]
NOISE = [
    "README.md",
    "unet/diffusion_pytorch_model.non_ema.safetensors",
    "unet/model.onnx",
    "unet/model.onnx_data",
    "unet/openvino_model.xml",
    "text_encoder/flax_model.msgpack",
    "vae_decoder/model.onnx",
    "sd_xl_base_1.0.safetensors",
]
PLAIN = ["unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"]
FP16 = ["unet/diffusion_pytorch_model.fp16.safetensors", "text_encoder/model.fp16.safetensors"]
BIN = ["unet/diffusion_pytorch_model.bin", "text_encoder/pytorch_model.bin"]
SHARDS = [f"unet/diffusion_pytorch_model-0000{n}-of-00002.safetensors" for n in (1, 2)]
SHARD_INDEX = "unet/diffusion_pytorch_model.safetensors.index.json"
SHARDS16 = [f"unet/diffusion_pytorch_model.fp16-0000{n}-of-00002.safetensors" for n in (1, 2)]
SHARD_INDEX16 = "unet/diffusion_pytorch_model.safetensors.index.fp16.json"


def weights(paths, variant=None):
    selected = select_files([*paths, *CONFIGS, *NOISE], INDEX, variant)
    assert set(selected) == {"unet", "text_encoder"}
    assert selected["unet"].config == ("unet/config.json",)
    return [path for files in selected.values() for path in files.weights], selected["unet"].index


@pytest.mark.parametrize(
    ("paths", "variant", "expected", "index"),
    [
        (PLAIN + FP16 + BIN, None, PLAIN, None),
        (PLAIN + FP16 + BIN, "fp16", FP16, None),
        (BIN, None, BIN, None),
        ([FP16[0], PLAIN[1]], "fp16", [FP16[0], PLAIN[1]], None),
        ([*SHARDS, SHARD_INDEX, PLAIN[1]], None, [*SHARDS, PLAIN[1]], SHARD_INDEX),
        ([*SHARDS, SHARD_INDEX, *SHARDS16, SHARD_INDEX16, FP16[1]], "fp16", [*SHARDS16, FP16[1]], SHARD_INDEX16),
        ([*PLAIN, *SHARDS, SHARD_INDEX], None, PLAIN, None),
    ],
)
def test_selection(paths, variant, expected, index):
    assert weights(paths, variant) == (expected, index)


def test_a_variant_that_is_nowhere_and_shards_without_an_index_are_refused():
    with pytest.raises(BaseError, match="no weights of variant 'bf16'; it has fp16, non_ema"):
        weights(PLAIN + FP16, "bf16")
    with pytest.raises(BaseError, match="no index file"):
        weights([*SHARDS, PLAIN[1]])


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ({"license": ["mit"]}, ("mit", None)),
        ({"license": ["mit", "apache-2.0"]}, (None, None)),
        ({"license": "mit", "license_name": "odd", "license_link": " LICENSE "}, ("mit", "LICENSE")),
        ({"license": "".join(("oth", "er")), "license_name": "odd"}, ("odd", None)),
        ({"license": " ", "license_link": 3}, (None, None)),
        ({}, (None, None)),
    ],
)
def test_a_cards_licence_is_one_text_and_the_name_of_one_that_the_hub_does_not_list(card, expected):
    assert license_of(card) == expected


def test_a_modular_index_says_where_a_component_is_and_what_it_is_before_it_is_loaded():
    spec = {"repo": "you/x", "type_hint": ["diffusers", "U"]}
    index = {"_class_name": "M", "unet": [None, None, spec], "vae": ["diffusers", "V"], "odd": [None, None, "spec"]}
    assert specs_of(index) == {"unet": spec} and specs_of(INDEX) == {}
    assert components_of(index) == {"unet": ("diffusers", "U"), "vae": ("diffusers", "V")}
    assert index_of(["modular_model_index.json", "model_index.json"]) == "model_index.json"
    assert index_of(["modular_model_index.json"]) == "modular_model_index.json" and index_of(["x.json"]) is None
