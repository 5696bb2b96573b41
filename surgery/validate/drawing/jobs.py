"""The images that a validation needs: a prompt and a seed each."""

import hashlib
from collections import Counter
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Job:
    """One image to draw of each side. index: the prompt's place in its set, by which images of one prompt belong
    together."""

    prompt: str
    seed: int
    index: int

    @cached_property
    def key(self):
        """What the image is stored under: it depends on prompt and seed alone."""
        return hashlib.sha256(f"{self.seed}\0{self.prompt}".encode()).hexdigest()[:24]


def jobs_of(prompt_set, images_per_prompt=1, seed=0):
    """The Jobs of a PromptSet: a first image of every prompt, then a second of every prompt, and so on.

    Each image's seed is drawn from `seed`, its prompt's text and its number among the images of that text, so it is the
    same in whatever set, order and number the prompt stands, and no two images share their noise.
    """
    seen = Counter()
    jobs = []
    for _ in range(images_per_prompt):
        for index, prompt in enumerate(prompt_set.prompts):
            jobs.append(Job(prompt.text, _seed(seed, prompt.text, seen[prompt.text]), index))
            seen[prompt.text] += 1
    return jobs


SEEDS = "sha256 of '{seed}|{image number}|{prompt}', its first 32 bits, for each image"


def _seed(seed, text, number):
    return int(hashlib.sha256(f"{seed}|{number}|{text}".encode()).hexdigest()[:8], 16)
