"""One metric over the images of two sides: values per image, kept as they come, and what they say together."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from surgery.artifact.scores import Category, Metric
from surgery.console import progress_bar
from surgery.errors import InputError, SurgeryError
from surgery.hub.bounded import parse_json
from surgery.machine import versions

from .checkpoints import Checkpoint, fetch_checkpoints
from .frames import compared, scored
from .jobs import PairedImages
from .metrics import metric_class
from .metrics.info import Info
from .reference import ReferenceSet
from .statistics import draws_of_images, mean_interval, normal_interval, paired
from .store import read_image

if TYPE_CHECKING:
    from .session import Settings

_CHUNK = 32  # images between two writes of their values
_FEATURE_DRAWS = 100  # bootstrap draws of FID and KID


@dataclass
class Scorer:
    """A metric that is ready to be loaded: its class, its checkpoints fetched. Its model is loaded when needed."""

    cls: type
    checkpoints: dict[str, Checkpoint]
    device: str | None
    reference: ReferenceSet | None = None
    resampled: dict[str, np.ndarray] = field(default_factory=dict)  # a distance over draws, by what it is of

    @property
    def info(self) -> Info:
        """The metric's Info."""
        return self.cls.info

    @property
    def identity(self) -> str:
        """What its values depend on besides the images, as a hash."""
        return self._hash(self.info.name)

    @property
    def features_identity(self) -> str:
        """What its features depend on, which are the same for every metric on the same checkpoint: fid and kid."""
        return self._hash("features")

    def _hash(self, name):
        parts = {part: checkpoint.identity for part, checkpoint in self.checkpoints.items()}
        content = [name, parts, versions()]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @cached_property
    def metric(self) -> Any:
        """The metric itself."""
        from surgery.machine import best_device

        files = {part: checkpoint.path for part, checkpoint in self.checkpoints.items()}
        return self.cls(files, self.device or best_device())


def check_metrics(settings: "Settings", sampling: Mapping[str, Any]) -> None:
    """Raise InputError for what is wrong with Settings' metrics, before anything is fetched or drawn.

    sampling: of the artifact. That is unknown metrics, prompts or images that one cannot judge, a missing reference.
    """
    names = settings.metrics
    if len(set(names)) != len(names):
        raise InputError(f"a metric is named twice: {', '.join(names)}")
    for name in names:
        cls = metric_class(name)
        if cls.info.kind == "score" and not all(prompt.text for prompt in settings.prompts.prompts):
            raise InputError(
                f"{name} judges how well an image fits its prompt, and these prompts are empty: measure fid or kid "
                "with --reference, or how far the images move (ssim, psnr, lpips)"
            )
        if hasattr(cls, "check_prompts"):
            cls.check_prompts(settings.prompts.prompts)
        if hasattr(cls, "check_sampling"):
            cls.check_sampling(sampling)
        if cls.info.kind == "diversity" and settings.images_per_prompt < 2:
            raise InputError(
                f"{name} compares the images of one prompt, and there is one of each; give --images-per-prompt 2"
            )
        if cls.info.kind == "distance" and settings.reference is None:
            raise InputError(
                f"{name} compares with real images: give a folder of them (for fid also an .npz of statistics) as "
                "--reference, or as the recipe's validate.reference"
            )


def prepare_scorers(
    names: Sequence[str],
    device: str | None = None,
    checkpoints: Mapping[str, Path | str] | None = None,
    reference: ReferenceSet | None = None,
) -> list[Scorer]:
    """[Scorer] of the metrics named, their checkpoints fetched.

    checkpoints: {"metric.part": path} on this machine. reference: a ReferenceSet, for the metrics that need one.
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


@dataclass(frozen=True, eq=False)
class MetricResult:
    """A metric over paired images. base, patched: its values (n,) in the order of the pairs, None where it has none.

    draws: a distance's values of the patched side over resampled images.
    """

    metric: Metric
    images: PairedImages
    base: np.ndarray | None = None
    patched: np.ndarray | None = None
    draws: np.ndarray | None = None

    @cached_property
    def own_interval(self) -> tuple[float, float]:
        """The 95% interval of the patched side's own value, `metric.patched`."""
        if self.draws is not None:
            return normal_interval(self.metric.patched, self.draws)
        assert self.patched is not None  # scores and fidelities have values of every image
        return mean_interval(self.patched, _texts([pair.job for pair in self.images.pairs]))


def score(scorer: Scorer, folder: Path | str, images: PairedImages) -> MetricResult:
    """The MetricResult of one metric. folder: where values are kept, so that what was scored is not again."""
    info, jobs = scorer.info, [pair.job for pair in images.pairs]
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
        "margin": info.margin,
    }
    if info.kind == "distance":
        figures, draws = _distances(scorer, folder, images, groups)
        return MetricResult(Metric(**named, **figures), images, draws=draws)
    values = _diversities if info.kind == "diversity" else _values
    of_patched = values(scorer, folder, images, "patched")
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
            for name, chosen in _categories(jobs)
        ]
        figures = {"base": None, "patched": float(of_patched.mean()), "difference": None, "interval": list(interval)}
        return MetricResult(Metric(**named, **figures, categories=categories), images, None, of_patched)
    of_base = values(scorer, folder, images, "base")
    found = paired(of_base, of_patched, groups, info.higher_is_better)
    categories = []
    for name, chosen in _categories(jobs):
        part = paired(of_base[chosen], of_patched[chosen], groups[chosen], info.higher_is_better)
        figures = {key: getattr(part, key) for key in ("n", "groups", "base", "patched", "difference")}
        categories.append(Category(name=name, **figures, interval=list(part.interval)))
    names = ("base", "patched", "difference", "win_rate", "tie_rate", "decided")
    figures = {key: getattr(found, key) for key in names}
    metric = Metric(**named, **figures, interval=list(found.interval), categories=categories)
    return MetricResult(metric, images, of_base, of_patched)


