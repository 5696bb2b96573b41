"""What became of the attention calls of one run: how many were changed, and why each other one stayed dense."""

from collections import Counter

OUTSIDE = "outside the window of every operation"
UNSELECTED = "not among the layers of any operation"
ONE_KEY = "there is a single key, where nothing can change"
OTHER_IMAGE = "its keys are another image's, not the text's"
OTHER_KIND = "another attention inside the block, of the image alone"
NO_PLACE = "nothing told where the text stands in its sequence"
UNEVEN = "prompts of several lengths in one batch, so the text has no one place"
UNASKED = (
    "the module computed attention without asking: another node replaced it, or this ComfyUI gives it no "
    "transformer_options"
)


class Report:
    """Counts of one run. `notes` are sentences about the run as a whole."""

    def __init__(self) -> None:
        self.model = ""
        self.runs = 0
        self.clear()

    def clear(self) -> None:
        """Begin a run."""
        self.calls = 0  # of the model
        self.changed: Counter = Counter()  # {operation in words: attention calls}
        self.dense: Counter = Counter()  # {reason: attention calls}
        self.notes: list[str] = []

    def note(self, sentence: str) -> None:
        """Say something of the run as a whole, once."""
        if sentence not in self.notes:
            self.notes.append(sentence)

    def __str__(self) -> str:
        total = sum(self.changed.values()) + sum(self.dense.values())
        if not (self.runs or self.calls or total):
            return "no run yet: connect the latent of a sampler that has this model to `after`"
        changed = sum(self.changed.values())
        lines = [f"{self.model}: {changed} of {total} attention calls changed, in {self.calls} calls of the model"]
        if not self.changed:
            lines[0] = f"NOTHING WAS CHANGED. {lines[0]}"
        lines += [f"  {count} by {name}" for name, count in self.changed.most_common()]
        lines += [f"  {count} dense: {reason}" for reason, count in self.dense.most_common()]
        return "\n".join([*lines, *(f"  {sentence}" for sentence in self.notes)])
