"""ImageReward: BLIP's arithmetic from the file's own key names, the reference's preprocessing, wrong files."""

import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.nn.functional import gelu, layer_norm, softmax

from surgery.errors import InputError
from surgery.validate.metrics import metric_class
from surgery.validate.metrics.clip import cropped_pixels
from surgery.validate.metrics.image_reward import ImageReward

from .tiny_clip import MEAN, STD, pictures, prompts

SIZE, PATCH, IMAGE_WIDTH, TEXT_WIDTH, LAYERS, HEADS = 32, 16, 24, 40, 2, 4
LETTERS = "abcdefghijklmnopqrstuvwxyz,!"
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{letter}" for letter in LETTERS)]
REWARD_MEAN, REWARD_STD = 0.16717362830052426, 1.0333394966054072


class TinyImageReward(ImageReward):
    """With a vision transformer of two layers."""

    vision = ImageReward.vision | {
        "hidden_size": IMAGE_WIDTH,
        "intermediate_size": 4 * IMAGE_WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "image_size": SIZE,
        "patch_size": PATCH,
    }


def random_tensors():
    """Weights under the names and in the order of shapes that ImageReward.pt has."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}

    def random(name, *shape, spread=1.0, around=0.0):
        tensors[name] = around + spread * torch.randn(shape, generator=generator)

    def linear(name, inputs, outputs):
        random(f"{name}.weight", outputs, inputs, spread=1.5 / inputs**0.5)
        random(f"{name}.bias", outputs, spread=0.3)

    def norm(name, width):
        random(f"{name}.weight", width, spread=0.2, around=1)
        random(f"{name}.bias", width, spread=0.2)

    vision, text = "blip.visual_encoder", "blip.text_encoder"
    random(f"{vision}.cls_token", 1, 1, IMAGE_WIDTH)
    random(f"{vision}.pos_embed", 1, (SIZE // PATCH) ** 2 + 1, IMAGE_WIDTH)
    random(f"{vision}.patch_embed.proj.weight", IMAGE_WIDTH, 3, PATCH, PATCH, spread=0.1)
    random(f"{vision}.patch_embed.proj.bias", IMAGE_WIDTH)
    norm(f"{vision}.norm", IMAGE_WIDTH)
    random(f"{text}.embeddings.word_embeddings.weight", len(VOCABULARY) + 2, TEXT_WIDTH)
    random(f"{text}.embeddings.position_embeddings.weight", 64, TEXT_WIDTH)
    tensors[f"{text}.embeddings.position_ids"] = torch.arange(64)[None]
    norm(f"{text}.embeddings.LayerNorm", TEXT_WIDTH)
    for index in range(LAYERS):
        block, layer = f"{vision}.blocks.{index}", f"{text}.encoder.layer.{index}"
        norm(f"{block}.norm1", IMAGE_WIDTH)
        norm(f"{block}.norm2", IMAGE_WIDTH)
        linear(f"{block}.attn.qkv", IMAGE_WIDTH, 3 * IMAGE_WIDTH)
        linear(f"{block}.attn.proj", IMAGE_WIDTH, IMAGE_WIDTH)
        linear(f"{block}.mlp.fc1", IMAGE_WIDTH, 4 * IMAGE_WIDTH)
        linear(f"{block}.mlp.fc2", 4 * IMAGE_WIDTH, IMAGE_WIDTH)
        for kind, keys in (("attention", TEXT_WIDTH), ("crossattention", IMAGE_WIDTH)):
            linear(f"{layer}.{kind}.self.query", TEXT_WIDTH, TEXT_WIDTH)
            linear(f"{layer}.{kind}.self.key", keys, TEXT_WIDTH)
            linear(f"{layer}.{kind}.self.value", keys, TEXT_WIDTH)
            linear(f"{layer}.{kind}.output.dense", TEXT_WIDTH, TEXT_WIDTH)
            norm(f"{layer}.{kind}.output.LayerNorm", TEXT_WIDTH)
        linear(f"{layer}.intermediate.dense", TEXT_WIDTH, 2 * TEXT_WIDTH)
        linear(f"{layer}.output.dense", 2 * TEXT_WIDTH, TEXT_WIDTH)
        norm(f"{layer}.output.LayerNorm", TEXT_WIDTH)
    linear("blip.vision_proj", IMAGE_WIDTH, 16)
    linear("blip.text_proj", TEXT_WIDTH, 16)
    sizes = (TEXT_WIDTH, 1024, 128, 64, 16, 1)
    for index, (inputs, outputs) in zip((0, 2, 4, 6, 7), pairwise(sizes), strict=True):
        linear(f"mlp.layers.{index}", inputs, outputs)
    return tensors


def reward(tensors, pixels, ids):
    """The score by its definition: pixels (3, SIZE, SIZE), token ids without padding."""
    patches = torch.nn.functional.unfold(pixels[None], PATCH, stride=PATCH)[0].T  # (patches, 3 * PATCH * PATCH)
    vision, text = "blip.visual_encoder", "blip.text_encoder"
    patches = patches @ tensors[f"{vision}.patch_embed.proj.weight"].flatten(1).T
    patches = patches + tensors[f"{vision}.patch_embed.proj.bias"]
    states = torch.cat([tensors[f"{vision}.cls_token"][0], patches]) + tensors[f"{vision}.pos_embed"][0]
    for index in range(LAYERS):
        block = f"{vision}.blocks.{index}"
        fused = linear(tensors, f"{block}.attn.qkv", norm(tensors, f"{block}.norm1", states, 1e-6))
        states = states + linear(tensors, f"{block}.attn.proj", attention(*fused.chunk(3, dim=1)))
        hidden = gelu(linear(tensors, f"{block}.mlp.fc1", norm(tensors, f"{block}.norm2", states, 1e-6)))
        states = states + linear(tensors, f"{block}.mlp.fc2", hidden)
    image = norm(tensors, f"{vision}.norm", states, 1e-6)
    words = tensors[f"{text}.embeddings.word_embeddings.weight"][ids]
    words = words + tensors[f"{text}.embeddings.position_embeddings.weight"][: len(ids)]
    states = norm(tensors, f"{text}.embeddings.LayerNorm", words, 1e-12)
    for index in range(LAYERS):
        layer = f"{text}.encoder.layer.{index}"
        for kind in ("attention", "crossattention"):
            read = states if kind == "attention" else image
            name = f"{layer}.{kind}.self"
            query = linear(tensors, f"{name}.query", states)
            mixed = attention(query, linear(tensors, f"{name}.key", read), linear(tensors, f"{name}.value", read))
            mixed = linear(tensors, f"{layer}.{kind}.output.dense", mixed)
            states = norm(tensors, f"{layer}.{kind}.output.LayerNorm", states + mixed, 1e-12)
        hidden = gelu(linear(tensors, f"{layer}.intermediate.dense", states))
        hidden = linear(tensors, f"{layer}.output.dense", hidden)
        states = norm(tensors, f"{layer}.output.LayerNorm", states + hidden, 1e-12)
    head = states[0]
    for index in (0, 2, 4, 6, 7):
        head = linear(tensors, f"mlp.layers.{index}", head)
    return (head.item() - REWARD_MEAN) / REWARD_STD


def attention(query, key, value):
    """Softmax attention of (tokens, width) matrices in HEADS heads."""
    query, key, value = (part.unflatten(1, (HEADS, -1)).transpose(0, 1) for part in (query, key, value))
    weights = softmax(query @ key.transpose(1, 2) / query.shape[-1] ** 0.5, dim=-1)
    return (weights @ value).transpose(0, 1).flatten(1)


def linear(tensors, name, states):
    return states @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"]


def norm(tensors, name, states, epsilon):
    return layer_norm(states, states.shape[-1:], tensors[f"{name}.weight"], tensors[f"{name}.bias"], epsilon)


def token_ids(text):
    """WordPiece of the tiny vocabulary: words in letters, all but the first with ##, at most 35 with start and end."""
    pieces = []
    for word in text.lower().replace(",", " , ").replace("!", " ! ").split():
        pieces += [word[0], *(f"##{letter}" for letter in word[1:])]
    return [VOCABULARY.index(piece) for piece in ("[CLS]", *pieces[:33], "[SEP]")]


