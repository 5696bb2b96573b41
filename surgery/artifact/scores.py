"""`scores.json`: what was measured of an artifact beside its untouched base, and the hash that it was measured on.

schema_version      2; 1 had no margins
artifact_hash       the manifest's hash of what was measured
date, hardware      when (ISO 8601) and on what
versions            of torch, diffusers, transformers, safetensors and this package
prompts             sets: name, count, sha256 of the prompts, source, revision
images_per_prompt, seeds, sampling, drawing     how the images were made; drawing: batch, dtype, device
excluded            pairs left out because a safety checker blackened an image of them
reference           of FID and KID: name, count and sha256 of the images compared with
purpose             the metrics that the recipe names as what the surgery is for
metrics             one entry each, see Metric; with its Category entries
"""

from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from surgery.errors import ArtifactError
from surgery.hub.bounded import read_json

SCORES = "scores.json"
SCHEMA_VERSION = 2
_READ = (1, SCHEMA_VERSION)
FEWEST_PROMPTS = 6  # that differ: fewer tell nothing, as five equal signs come by chance once in 16

_Interval = Annotated[list[float], Field(min_length=2, max_length=2)]
_Share = Annotated[float, Field(ge=0, le=1)]
_Count = Annotated[int, Field(ge=1)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class PromptsRecord(_Part):
    """The prompts that images were drawn from: a set's name, how many of it, their sha256, and where they come from."""

    name: str
    count: _Count
    sha256: str | None = None
    source: str | None = None  # Hub data set or file
    revision: str | None = None


class ReferenceRecord(_Part):
    """The images that a set of images was compared with."""

    name: str
    count: int | None
    sha256: str


def _prompts(count):
    return f"{count} prompt{'' if count == 1 else 's'}"


def _counted(n, groups):
    """n, and how many prompts that is where it is another number."""
    return str(n) if groups in (None, n) else f"{n} ({_prompts(groups)})"


class Category(_Part):
    """A metric over the prompts of one category; as the Metric's own fields."""

    name: str
    n: _Count
    groups: _Count
    base: float | None
    patched: float
    difference: float | None
    interval: _Interval

    @property
    def counted(self) -> str:
        """As `Metric.counted`."""
        return _counted(self.n, self.groups)


def _sides(part):
    return part.base, part.difference


class Metric(_Part):
    """One metric of base and patched images that share prompts and seeds.

    kind: "score", "diversity" and "distance" (to reference images) have a value for each side: difference is patched
    minus base, interval its 95% confidence interval. "fidelity" tells how near the patched images are to the base's
    own: `patched` is its mean, interval that mean's, and base and difference are None.
    n: pairs of images; groups: prompts, by their texts, over which the interval is. win_rate, tie_rate: the shares of
    pairs in which the patched image is the better one, and in which there is no difference; decided: prompts on which
    the sides differ at all. checkpoint: repository@commit of the scoring models. margin: the largest difference that
    does not matter in practice, None where none is stated.
    """

    name: str
    title: str = ""
    kind: Literal["score", "distance", "fidelity", "diversity"] = "score"
    higher_is_better: bool
    n: _Count
    groups: _Count | None = None
    base: float | None
    patched: float
    difference: float | None
    interval: _Interval
    win_rate: _Share | None = None
    tie_rate: _Share | None = None
    decided: Annotated[int, Field(ge=0)] | None = None
    checkpoint: str | None = None
    source: str | None = None  # paper or code that defines it
    margin: Annotated[float, Field(ge=0)] | None = None
    categories: list[Category] = []

    @model_validator(mode="after")
    def _has_both_sides(self):
        if self.kind != "fidelity" and None in [x for part in (self, *self.categories) for x in _sides(part)]:
            raise ValueError("lacks the base's value or the difference, which all but a fidelity have")
        return self

    @property
    def counted(self) -> str:
        """What its interval rests on, for a table: n, with the prompts where they are fewer; "60", "8 (7 prompts)"."""
        return _counted(self.n, self.groups)

    @property
    def verdict(self) -> str:
        """ "better", "worse", "no difference", "cannot tell with 60 prompts"; "" for fidelity.

        Better or worse is where the interval does not hold zero and as many prompts are decided as a sign test needs.
        No difference is where the whole interval lies within the margin, as in a test of equivalence (two one-sided
        tests, here at 2.5% each): that zero lies in a wide interval shows nothing.
        """
        if self.kind == "fidelity":
            return ""
        low, high = sorted(self.interval)
        prompts, margin = self.groups or self.n, self.margin or 0.0
        if prompts >= FEWEST_PROMPTS:
            if not low <= 0 <= high and (self.decided is None or self.decided >= FEWEST_PROMPTS):
                return "better" if (low > 0) == self.higher_is_better else "worse"
            if -margin <= low and high <= margin:
                return "no difference"
        return f"cannot tell with {_prompts(prompts)}"


class Scores(_Part):
    """The content of scores.json."""

    schema_version: int
    artifact_hash: str
    date: str
    hardware: str
    versions: dict[str, str]
    prompts: Annotated[list[PromptsRecord], Field(min_length=1)]
    images_per_prompt: _Count = 1
    seeds: str | list[int] = ""
    sampling: dict = {}
    drawing: dict = {}
    excluded: Annotated[int, Field(ge=0)] = 0
    reference: ReferenceRecord | None = None
    purpose: list[str] = []
    metrics: Annotated[list[Metric], Field(min_length=1)]

    def regressions(self, purpose: Collection[str] = ()) -> "list[Metric]":
        """The Metrics on which the patched side is significantly worse, among those named as the surgery's purpose.

        purpose: names; where there are none, or none of them was measured, all that have a value for each side.
        """
        measured = {metric.name for metric in self.metrics if metric.kind != "fidelity"}
        judged = measured.intersection(purpose) or measured
        return [metric for metric in self.metrics if metric.verdict == "worse" and metric.name in judged]


def read_scores(folder: str | Path, artifact_hash: str) -> "Scores | None":
    """The Scores beside a manifest, or None where there are none.

    Raises ArtifactError where scores.json is damaged, of a newer schema, or measured on another artifact.
    """
    path = Path(folder) / SCORES
    if not path.exists():
        return None
    try:
        data = read_json(path)
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}; delete it, or score the artifact again") from error
    measured = data.get("artifact_hash")
    if measured != artifact_hash:
        raise ArtifactError(
            f"{path} was measured on another artifact ({str(measured)[:12]}; this one is {artifact_hash[:12]}): scores "
            "may only stand beside what they measured. Delete it, or score this artifact with `surgery validate`"
        )
    if data.get("schema_version") not in _READ:
        raise ArtifactError(
            f"{path} has schema_version {data.get('schema_version')!r}; this version of pladis-surgery reads "
            f"{' and '.join(map(str, _READ))}. If it is newer, update: pip install -U pladis-surgery"
        )
    try:
        return Scores.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise ArtifactError(f"{path} is wrong at {key}: {first['msg'].lower()}; score the artifact again") from error
