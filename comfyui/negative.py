"""A negative prompt in attention (nag, vsf): which rows of a call have it, and its tokens behind the text's."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .layouts import Layout, Site
from .operations import Operation, is_negative, selects
from .operators import Told


class Negative:
    """The negative prompt of one call of a model. operation: whose it is; tokens: (rows, tokens, channels)."""

    def __init__(self, operation: Operation, tokens: Tensor) -> None:
        self.operation, self.tokens = operation, tokens

    @classmethod
    def of(
        cls, hook: Any, layout: Layout, sites: Sequence[Site], given: Mapping[str, Any], options: Mapping[str, Any]
    ) -> "Negative | None":
        """That of a hook's operations that hold, the last of them; None where none does or it has no meaning.

        given: arguments of apply_model. options: transformer_options, whose `cond_or_uncond` has 0 for each part of the
        batch with the prompt. The hook's modules are told, and its report where there is a reason.
        """
        hook.teller.told = Told()
        found = [
            one for one, held in zip(hook.operations, hook.held, strict=True) if held and is_negative(one.operator)
        ]
        if not found:
            return None
        one, conds = found[-1], options.get("cond_or_uncond") or [0]
        context = given.get("c_crossattn")
        if reason := cls._refusal(one, layout, sites, context, given.get("attention_mask")):
            hook.report.note(f"{one.operator}: {reason}")
            return None
        assert context is not None
        rows = context.shape[0]
        active = torch.tensor([cond == 0 for cond in conds], device=context.device)
        active = active.repeat_interleave(rows // len(conds)) if rows % len(conds) == 0 else active.new_ones(rows)
        if not any(cond == 0 for cond in conds):
            return None
        start = next(index for index, cond in enumerate(conds) if cond == 0) * (rows // len(conds))
        tokens = one.prompt.to(context).expand(rows, -1, -1) if one.prompt.shape[0] == 1 else one.prompt.to(context)
        hook.teller.told = Told(tokens.shape[1], start, active[start:], lengths=(tokens.shape[1],))
        return cls(one, tokens)

    @staticmethod
    def _refusal(one, layout, sites, context, mask):
        if one.prompt is None:
            return "it has no negative prompt; connect one"
        if not layout.negative:
            return "a negative prompt's tokens cannot be put behind the text of this model here"
        if context is None or context.ndim != 3:
            return "this call of the model has no text"
        if one.prompt.shape[-1] != context.shape[-1] or one.prompt.shape[0] not in (1, context.shape[0]):
            return (
                f"the negative prompt is {tuple(one.prompt.shape)}, the text {tuple(context.shape)}; encode it with "
                "the text encoder of this model"
            )
        if mask is not None and mask.ndim != 2:
            return "this call's attention mask is of queries and keys, and not of the text's tokens"
        if any(s.path and s.stack.kind == "joint" and not selects(one.layers, s) for s in sites):
            return "its tokens go through every block of joint attention, so its layers must be all"
        return None

    def after(self, text: Tensor) -> Tensor:
        """A cross-attention's text with the tokens behind it."""
        return torch.cat([text, self.tokens.to(text)], dim=1)

    def behind(self, given: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a model's call with the tokens behind the text's, and kept by its mask if it has one."""
        mask, changed = given.get("attention_mask"), {"c_crossattn": self.after(given["c_crossattn"])}
        if mask is not None:  # of the text's tokens
            more = mask.new_full(self.tokens.shape[:2], 0.0 if mask.is_floating_point() else 1)
            changed["attention_mask"] = torch.cat([mask, more], dim=1)
        return {**given, **changed}
