"""What HunyuanVideo 1.5 and HunyuanImage share: refined texts, behind a second encoder's and an image's."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

from ..additions import Teller
from ..further_text import FurtherTexts
from .processors import JointModel


class WithRefinedTexts(JointModel):
    """A model of two text encoders, whose second's tokens, and an image's, stand before each text alike."""

    hides_negative = True
    negative_blocks = ("transformer_blocks",)

    def shared_mask(self, given: Mapping[str, Any]) -> list[torch.Tensor]:
        """(batch, tokens) bool of each part of a call that stands before each text, which tokens are there."""
        mask = given.get("encoder_attention_mask_2")
        return [] if mask is None or given.get("encoder_hidden_states_2") is None else [mask.bool()]

    def refined(self, tokens: torch.Tensor, timestep: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """(batch, tokens, channels) of a text as forward() makes them of a prompt's."""
        mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device) if mask is None else mask.bool()
        return self.context_embedder(tokens, timestep, mask)

    def around_negative(self, tokens: int, given: Mapping[str, Any]) -> tuple[int, int]:
        """As PladisModel's: what stands before each text."""
        return sum(mask.shape[1] for mask in self.shared_mask(given)), 0

    def negative_shown(self, mask: torch.Tensor, given: Mapping[str, Any]) -> torch.Tensor:
        """As PladisModel's: of what stands before each text, the first tokens, as forward() puts the others last."""
        shared = self.shared_mask(given)
        if not shared:
            return mask
        count = sum(part.sum(1, keepdim=True) for part in shared)
        place = torch.arange(sum(part.shape[1] for part in shared), device=mask.device)
        return torch.cat([place < count, mask], dim=1)

    def with_negative(self, given: dict[str, Any], texts: FurtherTexts) -> dict[str, Any]:
        """The same arguments: `at_block` puts the texts in."""
        return given

    def at_block(self, teller: Teller, given: dict[str, Any], first: bool) -> dict[str, Any]:
        """As PladisModel's: the texts, refined as a prompt is, behind what stands before each."""
        count = teller.told.negative
        changed = {"attention_mask": F.pad(given["attention_mask"], (0, count), value=True)}
        if first:
            (tokens, mask, call, _), texts = teller.told.encoded, len(teller.told.lengths)
            text, masks = given["encoder_hidden_states"], [None] * texts if mask is None else mask.chunk(texts, dim=1)
            whole = [text]
            for own, own_mask in zip(tokens.chunk(texts, dim=1), masks, strict=True):
                shared = text[:, : count // texts - own.shape[1]]
                whole += [shared, self.refined(own, call["timestep"], own_mask).to(text)]
            changed["encoder_hidden_states"] = torch.cat(whole, dim=1)
        return {**given, **changed}
