"""Either change of alpha-entmax alone: shares of one map, inside of the other, and the pipeline is left as it was."""

import pytest
import torch

import surgery
from surgery.analysis.mechanism import VARIANTS, kinds_of, mixed_attention, mixture_of

from ..conftest import PROMPTS, draw, load_shapes


def test_the_kinds_shares_are_of_one_map_and_what_is_within_them_of_the_other():
    generator = torch.Generator().manual_seed(0)
    between, within = torch.rand(2, 3, 4, 5, 9, generator=generator).double().softmax(-1)
    within[..., 2:4] = 0.0  # of batch entry 0 all of its second kind
    within /= within.sum(-1, keepdim=True)
    groups = [[[0], [1, 2, 3], [4, 5, 6, 7, 8]], [[0, 1], [2, 3], [4, 5, 6, 7, 8]], [[8], [0, 1], [2, 3, 4, 5, 6, 7]]]
    kinds = torch.zeros(3, 3, 9, dtype=torch.float64)
    for entry, of_entry in enumerate(groups):
        for kind, places in enumerate(of_entry):
            kinds[entry, kind, places] = 1.0
    mixed = mixture_of(between, within, kinds)
    for entry, of_entry in enumerate(groups):
        for places in of_entry:
            share, inside, wanted = (each[entry][..., places] for each in (between, within, mixed))
            assert torch.allclose(wanted.sum(-1), share.sum(-1))
            empty = inside.sum(-1, keepdim=True) < 1e-6
            expected = torch.where(empty, share / share.sum(-1, keepdim=True), inside / inside.sum(-1, keepdim=True))
            assert torch.allclose(wanted / wanted.sum(-1, keepdim=True), expected)


def test_the_kinds_are_start_words_and_the_rest():
    tokenizer = load_shapes().tokenizer
    kinds = kinds_of(tokenizer, ["a red circle"])
    assert kinds.shape == (2, 3, 77) and torch.equal(kinds.sum(1), torch.ones(2, 77))
    assert kinds.sum(-1).tolist() == [[1, 0, 76], [1, 3, 73]]


def test_the_unmixed_variants_are_the_model_and_its_sparse_form_and_nothing_stays():
    pipeline = load_shapes()
    plain, processors = draw(pipeline), pipeline.unet.attn_processors
    drawn = {}
    for name in VARIANTS:
        with mixed_attention(pipeline, name, PROMPTS):
            drawn[name] = draw(pipeline)
    assert pipeline.unet.attn_processors == processors and torch.equal(draw(pipeline), plain)
    sparse = draw(surgery.patch(pipeline, operator="sparse"))
    assert drawn["softmax"] == pytest.approx(plain, abs=1e-4) and drawn["entmax"] == pytest.approx(sparse, abs=1e-4)
    first, second = (drawn[name] for name in list(VARIANTS)[2:])
    assert all((one - other).abs().max() > 0.01 for one, other in ((first, second), (first, plain), (second, plain)))
