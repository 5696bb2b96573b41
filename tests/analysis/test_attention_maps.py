"""Attention maps: words are their tokens, maps are the weights the modules used, and the pipeline is as it was."""

import json

import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import Attention

import surgery
from surgery.analysis.attention_maps import Column, Encoded, compare_attention, sheet, words_of
from surgery.analysis.attention_maps.recording import Recording
from surgery.analysis.attention_maps.weights import weights_by_rows
from surgery.analysis.observing import AttentionCall
from surgery.errors import InputError, UnsupportedModelError
from surgery.nn import PladisAttention, attention
from surgery.nn.operators import OPERATORS

from ..conftest import PROMPTS, SHAPES, draw, load_shapes
from ..models.test_patch_survives import lora_state
from ..tiny import clip_tokenizer, tiny_sdxl

PROMPT = PROMPTS[0]  # a red circle to the left of a blue square
SAMPLING = {"steps": 2, "guidance_scale": 4.0, "height": 64, "width": 64}
MODULE = "up_blocks.1.attentions.0.transformer_blocks.0.attn2"


def words_of_prompt(tokenizer, prompt, wanted=None, special=False):
    """The words where the tokens, padded, are the keys as they stand."""
    ids = tokenizer(prompt, padding="max_length", truncation=True, max_length=77).input_ids
    return words_of([Encoded(tokenizer, ids, {place: place for place in range(77)})], 77, prompt, wanted, special)


@pytest.fixture(scope="module")
def shapes():
    """One pipeline for the tests that leave it as it was, which is itself a promise tested below."""
    return load_shapes()


@pytest.fixture(scope="module")
def comparison(shapes):
    """Dense, sparse and PLADIS of the plain pipeline, every token in a column."""
    return compare_attention(shapes, PROMPT, special=True, sampling=SAMPLING)


def test_a_words_column_is_the_tokens_that_its_characters_became(shapes):
    found = words_of_prompt(shapes.tokenizer, PROMPT)
    assert [(column.label, *column.positions) for column in found.columns] == [
        ("a", 1), ("red", 2), ("circle", 3), ("to", 4), ("the", 5),
        ("left", 6), ("of", 7), ("a (2)", 8), ("blue", 9), ("square", 10),
    ]  # fmt: skip
    assert found.length == 77 and not found.cut_off
    # A tokenizer of single bytes: the words' letters, é as two of them, punctuation beside the words as none of theirs.
    prompt = "A (red) café, it's well-made!"
    found = words_of_prompt(clip_tokenizer(), prompt)
    assert [(column.label, len(column.positions)) for column in found.columns] == [
        ("A", 1), ("red", 3), ("café", 5), ("it's", 4), ("well-made", 9),
    ]  # fmt: skip
    assert found.columns[1].positions == (3, 4, 5)


def test_special_columns_and_words_together_hold_every_token_once(shapes):
    for tokenizer, prompt in (
        (shapes.tokenizer, "a red, circle"),
        (shapes.tokenizer, "star " * 90),
        (clip_tokenizer(), "日本 and e\u0301!"),
    ):
        found = words_of_prompt(tokenizer, prompt, special=True)
        positions = sorted(position for column in found.columns for position in column.positions)
        assert positions == list(range(found.length)), prompt
    columns = words_of_prompt(shapes.tokenizer, "a, b", special=True).columns
    labels = {column.label: column.positions for column in columns}
    assert labels["<start>"] == (0,) and labels["<punctuation>"] == (2,)
    assert labels["<end>"] == (4,) and labels["<padding>"] == tuple(range(5, 77))


def test_chosen_words_come_in_their_order_and_a_wrong_one_lists_what_there_is(shapes):
    def labels(*words, prompt=PROMPT):
        return [column.label for column in words_of_prompt(shapes.tokenizer, prompt, words).columns]

    assert labels("Square", " red", "a", "a (2)") == ["square", "red", "a", "a (2)"]
    assert labels("a (2)") == ["a (2)"]
    with pytest.raises(InputError, match="no word 'circel'; did you mean 'circle'.*It has: a, red, circle, to"):
        labels("circel")
    with pytest.raises(InputError, match="'green' lies beyond the 77 tokens"):
        labels("green", prompt="a " * 75 + "green star")
    found = words_of_prompt(shapes.tokenizer, "a " * 75 + "green star")
    assert found.cut_off == ("green", "star") and len(found.columns) == 75
    with pytest.raises(InputError, match="no words"):
        words_of_prompt(shapes.tokenizer, " !? ")
    with pytest.raises(UnsupportedModelError, match="does not tell which characters"):
        words_of([Encoded(object(), [1, 2], {0: 0, 1: 1})], 2, PROMPT)
    with pytest.raises(UnsupportedModelError, match="not among those that CLIPTokenizer was asked for"):
        words_of([Encoded(shapes.tokenizer, [0, 1], {0: 0, 1: 1})], 2, PROMPT)


