"""`scores.json`: what was measured of an artifact beside its untouched base, and the hash that it was measured on."""

import json
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from surgery.errors import ArtifactError

NAME = "scores.json"
SCHEMA_VERSION = 1

_Interval = Annotated[list[float], Field(min_length=2, max_length=2)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class PromptSet(_Part):
    """The prompts that images were drawn from: a set's name, how many of it, their sha256, and where they come from."""

    name: str
    count: Annotated[int, Field(ge=1)]
    sha256: str | None = None
    source: str | None = None  # Hub data set or file
    revision: str | None = None


class Metric(_Part):
    """One metric of base and patched images that share prompts and seeds.

    difference is patched minus base, interval its 95% confidence interval; win_rate the share of pairs in which the
    patched image is the better one. checkpoint: repository@revision of the scoring model.
    """

    name: str
    higher_is_better: bool
    n: Annotated[int, Field(ge=1)]  # pairs of images
    base: float
    patched: float
    difference: float
    interval: _Interval
    win_rate: Annotated[float, Field(ge=0, le=1)] | None = None
    checkpoint: str | None = None
    source: str | None = None  # paper or code that defines it

    @property
    def verdict(self):
        """ "better", "worse", or "no difference" where the interval holds zero."""
        low, high = sorted(self.interval)
        if low <= 0 <= high:
            return "no difference"
        return "better" if (low > 0) == self.higher_is_better else "worse"


class Scores(_Part):
    """The content of scores.json."""

    schema_version: int
    artifact_hash: str  # the manifest's hash of what was measured
    date: str  # ISO 8601
    hardware: str
    versions: dict[str, str]
    prompts: Annotated[list[PromptSet], Field(min_length=1)]
    images_per_prompt: Annotated[int, Field(ge=1)] = 1
    seeds: str | list[int] = ""
    sampling: dict = {}
    metrics: Annotated[list[Metric], Field(min_length=1)]


def read_scores(folder, artifact_hash):
    """The Scores beside a manifest, or None where there are none.

    Raises ArtifactError where scores.json is damaged, of a newer schema, or measured on another artifact.
    """
    path = Path(folder) / NAME
    if not path.exists():
        return None
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(data, dict):
            raise ValueError("it holds no mapping of keys")
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}; delete it, or score the artifact again") from error
    measured = data.get("artifact_hash")
    if measured != artifact_hash:
        raise ArtifactError(
            f"{path} was measured on another artifact ({str(measured)[:12]}; this one is {artifact_hash[:12]}): scores "
            "may only stand beside what they measured. Delete it, or score this artifact"
        )
    if data.get("schema_version") != SCHEMA_VERSION:
        raise ArtifactError(
            f"{path} has schema_version {data.get('schema_version')!r}; this version of pladis-surgery reads "
            f"{SCHEMA_VERSION}. If it is newer, update: pip install -U pladis-surgery"
        )
    try:
        return Scores.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise ArtifactError(f"{path} is wrong at {key}: {first['msg'].lower()}; score the artifact again") from error
