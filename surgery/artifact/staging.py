"""A folder that appears whole or not at all: written under a temporary name beside its place, then renamed.

The temporary name carries the writer's process id, so that the next run can tell what a killed one left behind: a
partial folder is removed, and a folder that was moved aside for replacement is put back.
"""

import errno
import os
import secrets
import shutil
from contextlib import contextmanager
from pathlib import Path

from surgery.errors import InputError, SurgeryError

from .manifest import NAME


@contextmanager
def staged_folder(target, force=False):
    """Yield a temporary folder that becomes `target` when the block ends without an error, and vanishes else.

    Raises InputError if `target` exists and `force` is not given; or if it is not an artifact, which is never
    replaced. SurgeryError says how much space is lacking where the disk is full.
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


def check_target(target, force=False):
    """Raise InputError if `target` may not be written to: see staged_folder."""
    target = Path(target)
    if not target.exists():
        return
    empty = target.is_dir() and not any(target.iterdir())
    if not empty and not (target / NAME).is_file():
        raise InputError(f"{target} exists and is no surgery artifact, so it is never replaced; choose another --out")
    if not force and not empty:
        raise InputError(f"{target} exists already; --force replaces it, --out DIR writes elsewhere")


def check_space(target, needed):
    """Raise SurgeryError if the disk that `target` lies on has less than `needed` bytes free."""
    free = shutil.disk_usage(existing_parent(target)).free
    if free < needed:
        raise _disk_full(target, f"{needed / 1e6:.1f} MB are needed, {free / 1e6:.1f} MB are free")


def _put_in_place(partial, target, force):
    check_target(target, force)  # it may have appeared meanwhile
    aside = target.with_name(f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}.replaced")
    if target.exists():
        os.rename(target, aside)
    try:
        os.rename(partial, target)
    except OSError:
        if aside.exists():
            os.rename(aside, target)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _clean_up_after_killed_runs(target):
    if not target.parent.is_dir():
        return
    for left in target.parent.glob(f".{target.name}.*"):
        owner, _, kind = left.name.removeprefix(f".{target.name}.").partition(".")
        pid = owner.partition("-")[0]
        if kind not in ("partial", "replaced") or not pid.isdigit() or _is_running(int(pid)):
            continue
        if kind == "replaced" and not target.exists():
            os.rename(left, target)
        else:
            shutil.rmtree(left, ignore_errors=True)


def _is_running(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _explained(error, target):
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = shutil.disk_usage(existing_parent(target)).free
        return _disk_full(target, f"it ran full while writing; now {free / 1e6:.1f} MB are free again")
    where = error.filename or target
    return SurgeryError(f"cannot write the artifact: {error.strerror or error} ({where}); nothing was left behind")


def _disk_full(target, figures):
    return SurgeryError(
        f"the disk of {Path(target).parent} is full: {figures}. Nothing was left there. Free some space, or write with "
        "--out to the disk that holds the base: there the weights are linked and take no space"
    )


def existing_parent(target):
    """The nearest folder above `target` that is there."""
    return next(parent for parent in Path(os.path.abspath(target)).parents if parent.is_dir())