def test_dense_weights_sum_to_one_and_so_do_sparse_and_pladis_ones(comparison):
    assert [row.mode for row in comparison.rows] == ["dense", "sparse", "pladis"]
    assert comparison.rows[2].setting == "alpha 1.5, scale 2, temperature 1" and len(comparison.modules) == 7
    for row in comparison.rows:
        assert row.maps.shape == (13, 64, 64) and row.maps.dtype == np.float32
        assert np.abs(row.maps.sum(0) - 1).max() < 1e-5
        assert sum(figures["mass"] for figures in row.figures.values()) == pytest.approx(1, abs=1e-5)
    dense = comparison.rows[0].maps
    assert dense.min() > 0 and dense[2].std() > 1e-3  # "circle" is not attended to everywhere alike


def test_only_sparse_weights_are_exactly_zero_and_only_pladis_ones_negative(comparison):
    dense, sparse, pladis = (row.figures for row in comparison.rows)
    for label in ("circle", "square", "<padding>"):
        assert dense[label]["negatives"] == sparse[label]["negatives"] == 0
        assert dense[label]["zeros"] < 0.05  # a softmax's weight too small for float32
        assert 0.2 < sparse[label]["zeros"] < 1 and 0.2 < pladis[label]["negatives"] < 1
        assert pladis[label]["zeros"] < 0.01
        assert 0 < sparse[label]["entropy"] < 1 and sparse[label]["lowest"] >= 0
    assert sparse["circle"]["highest"] > dense["circle"]["highest"]
    assert sparse["circle"]["entropy"] < dense["circle"]["entropy"]


@pytest.mark.parametrize("with_lora", [False, True])
def test_a_recorded_dense_map_is_what_diffusers_own_scores_give(with_lora):
    pipeline = load_shapes()
    if with_lora:
        pipeline.load_lora_weights(lora_state(pipeline.unet))
    module, maps = pipeline.unet.get_submodule(MODULE), []

    def independent(module, arguments, keywords):
        query, key = (
            module.head_to_batch_dim(projection(states[1:]))  # the conditional half
            for projection, states in ((module.to_q, arguments[0]), (module.to_k, keywords["encoder_hidden_states"]))
        )
        maps.append(module.get_attention_scores(query, key).mean(0))

    columns = words_of_prompt(pipeline.tokenizer, PROMPT, ["circle", "blue"]).columns
    with Recording(pipeline, [MODULE], columns, 77) as recording:
        handle = module.register_forward_pre_hook(independent, with_kwargs=True)
        pipeline(PROMPT, num_inference_steps=3, guidance_scale=4.0, generator=torch.Generator().manual_seed(0))
        handle.remove()
    wanted = torch.stack(maps).mean(0)  # (queries, keys)
    assert len(maps) == 3
    found = recording.maps((8, 8) if len(wanted) == 64 else (16, 16))
    assert torch.allclose(found.flatten(1), wanted[:, [3, 9]].T, atol=1e-6)
    assert [mass for mass, _, _ in recording.shares()] == pytest.approx(wanted[:, [3, 9]].mean(0).tolist())


