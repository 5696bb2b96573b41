"""Cross-attention maps per word of a prompt: dense beside sparse beside the model's own operator (PLADIS, Fig. 10).

comparison = compare_attention(pipeline, "a red circle to the left of a blue square", seed=0)
sheet(comparison).save("attention.png")
"""

from .picture import heat_colours, sheet
from .rows import Comparison, MapRow, compare_attention
from .words import Column, Words, words_of_prompt

__all__ = ["Column", "Comparison", "MapRow", "Words", "compare_attention", "heat_colours", "sheet", "words_of_prompt"]
