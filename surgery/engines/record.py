"""`engines/<key>/engine.json`: what an engine is, where it was built, how far it is from eager."""

import hashlib
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from surgery.artifact.manifest import MANIFEST, Manifest
from surgery.errors import ArtifactError, InputError
from surgery.hub import sha256_of
from surgery.hub.bounded import read_json
from surgery.machine import Machine

ENGINES_FOLDER = "engines"
ENGINE_FILE = "engine.json"
SCHEMA_VERSION = 1
USUAL_BATCH = 4  # images: what a server draws at once, and an engine is built for, unless told otherwise
Backend = Literal["inductor", "tensorrt", "onnx"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)

_Span = Annotated[list[int], Field(min_length=3, max_length=3)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Tensor(_Part):
    """An input: its place in the call, as "added_cond_kwargs.time_ids"; of each dimension the least and the largest."""

    name: str
    dtype: str
    shape: list[Annotated[list[int], Field(min_length=2, max_length=2)]]


class Region(_Part):
    """One compiled function and the modules that it runs for, by path in the component; "" is all of it.

    constants: what of a call is no tensor and was compiled in. outputs: names of the tensors that come back; output:
    the class of what a call returns, "tuple:2" for a tuple of two, "" for a bare tensor. hyperparameters: inputs after
    the call's own, each a vector of the values of these buffers; values: what they were when it was built.
    input_names, output_names: of the function by itself, in its order, as an ONNX graph or a TensorRT engine has them
    (the latter leaves out inputs that it has no use for); not in older records.
    """

    file: str
    modules: Annotated[list[str], Field(min_length=1)]
    method: Literal["forward", "decode"] = "forward"
    inputs: list[Tensor]
    constants: dict[str, bool | int | float | str]
    outputs: list[str]
    output: str
    hyperparameters: dict[str, list[str]] = {}
    values: dict[str, list[float]] = {}
    input_names: list[str] = []
    output_names: list[str] = []


class Difference(_Part):
    """From eager, on real inputs: the largest and the mean of an element; relative: the largest over eager's RMS.

    after_change: the same relative figure after the hyperparameters were changed in the engine and in eager, None where
    the engine has none. calls: how many calls were compared.
    """

    largest: float
    mean: float
    relative: float
    tolerance: float
    after_change: float | None
    calls: int


class EngineFile(_Part):
    """A file beside engine.json."""

    size: int
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Engine(_Part):
    """The content of engine.json."""

    schema_version: int
    key: str
    backend: Backend
    versions: dict[str, str]  # of the packages that running it needs, besides torch
    component: str
    artifact_hash: str
    built_on: Machine  # to which `extra="forbid"` reaches down
    dtype: str
    images: _Span
    height: _Span
    width: _Span
    weights: Literal["artifact", "engine"]
    hyperparameters: Literal["adjustable", "fixed"]
    operator: Literal["fused", "decomposed"]
    options: dict[str, str | int | float | bool]
    inputs: list[Tensor]  # of a call of the whole component
    regions: Annotated[list[Region], Field(min_length=1)]
    files: dict[str, EngineFile]
    seconds: dict[str, float]
    difference: Difference

    @property
    def profile(self) -> "Profile":
        """Its Profile."""
        return Profile.from_json({"images": self.images, "height": self.height, "width": self.width})


def target_key(
    component: str, backend: str, machine: Machine, dtype: str, profile: "Profile", artifact_hash: str, **further: Any
) -> str:
    """The name of an engine's folder: to be read by people, then a hash over all that makes an engine another one."""
    told = {
        "component": component,
        "backend": backend,
        "machine": {key: value for key, value in machine.to_json().items() if key != "name"},
        "dtype": dtype,
        "profile": profile.to_json(),
        "artifact": artifact_hash,
        **further,
    }
    digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:10]
    where = machine.architecture.split(" ")[-1].lower().replace("default", "cpu")
    return f"{component}-{backend}-{machine.device}-{where}-{dtype}-{digest}".replace("_", "")


def read_engine(folder: str | Path) -> Engine:
    """The Engine of a folder; ArtifactError where its engine.json is missing, damaged, or of a newer schema."""
    path = Path(folder) / ENGINE_FILE
    try:
        data = read_json(path)
        if data.get("schema_version") != SCHEMA_VERSION:
            raise ArtifactError(
                f"{path} has schema_version {data.get('schema_version')!r}; this version of pladis-surgery reads "
                f"{SCHEMA_VERSION}. If it is newer, update: pip install -U pladis-surgery"
            )
        engine = Engine.model_validate(data)
    except (OSError, ValueError) as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else None
        what = f"at {'.'.join(map(str, first['loc']))}: {first['msg'].lower()}" if first else f"({error})"
        raise ArtifactError(f"{path} cannot be read {what}; build the engine again, or delete its folder") from error
    files = {region.file for region in engine.regions}
    unsafe = [name for name in engine.files if "/" in name or "\\" in name or name.startswith(".")]
    if unsafe or not files <= set(engine.files):
        raise ArtifactError(f"{path} names files outside its folder or lacks some; delete that folder")
    return engine