@pytest.mark.parametrize(
    ("operator", "unit", "settings"),
    [
        ("pladis", "head", {"scale": 2.5}),
        ("sparse", "head", {"alpha": 2.0, "temperature": 0.5}),
        ("anderson", "head", {"scale_low": 0.5}),
        ("gag", "head", {}),
        ("gag", "head", {"zeta": 0.5, "eta": 0.2}),
        ("gag", "token", {"zeta": 1.0, "eta": 0.5}),
        ("gag", "image", {"zeta": 1.0, "parallel": 0.0, "sparse_temperature": 0.7}),
        ("anderson_least_squares", "head", {"temperature": 0.8}),
        ("anderson_history", "head", {}),
    ],
)
def test_weights_times_values_are_the_operators_output(operator, unit, settings):
    module = PladisAttention.convert(Attention(64, 16, heads=2, dim_head=32), operator, unit=unit, **settings)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, length, 32, generator=generator) for length in (25, 20, 20))
    mask = torch.zeros(1, 2, 1, 20)
    mask[..., 17:] = -10000.0
    call = AttentionCall("", module, 0, query * 3, key, value, mask, module.scale)
    weights = torch.cat(list(weights_by_rows(call)), dim=2)
    wanted = attention(
        query * 3, key, value, operator=operator, unit=unit, **{**OPERATORS[operator].defaults, **settings},
        mask=mask, qk_scale=module.scale,
    )  # fmt: skip
    assert (weights @ value - wanted).abs().max() < 2e-5 * wanted.abs().max()
    assert not weights[..., 17:].any()


def test_scale_zero_is_the_dense_row_and_gag_has_a_row(pipeline):
    surgery.patch(pipeline, scale=0.0)
    dense, sparse, own = compare_attention(pipeline, PROMPT, sampling=SAMPLING).rows
    assert np.abs(dense.maps - own.maps).max() < 1e-4 < np.abs(dense.maps - sparse.maps).max()
    assert np.abs(np.float32(dense.image) - np.float32(own.image)).max() <= 1
    surgery.patch(surgery.unpatch(pipeline), operator="gag")
    found = compare_attention(pipeline, PROMPT, words=["circle"], sampling={**SAMPLING, "steps": 1})
    assert found.rows[2].mode == "gag" and found.rows[2].setting.endswith("eta 15, unit head")
    assert sheet(found).width > 4 * 160
    surgery.patch(surgery.unpatch(pipeline), operator="sparse")
    rows = compare_attention(pipeline, "a", sampling={**SAMPLING, "steps": 1}).rows
    assert [row.mode for row in rows] == ["dense", "sparse"]


def test_a_patched_pipeline_is_bit_for_bit_as_it_was_and_its_own_row_its_image(pipeline):
    schedule = {"steps": [1, None], "scale": [1.0, 2.0]}
    surgery.patch(pipeline, layers="down", schedule=schedule, implementation="reference")
    unet, modules = pipeline.unet, list(pipeline.unet.modules())
    before, index = draw(pipeline), dict(pipeline.config)
    config, state = dict(unet.config), {key: value.clone() for key, value in unet.state_dict().items()}
    found = compare_attention(pipeline, PROMPT, sampling=SAMPLING, seed=7)
    assert len(found.modules) == 2 and found.rows[2].setting.endswith("on schedule steps [1, null], scale [1, 2]")
    own = surgery.runtime.draw.generate(pipeline, [PROMPT], [7], SAMPLING)[PROMPT, 7]
    assert own.tobytes() == found.rows[2].image.tobytes() != found.rows[0].image.tobytes()
    # The schedule leaves the first of two steps dense: half of the weights cannot be zero.
    assert 0.1 < found.rows[1].figures["square"]["zeros"] <= 0.5

    assert torch.equal(draw(pipeline), before) and dict(unet.config) == config and dict(pipeline.config) == index
    assert pipeline.unet is unet and list(unet.modules()) == modules
    assert unet.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in unet.state_dict().items())
    assert unet.get_submodule(found.modules[0]).pladis_implementation == "reference"
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in modules)


def test_a_plain_pipeline_is_plain_again_even_after_a_failure(pipeline):
    before, config, index = draw(pipeline), dict(pipeline.unet.config), dict(pipeline.config)
    dense = compare_attention(pipeline, PROMPT, sampling=SAMPLING, seed=5).rows[0]
    assert (
        dense.image.tobytes() == surgery.runtime.draw.generate(pipeline, [PROMPT], [5], SAMPLING)[PROMPT, 5].tobytes()
    )
    with pytest.raises(InputError, match="layers: 'upp' matches no module"):
        compare_attention(pipeline, PROMPT, layers="upp", sampling=SAMPLING)
    with pytest.raises(InputError, match="steps must be at most 1000"):
        compare_attention(pipeline, PROMPT, sampling={"steps": 2000})
    assert type(pipeline.unet).__name__ == "UNet2DConditionModel"
    assert dict(pipeline.unet.config) == config and dict(pipeline.config) == index
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in pipeline.unet.modules())
    assert torch.equal(draw(pipeline), before)


