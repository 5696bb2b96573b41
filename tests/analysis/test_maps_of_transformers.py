"""Attention maps of transformers: which keys a word became, seen without knowing the pipeline, and their weights."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

import surgery
from surgery.analysis.attention_maps import compare_attention, sheet, text_keys, words_of
from surgery.errors import UnsupportedModelError

from ..nn.backbones import cross, flux, one_stream, two_streams, video

SIZE = {"steps": 2, "height": 32, "width": 32}


def z_image():
    """With a text encoder, whose template stands around the prompt."""
    pipeline, _ = one_stream.z_image()
    pipeline.register_modules(text_encoder=flux.qwen3_text(), tokenizer=flux.qwen3_tokenizer())
    return pipeline


# {backbone: (its pipeline, settings, the words of "a cat" and the tokens around them among the keys)}; padding left out
CASES = {
    "flux": (flux.flux, {"max_sequence_length": 24}, {"a": [0, 1], "cat": [2, 3, 4, 5], "<end>": [6]}),
    "flux2": (
        flux.flux2_klein,
        {"max_sequence_length": 48, "text_encoder_out_layers": (0, 1), "height": 16, "width": 16},
        {"<start>": [0], "a": [1], "cat": [3, 4, 5], "<punctuation>": [2], "<end>": [6]},
    ),
    "sd3": (  # CLIP's 77 tokens, then T5's
        two_streams.sd3,
        {"max_sequence_length": 16, "guidance_scale": 4.0},
        {"<start>": [0], "a": [1, 77, 78], "cat": [2, 3, 4, 79, 80, 81, 82], "<end>": [5, 83]},
    ),
    "z_image": (
        z_image,
        {"guidance_scale": 4.0},
        {"<start>": [0], "a": [1], "<punctuation>": [2], "cat": [3, 4, 5], "<end>": [6]},
    ),
    "pixart": (cross.pixart, {"use_resolution_binning": False}, {"a": [0, 1], "cat": [2, 3, 4, 5], "<end>": [6]}),
    "ltx": (video.ltx, {"num_frames": 9, "max_sequence_length": 16}, {"a": [0, 1], "cat": [2, 3, 4, 5], "<end>": [6]}),
    "hunyuan_video": (
        video.hunyuan_video,
        {"num_frames": 9, "max_sequence_length": 16, "prompt_template": {"template": "{}", "crop_start": 0}},
        {"a": [10, 11], "<punctuation>": [12], "cat": [13, 14, 15]},  # padded on the left
    ),
    "wan": (video.wan, {"num_frames": 9, "max_sequence_length": 16}, {"a": [0, 1], "cat": [2, 3, 4, 5], "<end>": [6]}),
}


@pytest.mark.parametrize("name", CASES)
def test_a_word_is_found_among_the_keys_of_any_pipeline(name):
    build, settings, wanted = CASES[name]
    built = build()
    pipeline = built[0] if isinstance(built, tuple) else built
    text = text_keys(pipeline, "a cat", {**SIZE, **settings})
    words = words_of(text.encoded, text.length, "a cat", special=True)
    found = {column.label: list(column.positions) for column in words.columns}
    padding = found.pop("<padding>", [])
    assert found == wanted and words.cut_off == ()
    assert sorted([*padding, *(key for keys in found.values() for key in keys)]) == list(range(text.length))
    # The entry is the prompt's, whichever way the pipeline stacks them: with another prompt its text is another.
    assert text.entry == {"sd3": 1, "ltx": 1, "pixart": 1}.get(name, 0)


def test_a_template_that_is_cut_off_and_a_prompt_that_is():
    pipeline, _ = two_streams.qwen_image()
    settings = {**SIZE, "max_sequence_length": 512, "negative_prompt": "bad", "true_cfg_scale": 2.0}
    text = text_keys(pipeline, "a cat", settings)
    assert text.length == 133 == len(text.encoded[0].ids) - 34  # diffusers drops 34 tokens of the template
    words = words_of(text.encoded, text.length, "a cat", ["cat"])
    (cat,) = words.columns
    letters = pipeline.tokenizer.convert_ids_to_tokens([text.encoded[0].ids[34 + key] for key in cat.positions])
    assert letters == ["c", "a", "t"]

    pipeline, _ = flux.flux()
    text = text_keys(pipeline, "a cat on the mat", {**SIZE, "max_sequence_length": 10})
    words = words_of(text.encoded, text.length, "a cat on the mat")
    assert [column.label for column in words.columns] == ["a", "cat", "on"] and words.cut_off == ("the", "mat")


class Scores(TorchFunctionMode):
    """Sums the dense weights of image on text over the calls of scaled_dot_product_attention, in float64."""

    def __init__(self, text):
        super().__init__()
        self.text, self.sum, self.calls = text, 0.0, 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        given = {**dict(zip(("query", "key"), args, strict=False)), **(kwargs or {})}
        if func is F.scaled_dot_product_attention and given["key"].shape[2] == self.text + 8 * 8:
            query, key = given["query"].double(), given["key"].double()
            weights = (query @ key.mT * query.shape[-1] ** -0.5).softmax(-1)
            self.sum = self.sum + weights[0, :, self.text :, : self.text].mean((0, 1))
            self.calls += 1
        return func(*args, **(kwargs or {}))


def test_flux_dense_maps_are_softmax_over_text_and_image_by_brute_force():
    pipeline, _ = flux.flux()
    settings = {**SIZE, "max_sequence_length": 24}
    comparison = compare_attention(pipeline, "a cat", special=True, sampling=settings, each_call=True)
    dense, sparse, pladis = comparison.rows
    with Scores(24) as scores, torch.no_grad():
        surgery.runtime.draw.draw(pipeline, [("a cat", 0)], settings)
    assert scores.calls == 2 * 4  # of its two steps and four blocks
    wanted = (scores.sum / scores.calls).numpy()
    for column in comparison.columns:
        assert dense.figures[column.label]["mass"] == pytest.approx(wanted[list(column.positions)].sum(), rel=1e-4)
    share = sum(figures["mass"] for figures in dense.figures.values())
    assert 0.1 < share < 0.9 and sparse.figures["cat"]["zeros"] >= 0 and pladis.mode == "pladis"
    # Each call's map, (columns, steps, modules, frames, height, width), means what the whole one is.
    calls = comparison.calls["dense"]
    assert calls.shape == (len(comparison.columns), 2, 4, 1, 8, 8) and not np.isnan(calls).any()
    assert calls.mean((1, 2, 3, 4, 5)) == pytest.approx(
        [figures["mass"] for figures in dense.figures.values()], rel=1e-4
    )
    assert type(pipeline.transformer).__name__ == "FluxTransformer2DModel"


@pytest.mark.parametrize(("by", "names"), [("step", ["step 1", "step 2"]), ("block", 4)])
def test_rows_by_step_and_by_block(by, names):
    pipeline, _ = flux.flux()
    surgery.patch(pipeline, operator="gag")
    settings = {**SIZE, "max_sequence_length": 24}
    comparison = compare_attention(pipeline, "a cat", sampling=settings, by=by, each_call=True)
    rows = comparison.rows
    assert len(rows) == names if by == "block" else [row.mode for row in rows] == names
    assert list(comparison.calls) == ["gag"]
    calls = comparison.calls["gag"]
    for place, row in enumerate(rows):
        of_row = calls[:, place] if by == "step" else calls[:, :, place]
        assert row.maps.mean((1, 2)) == pytest.approx(of_row.reshape(len(calls), -1).mean(1), rel=0.05)
    assert sheet(comparison).height > len(rows) * 208


def test_a_videos_maps_are_a_strip_of_its_frames():
    pipeline, _ = video.ltx()
    settings = {**SIZE, "steps": 1, "num_frames": 9, "max_sequence_length": 16}
    comparison = compare_attention(pipeline, "a cat", special=True, sampling=settings, each_call=True)
    for row in comparison.rows:
        assert row.image.size == (32, 4 * 32) and row.maps.shape[1:] == (4 * 32, 32)
        assert np.abs(row.maps.sum(0) - 1).max() < 1e-4  # cross-attention: text has all of it
    frames = comparison.calls["dense"].shape[3]
    assert frames == 3  # of the latents
    assert sheet(comparison).width > 208


def test_words_that_cannot_be_followed_are_refused_before_anything_is_drawn(monkeypatch):
    pipeline, _ = flux.flux()
    own = pipeline.encode_prompt
    monkeypatch.setattr(pipeline, "encode_prompt", lambda **given: (own(**given)[0] ** 2, *own(**given)[1:]))
    with pytest.raises(UnsupportedModelError, match="is no output of FluxPipeline's text encoders"):
        compare_attention(pipeline, "a cat", sampling={**SIZE, "max_sequence_length": 24})
    assert type(pipeline.transformer).__name__ == "FluxTransformer2DModel"


def test_the_command_on_a_saved_transformer(run, tmp_path):
    pipeline, _ = flux.flux()
    pipeline.save_pretrained(tmp_path / "flux")
    options = ["--steps", "1", "--height", "32", "--width", "32", "--by", "step", "--npy", "--json"]
    done = run("attention-maps", tmp_path / "flux", "a cat", "--out", tmp_path / "maps.png", *options, check=0)
    made = json.loads(done.stdout)
    assert [row["mode"] for row in made["rows"]] == ["step 1"]
    assert np.load(made["arrays"]["pladis"]).shape == (2, 1, 4, 1, 8, 8)
