"""What a metric says about itself before anything is loaded, and where its checkpoints are published."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class HubFiles:
    """Files of a Hub repository at a commit. revision None: the newest, whose commit is recorded with the scores."""

    repo: str
    files: tuple[str, ...]  # names or glob patterns
    revision: str | None = None


@dataclass(frozen=True)
class WebFile:
    """One file at a fixed address; sha256: the whole digest, or the leading digits that its publisher gives."""

    url: str
    sha256: str


@dataclass(frozen=True)
class Info:
    """A metric's name, what kind of figure it is, and its source.

    kind: "score" is a figure per image, given its prompt; "distance" one per set of images, against a reference set;
    "fidelity" one per pair, how near the patched image is to the base's own.
    """

    name: str  # clip_score
    title: str  # CLIPScore
    kind: str
    higher_is_better: bool
    source: str  # paper or code that defines it
    checkpoints: dict[str, HubFiles | WebFile] = field(default_factory=dict)  # by the part that they play in it
