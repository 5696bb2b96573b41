"""Paired images: every prompt and seed from the base and from the patched pipeline."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from surgery.artifact import Manifest
from surgery.console import progress_bar
from surgery.errors import InputError
from surgery.hub.base import read_json_file
from surgery.machine import DTYPES, versions
from surgery.runtime.draw import number_of_steps
from surgery.runtime.pool import Batch, worker_pool
from surgery.runtime.worker import ImageRequest, WorkerConfig

from .prompts import Prompt, PromptSet
from .store import ImageStore


@dataclass(frozen=True)
class Job:
    """One image to draw of each side."""

    prompt: Prompt
    seed: int

    @cached_property
    def key(self) -> str:
        """What the image is stored under: it depends on the prompt's text and the seed alone."""
        return hashlib.sha256(f"{self.seed}\0{self.prompt.text}".encode()).hexdigest()[:24]


def jobs_of(prompt_set: PromptSet, images_per_prompt: int = 1, seed: int = 0) -> list[Job]:
    """The Jobs of a PromptSet: a first image of every prompt, then a second of every prompt, and so on.

    Each image's seed is drawn from `seed`, its prompt's text and its number among the images of that text, so it is the
    same in whatever set, order and number the prompt stands, and no two images share their noise.
    """
    seen = Counter()
    jobs = []
    for _ in range(images_per_prompt):
        for prompt in prompt_set.prompts:
            jobs.append(Job(prompt, _seed(seed, prompt.text, seen[prompt.text])))
            seen[prompt.text] += 1
    return jobs


SEEDS = "sha256 of '{seed}|{image number}|{prompt}', its first 32 bits, for each image"


def _seed(seed, text, number):
    return int(hashlib.sha256(f"{seed}|{number}|{text}".encode()).hexdigest()[:8], 16)


@dataclass(frozen=True)
class Side:
    """A pipeline to draw with. operations: as the model's config has them, None for the untouched base.

    identity: {name: value} of all else that an image depends on: base, sampling, library versions, device and dtype.
    """

    name: str
    operations: list | None
    identity: dict

    @cached_property
    def key(self) -> str:
        """The hash that its images are kept under."""
        content = {"operations": self.operations, **self.identity}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def sides_of(manifest: Manifest, folder: Path, environment: Mapping[str, Any]) -> tuple[Side, Side]:
    """(base Side, patched Side) of an artifact."""
    identity = identity_of(manifest, folder, environment)
    operations = [operation.model_dump() for operation in manifest.operations]
    return base_side(identity), patched_side("patched", operations, identity, operator_code(manifest, folder))


def identity_of(manifest: Manifest, folder: Path, environment: Mapping[str, Any]) -> dict[str, Any]:
    """What the images of an artifact's base depend on, by the names of `Side.identity`."""
    identity = {"base": base_identity(manifest, folder), "sampling": manifest.sampling, **environment}
    return {**identity, "guidance_code": _guidance_code()} if "guidance" in manifest.sampling else identity


@cache
def _guidance_code():
    """A hash of the code that guides, and of what it knows of the models."""
    import surgery.guidance
    import surgery.nn.backbones

    digest = hashlib.sha256()
    for room in (surgery.guidance, surgery.nn.backbones):
        for path in sorted(Path(room.__path__[0]).rglob("*.py")):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def base_side(identity: dict[str, Any]) -> Side:
    """The Side of the untouched base; identity: of base, sampling and environment."""
    return Side("base", None, identity)


def patched_side(name: str, operations: list, identity: dict[str, Any], code: str) -> Side:
    """The Side of a base with operations, which depends on the code of the operators too; code: `operator_code`'s."""
    return Side(name, operations, {**identity, "code": code})


def operator_code(manifest: Manifest, folder: Path) -> str:
    """The name, by its content, of the code that this installation runs an artifact's operations with."""
    from surgery.nn.shipped import module_name

    return module_name(read_json_file(Path(folder) / manifest.component / "config.json")["_class_name"])


def environment(device: Any, dtype: str | None, threads: int | None = None) -> dict[str, Any]:
    """What of this machine an image depends on."""
    installed = {name: version for name, version in versions().items() if name != "pladis-surgery"}
    device = str(device).partition(":")[0]
    device = f"{device} x{threads}" if threads and threads > 1 else device
    return {"device": device, "dtype": dtype or "default", "versions": installed}


def base_identity(manifest: Manifest, folder: Path) -> str:
    """A hash of all of the artifact but the surgery, so that artifacts of one base share the base's images."""
    ours = {manifest.index_name} | manifest.written
    ours |= {path for path in manifest.needed if path.endswith(".json") and ".index." in path}
    files = {path: file.sha256 for path, file in manifest.needed.items() if path not in ours}
    configs = [read_json_file(Path(folder) / component / "config.json") for component in manifest.patched]
    configs = [
        {key: config[key] for key in config if key not in ("pladis", "auto_map") and not key.startswith("_")}
        for config in configs
    ]
    index = read_json_file(Path(folder) / manifest.index_name) if manifest.index is None else manifest.index
    index = {key: value for key, value in index.items() if key not in ("auto_map", *manifest.patched)}
    content = [files, *configs, index, manifest.weight_variant()]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


