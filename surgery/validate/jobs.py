"""Paired images: every prompt and seed from the base and from the patched pipeline."""

import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

from surgery.console import progress_bar
from surgery.errors import InputError
from surgery.hub.local import read_json_file
from surgery.machine import versions
from surgery.runtime.draw import number_of_steps
from surgery.runtime.workers import crew

from .store import ImageStore


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


@dataclass(frozen=True)
class Side:
    """A pipeline to draw with. operations: as the model's config has them, None for the untouched base.

    identity: {name: value} of all else that an image depends on: base, sampling, library versions, device and dtype.
    """

    name: str
    operations: list | None
    identity: dict

    @cached_property
    def key(self):
        """The hash that its images are kept under."""
        content = {"operations": self.operations, **self.identity}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def sides_of(manifest, folder, environment):
    """(base Side, patched Side) of an artifact."""
    identity = identity_of(manifest, folder, environment)
    operations = [operation.model_dump() for operation in manifest.operations]
    return base_side(identity), patched_side("patched", operations, identity, operator_code(manifest, folder))


def identity_of(manifest, folder, environment):
    """What the images of an artifact's base depend on, by the names of `Side.identity`."""
    identity = {"base": base_identity(manifest, folder), "sampling": manifest.sampling, **environment}
    return {**identity, "guidance_code": _guidance_code()} if "guidance" in manifest.sampling else identity


@cache
def _guidance_code():
    """A hash of the code that guides."""
    import surgery.guidance

    folder = Path(surgery.guidance.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def base_side(identity):
    """The Side of the untouched base; identity: of base, sampling and environment."""
    return Side("base", None, identity)


def patched_side(name, operations, identity, code):
    """The Side of a base with operations, which depends on the code of the operators too; code: `operator_code`'s."""
    return Side(name, operations, {**identity, "code": code})


def operator_code(manifest, folder):
    """The name, by its content, of the code that this installation runs an artifact's operations with."""
    from surgery.nn.shipped import module_name

    return module_name(read_json_file(Path(folder) / manifest.component / "config.json")["_class_name"])


def environment(device, dtype, threads=None):
    """What of this machine an image depends on."""
    installed = {name: version for name, version in versions().items() if name != "pladis-surgery"}
    device = str(device).partition(":")[0]
    device = f"{device} x{threads}" if threads and threads > 1 else device
    return {"device": device, "dtype": dtype or "default", "versions": installed}


def base_identity(manifest, folder):
    """A hash of all of the artifact but the surgery, so that artifacts of one base share the base's images."""
    ours = {manifest.code, manifest.buffers, "model_index.json", f"{manifest.component}/config.json"}
    ours |= {path for path in manifest.needed if path.endswith(".json") and ".index." in path}
    files = {path: file.sha256 for path, file in manifest.needed.items() if path not in ours}
    config = read_json_file(Path(folder) / manifest.component / "config.json")
    config = {key: config[key] for key in config if key not in ("pladis", "auto_map") and not key.startswith("_")}
    index = read_json_file(Path(folder) / "model_index.json")
    index = {key: value for key, value in index.items() if key != manifest.component}
    content = [files, config, index, manifest.weight_variant()]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def draw_sides(folder, sides, jobs, order, *, batch=None, workers=1, address=None, announce=None):
    """({Side name: {Job key: PNG path}}, batch sizes) of every Job and Side, drawing those that `folder` does not hold.

    Batches are cut from the Jobs that are lacking, in their order. A finished batch is kept whole, so a killed run goes
    on with the very batches that it would have drawn, and the images do not depend on the number of workers.
    batch: images drawn at once; unless given, what was used here before, else chosen by memory. The second value are
    the sizes behind the images, which may differ in their last bits by them. announce: called with (there, to draw,
    batch).
    Raises InputError for a batch or workers under 1, and what painter, workers and store raise.
    """
    if batch is not None and batch < 1:
        raise InputError(f"--batch must be at least 1, not {batch}")
    stores = {side.key: ImageStore(folder, side) for side in sides}
    lacking = {key: _lacking(jobs, store.existing()) for key, store in stores.items()}
    total = sum(map(len, lacking.values()))
    if total:
        with crew(order, workers, address) as painters:
            batch = batch or _used_before(stores.values()) or painters.batch_size()
            if announce:
                announce(len(stores) * len({job.key for job in jobs}) - total, total, batch)
            with progress_bar("drawing", total * number_of_steps(order.sampling), "image steps") as advance:
                for (side, some), images in painters.draw(_tasks(stores, lacking, batch), advance):
                    stores[side.key].add(some, images, batch)
    found = {}
    for side in sides:
        there = stores[side.key].existing()
        found[side.name] = {job.key: there[job.key] for job in jobs}
    return found, sorted(set().union(*(store.batch_sizes() for store in stores.values())))


def _used_before(stores):
    return max((size for store in stores for size in store.batch_sizes()), default=None)


def _lacking(jobs, existing):
    return list({job.key: job for job in jobs if job.key not in existing}.values())


def _tasks(stores, lacking, batch):
    """[(Side, Jobs)], the sides in turn, so that a run that is cut short has pairs to show."""
    cut = [
        [(store.side, lacking[key][at : at + batch]) for at in range(0, len(lacking[key]), batch)]
        for key, store in stores.items()
    ]
    return [tasks[at] for at in range(max(map(len, cut))) for tasks in cut if at < len(tasks)]
