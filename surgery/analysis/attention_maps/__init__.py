"""Maps of attention to each word of a prompt: dense beside sparse beside the model's own operator (PLADIS, Fig. 10).

comparison = compare_attention(pipeline, "a red circle to the left of a blue square", seed=0)
sheet(comparison).save("attention.png")
"""

from .picture import heat_colours, sheet
from .rows import Comparison, MapRow, compare_attention
from .text import TextKeys, text_keys
from .tokens import Encoded, words_of
from .words import Column, Words

__all__ = [
    "Column",
    "Comparison",
    "Encoded",
    "MapRow",
    "TextKeys",
    "Words",
    "compare_attention",
    "heat_colours",
    "sheet",
    "text_keys",
    "words_of",
]