def test_masked_tokens_have_no_weight(shapes):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(2, 4, 10, 14, generator=generator), 500, torch.randn(2, 20, 128, generator=generator)
    mask = torch.ones(2, 20)
    mask[1, 5:] = 0
    paths = [path for path, _ in shapes.unet.named_modules() if path.endswith("attn2")]
    columns = [Column(str(place), (place,)) for place in range(20)]
    with Recording(shapes, paths, columns, 20) as recording, torch.no_grad():
        shapes.unet(*inputs, encoder_attention_mask=mask)
    maps = recording.maps((20, 28))[:, 0]  # of latents that halve to 5 x 7 and 3 x 4
    assert (maps[:5] > 0).all() and not maps[5:].any()
    assert torch.allclose(maps.sum(0), torch.ones(20, 28), atol=1e-5)


@pytest.mark.parametrize("guidance_scale", [5.0, 0.0])
def test_sdxl_with_and_without_guidance(guidance_scale):
    pipeline, _ = tiny_sdxl()
    sampling = {"steps": 1, "guidance_scale": guidance_scale, "height": 48, "width": 64}
    found = compare_attention(pipeline, "a small cat", special=True, sampling=sampling)
    labels = ["a", "small", "cat", "<start>", "<end>", "<padding>"]
    assert [column.label for column in found.columns] == labels and found.columns[1].positions == (2, 3, 4, 5, 6)
    for row in found.rows:
        assert row.maps.shape == (6, 48, 64) and np.abs(row.maps.sum(0) - 1).max() < 1e-5
    assert found.rows[1].figures["<padding>"]["zeros"] > 0


def test_what_cannot_be_recorded_is_refused_before_or_at_the_first_step(pipeline):
    with (
        pytest.raises(UnsupportedModelError, match="77 text keys, but the prompt 19 tokens"),
        Recording(pipeline, [MODULE], [Column("circle", (3,))], 19),
    ):
        draw(pipeline)
    with pytest.raises(UnsupportedModelError, match="was never called"):
        Recording(pipeline, [MODULE], [Column("circle", (3,))], 77).shares()
    pipeline.unet.compile(backend="eager")
    with pytest.raises(InputError, match="compiled"):
        compare_attention(pipeline, PROMPT, sampling=SAMPLING)


def test_the_sheet_shows_each_map_in_its_columns_colours(comparison):
    picture = np.asarray(sheet(comparison).convert("RGB")).astype(int)
    # magma's lowest and highest colours: each column's lowest and highest value over the three rows are drawn so.
    darkest, brightest = (np.abs(picture - colour).sum(-1) < 6 for colour in ((0, 0, 4), (252, 253, 191)))
    assert darkest.any() and brightest.any() and picture[0, 0].tolist() == [255, 255, 255]
    assert picture.shape[1] == 2 * 24 + 200 + 8 * (208 + 8)  # two bands of seven and six maps beside the image


def test_the_command_writes_a_png_and_tells_its_figures(run, tmp_path):
    options = ["--steps", "2", "--guidance-scale", "4", "--words", "red,square", "--out", tmp_path / "maps.png"]
    done = run("attention-maps", SHAPES, PROMPT, *options, "--json", "--layers", "mid", "up", check=0)
    made = json.loads(done.stdout)
    assert made["schema_version"] == 1 and [row["mode"] for row in made["rows"]] == ["dense", "sparse", "pladis"]
    assert made["words"] == [{"word": "red", "tokens": [2]}, {"word": "square", "tokens": [10]}]
    assert made["rows"][1]["words"]["square"]["zeros"] > 0.1 and len(made["modules"]) == 5

    from PIL import Image

    picture = Image.open(tmp_path / "maps.png")
    assert picture.width > 3 * 208 and json.loads(picture.text["surgery"])["seed"] == 0
    for wrong, message in (
        (["--words", "green"], "the prompt has no word 'green'"),
        (["--words", " ,"], "--words names none"),
        (["--out", "maps.jpg"], "must name a .png file"),
        (["--height", "65"], "height: input should be a multiple of 8"),
    ):
        failed = run("attention-maps", SHAPES, PROMPT, *wrong, cwd=tmp_path, check=2)
        assert message in failed.stderr and "Traceback" not in failed.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["maps.png"]
