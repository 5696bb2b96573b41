"""What the tests of every backbone need to know of one."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """A tiny pipeline of a backbone.

    build: () -> (pipeline, the arguments of a call that draws in two steps). modules: how many attention modules "all"
    patches. text_first: where the text is in the sequence of joint attention; None for cross-attention. mask: the
    argument of the denoiser that says which text tokens are padding (1 or True keeps one), None where there is none;
    embeds: the one that has the tokens. draws: whether the pipeline is the model's own; else the arguments are those of
    a call of the denoiser. compiles: whether diffusers' own forward() does, in one graph.
    """

    name: str
    model_class: str
    build: Callable
    modules: int
    text_first: bool | None = None
    mask: str | None = None
    embeds: str = "encoder_hidden_states"
    draws: bool = True
    compiles: bool = True

    def __str__(self):
        return self.name

    @property
    def is_joint(self):
        """Whether text and image share one sequence."""
        return self.text_first is not None

    def text_length(self, call):
        """How many text keys the patched attention sees in a call of the denoiser."""
        return call[self.embeds].shape[1]

    def is_to_text(self, length, queries, keys):
        """Whether an attention of so many queries and keys is one that is patched, with `length` tokens of text."""
        if self.text_first is None:
            return keys == length != queries
        return keys == queries > length

    def entries(self, call):
        """The calls that brute force answers, one after the other: those of each entry where texts differ in place."""
        return [call]
