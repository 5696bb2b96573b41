"""The blocks of a model that are alike, each class of which is compiled once."""

from torch import nn

from surgery.errors import InputError
from surgery.nn.module import is_pladis


def repeated_blocks(model):
    """{path: module} of the classes that diffusers names for it, or of the blocks in lists that hold patched attention.

    Several of diffusers' transformers (SD3, PixArt, SANA, Mochi) name none. Raises InputError where there are none.
    """
    names = getattr(model, "_repeated_blocks", None)
    if not names:
        lists = [child for child in model.children() if isinstance(child, nn.ModuleList)]
        names = {type(block).__name__ for blocks in lists for block in blocks if any(map(is_pladis, block.modules()))}
    blocks = {path: module for path, module in model.named_modules() if type(module).__name__ in names}
    if not blocks:
        raise InputError(f"{type(model).__name__} has no repeated blocks to compile once; compile it whole")
    return blocks
