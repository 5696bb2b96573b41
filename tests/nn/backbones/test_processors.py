"""Attention by diffusers' own processors: what it is told of the text, by whom, and what it refuses."""

import threading

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import surgery
from surgery.models.anatomy import attention_sites, refusal_of_class
from surgery.nn.backbones import BACKBONES, REFUSED

from .checks import draw, forward, recorded_call
from .hosted import noise, padded
from .hosted_text_first import glm_image, lumina2
from .hosted_text_last import hidream, nucleus_moe
from .one_stream import krea2, z_image
from .test_backbones import gap


def test_a_block_of_one_stream_outside_its_model_says_that_it_was_not_told():
    pipeline, arguments = krea2()
    call = recorded_call(pipeline, arguments)
    surgery.patch(pipeline)
    attention = pipeline.transformer.transformer_blocks[0].attn
    with torch.no_grad():
        forward(pipeline, call)
        with pytest.raises(ValueError, match="was not told how many of its tokens are text"):
            attention(noise(2, 28, 64))


class HeadsGiven(TorchDispatchMode):
    """Keeps (heads of queries, of keys, of values) of every call of an operator."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "pladis":
            self.heads = [*getattr(self, "heads", []), tuple(tensor.shape[1] for tensor in args[:3])]
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("tiny", [krea2, lumina2, nucleus_moe])
def test_heads_that_share_keys_reach_the_operator_without_a_copy_for_each(tiny):
    pipeline, call = tiny()
    if tiny is krea2:
        call = recorded_call(pipeline, call)
    surgery.patch(pipeline)
    with HeadsGiven() as mode:
        forward(pipeline, call)
    assert mode.heads == [(4, 2, 2)] * 2


def test_calls_in_several_threads_keep_their_texts_apart():
    pipeline, arguments = krea2()
    call = recorded_call(pipeline, arguments)
    calls = [
        {
            **call,
            "encoder_hidden_states": call["encoder_hidden_states"][:, :text],
            "encoder_attention_mask": None,
            "position_ids": call["position_ids"][12 - text :],
        }
        for text in (5, 9, 12)
    ]
    surgery.patch(pipeline)
    alone = [forward(pipeline, call) for call in calls]
    found, start = {}, threading.Barrier(len(calls))

    def run(index):
        start.wait()
        found[index] = [forward(pipeline, calls[index]) for _ in range(5)]

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, expected in enumerate(alone):
        assert all(gap(one, expected) < 1e-5 for one in found[index])


def omni(lengths):
    """(Z-Image Omni, a call with one image given and one drawn, and texts of so many tokens before each)."""
    pipeline, _ = z_image()
    torch.manual_seed(0)
    images = [[noise(4, 1, 8, 8, seed=1), noise(4, 1, 8, 8, seed=2)]] * len(lengths)
    call = {
        "x": images,
        "t": torch.full((len(lengths),), 0.3),
        "cap_feats": [[noise(one, 16, seed=3), noise(5, 16, seed=4)] for one in lengths],
        "siglip_feats": [None] * len(lengths),
        "image_noise_mask": [[0, 1]] * len(lengths),
    }
    return pipeline, call


def test_z_image_omni_has_its_text_first_and_one_length_of_it_in_a_batch():
    pipeline, call = omni([20, 25])  # each fills 32 tokens
    base = forward(pipeline, call)
    surgery.patch(pipeline, scale=0.0)
    assert gap(forward(pipeline, call), base) < 2e-5
    surgery.tune(pipeline, scale=2.0)
    assert gap(forward(pipeline, call), base) > 1e-3
    with pytest.raises(ValueError, match="prompts of one length at a time"):
        forward(pipeline, omni([20, 40])[1])


def test_z_image_takes_images_of_one_size_in_a_batch():
    pipeline, arguments = z_image()
    call = recorded_call(pipeline, arguments)
    surgery.patch(pipeline)
    with pytest.raises(ValueError, match="images of one size at a time"):
        forward(pipeline, {**call, "x": [*call["x"][:-1], noise(4, 1, 4, 4)]})


def test_hidreams_picture_need_not_be_square():
    pipeline, call = hidream(size=(8, 12))
    base = forward(pipeline, call)
    surgery.patch(pipeline, scale=0.0)
    assert gap(forward(pipeline, call), base) < 2e-5
    surgery.tune(pipeline, scale=2.0)
    assert gap(forward(pipeline, call), base) > 1e-3


def test_glm_image_refuses_keys_that_were_kept_of_images_to_edit():
    from diffusers.models.transformers.transformer_glm_image import GlmImageKVCache

    pipeline, call = glm_image()
    surgery.patch(pipeline)
    caches = GlmImageKVCache(num_layers=2)
    caches.set_mode("write")
    forward(pipeline, {**call, "kv_caches": caches})
    caches.set_mode("read")
    with pytest.raises(ValueError, match="draw without them"):
        forward(pipeline, {**call, "kv_caches": caches})


def test_what_attends_to_one_kind_of_token_is_no_joint_attention():
    sites = attention_sites(z_image()[0].transformer)
    joint = [site for site in sites if not site.refusal]
    assert {site.path.split(".")[0] for site in joint} == {"layers"} and {site.block for site in joint} == {"single"}
    others = [site for site in sites if site.refusal]
    assert others and all(site.kind == "self" and "stays dense" in site.refusal for site in others)


def test_a_processor_with_an_attention_of_its_own_is_refused():
    from diffusers.models.attention_processor import AttnProcessor2_0

    pipeline, _ = z_image()
    surgery.patch(pipeline)
    with pytest.raises(ValueError, match="cannot run AttnProcessor2_0"):
        pipeline.transformer.layers[0].attention.set_processor(AttnProcessor2_0())


def test_history_knows_the_steps_of_a_model_whose_timestep_has_another_name_and_rises():
    pipeline, arguments = z_image()
    surgery.patch(pipeline, operator="sparse")
    sparse = draw(pipeline, arguments)
    surgery.unpatch(pipeline)
    surgery.patch(pipeline, operator="anderson_history")
    first = draw(pipeline, arguments)
    assert gap(first, sparse) > 1e-4  # the first of the two steps is sparse, the second is not
    assert torch.equal(draw(pipeline, arguments), first)  # each run begins anew


def test_kolors_unet_reads_a_language_models_text():
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        block_out_channels=(32, 64),
        layers_per_block=1,
        sample_size=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=80,
        cross_attention_dim=32,
        encoder_hid_dim=16,
        encoder_hid_dim_type="text_proj",
    ).eval()
    call = {
        "sample": noise(2, 4, 16, 16),
        "timestep": torch.tensor(300),
        "encoder_hidden_states": noise(2, 12, 16, seed=1),
        "encoder_attention_mask": padded(12, 9),
        "added_cond_kwargs": {"text_embeds": noise(2, 32, seed=2), "time_ids": noise(2, 6, seed=3)},
        "return_dict": False,
    }
    with torch.no_grad():
        base = unet(**call)[0]
        surgery.patch(unet, scale=0.0)
        assert gap(unet(**call)[0], base) < 2e-5
        surgery.tune(unet, scale=2.0)
        assert gap(unet(**call)[0], base) > 1e-3


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_were_looked_at_and_left_are_refused_with_the_reason(name):
    import diffusers

    assert hasattr(diffusers, name) and name not in BACKBONES
    assert REFUSED[name] in refusal_of_class(name)
