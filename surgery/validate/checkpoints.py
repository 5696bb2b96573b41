"""A metric's checkpoints: fetched before anything is drawn, each known by commit or sha256 afterwards."""

import fnmatch
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from surgery.errors import InputError, SurgeryError
from surgery.hub import sha256_of
from surgery.hub.client import hub_api, one_line, retried, status_of

from .metrics.info import HubFiles, Info


@dataclass(frozen=True)
class Checkpoint:
    """Where a part lies, and what it is: "OWNER/NAME@commit", or a file's name and sha256."""

    path: Path
    identity: str


def fetch_checkpoints(info: Info, given: Mapping[str, Path | str] | None = None) -> dict[str, Checkpoint]:
    """{part: Checkpoint} of a metric's Info; from the Hub or the web unless it is there already.

    given: {part: path} of those that are on this machine. Raises InputError for a part or path that is not there, and
    SurgeryError where one cannot be fetched or is not what its publisher says.
    """
    given = given or {}
    unknown = sorted(set(given) - set(info.checkpoints))
    if unknown:
        parts = ", ".join(info.checkpoints) or "none"
        raise InputError(f"--checkpoint {info.name}.{unknown[0]}: {info.name} has no such part; it has {parts}")
    return {
        part: _given(info, part, given[part]) if part in given else _fetched(info, part, source)
        for part, source in info.checkpoints.items()
    }


def _given(info, part, path):
    path = Path(path).expanduser()
    source = info.checkpoints[part]
    if isinstance(source, HubFiles):
        if not path.is_dir():
            raise InputError(
                f"--checkpoint {info.name}.{part}: there is no folder {path} (with {', '.join(source.files)})"
            )
        there = sorted(
            file for file in path.rglob("*") if file.is_file() and _is_wanted(file.relative_to(path), source)
        )
        if not there:
            raise InputError(f"--checkpoint {info.name}.{part}: {path} holds none of {', '.join(source.files)}")
        hashes = ", ".join(f"{file.relative_to(path).as_posix()} {sha256_of(file)[:12]}" for file in there)
        return Checkpoint(path, f"given by hand ({hashes})")
    if not path.is_file():
        raise InputError(f"--checkpoint {info.name}.{part}: there is no file {path}")
    return Checkpoint(path, f"given by hand ({path.name} {sha256_of(path)[:12]})")


def _is_wanted(path, source):
    return any(fnmatch.fnmatch(path.as_posix(), pattern) for pattern in source.files)


def _fetched(info, part, source):
    how = f"; or give the files: --checkpoint {info.name}.{part}=PATH"
    return _from_hub(info, source, how) if isinstance(source, HubFiles) else _from_web(info, source, how)


def _from_hub(info, source, how):
    def download(**where):
        how = {"revision": source.revision, "allow_patterns": list(source.files), **where}
        return Path(hub_api().snapshot_download(source.repo, **how))

    try:
        folder = _kept(download, source) or retried(download, retry_connecting=False)
    except Exception as error:
        status = status_of(error)
        reason = {
            401: "it is gated or private: ask for access on its page, then `hf auth login`",
            404: "it is not there",
        }
        raise SurgeryError(
            f"{info.title}'s {source.repo} cannot be fetched: {reason.get(status or 0, one_line(error))}{how}"
        ) from error
    if missing := _missing(folder, source):
        raise SurgeryError(f"{source.repo} at {folder.name[:12]} has no {', '.join(missing)}{how}")
    return Checkpoint(folder, f"{source.repo}@{folder.name}")


def _kept(download, source):
    """The folder in the cache if it holds all of a commit's files, which do not change; None else."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = download(local_files_only=True) if source.revision else None
    except LocalEntryNotFoundError:
        return None
    return folder if folder and not _missing(folder, source) else None


def _missing(folder, source):
    there = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    return [name for name in source.files if not any(fnmatch.fnmatch(path, name) for path in there)]


def _from_web(info, source, how):
    from huggingface_hub import cached_assets_path, constants
    from torch.hub import download_url_to_file

    address = urlsplit(source.url)
    folder = cached_assets_path("pladis-surgery", "checkpoints", address.netloc.replace(":", "-"))
    path = folder / Path(address.path).name
    if not path.is_file():
        if constants.HF_HUB_OFFLINE:
            raise SurgeryError(f"{info.title} needs {source.url}, which is not in the cache (offline mode){how}")
        print(f"surgery: fetching {path.name} for {info.title} from {address.netloc}", file=sys.stderr)
        try:
            download_url_to_file(source.url, str(path), hash_prefix=source.sha256 or None, progress=sys.stderr.isatty())
        except Exception as error:
            path.unlink(missing_ok=True)
            raise SurgeryError(f"{info.title}'s {source.url} cannot be fetched: {one_line(error)}{how}") from error
    digest = sha256_of(path)
    if not digest.startswith(source.sha256):
        path.unlink()
        raise SurgeryError(
            f"{path} is damaged (its sha256 is {digest[:12]}); it was removed, run the same command again"
        )
    return Checkpoint(path, f"{path.name} sha256 {digest[:12]}")
