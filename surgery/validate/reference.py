"""The images, or the stored statistics of images, that FID and KID measure a distance to."""

import hashlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from surgery.console import progress_bar
from surgery.errors import InputError
from surgery.hub import sha256_of
from surgery.hub.bounded import IMAGE, open_image, read_bytes

if TYPE_CHECKING:
    from PIL import Image

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True, eq=False)
class Statistics:
    """Mean (d,) and covariance (d, d) of a reference set's Inception features, float64."""

    mean: np.ndarray
    covariance: np.ndarray


@dataclass(frozen=True, eq=False)
class ReferenceSet:
    """Image files, or statistics alone (`statistics` is None for images).

    count: of images, None for statistics. sha256: of what is in it, not of the files' names or order: for images of the
    sorted digests of the files, one a line; for statistics of the file.
    """

    name: str
    count: int | None
    sha256: str
    files: tuple[Path, ...] = ()
    statistics: Statistics | None = None

    def images(self) -> "Iterator[Image.Image]":
        """Yield the images one after another as PIL RGB, in the order of their paths."""
        for file in self.files:
            yield _image(file)


def open_reference(path: Path | str) -> ReferenceSet:
    """The ReferenceSet at a path: a folder of png, jpg and webp files, those of its subfolders too, or an .npz file.

    An .npz holds `mu` (d,) and `sigma` (d, d), as `python -m pytorch_fid --save-stats` writes it. Every image is read
    and decoded here, so that a damaged one is found before anything is generated. Raises InputError for a path that is
    neither, a folder of fewer than 2 images, an image that cannot be read, an .npz of another content.
    """
    path = Path(path)
    if path.is_dir():
        return _folder(path)
    if not path.exists():
        raise InputError(f"there is no reference set at {path}; give a folder of images or an .npz of mu and sigma")
    if path.suffix.lower() != ".npz":
        raise InputError(f"{path} is no reference set; give a folder of images or an .npz of mu and sigma")
    return _stored(path)


def _folder(path):
    files = [file for file in path.rglob("*") if file.suffix.lower() in _SUFFIXES and file.is_file()]
    files.sort(key=lambda file: file.relative_to(path).as_posix())
    if not files:
        raise InputError(f"there are no images in {path}; a reference set needs {', '.join(_SUFFIXES)} files")
    if len(files) < 2:
        raise InputError(f"{path} holds 1 image, and a reference set needs 2 at least; thousands make it meaningful")
    digests = []
    with progress_bar(f"reading {path.name}", len(files), "images") as advance:
        for file in files:
            _image(file)
            digests.append(sha256_of(file))
            advance(1)
    sha256 = hashlib.sha256("\n".join(sorted(digests)).encode()).hexdigest()
    return ReferenceSet(path.resolve().name, len(files), sha256, tuple(files))


def _image(file):
    try:
        with open_image(file) as image:
            return image.convert("RGB")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"the reference image {file} cannot be read: {reason}; replace or remove it") from error


def _stored(path):
    import zipfile
    import zlib

    advice = "it must hold `mu` (d,) and `sigma` (d, d), as `python -m pytorch_fid --save-stats` writes them"
    try:
        content = read_bytes(path, IMAGE)
        with zipfile.ZipFile(io.BytesIO(content)) as listed:
            if sum(entry.file_size for entry in listed.infolist()) > IMAGE:
                raise ValueError("what is packed in it is too large")
        with np.load(io.BytesIO(content), allow_pickle=False) as stored:
            mean, covariance = (np.asarray(stored[name], np.float64) for name in ("mu", "sigma"))
    except KeyError as error:
        raise InputError(f"{path} is not a reference set's statistics: {error.args[0]}; {advice}") from error
    except (OSError, ValueError, TypeError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path} cannot be read: {reason}; {advice}") from error
    if mean.ndim != 1 or covariance.shape != (mean.size, mean.size):
        raise InputError(f"{path}: mu has shape {mean.shape} and sigma {covariance.shape}; {advice}")
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise InputError(f"{path} holds values that are not finite; compute it again")
    if not np.allclose(covariance, covariance.T, rtol=1e-4, atol=1e-6 * np.abs(covariance).max()):
        raise InputError(f"{path}: sigma is not symmetric, so it is no covariance; {advice}")
    digest = hashlib.sha256(content).hexdigest()
    return ReferenceSet(path.resolve().name, None, digest, statistics=Statistics(mean, covariance))
