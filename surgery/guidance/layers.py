"""Which attention modules and blocks a method's `layers` selects, and others in their place for one evaluation.

A selector is "all", "mid", a block group (down, up of a UNet; double, single of joint attention), or a glob pattern
over module paths, in which * crosses dots. "mid" is the middle block of a UNet, and of a transformer the block in the
middle of those that a method can weaken.
"""

import dataclasses
import fnmatch
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from surgery.errors import InputError, UnsupportedModelError, nearest
from surgery.models.anatomy import attention_sites, record_of
from surgery.models.selection import STREAMS
from surgery.nn.backbones import BACKBONES, GUIDED_ALONE
from surgery.nn.backbones.record import Backbone

if TYPE_CHECKING:
    from torch import nn

    Replacement = tuple[nn.Module, str, Any]  # (parent, name, what stands there)


@dataclass(frozen=True)
class Layer:
    """One attention module among image tokens, or from them to text; block: the path of its transformer block."""

    path: str
    block: str
    group: str
    kind: str  # "self", "cross" or "joint"


def guided_backbone(model: "nn.Module") -> Backbone:
    """The record of a live denoiser's class; UnsupportedModelError for a class that guidance knows nothing of."""
    backbone = record_of(model)
    if backbone is None:
        known = ", ".join((*BACKBONES, *GUIDED_ALONE))
        raise UnsupportedModelError(f"there is no guidance for {type(model).__name__}; there is for {known}")
    return backbone


def attention_layers(model: "nn.Module") -> list[Layer]:
    """The Layers of a model's stacks of blocks; not those that refine text, nor a video UNet's attention over time."""
    backbone = guided_backbone(model)
    found = [(site, backbone.block_of(site.path)) for site in attention_sites(model)]
    if names := backbone.self_attention:
        found = [(site, block) for site, block in found if site.kind != "self" or site.path.endswith(names)]
    return [Layer(site.path, block, site.block, site.kind) for site, block in found if block]


def chosen_layers(
    model: "nn.Module",
    selectors: Sequence[str],
    kinds: tuple[str, ...],
    what: str,
    able: "Callable[[nn.Module], bool]" = lambda module: True,
) -> list[Layer]:
    """The Layers of some kinds that selectors name; InputError for a selector that names none.

    what: the words for them in the error, "self-attention". able: whether the method can weaken an attention module.
    """
    layers = [layer for layer in attention_layers(model) if layer.kind in kinds]
    layers = [layer for layer in layers if able(model.get_submodule(layer.path))]
    if not layers:
        raise InputError(f"guidance: {type(model).__name__} has no {what} module that this method can weaken")
    layers, chosen = _with_middle(layers), []
    for selector in selectors:
        found = [layer for layer in layers if _matches(layer, selector)]
        if not found:
            near = nearest(selector, ["all", *{layer.group: None for layer in layers}, *(one.path for one in layers)])
            hint = f'did you mean "{near}"?' if near else f'a path here is "{layers[0].path}"'
            raise InputError(f"guidance.layers: {selector!r} selects no {what}; {hint}")
        chosen += [layer for layer in found if layer not in chosen]
    return chosen


def _with_middle(layers):
    """The Layers, of a transformer those of the block in the middle in a group of that name."""
    blocks = list(dict.fromkeys(layer.block for layer in layers))
    if any(layer.group in ("down", "mid", "up") for layer in layers):
        return layers
    middle = blocks[len(blocks) // 2]
    return [dataclasses.replace(layer, group="mid") if layer.block == middle else layer for layer in layers]


def _matches(layer, selector):
    if selector in ("all", layer.group, layer.block):
        return True
    if selector in STREAMS:  # the middle block is of one of them too
        return layer.kind == "joint" and (selector == "single") == layer.block.startswith("single_")
    return fnmatch.fnmatchcase(layer.path, selector) or fnmatch.fnmatchcase(layer.block, selector)


def placed(model: "nn.Module", path: str) -> "tuple[nn.Module, str]":
    """(parent, name) of the module at a dotted path."""
    parent, _, name = path.rpartition(".")
    return model.get_submodule(parent), name


def replaced_blocks(
    model: "nn.Module", selectors: Sequence[str], make: "Callable[[nn.Module, tuple[str, ...] | None], nn.Module]"
) -> "list[Replacement]":
    """[(parent, name, what stands there)] for the blocks of the attention modules that selectors name.

    make: (block, its record's `streams` of it, None where diffusers lists them) -> its stand-in.
    """
    layers = chosen_layers(model, selectors, ("self", "joint", "cross"), "transformer block")
    paths, streams = dict.fromkeys(layer.block for layer in layers), guided_backbone(model).streams
    stacks = {path: path.rpartition(".")[0] for path in paths}
    return [(*placed(model, path), make(model.get_submodule(path), streams.get(stacks[path]))) for path in paths]


@contextmanager
def swapped(replacements: "Sequence[Replacement]") -> Iterator[None]:
    """While it lasts, modules and processors of attention are in others' place."""
    before = []
    try:
        for parent, name, part in replacements:
            table: Any = parent._modules if name in parent._modules else vars(parent)
            before.append((table, name, table[name]))
            table[name] = part
        yield
    finally:
        for table, name, part in reversed(before):
            table[name] = part
