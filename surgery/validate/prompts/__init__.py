"""Prompts: the sets that have a name, a file of one's own, and the shapes prompts that ship."""

from .opening import NAMES, open_prompts
from .prompt import Prompt, PromptSet

__all__ = ["NAMES", "Prompt", "PromptSet", "open_prompts"]
