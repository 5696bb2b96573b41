"""Which attention modules and blocks a method's `layers` selects.

A selector is "all", "mid", a block group (down, up of a UNet; double, single of joint attention), or a glob pattern
over module paths, in which * crosses dots. "mid" is the middle block of a UNet, and of a transformer the block in the
middle of those that a method can weaken.
"""

import dataclasses
import fnmatch
import re
from dataclasses import dataclass

from surgery.errors import InputError, nearest
from surgery.models.anatomy import attention_sites
from surgery.models.selection import STREAMS

_BLOCK = re.compile(r"^(.*?(?:^|\.)(?:single_transformer_blocks|transformer_blocks|blocks)\.\d+)\.")


@dataclass(frozen=True)
class Layer:
    """One attention module among image tokens, or from them to text; block: the path of its transformer block."""

    path: str
    block: str
    group: str
    kind: str  # "self", "cross" or "joint"


def attention_layers(model):
    """The Layers of a model's stacks of blocks; not those that refine text, nor a video UNet's attention over time."""
    sites = [(site, match.group(1)) for site in attention_sites(model) if (match := _BLOCK.match(site.path))]
    sites = [(site, block) for site, block in sites if not _is_aside(site.path)]
    return [Layer(site.path, block, site.block, site.kind) for site, block in sites]


def chosen_layers(model, selectors, kinds, what, able=lambda module: True):
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


def _is_aside(path):
    return "temporal_transformer_blocks" in path or path.startswith(("context_embedder", "token_refiner"))