def _texts(jobs):
    """The number of each Job's text (n,): images of one text are one observation, wherever in the set it stands.

    Images of no text are independent of each other.
    """
    return np.unique([job.prompt.text or f"\0{job.key}" for job in jobs], return_inverse=True)[1]


def _categories(jobs):
    """(name, bool array over the Jobs) of each category, in the order in which they come; none if there is but one."""
    of_job = np.array([job.prompt.category for job in jobs])
    names = list(dict.fromkeys(of_job))
    return [(str(name), of_job == name) for name in names if name] if len(names) > 1 else []


def _values(scorer, folder, images, which):
    """The metric's value of the "base" or "patched" image of each pair (n,); fidelity compares it with the base's."""
    compares = scorer.info.kind == "fidelity"
    name = f"{scorer.info.name}-{getattr(images, which).key[:12]}" + (f"-{images.base.key[:12]}" if compares else "")
    path = Path(folder) / "values" / f"{name}-{scorer.identity[:12]}.jsonl"
    known = _read_values(path)
    keys = [_value_key(pair.job) for pair in images.pairs]
    lacking = {key: pair for key, pair in zip(keys, images.pairs, strict=True) if key not in known}
    with progress_bar(f"{scorer.info.title} of {len(lacking)} images", len(lacking), "images") as advance:
        for start in range(0, len(lacking), _CHUNK):
            some = list(lacking.items())[start : start + _CHUNK]
            pairs = [pair for _, pair in some]
            files = [getattr(pair, which) for pair in pairs]
            if compares:
                values = compared(scorer.metric, files, [pair.base for pair in pairs])
            else:
                values = scored(scorer.metric, files, [pair.job.prompt for pair in pairs])
            for file, value in zip(files, values, strict=True):
                if not np.isfinite(value):
                    raise SurgeryError(f"{scorer.info.title} of {file} is {value}; look at that image")
            new = {key: float(value) for (key, _), value in zip(some, values, strict=True)}
            _append(path, new)
            known |= new
            advance(len(some))
    return np.array([known[key] for key in keys])


def _diversities(scorer, folder, images, which):
    """The "base" or "patched" value (n,) of the image of each pair among those of its text; 0 where it is alone."""
    jobs = [pair.job for pair in images.pairs]
    files = [getattr(pair, which) for pair in images.pairs]
    key = f"{getattr(images, which).key[:12]}-{_keys_hash(jobs)}"
    features, groups = _features(scorer, folder, key, map(read_image, files), len(files)), _texts(jobs)
    values = np.zeros(len(files))
    for group in np.unique(groups):
        if (chosen := groups == group).sum() > 1:
            values[chosen] = scorer.metric.of_prompt(features[chosen])
    return values


def _keys_hash(jobs):
    return hashlib.sha256(" ".join(job.key for job in jobs).encode()).hexdigest()[:12]


def _value_key(job):
    """What a value is kept under: of the image, and of what a metric may judge it by."""
    if not job.prompt.facts:
        return job.key
    facts = json.dumps(job.prompt.facts, sort_keys=True, ensure_ascii=False)
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


def _distances(scorer, folder, images, groups):
    reference = scorer.reference
    known = getattr(reference, "statistics", None)
    if known is None:
        count = reference.count
        known = _features(scorer, folder, f"reference-{reference.sha256[:12]}", reference.images(), count)
    jobs = _keys_hash([pair.job for pair in images.pairs])
    values, draws = {}, {}
    for name in ("base", "patched"):
        key = f"{getattr(images, name).key[:12]}-{jobs}"
        files = [getattr(pair, name) for pair in images.pairs]
        features = _features(scorer, folder, key, map(read_image, files), len(files))
        values[name] = float(scorer.metric.distance(features, known))
        draws[name] = _resampled(scorer, key, features, known, groups)
    difference = values["patched"] - values["base"]
    interval = normal_interval(difference, draws["patched"] - draws["base"])
    return {**values, "difference": difference, "interval": list(interval)}, draws["patched"]


def _resampled(scorer, key, features, known, groups):
    """A side's distances over draws (k,), the same images in each draw for every side."""
    if key not in scorer.resampled:
        found = []
        with progress_bar(f"{scorer.info.title}: resampling", _FEATURE_DRAWS, "draws") as advance:
            for value in scorer.metric.resampled(features, known, draws_of_images(groups, _FEATURE_DRAWS)):
                found.append(value)
                advance(1)
        scorer.resampled[key] = np.array(found)
    return scorer.resampled[key]


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
        for image in images:
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
