"""How much of a prompt a model reads: what OpenAI's answers call usage, and what is cut off without a word."""

import inspect
from collections.abc import Mapping
from typing import Any

from surgery.runtime.worker import ImageRequest

_ENDLESS = 100_000  # tokenizers without a length of their own tell a number above any


class Reading:
    """What the most patient of a pipeline's tokenizers makes of prompts. sampling: with its max_sequence_length."""

    def __init__(self, pipeline: Any, sampling: Mapping[str, Any]) -> None:
        self._factor = getattr(pipeline, "vae_scale_factor", None) or 8
        self._tokenizer, self._longest = None, 0
        for name, part in pipeline.components.items():
            if "tokenizer" in name and callable(part):
                longest = _longest(pipeline, part, sampling)
                if longest > self._longest:
                    self._tokenizer, self._longest = part, longest

    def of(self, request: ImageRequest, image: Any) -> dict[str, int]:
        """The fields tokens, cut and positions of an ImageResult. image: what was drawn, PIL's or a Video."""
        width, height = image.size
        told = {"positions": (width // self._factor) * (height // self._factor)}
        if self._tokenizer is None:
            return told
        read: Any = self._tokenizer
        count = len(read(request.prompt, truncation=False, verbose=False)["input_ids"])
        return {**told, "tokens": min(count, self._longest), "cut": max(0, count - self._longest)}


def _longest(pipeline, tokenizer, sampling):
    own = getattr(tokenizer, "model_max_length", 0)
    if "CLIP" in type(tokenizer).__name__:
        return own
    told = inspect.signature(type(pipeline).__call__).parameters.get("max_sequence_length")
    asked = sampling.get("max_sequence_length") or (told.default if told else None)
    longest = asked if isinstance(asked, int) else own
    return longest if longest < _ENDLESS else 0
