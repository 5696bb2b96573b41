"""The record that closes each backbone's file: what the rest of the package knows of that model class of diffusers."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

SINGLE_KEY = "its cross-attention has a single key, where PLADIS changes nothing"
ONE_STREAM = ("hidden_states",)
TEXT_AND_IMAGE = ("encoder_hidden_states", "hidden_states")
IMAGE_AND_TEXT = ("hidden_states", "encoder_hidden_states")
OTHER_IMAGES = "guidance by attention takes no images beside the one that is drawn"


@dataclass(frozen=True)
class Backbone:
    """What is known of a model class beside how its attention is computed, which stands in `patched`.

    grid: (config, {argument of forward(): value}) -> (frames, height, width) of the image's tokens where attention is
    finest; raises ValueError where other images stand among them.
    """

    patched: Any  # the PladisModel of it; None where guidance alone knows the model
    attention: str  # what the module that attends to the text is called in its block
    grid: Callable[[Mapping, Mapping], tuple[int, int, int]]
    has_levels: bool = False  # coarser ones have half the grid's sides, rounded up
    latents: str = "hidden_states"  # the argument of forward() with the noisy ones
    blocks: tuple[str, ...] = ("transformer_blocks",)  # paths of stacks of them, * for what stands before one's name
    # {stack: arguments of its blocks that hold hidden states, as they come back}, where diffusers does not list them
    streams: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    text_first: bool = True  # in the one sequence of joint attention
    one_stream: bool = False  # every block has text and image in one, whatever its stack is called
    fills_up_to: int = 1  # text and image are each filled up behind to a multiple of it
    turns_complex: bool = False  # queries and keys by complex numbers, which only some compilers have
    reads_lengths: bool = False  # forward() reads the lengths of texts out of tensors, so no graph has all of it
    refused_pipelines: Mapping[str, str] = field(default_factory=dict)  # {class: why surgery does not fit there}
    unguided: str | None = None  # why methods of guidance do not fit, where they do not
    # CFG is one call with [without prompt, with prompt] in the batch; else two, the one with it first.
    batches_cfg: bool = True
    prompt_first: bool = False  # [with prompt, without prompt]
    lists: bool = False  # latents and texts are lists, with an entry for each image
    adds_to_cond: bool = False  # CFG is C + w (C - U), where others have U + w (C - U)
    guider: bool = False  # a guider, which is a part of the pipeline, combines both outputs
    # guidance_scale is an input of the model, and CFG runs for a negative prompt and a true_cfg_scale above 1 alone.
    embeds_guidance: bool = False
    guided_pipelines: tuple[str, ...] = ()  # those that run CFG by guidance_scale all the same
    own_methods: tuple[str, ...] = ()  # of guidance, that are for this model alone
    self_attention: tuple[
        str, ...
    ] = ()  # what modules of the image's alone are called, where others have that kind too
    batch_second: tuple[str, ...] = ()  # arguments whose entries are in the second dimension
    time_embedding: str | None = None  # path of the module that embeds the time, where it is of no class of diffusers'
    keeps_norm: bool = False  # the pipeline gives what CFG makes the norm of the output with the prompt
    predicts_sound: bool = False  # beside the video, and in the same call
    turns_velocity: bool = False  # the pipeline steps by the model's output with its sign turned
    channels_last: bool = False  # latents are (batch, frames, height, width, channels)
    # (config, given) -> where the image's tokens begin in one stream, (batch,) where entries differ, None by text_first
    image_start: Callable[[Mapping, Mapping], Any] | None = None

    def __post_init__(self) -> None:
        if self.patched is not None:
            self.patched.backbone = self

    def block_of(self, path: str) -> str | None:
        """The path of the transformer block of a module at `path`; None where it is in none."""
        stacks = "|".join(re.escape(stack).replace(r"\*", ".*") for stack in self.blocks)
        found = re.match(rf"(?:{stacks})\.\d+(?=\.)", path)
        return found and found[0]


def image_grid(config: Mapping, given: Mapping) -> tuple[int, int, int]:
    """`grid` of a model that cuts latents, (batch, channels, height, width), into patches."""
    height, width = given["hidden_states"].shape[-2:]
    return 1, height // config["patch_size"], width // config["patch_size"]


def video_grid(config: Mapping, given: Mapping) -> tuple[int, int, int]:
    """`grid` of a model that cuts latents, (batch, channels, frames, height, width), into patches."""
    frames, height, width = given["hidden_states"].shape[-3:]
    patch = config["patch_size"]
    time, *space = patch if isinstance(patch, (tuple, list)) else (config.get("patch_size_t", 1), patch)
    return frames // time, height // space[0], width // space[-1]
