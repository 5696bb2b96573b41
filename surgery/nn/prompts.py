"""What a model with additions is told of the prompts of a run, and how its modules come to know it.

The negative prompt's tokens are put behind the text's where the model is called, so that whatever the model makes of
its text it makes of them; modules that attend to the text without an addition are not shown them.
"""

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .additions import WORD, Teller, Told, negative_role
from .hooks import arguments_of
from .module import is_pladis


class Prompts(NamedTuple):
    """Of the images of a run, in their order.

    negative: the negative prompt as the pipeline encodes it, (images, tokens, channels), or None. mask: (images,
    tokens), nonzero where one is attended to, as the model takes its text's, or None. words: (images, tokens) bool,
    which are no padding. active: (images,) bool, which images have one. pair: that a call of twice as many rows is
    CFG's, [without prompt, with prompt]. kinds: (images, the text's tokens) as in additions.py; negative_kinds too.
    """

    negative: Tensor | None = None
    mask: Tensor | None = None
    words: Tensor | None = None
    active: Tensor | None = None
    pair: bool = False
    kinds: Tensor | None = None
    negative_kinds: Tensor | None = None


def put_hooks(model: Any, negative: bool) -> list:
    """Have a model tell its modules of the prompts that it is told; negative: that one may be negative."""
    teller = Teller()
    for module in model.modules():
        if is_pladis(module):
            module.pladis_teller = teller
    handles = [model.register_forward_pre_hook(functools.partial(_tell, teller), with_kwargs=True)]
    hide = functools.partial(_hide, teller)
    return handles + [other.register_forward_pre_hook(hide, with_kwargs=True) for other in _others(model) if negative]


def _others(model):
    """The modules with cross-attention to the text that have no negative prompt, patched or not."""
    patched = {path: module for path, module in model.named_modules() if is_pladis(module)}
    knowing = [module for module in patched.values() if negative_role(module)]
    stocks, names = {module.stock for module in patched.values()}, {path.rpartition(".")[2] for path in patched}
    alike = [
        module
        for path, module in model.named_modules()
        if getattr(module, "stock", type(module)) in stocks and path.rpartition(".")[2] in names
    ]
    return [module for module in alike if module not in knowing]


def _tell(teller: Teller, model: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    prompts: Prompts | None = model.__dict__.get("_pladis_prompts")
    teller.told = Told()
    if prompts is None or model.__dict__.get("_pladis_context") == "uncond":
        return None
    given = arguments_of(model.stock.forward, args, kwargs)
    text = given["encoder_hidden_states"]
    if not isinstance(text, Tensor):
        raise ValueError("a negative prompt in attention has no place in a text of two parts, as this call's is")
    batch, images = text.shape[0], _images(prompts)
    if batch % images:
        raise ValueError(f"the denoiser was told of {images} prompts, which do not fit a batch of {batch}")
    start = images if prompts.pair and batch == 2 * images else 0
    times = batch // images

    def of_all(tensor):
        return None if tensor is None else tensor.to(text.device).repeat(times, *[1] * (tensor.ndim - 1))

    kinds = of_all(prompts.kinds)
    if kinds is not None and start:
        kinds[:start] = WORD  # without a prompt there are no words to tell apart
    if prompts.negative is None:
        teller.told = Told(kinds=kinds)
        return None
    tokens, active = (of_all(tensor) for tensor in (prompts.negative, prompts.active))
    assert tokens is not None and active is not None  # what has one says of which images
    more = of_all(prompts.negative_kinds)
    kinds = None if kinds is None or more is None else torch.cat([kinds, more], dim=1)
    teller.told = Told(tokens.shape[1], start, active[start:], of_all(prompts.words), kinds)
    return (), model.with_negative(given, tokens, of_all(prompts.mask))


def _images(prompts):
    known = prompts.negative if prompts.negative is not None else prompts.kinds
    return 1 if known is None else known.shape[0]


def _hide(teller: Teller, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    """A forward pre-hook of a module that does not know of negative prompts: it is called as without one."""
    count = teller.told.negative
    if not count:
        return None
    given = arguments_of(getattr(module, "stock", type(module)).forward, args, kwargs)
    text = given["encoder_hidden_states"]
    length = (text[0] if isinstance(text, tuple) else text).shape[1]
    hidden = (text[0][:, :-count], *text[1:]) if isinstance(text, tuple) else text[:, :-count]
    mask = given.get("attention_mask")
    if mask is not None and mask.shape[-1] == length:
        mask = mask[..., :-count]
    return (), {**given, "encoder_hidden_states": hidden, "attention_mask": mask}
