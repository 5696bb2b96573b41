"""One metric over the images of two sides: values per image, kept as they come, and what they say together."""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from surgery.artifact.scores import Category, Metric
from surgery.console import progress_bar
from surgery.errors import InputError, SurgeryError
from surgery.hub.bounded import parse_json
from surgery.machine import versions

from .checkpoints import fetch_checkpoints
from .metrics import metric_class
from .statistics import draws_of_images, mean_interval, normal_interval, paired
from .store import read_image

_CHUNK = 32  # images between two writes of their values
_FEATURE_DRAWS = 100  # bootstrap draws of FID and KID


@dataclass
class Scorer:
    """A metric that is ready to be loaded: its class, its checkpoints fetched. Its model is loaded when needed."""

    cls: type
    checkpoints: dict
    device: str | None
    reference: object | None = None

    @property
    def info(self):
        """The metric's Info."""
        return self.cls.info

    @property
    def identity(self):
        """What its values depend on besides the images, as a hash."""
        return self._hash(self.info.name)

    @property
    def features_identity(self):
        """What its features depend on, which are the same for every metric on the same checkpoint: fid and kid."""
        return self._hash("features")

    def _hash(self, name):
        parts = {part: checkpoint.identity for part, checkpoint in self.checkpoints.items()}
        content = [name, parts, versions()]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @cached_property
    def metric(self):
        """The metric itself."""
        from surgery.machine import best_device

        files = {part: checkpoint.path for part, checkpoint in self.checkpoints.items()}
        return self.cls(files, self.device or best_device())


def check_metrics(settings, sampling):
    """Raise InputError for what is wrong with Settings' metrics, before anything is fetched or drawn.

    sampling: of the artifact. That is unknown metrics, prompts or images that one cannot judge, a missing reference.
    """
    names = settings.metrics
    if len(set(names)) != len(names):
        raise InputError(f"a metric is named twice: {', '.join(names)}")
    for name in names:
        cls = metric_class(name)
        if hasattr(cls, "check_prompts"):
            cls.check_prompts(settings.prompts.prompts)
        if hasattr(cls, "check_sampling"):
            cls.check_sampling(sampling)
        if cls.info.kind == "distance" and settings.reference is None:
            raise InputError(
                f"{name} compares with real images: give a folder of them (for fid also an .npz of statistics) as "
                "--reference, or as the recipe's validate.reference"
            )


def prepare_scorers(names, device=None, checkpoints=None, reference=None):
    """[Scorer] of the metrics named, their checkpoints fetched.

    checkpoints: {"metric.part": path} on this machine. reference: a Reference, for the metrics that need one.
    Raises InputError for checkpoints that are no part of them, SurgeryError for those that cannot be fetched.
    """
    by_metric = {}
    for name, path in (checkpoints or {}).items():
        metric, dot, part = name.rpartition(".")
        if not dot or metric not in names:
            raise InputError(f"--checkpoint {name}={path}: write METRIC.PART=PATH, for one of {', '.join(names)}")
        by_metric.setdefault(metric, {})[part] = path
    classes = {name: metric_class(name) for name in names}
    return [
        Scorer(
            cls,
            fetch_checkpoints(cls.info, by_metric.get(name)),
            device,
            reference if cls.info.kind == "distance" else None,
        )
        for name, cls in classes.items()
    ]


def score(scorer, folder, base, patched, jobs, prompts):
    """(Metric, differences per job or None) of one metric over two sides' images of the same Jobs.

    base, patched: (Side key, {Job key: path}). folder: where values are kept, so that what was scored is not again.
    """
    info = scorer.info
    groups = _texts(jobs)
    named = {
        "name": info.name,
        "title": info.title,
        "kind": info.kind,
        "higher_is_better": info.higher_is_better,
        "n": len(jobs),
        "groups": len(np.unique(groups)),
        "checkpoint": "; ".join(checkpoint.identity for checkpoint in scorer.checkpoints.values()) or None,
        "source": info.source,
    }
    if info.kind == "distance":
        return Metric(**named, **_distances(scorer, folder, base, patched, jobs, groups)), None
    of_patched = _values(scorer, folder, patched, jobs, prompts, base if info.kind == "fidelity" else None)
    if info.kind == "fidelity":
        interval = mean_interval(of_patched, groups)
        categories = [
            Category(
                name=name,
                n=len(of_patched[chosen]),
                groups=len(np.unique(groups[chosen])),
                base=None,
                patched=float(of_patched[chosen].mean()),
                difference=None,
                interval=list(mean_interval(of_patched[chosen], groups[chosen])),
            )
            for name, chosen in _categories(jobs, prompts)
        ]
        figures = {"base": None, "patched": float(of_patched.mean()), "difference": None, "interval": list(interval)}
        return Metric(**named, **figures, categories=categories), of_patched
    of_base = _values(scorer, folder, base, jobs, prompts)
    found = paired(of_base, of_patched, groups, info.higher_is_better)
    categories = []
    for name, chosen in _categories(jobs, prompts):
        part = paired(of_base[chosen], of_patched[chosen], groups[chosen], info.higher_is_better)
        figures = {key: getattr(part, key) for key in ("n", "groups", "base", "patched", "difference")}
        categories.append(Category(name=name, **figures, interval=list(part.interval)))
    names = ("base", "patched", "difference", "win_rate", "tie_rate", "decided")
    figures = {key: getattr(found, key) for key in names}
    return Metric(**named, **figures, interval=list(found.interval), categories=categories), (of_base, of_patched)


