"""Images on disk: kept as they are drawn, read back. A video is an animated PNG, so that no pixel of it is lost."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from surgery.artifact.manifest import write_json
from surgery.errors import InputError, SurgeryError, disk_problem
from surgery.hub.bounded import VIDEO, open_image
from surgery.runtime.video import Video, frames_of

if TYPE_CHECKING:
    from PIL.Image import Image

    from .jobs import Job, Side


def read_image(path: str | os.PathLike) -> "Image":
    """The PIL image (RGB) of a drawn PNG; a damaged one is removed, and SurgeryError says so."""
    with _opened(path) as image:
        return image.convert("RGB")


def read_drawn(path: str | os.PathLike) -> "Image | Video":
    """What was drawn: the PIL image (RGB), or the Video, of a PNG; a damaged one as for `read_image`."""
    with _opened(path) as image:
        record = _record(image)
        if "frames" not in record:
            return image.convert("RGB")
        return Video(frames_of(image, record["frames"], record["fps"]), record["fps"])


@contextlib.contextmanager
def _opened(path) -> "Iterator[Image]":
    try:
        with open_image(path, VIDEO) as image:
            yield image
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # the system's, not Pillow's: the file may be well
            raise SurgeryError(f"{path} cannot be read: {error.strerror}; run the same command again") from error
        Path(path).unlink(missing_ok=True)
        raise SurgeryError(
            f"{path} is damaged ({error}) and was removed; run the same command again, which draws it anew"
        ) from error


def _record(image):
    """What the worker that drew an image wrote into its file."""
    try:
        record = json.loads(image.info.get("surgery", "{}"))
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


def is_flagged(path: str | os.PathLike) -> bool:
    """Whether a safety checker blackened the image when it was drawn."""
    try:
        with open_image(path, VIDEO) as image:
            return _record(image).get("flagged") is True
    except (OSError, ValueError):
        return False  # read_image says what is wrong with it


_SCHEMA_VERSION = 1


class ImageStore:
    """The folder images/<name>-<key>/ of a Side: PNG files by Job key, in a folder batch-<number>-<size>-... each.

    The key alone tells what is in it: a side that was drawn under another name is found again.
    """

    def __init__(self, folder: str | os.PathLike, side: "Side") -> None:
        images = Path(folder) / "images"
        known = sorted(images.glob(f"*-{side.key[:16]}"))
        self.folder = known[0] if known else images / f"{side.name}-{side.key[:16]}"
        self.side = side

    def existing(self) -> dict[str, Path]:
        """{Job key: path} of the images that are there."""
        return {path.stem: path for path in self.folder.glob("batch-*/*.png")}

    def batch_sizes(self) -> set[int]:
        """The numbers of images that were drawn at once, as they were asked for."""
        return {int(path.name.split("-")[2]) for path in self.folder.glob("batch-*")}

    def add(self, jobs: "Sequence[Job]", images: Iterable[bytes], size: int) -> None:
        """Keep the PNG files (bytes) of a batch of Jobs. size: how many are drawn at once; the last may be fewer.

        Raises SurgeryError where the disk is full or cannot be written; the batch is not there then, all before it is.
        """
        partial = self.folder / f".{jobs[0].key}.partial"
        try:
            self._begin()
            partial.mkdir(exist_ok=True)
            for job, image in zip(jobs, images, strict=True):
                (partial / f"{job.key}.png").write_bytes(image)
            number = len(list(self.folder.glob("batch-*")))
            os.rename(partial, self.folder / f"batch-{number:06}-{size}-{jobs[0].key[:8]}")
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise _explained(error, self.folder) from error

    def _begin(self):
        self.folder.mkdir(parents=True, exist_ok=True)
        record = self.folder / "side.json"
        if not record.exists():
            content = {"schema_version": _SCHEMA_VERSION, "name": self.side.name, "operations": self.side.operations}
            write_json(record, {**content, **self.side.identity})


def clean_up(folder: str | os.PathLike) -> None:
    """Remove what a killed run left half-written."""
    for left in Path(folder).glob("images/*/.*.partial"):
        shutil.rmtree(left, ignore_errors=True)


@contextlib.contextmanager
def locked(folder: str | os.PathLike) -> Iterator[None]:
    """Hold a validation folder for this process; InputError where another one is at work in it."""
    from filelock import FileLock, Timeout

    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with FileLock(Path(folder) / ".lock", timeout=0):
            clean_up(folder)
            yield
    except Timeout as error:
        raise InputError(f"another process is at work in {folder}; wait for it, or give another --out") from error
    except OSError as error:
        if disk_problem(error) is None:
            raise
        raise _explained(error, folder) from error


def _explained(error, folder):
    if disk_problem(error) == "no access":
        return InputError(f"{folder} cannot be written to ({error.strerror}); give another folder with --out")
    if disk_problem(error) == "full":
        return SurgeryError(
            f"the disk of {folder} is full. What was drawn so far is kept: free some space and run the same command "
            "again, it goes on from there"
        )
    return SurgeryError(f"cannot write to {folder}: {error.strerror or error}; what was drawn so far is kept")
