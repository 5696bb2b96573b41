"""A prompt, and a set of prompts that says where it comes from and what exactly is in it."""

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace


@dataclass(frozen=True)
class Prompt:
    """What an image is asked to show.

    category: what per-category scores are grouped by, "" for none. facts: what a metric needs to judge an image of it
    (GenEval's `include`, the objects of a shapes prompt), plain JSON data.
    """

    text: str
    category: str = ""
    facts: dict = field(default_factory=dict)


@dataclass(frozen=True)
class PromptSet:
    """Prompts under a name. source: Hub data set or file name; revision: the data set's commit."""

    name: str
    prompts: tuple[Prompt, ...]
    source: str | None = None
    revision: str | None = None

    @property
    def sha256(self):
        """Of the prompts themselves: text, category and facts, in their order."""
        content = json.dumps([asdict(prompt) for prompt in self.prompts], sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(content.encode("utf-8")).hexdigest()

    def spread(self, count):
        """The set with `count` of its prompts, evenly spaced in each category; itself if None."""
        total = len(self.prompts)
        if count is None or count >= total:
            return self
        # Where categories take turns, every n-th prompt of the whole could be of one category alone.
        categories = list(dict.fromkeys(prompt.category for prompt in self.prompts))
        sorted_places = sorted(range(total), key=lambda place: categories.index(self.prompts[place].category))
        chosen = sorted(sorted_places[number * total // count] for number in range(count))
        return replace(self, prompts=tuple(self.prompts[place] for place in chosen))