def _texts(jobs):
    """The number of each Job's text (n,): images of one text are one observation, wherever in the set it stands."""
    return np.unique([job.prompt for job in jobs], return_inverse=True)[1]


def _categories(jobs, prompts):
    """(name, bool array over the Jobs) of each category, in the order in which they come; none if there is but one."""
    of_job = np.array([prompts[job.index].category for job in jobs])
    names = list(dict.fromkeys(of_job))
    return [(str(name), of_job == name) for name in names if name] if len(names) > 1 else []


def _values(scorer, folder, side, jobs, prompts, other=None):
    """The metric's value of each Job's image (n,), in the order of the Jobs; other: the side to compare with."""
    key, images = side
    name = f"{scorer.info.name}-{key[:12]}" + (f"-{other[0][:12]}" if other else "")
    path = Path(folder) / "values" / f"{name}-{scorer.identity[:12]}.jsonl"
    known = _read_values(path)
    keys = {job: _value_key(job, prompts[job.index]) for job in jobs}
    lacking = list({keys[job]: job for job in jobs if keys[job] not in known}.values())
    with progress_bar(f"{scorer.info.title} of {len(lacking)} images", len(lacking), "images") as advance:
        for start in range(0, len(lacking), _CHUNK):
            some = lacking[start : start + _CHUNK]
            shown = [read_image(images[job.key]) for job in some]
            if other:
                values = scorer.metric.compare(shown, [read_image(other[1][job.key]) for job in some])
            else:
                values = scorer.metric.score(shown, [prompts[job.index] for job in some])
            for job, value in zip(some, values, strict=True):
                if not np.isfinite(value):
                    raise SurgeryError(f"{scorer.info.title} of {images[job.key]} is {value}; look at that image")
                known[keys[job]] = float(value)
            _append(path, {keys[job]: known[keys[job]] for job in some})
            advance(len(some))
    return np.array([known[keys[job]] for job in jobs])


def _value_key(job, prompt):
    """What a value is kept under: of the image, and of what a metric may judge it by."""
    if not prompt.facts:
        return job.key
    facts = json.dumps(prompt.facts, sort_keys=True, ensure_ascii=False)
    return f"{job.key}-{hashlib.sha256(facts.encode()).hexdigest()[:12]}"


def _read_values(path):
    known = {}
    if path.is_file():
        for line in path.read_bytes().splitlines():
            try:
                key, value = parse_json(line)
                if np.isfinite(value):
                    known[key] = float(value)
            except (ValueError, TypeError):  # the last line of a run that was killed while writing it
                continue
    return known


def _append(path, values):
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="utf-8") as file:
            # A line that a killed run left unfinished would swallow the next one.
            file.write("\n" if file.tell() else "")
            file.writelines(json.dumps([key, value]) + "\n" for key, value in values.items())
    except OSError as error:
        raise SurgeryError(
            f"cannot write {path}: {error.strerror}; what was scored so far is kept, run it again"
        ) from error


def _distances(scorer, folder, base, patched, jobs, groups):
    reference = scorer.reference
    known = getattr(reference, "statistics", None)
    if known is None:
        count = reference.count
        known = _features(scorer, folder, f"reference-{reference.sha256[:12]}", reference.images, count)
    features = {
        name: _features(
            scorer,
            folder,
            f"{name}-{side[0][:12]}-{_hash_of(jobs)}",
            lambda images=side[1]: (read_image(images[job.key]) for job in jobs),
            len(jobs),
        )
        for name, side in (("base", base), ("patched", patched))
    }
    metric = scorer.metric
    values = {name: float(metric.distance(array, known)) for name, array in features.items()}
    draws = draws_of_images(groups, _FEATURE_DRAWS)
    with progress_bar(f"{scorer.info.title}: resampling", len(draws), "draws") as advance:
        differences = []
        for start in range(0, len(draws), 10):
            some = draws[start : start + 10]
            differences.append(metric.differences(features["patched"], features["base"], known, some))
            advance(len(some))
    difference = values["patched"] - values["base"]
    interval = normal_interval(difference, np.concatenate(differences))
    return {**values, "difference": difference, "interval": list(interval)}


def _features(scorer, folder, name, images, count):
    """The features (count, d) of an iterable of images, kept once they are all there."""
    path = Path(folder) / "values" / f"features-{name}-{scorer.features_identity[:12]}.npy"
    if path.is_file():
        try:
            known = np.load(path, mmap_mode="r", allow_pickle=False)
            if known.ndim == 2 and len(known) == count:
                return np.asarray(known)
        except (OSError, ValueError, EOFError):  # damaged; it is made anew
            pass
    found, some = [], []
    with progress_bar(f"features of {count} images", count, "images") as advance:
        for image in images():
            some.append(image)
            if len(some) == _CHUNK:
                found.append(scorer.metric.features(some))
                advance(len(some))
                some = []
        if some:
            found.append(scorer.metric.features(some))
    features = np.concatenate(found)
    partial = path.with_suffix(".partial.npy")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(partial, features)
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise SurgeryError(f"cannot write {path}: {error}; free some space and run it again") from error
    return features


def _hash_of(jobs):
    return hashlib.sha256(" ".join(job.key for job in jobs).encode()).hexdigest()[:12]
