"""A patch goes in and out under hooks that offload or cache, which keep a forward() and copies of tensors."""

import copy
import inspect
from types import SimpleNamespace

import pytest
import torch

import surgery
from surgery.errors import InputError
from surgery.models.patching import read_hyperparameters, write_hyperparameters
from surgery.nn import is_pladis
from surgery.nn.schedule import StepSchedule

from ..conftest import load_shapes
from ..nn.backbones.checks import recorded_call
from ..nn.backbones.flux import flux

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def call():
    generator = torch.Generator().manual_seed(0)
    sample, text = torch.randn(1, 4, 16, 16, generator=generator), torch.randn(1, 20, 128, generator=generator)
    return {"sample": sample, "timestep": 10, "encoder_hidden_states": text}


def forward(model, call):
    with torch.no_grad():
        return model(**{**call, "return_dict": False})[0]


def offload_leaves(unet):
    unet.enable_group_offload(CPU, CPU, "leaf_level")


def offload_blocks(unet, **more):
    unet.enable_group_offload(CPU, CPU, "block_level", num_blocks_per_group=1, **more)


def groups(unet):
    hooks = [
        hook
        for part in unet.modules()
        for hook in getattr(part, "_diffusers_hook", SimpleNamespace(hooks={})).hooks.values()
    ]
    return [hook.group for hook in hooks if hasattr(hook, "group")]


def take_off(unet):
    for part in unet.modules():
        for name in list(getattr(part, "_diffusers_hook", SimpleNamespace(hooks={})).hooks):
            part._diffusers_hook.remove_hook(name, recurse=False)


@pytest.mark.parametrize(
    ("offload", "steps"),
    [
        (offload_leaves, "patch hook unpatch off patch unpatch"),
        (offload_blocks, "hook patch off unpatch patch hook unpatch"),
    ],
)
def test_group_offloading_runs_the_forward_of_the_present_class(pipeline, call, offload, steps):
    unet = pipeline.unet
    base = forward(unet, call)
    patched = forward(surgery.patch(copy.deepcopy(pipeline)).unet, call)
    do = {"patch": surgery.patch, "unpatch": surgery.unpatch, "hook": offload, "off": take_off}
    for step in steps.split():
        do[step](unet)
        is_patched = any(map(is_pladis, unet.modules()))
        assert torch.equal(forward(unet, call), patched if is_patched else base), step
    module = unet.mid_block.attentions[0].transformer_blocks[0].attn2
    assert inspect.signature(module.forward) == inspect.signature(type(module).forward.__get__(module))


def test_accelerates_hooks_forget_the_buffers_and_take_no_new_ones(pipeline, call):
    from accelerate import cpu_offload
    from accelerate.hooks import remove_hook_from_submodules

    unet = pipeline.unet
    base = forward(unet, call)
    surgery.patch(unet)
    cpu_offload(unet, CPU, offload_buffers=True)
    assert len(unet.pladis_operations()[0]["layers"]) == 7  # though the buffers are on the meta device
    surgery.unpatch(unet)
    assert torch.equal(forward(unet, call), base)
    with pytest.raises(InputError, match="patch first, offload after"):  # the hook would put the old values in
        surgery.patch(unet, scale=0.5)
    remove_hook_from_submodules(unet)
    assert torch.equal(forward(unet, call), base)
    surgery.patch(unet)


def test_a_cache_on_a_transformer_runs_the_forward_of_the_present_class():
    from diffusers import PyramidAttentionBroadcastConfig

    pipeline, arguments = flux()
    model, call = pipeline.transformer, recorded_call(pipeline, arguments)
    blocks = ("transformer_blocks", "single_transformer_blocks")
    cache = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_block_identifiers=blocks,
        current_timestep_callback=lambda: 500,
    )

    def run():
        with model.cache_context("cond"):
            output = forward(model, call)
        model._reset_stateful_cache()
        return output

    base = forward(model, call)
    patched = forward(surgery.patch(pipeline).transformer, call)
    for _ in range(2):
        model.enable_cache(cache)
        assert torch.equal(run(), patched)
        surgery.unpatch(pipeline)
        assert torch.equal(run(), base)
        model.disable_cache()
        assert torch.equal(forward(model, call), base)
        surgery.patch(pipeline)
        assert torch.equal(forward(model, call), patched)
    surgery.unpatch(pipeline)
    model.enable_cache(cache)
    surgery.patch(pipeline)
    assert torch.equal(run(), patched)


def test_what_is_offloaded_to_disk_is_neither_tuned_nor_scheduled_nor_read(pipeline, call, tmp_path):
    unet = surgery.patch(pipeline, scale=0.5, schedule={"steps": [0, 1]}).unet
    expected, operations = forward(unet, call), unet.pladis_operations()
    offload_blocks(unet, offload_to_disk_path=str(tmp_path))
    with pytest.raises(InputError, match="offloaded to disk, so writes would be lost; tune first, offload after"):
        surgery.tune(pipeline, scale=2.0)
    for write in (lambda: read_hyperparameters(unet), lambda: write_hyperparameters(unet, {})):
        with pytest.raises(InputError, match="offloaded to disk, so writes would be lost"):
            write()
    with pytest.raises(ValueError, match="buffers that are offloaded to disk"):
        StepSchedule(pipeline, unet)
    unet.update_config()
    assert unet.config.pladis == operations and torch.equal(forward(unet, call), expected)


def test_a_patch_after_offloading_to_disk_can_be_tuned(pipeline, call, tmp_path):
    expected = forward(surgery.patch(load_shapes(), scale=0.5).unet, call)
    offload_blocks(pipeline.unet, offload_to_disk_path=str(tmp_path))
    surgery.patch(pipeline, scale=2.0)
    assert not torch.equal(forward(pipeline.unet, call), expected)
    surgery.tune(pipeline, scale=0.5)
    assert torch.equal(forward(pipeline.unet, call), expected)


def test_streams_which_have_copies_of_their_own_are_known_by_them(pipeline):
    offload_blocks(pipeline.unet)
    for group in groups(pipeline.unet):
        group.cpu_param_dict = {tensor: tensor for part in group.modules for tensor in part.parameters()}
    with pytest.raises(InputError, match="patch first, offload after"):
        surgery.patch(pipeline)
    assert not any(map(is_pladis, pipeline.unet.modules()))
    patched = surgery.patch(load_shapes())
    offload_blocks(patched.unet)
    for group in groups(patched.unet):
        group.cpu_param_dict = {tensor: tensor for part in group.modules for tensor in part.buffers()}
    with pytest.raises(InputError, match="offloaded through a stream"):
        surgery.tune(patched, scale=0.5)
