"""HPSv3 on random weights in the published files: the head's first number at its token."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from surgery.errors import InputError
from surgery.validate.metrics.hps_v3 import HpsV3, instruction_in

from .tiny_clip import pictures, prompts
from .tiny_qwen import write_hps_v3


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(files, the model, the head)."""
    return write_hps_v3(tmp_path_factory.mktemp("hps_v3"))


def resized(image):
    """By the authors' rule for one size, 256 * 28 * 28 pixels at most and at least, sides multiples of 28."""
    width, height = image.size
    near = [max(28, round(side / 28) * 28) for side in (height, width)]
    product = near[0] * near[1]
    if product != 200704:
        beta = (height * width / 200704) ** 0.5
        down = product > 200704
        near = [(int(side / beta / 28) if down else -int(-side / beta // 28)) * 28 for side in (height, width)]
    return image.resize((near[1], near[0]), 3)


def test_it_is_the_heads_first_number_at_its_token(made):
    from transformers import AutoTokenizer
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    files, model, head = made
    images, texts = pictures([(512, 512), (300, 200), (640, 420)]), ["a cat", "a {dog} <|Reward|>", "a tree"]
    found = HpsV3(files).score(images, prompts(texts))
    tokenizer = AutoTokenizer.from_pretrained(files["reader"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|Reward|>"]})
    token = tokenizer.convert_tokens_to_ids("<|Reward|>")
    pixels = Qwen2VLImageProcessorPil.from_pretrained(files["reader"])
    expected = []
    for image, text in zip(images, texts, strict=True):
        seen = pixels([resized(image)], return_tensors="pt")
        assert seen["image_grid_thw"][0, 1:].prod() * 196 == pytest.approx(200704, rel=0.15)
        count = int(seen["image_grid_thw"].prod()) // 4
        asked = f"\nRate it.\nPrompt - {text}\n\n\nHow good: <|Reward|>\n\nEND\n"
        before = "<|im_start|>user\n<|vision_start|>"
        written = f"{before}{'<|image_pad|>' * count}<|vision_end|>{asked}<|im_end|>\n<|im_start|>assistant\n"
        ids = tokenizer(written, return_tensors="pt")["input_ids"]
        kinds = (ids == tokenizer.convert_tokens_to_ids("<|image_pad|>")).long()
        with torch.no_grad():
            states = model(input_ids=ids, mm_token_type_ids=kinds, **seen).last_hidden_state[0]
            last = int((ids[0] == token).nonzero()[-1])
            expected.append(float(head(states[last])[0]))
    assert found == pytest.approx(expected, abs=1e-4) and len(set(found.round(6))) == 3


def test_names_of_newer_versions_are_the_same_weights(made, tmp_path):
    files, *_ = made
    tensors = load_file(files["weights"] / "HPSv3.safetensors")
    newer = {
        f"model.{name}" if name.startswith("visual.") else name.replace("model.", "model.language_model.", 1): tensor
        for name, tensor in tensors.items()
    }
    save_file(newer, tmp_path / "HPSv3.safetensors")
    images = pictures([(64, 64)])
    again = HpsV3({**files, "weights": tmp_path}).score(images, prompts(["a cat"]))
    assert again == HpsV3(files).score(images, prompts(["a cat"]))


def test_files_that_do_not_fit_are_refused_by_name(made, tmp_path):
    files, *_ = made
    tensors = load_file(files["weights"] / "HPSv3.safetensors")
    for left_out in ("rm_head.0.weight", "visual.merger.ln_q.weight", "model.embed_tokens.weight"):
        save_file({name: one for name, one in tensors.items() if name != left_out}, tmp_path / "HPSv3.safetensors")
        with pytest.raises(InputError, match=left_out.rpartition("model.")[2].removeprefix("rm_head.")):
            HpsV3({**files, "weights": tmp_path})
    broken = shutil.copy(files["instruction"], tmp_path / "broken.whl")
    with open(broken, "r+b") as file:
        file.truncate(100)
    with pytest.raises(InputError, match="instruction"):
        instruction_in(broken)