def check_files(folder: str | Path, engine: Engine, manifest: Manifest, private: str | Path | None = None) -> None:
    """Hash an engine's files against engine.json and surgery.json; ArtifactError where they differ.

    manifest: the artifact's, which lists the files of every engine that was built into it or published with it.
    private: a folder that nobody else writes to; the files are copied there first, so that what is opened there is what
    was hashed.
    """
    folder = Path(folder)
    for name, file in {**engine.files, ENGINE_FILE: None}.items():
        path = folder / name
        if private and path.is_file():
            path = Path(shutil.copyfile(path, Path(private, name)))
        actual = sha256_of(path) if path.is_file() else None
        listed = manifest.files.get(f"{ENGINES_FOLDER}/{folder.name}/{name}")
        if listed is None:
            raise ArtifactError(
                f"{MANIFEST} does not list {ENGINES_FOLDER}/{folder.name}/{name}: an engine is native code, and one "
                "that was put there by hand is not run. `surgery export` builds and lists one"
            )
        if actual != listed.sha256 or (file and actual != file.sha256):
            raise ArtifactError(
                f"{folder / name} is not the file that {MANIFEST} lists; it is not run. Build the engine again or "
                "delete its folder"
            )
    if private and read_engine(private) != engine:
        raise ArtifactError(f"{folder / ENGINE_FILE} was changed while the engine was opened; run it again")


AXES = ("images", "height", "width")
_SHAPE = re.compile(r"(\d+)(?:\.\.(\d+))?x(\d+)(?:\.\.(\d+))?x(\d+)(?:\.\.(\d+))?")


@dataclass(frozen=True)
class Span:
    """A number's range, ends included, and the value that an engine is tuned for."""

    low: int
    usual: int
    high: int

    @property
    def is_fixed(self) -> bool:
        """Whether there is but one value."""
        return self.low == self.high

    def __str__(self) -> str:
        return str(self.low) if self.is_fixed else f"{self.low}..{self.high}"


@dataclass(frozen=True)
class Profile:
    """How many images at once, and their height and width in pixels."""

    images: Span
    height: Span
    width: Span

    @classmethod
    def of(cls, images: int, height: int, width: int) -> "Profile":
        """The profile of one fixed size."""
        return cls(*(Span(number, number, number) for number in (images, height, width)))

    @property
    def is_fixed(self) -> bool:
        """Whether it is one size."""
        return all(span.is_fixed for span in (self.images, self.height, self.width))

    def sizes(self) -> dict[str, tuple[int, int, int]]:
        """{"usual", "low", "high": (images, height, width)}: the corners that a compiler has to know, each once."""
        corners = {}
        for name in ("usual", "low", "high"):
            size = tuple(getattr(getattr(self, axis), name) for axis in AXES)
            if size not in corners.values():
                corners[name] = size
        return corners

    def problem(self, images: int | None, height: int, width: int) -> str | None:
        """Why a size is outside, as "height 768 is outside 1024"; None if it is inside. images: None where unknown."""
        for axis, number in zip(AXES, (images, height, width), strict=True):
            span = getattr(self, axis)
            if number is not None and not span.low <= number <= span.high:
                return f"{axis} {number} is outside the engine's {span}"
        return None

    def to_json(self) -> dict[str, list[int]]:
        """{"images": [low, usual, high], "height": ..., "width": ...}"""
        return {axis: [span.low, span.usual, span.high] for axis in AXES for span in [getattr(self, axis)]}

    @classmethod
    def from_json(cls, data: Mapping[str, Sequence[int]]) -> "Profile":
        """The inverse of to_json."""
        return cls(**{axis: Span(*data[axis]) for axis in AXES})

    def __str__(self) -> str:
        return "x".join(str(getattr(self, axis)) for axis in AXES)


def parse_profile(text: str) -> Profile:
    """The Profile in "IMAGESxHEIGHTxWIDTH", each a number or a range "512..1024"; several with commas between.

    "1x1024x1024" is that size alone. "1x1024x1024,4x512x512" is every size between the smallest and the largest of
    them, tuned for the first; of a range, for its upper end. Raises InputError for what cannot be read, and for heights
    and widths that are no multiples of 8.
    """
    spans = [[], [], []]
    for part in text.replace(" ", "").split(","):
        match = _SHAPE.fullmatch(part)
        if not match:
            raise InputError(
                f"--shapes {part!r} cannot be read; write IMAGESxHEIGHTxWIDTH, such as 1x1024x1024 or "
                "1..4x512..1024x512..1024"
            )
        numbers = match.groups()
        for axis in range(3):
            low = int(numbers[2 * axis])
            spans[axis].append((low, int(numbers[2 * axis + 1] or low)))
    made = []
    for axis, found in zip(AXES, spans, strict=True):
        span = Span(min(low for low, _ in found), found[0][1], max(high for _, high in found))
        if span.low < 1 or any(low > high for low, high in found):
            raise InputError(f"--shapes {text}: {axis} must be at least 1, and a range must rise")
        if axis != "images" and any(number % 8 for number in (span.low, span.usual, span.high)):
            raise InputError(f"--shapes {text}: {axis} must be a multiple of 8")
        made.append(span)
    return Profile(*made)