_MOST = 4096  # of workers, threads and images at once


@dataclass(frozen=True)
class Drawing:
    """How the images are drawn. None: chosen by the model and the machine; address: of a Ray cluster.

    threads: of each worker on a CPU, 1 unless given: the last bit of a result may depend on their number, and images
    must not depend on the number of workers.
    """

    batch: int | None = None
    workers: int = 1
    address: str | None = None
    device: str | None = None
    dtype: str | None = None
    threads: int | None = None

    def __post_init__(self) -> None:
        for name in ("batch", "workers", "threads"):
            if getattr(self, name) is not None and not 1 <= getattr(self, name) <= _MOST:
                raise InputError(f"--{name} must be from 1 to {_MOST}, not {getattr(self, name)}")
        if self.dtype not in (None, *DTYPES):
            raise InputError(f"--dtype must be one of {', '.join(DTYPES)}, not {self.dtype}")


@dataclass(frozen=True)
class ImagePair:
    """A Job's images of two sides, as PNG files."""

    job: Job
    base: Path
    patched: Path


@dataclass(frozen=True)
class PairedImages:
    """Two sides, and the pairs that are to be compared."""

    base: Side
    patched: Side
    pairs: tuple[ImagePair, ...]


@dataclass(frozen=True)
class DrawnImages:
    """The images of Jobs and Sides. paths: by Side name and Job key. batch_sizes: behind them, by which the last bits
    of an image may differ."""

    jobs: tuple[Job, ...]
    paths: dict[str, dict[str, Path]]
    batch_sizes: tuple[int, ...]

    def paired(self, base: Side, patched: Side) -> PairedImages:
        """The pairs of two of the sides."""
        of_base, of_patched = self.paths[base.name], self.paths[patched.name]
        pairs = tuple(ImagePair(job, of_base[job.key], of_patched[job.key]) for job in self.jobs)
        return PairedImages(base, patched, pairs)


def draw_sides(
    folder: Path | str,
    sides: Sequence[Side],
    jobs: Sequence[Job],
    config: WorkerConfig,
    drawing: Drawing = Drawing(),
    announce: Callable[[int, int, int], object] | None = None,
) -> DrawnImages:
    """The DrawnImages of every Job and Side, of which those that `folder` does not hold are drawn.

    Batches are cut from the Jobs that are lacking, in their order. A finished batch is kept whole, so a killed run goes
    on with the very batches that it would have drawn, and the images do not depend on the number of workers.
    Unless the Drawing has a batch size, it is what was used here before, else chosen by memory. announce: called with
    (there, to draw, batch size). Raises what worker, pool and store raise.
    """
    stores = {side.key: ImageStore(folder, side) for side in sides}
    lacking = {key: _lacking(jobs, store.existing()) for key, store in stores.items()}
    total = sum(map(len, lacking.values()))
    if total:
        with worker_pool(config, drawing.workers, drawing.address) as pool:
            size = drawing.batch or _used_before(stores.values()) or pool.batch_size()
            if announce:
                announce(len(stores) * len({job.key for job in jobs}) - total, total, size)
            tasks = _tasks(stores, lacking, size)
            batches = [Batch(store.side.operations, _requests(some)) for store, some in tasks]
            with progress_bar("drawing", total * number_of_steps(config.sampling), "image steps") as advance:
                for number, images in pool.draw(batches, advance):
                    store, some = tasks[number]
                    store.add(some, images, size)
    paths = {}
    for side in sides:
        there = stores[side.key].existing()
        paths[side.name] = {job.key: there[job.key] for job in jobs}
    sizes = set().union(*(store.batch_sizes() for store in stores.values()))
    return DrawnImages(tuple(jobs), paths, tuple(sorted(sizes)))


def _requests(jobs):
    return tuple(ImageRequest(job.prompt.text, job.seed) for job in jobs)


def _used_before(stores):
    return max((size for store in stores for size in store.batch_sizes()), default=None)


def _lacking(jobs, existing):
    return list({job.key: job for job in jobs if job.key not in existing}.values())


def _tasks(stores, lacking, size):
    """[(ImageStore, Jobs)], the sides in turn, so that a run that is cut short has pairs to show."""
    cut = [
        [(store, lacking[key][at : at + size]) for at in range(0, len(lacking[key]), size)]
        for key, store in stores.items()
    ]
    return [tasks[at] for at in range(max(map(len, cut))) for tasks in cut if at < len(tasks)]