def write(folder, tensors, **changes):
    """The two folders, each with the files that the metric lists for it and no other."""
    files = {"model": folder / "model", "tokenizer": folder / "tokenizer"}
    for path in files.values():
        path.mkdir(parents=True)
    torch.save(tensors, files["model"] / "ImageReward.pt")
    config = {
        "architectures": ["BertModel"],
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": 2 * TEXT_WIDTH,
        "layer_norm_eps": 1e-12,
        "max_position_embeddings": 64,
        "model_type": "bert",
        "num_attention_heads": HEADS,
        "num_hidden_layers": LAYERS,
        "pad_token_id": 0,
        "type_vocab_size": 2,
        "vocab_size": len(VOCABULARY) + 2,
        "encoder_width": 768,
        "add_cross_attention": True,
    }
    config = {name: value for name, value in (config | changes).items() if value is not None}
    (files["model"] / "med_config.json").write_text(json.dumps(config))
    (files["tokenizer"] / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    (files["tokenizer"] / "tokenizer_config.json").write_text('{"do_lower_case": true, "model_max_length": 512}')
    for part, path in files.items():
        assert {file.name for file in path.iterdir()} <= set(ImageReward.info.checkpoints[part].files)
    return files


@pytest.fixture(scope="module")
def tensors():
    return random_tensors()


@pytest.fixture(scope="module")
def metric(tensors, tmp_path_factory):
    return TinyImageReward(write(tmp_path_factory.mktemp("reward"), tensors))


def test_the_score_is_blips_own_arithmetic_and_the_head_on_its_first_token(metric, tensors):
    texts = ["a red circle, Left!", "Two  green stars", "", "many cats, " * 30]
    images = pictures([(SIZE, SIZE)] * len(texts))
    pixels = [(torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 - MEAN) / STD for image in images]
    expected = [reward(tensors, one, token_ids(text)) for one, text in zip(pixels, texts, strict=True)]
    scores = metric.score(images, prompts(texts))
    assert scores.dtype == np.float64
    assert np.std(expected) > 0.1
    np.testing.assert_allclose(scores, expected, atol=1e-4)


def test_a_constant_head_gives_the_reward_in_standard_deviations(tensors, tmp_path):
    constant = tensors | {"mlp.layers.7.weight": torch.zeros(1, 16), "mlp.layers.7.bias": torch.tensor([2.0])}
    scores = TinyImageReward(write(tmp_path, constant)).score(pictures([(40, 50)]), prompts(["a cat"]))
    np.testing.assert_allclose(scores, [(2 - 0.16717362830052426) / 1.0333394966054072], rtol=1e-7)


def test_a_score_depends_on_its_own_image_and_prompt_alone(metric):
    images = pictures([(64, 40)] * 18)  # more than a batch
    texts = prompts(["cat " * index for index in range(18)])
    scores = metric.score(images, texts)
    assert len(set(scores)) > 9
    np.testing.assert_allclose(metric.score(images[::-1], texts[::-1]), scores[::-1], atol=1e-4)
    np.testing.assert_allclose(metric.score(images[17:], texts[17:]), scores[17:], atol=1e-4)


def test_a_prompt_counts_up_to_35_tokens_and_no_further(metric):
    texts = ["a " * 32 + "b", "a " * 32 + "b c d", "a " * 32 + "c"]  # 33 words, and the start and the end
    score, longer, other = metric.score(pictures([(40, 40)]) * 3, prompts(texts))
    assert longer == pytest.approx(score, abs=1e-5)
    assert other != pytest.approx(score, abs=1e-3)


@pytest.mark.parametrize(("extra", "left"), [(1, 0), (2, 1), (3, 2), (5, 2), (7, 4)])
def test_the_middle_of_the_longer_side_is_kept_halves_rounded_to_even(extra, left):
    from PIL import Image

    columns = np.tile(np.arange(224 + extra, dtype=np.uint8)[:, None], (224, 1, 3))
    expected = torch.from_numpy(columns).permute(2, 0, 1)[:, :, left : left + 224] / 255
    for image, kept in (
        (Image.fromarray(columns), expected),
        (Image.fromarray(columns).transpose(Image.Transpose.TRANSPOSE), expected.mT),
    ):
        assert torch.allclose(cropped_pixels([image], 224)[0] * STD + MEAN, kept, atol=1e-6)


def test_an_image_is_resized_by_its_shorter_side():
    from PIL import Image

    image = pictures([(500, 333)])[0]
    resized = image.resize((336, 224), Image.Resampling.BICUBIC)  # 224 * 500 / 333 = 336.3
    expected = torch.from_numpy(np.array(resized)).permute(2, 0, 1)[:, :, 56:280] / 255
    assert torch.allclose(cropped_pixels([image], 224)[0] * STD + MEAN, expected, atol=1e-6)


def test_it_is_found_by_name_and_needs_no_pretraining_projections(metric, tensors, tmp_path):
    assert metric_class("image_reward") is ImageReward
    bare = {name: tensor for name, tensor in tensors.items() if "_proj." not in name and "position_ids" not in name}
    assert len(bare) == len(tensors) - 5
    arguments = pictures([(40, 50)]), prompts(["a cat"])
    assert TinyImageReward(write(tmp_path, bare)).score(*arguments) == pytest.approx(metric.score(*arguments))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("blip.visual_encoder.cls_token"), "missing: blip.visual_encoder.cls_token"),
        (lambda tensors: tensors.pop("mlp.layers.4.bias"), "missing: mlp.layers.4.bias"),
        (
            lambda tensors: tensors.update({"blip.text_encoder.pooler.dense.bias": torch.zeros(1)}),
            "unexpected: blip.text_encoder.pooler.dense.bias",
        ),
        (lambda tensors: tensors.update({"mlp.layers.7.weight": torch.zeros(1, 15)}), "size mismatch for 7.weight"),
        (
            lambda tensors: tensors.update({"blip.visual_encoder.norm.bias": torch.zeros(7)}),
            r"shapes: post_layernorm.bias \(7,\) instead of \(24,\)",
        ),
    ],
)
def test_weights_that_do_not_fit_are_named(tensors, tmp_path, change, message):
    changed = dict(tensors)
    change(changed)
    files = write(tmp_path, changed)
    with pytest.raises(InputError, match=message) as error:
        TinyImageReward(files)
    assert str(files["model"] / "ImageReward.pt") in str(error.value)


def test_a_damaged_or_absent_file_is_named(tensors, tmp_path):
    files = write(tmp_path, tensors)
    path = files["model"] / "ImageReward.pt"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="ImageReward.pt cannot be read"):
        TinyImageReward(files)
    path.unlink()
    with pytest.raises(InputError, match="ImageReward.pt: there is no such file"):
        TinyImageReward(files)
    (files["model"] / "med_config.json").write_text("{")
    with pytest.raises(InputError, match="med_config.json cannot be read"):
        TinyImageReward(files)


def test_settings_that_do_not_fit_are_named(tensors, tmp_path):
    with pytest.raises(InputError, match="does not say num_hidden_layers"):
        TinyImageReward(write(tmp_path / "a", tensors, num_hidden_layers=None))
    with pytest.raises(InputError, match=rf"the tokenizer has {len(VOCABULARY) + 2} tokens, ImageReward 1000"):
        TinyImageReward(write(tmp_path / "b", tensors, vocab_size=1000))
    files = write(tmp_path / "c", tensors)
    (files["tokenizer"] / "vocab.txt").unlink()
    with pytest.raises(InputError, match="tokenizer"):
        TinyImageReward(files)
