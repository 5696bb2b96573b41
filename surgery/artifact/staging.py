"""A folder that appears whole or not at all: written under a temporary name beside its place, then renamed.

The temporary name carries the writer's process id, so that the next run can tell what a killed one left behind: a
partial folder is removed, and a folder that was moved aside for replacement is put back.
"""

import os
import re
import secrets
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from surgery.errors import ArtifactError, InputError, SurgeryError, disk_problem

from .manifest import MANIFEST, read_manifest, replace_file
from .scores import SCORES, read_scores

_LEFT_BEHIND = re.compile(r"(\d+)-[0-9a-f]{8}\.(partial|replaced)")


@contextmanager
def staged_folder(target: str | Path, force: bool = False) -> Iterator[Path]:
    """Yield a temporary folder that becomes `target` when the block ends without an error, and vanishes else.

    What lies in an artifact that is replaced, and its surgery.json does not list, is the user's and stays; but scores
    of that very artifact go with it.
    Raises InputError if `target` exists and `force` is not given; or if it is not an artifact, which is never
    replaced; or if something of the user's lies where a file is to be written. SurgeryError says how much space is
    lacking where the disk is full.
    """
    target = Path(os.path.realpath(target))  # a link to a folder stays a link to it
    _clean_up_after_killed_runs(target)
    check_target(target, force)
    # Process ids repeat (in containers after every start), and threads share one.
    partial = target.with_name(f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")
    try:
        partial.mkdir(parents=True)
        yield partial
        _put_in_place(partial, target, force)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise _explained(error, target) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_target(target: str | Path, force: bool = False) -> None:
    """Raise InputError if `target` may not be written to: see staged_folder."""
    target = Path(target)
    if "\0" in str(target):
        raise InputError("--out holds a zero byte, which no name may")
    if not os.path.lexists(target):
        return
    if target.is_dir() and not any(target.iterdir()):
        return
    try:
        read_manifest(target)
    except ArtifactError as error:
        raise InputError(
            f"{target} exists and is no surgery artifact, so it is never replaced; choose another --out ({error})"
        ) from error
    if not force:
        raise InputError(f"{target} exists already; --force replaces it, --out DIR writes elsewhere")


def check_space(target: str | Path, needed: int) -> None:
    """Raise SurgeryError if the disk that `target` lies on has less than `needed` bytes free."""
    free = shutil.disk_usage(existing_parent(target)).free
    if free < needed:
        raise _disk_full(target, f"{needed / 1e6:.1f} MB are needed, {free / 1e6:.1f} MB are free")


def _put_in_place(partial, target, force):
    check_target(target, force)  # it may have appeared meanwhile
    aside = target.with_name(f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}.replaced")
    if target.exists():
        if any(target.iterdir()):
            keep_others(target, partial, _own_files(target))
        os.rename(target, aside)
    try:
        os.rename(partial, target)
    except OSError:
        if aside.exists():
            os.rename(aside, target)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _own_files(folder):
    manifest = read_manifest(folder)
    own = {MANIFEST, *manifest.files}
    # Up to 0.2.0 `surgery validate` did not list it. Of another artifact, or no scores at all, it is somebody's file.
    with suppress(ArtifactError):
        if read_scores(folder, manifest.hash):
            own.add(SCORES)
    return own


def keep_others(old: Path, new: Path, own: Collection[str]) -> None:
    """Have everything in a folder whose path is not among `own` in another folder as well, linked where links work.

    Raises InputError where something lies there already.
    """
    for place, folders, names in os.walk(old, onerror=_raise):
        below = Path(place).relative_to(old)
        links = [name for name in folders if Path(place, name).is_symlink()]
        for name in (*names, *links):
            source, target = Path(place, name), new / below / name
            if (below / name).as_posix() in own:
                continue
            if os.path.lexists(target) or not _can_hold(new, below):
                raise InputError(f"{source} is no file of the artifact's, but the new one has one there; move it away")
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(source, target, follow_symlinks=False)
            except OSError:  # a filesystem without links, a file of somebody else's
                shutil.copy2(source, target, follow_symlinks=False)
        if place != str(old) and not folders and not names and _can_hold(new, below):
            (new / below).mkdir(parents=True, exist_ok=True)


def _raise(error):
    raise error


def _can_hold(folder, below):
    return all(not os.path.lexists(folder / part) or (folder / part).is_dir() for part in (below, *below.parents))


def _clean_up_after_killed_runs(target):
    if not os.path.isdir(target.parent):  # which takes a name that is too long, unlike Path
        return
    for left in target.parent.iterdir():
        start, _, rest = left.name.partition(f".{target.name}.")
        found = _LEFT_BEHIND.fullmatch(rest)
        if start or not found or _is_running(int(found[1])):
            continue
        if found[2] == "replaced" and not target.exists():
            os.rename(left, target)
        else:
            shutil.rmtree(left, ignore_errors=True)


def write_file(path: Path, data: bytes, full: str) -> None:
    """Write one file whole, in folders that are made; SurgeryError or InputError where that cannot be.

    full: what to say of a full disk behind "the disk is full".
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, data)
    except OSError as error:
        raise unwritten(path, error, full) from error


def unwritten(what: object, error: OSError, full: str) -> SurgeryError:
    """The error to raise where something cannot be written; what, full: as in "cannot write to x", `write_file`."""
    if disk_problem(error) == "full":
        return SurgeryError(f"cannot write {what}: the disk is full; {full}")
    return InputError(f"cannot write {what}: {error.strerror or error}")


def _is_running(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _explained(error, target):
    if disk_problem(error) == "full":
        free = shutil.disk_usage(existing_parent(target)).free
        return _disk_full(target, f"it ran full while writing; now {free / 1e6:.1f} MB are free again")
    where = error.filename or target
    return SurgeryError(f"cannot write the artifact: {error.strerror or error} ({where}); nothing was left behind")


def _disk_full(target, figures):
    return SurgeryError(
        f"the disk of {Path(target).parent} is full: {figures}. Nothing was left there. Free some space, or write with "
        "--out to the disk that holds the base: there the weights are linked and take no space"
    )


def existing_parent(target: str | Path) -> Path:
    """The nearest folder above `target` that is there."""
    return next(parent for parent in Path(os.path.abspath(target)).parents if os.path.isdir(parent))
