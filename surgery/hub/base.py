"""The base model: in a folder, or on the Hub at one commit, read through the cache; and what a name means of these."""

import hashlib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from surgery.compat import transport_error
from surgery.console import progress_bar
from surgery.errors import BaseError, BaseNotFoundError, InputError, disk_problem, nearest

from .bounded import files_below, open_file, parse_yaml, read_json, read_text
from .client import bar_up_to, hub_api, one_line, retried
from .listing import INDEX, MODULAR_INDEX, FileEntry, entries_of, index_of, license_of


class LocalBase:
    """A diffusers folder. `files` maps relative paths to sizes; hashes are computed when an artifact is written."""

    kind = "local"
    commit = license = license_link = None

    def __init__(self, folder: str | Path, name: str | None = None) -> None:
        self.folder = Path(folder)
        self.name = name or str(folder)
        if not os.path.isdir(self.folder):
            raise BaseNotFoundError(f"{_no_folder(self.name, self.folder)} (base.pipeline in a recipe)")
        try:
            found = files_below(self.folder)
        except (OSError, ValueError) as error:
            raise BaseError(f"the base folder {self.folder} cannot be listed: {error}; check base.pipeline") from error
        self.files = {
            path: FileEntry(entry.st_size) for path, entry in found.items() if not Path(path).name.startswith(".")
        }
        card = _front_matter(self.folder / "README.md")  # a clone of a Hub repository brings its card
        self.license, self.license_link = license_of(card)

    def path(self, name: str) -> Path:
        """Where the file lies."""
        if name not in self.files:
            raise BaseNotFoundError(f"{self.folder} has no file {name}")
        return self.folder / name

    def read_json(self, name: str) -> dict:
        """The content of a JSON file; BaseError where it is missing or damaged."""
        return read_json_file(self.path(name))


def _front_matter(path):
    """The YAML mapping at the head of a model card, or {} where there is none."""
    import yaml

    try:
        text = read_text(path)
        data = parse_yaml(text.split("---", 2)[1]) if text.startswith("---\n") else {}
    except (OSError, ValueError, IndexError, yaml.YAMLError):
        return {}
    return data if isinstance(data, dict) else {}


def read_json_file(path: str | Path) -> dict:
    """The content of a JSON file on disk; BaseError naming the file where it cannot be read as such."""
    try:
        return read_json(path)
    except (OSError, ValueError) as error:
        raise BaseError(f"{path} cannot be read as JSON: {error}; fetch the base again") from error


def sha256_of(path: str | Path, progress: Callable[[int], object] | None = None) -> str:
    """The sha256 of a file as hex; `progress(bytes)` is called as it goes."""
    digest = hashlib.sha256()
    with open_file(path) as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
            if progress:
                progress(len(chunk))
    return digest.hexdigest()


def sha256_of_all(folder: str | Path, paths: Sequence[str], label: str) -> dict[str, str]:
    """{path: sha256 as hex} of files below a folder, several at a time, under a progress bar with that label."""
    folder = Path(folder)
    total = sum((folder / path).stat().st_size for path in paths)
    with progress_bar(label, total) as advance, ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        return dict(zip(paths, pool.map(lambda path: sha256_of(folder / path, advance), paths), strict=True))


def read_index(place: "str | Path | LocalBase | HubBase") -> dict[str, Any]:
    """What pipeline a folder or base holds: its model_index.json or, of a modular one, modular_model_index.json.

    Raises InputError for a folder that has neither, BaseError where that cannot be read.
    """
    if not isinstance(place, (str, Path)):
        return place.read_json(index_of(place.files) or INDEX)
    if (name := index_of(path.name for path in Path(place).glob("*model_index.json"))) is None:
        raise InputError(f"{place} holds no pipeline: it has no {INDEX}")
    return read_json_file(Path(place, name))


class HubBase:
    """A model repository at a commit. `files` has the sizes and hashes of the Hub's own listing.

    Without a connection, the last snapshot in the local cache stands in for the listing (then sizes are the cache's,
    and `listed` is False).
    """

    kind = "hub"

    def __init__(
        self, repo: str, revision: str | None = None, local_files_only: bool = False, beside: Path = Path()
    ) -> None:
        """beside: where a folder would be that somebody meant, for what is said where there is no such repository."""
        if "/" not in repo:
            raise InputError(_no_folder(repo, beside / repo))
        self._beside = beside / repo
        self.repo, self.name, self.revision = repo, repo, revision
        self.license = self.license_link = None
        self.private = self.gated = self.listed = False
        from huggingface_hub import constants

        if local_files_only or constants.HF_HUB_OFFLINE:
            self._list_cache("no connection was tried (offline mode)")
        else:
            self._list_repository()

    def _list_repository(self):
        from huggingface_hub import errors

        def list_files():
            return hub_api().model_info(self.repo, revision=self.revision, files_metadata=True)

        try:
            info = retried(list_files, retry_connecting=False)
        except errors.GatedRepoError as error:
            raise self._gated() from error
        except errors.RevisionNotFoundError as error:
            raise BaseNotFoundError(
                f"{self.repo} has no revision {self.revision!r}; leave the revision out for its main branch"
            ) from error
        except errors.RepositoryNotFoundError as error:
            raise BaseNotFoundError(
                f"there is no model repository {self.repo} on the Hub, or it is private and you may not see it "
                f"(`hf auth login`); if it is a folder: {_no_folder(self.repo, self._beside)}"
            ) from error
        except errors.HFValidationError as error:
            raise BaseNotFoundError(f"{self.repo!r} cannot be a Hub repository: {one_line(error)}") from error
        except errors.HfHubHTTPError as error:
            raise BaseError(f"the Hub refused the listing of {self.repo}: {one_line(error)}; try again") from error
        except (OSError, transport_error()) as error:
            self._list_cache(one_line(error))
            return
        except (KeyError, TypeError, ValueError) as error:
            raise BaseError(
                f"the Hub's listing of {self.repo} cannot be understood ({type(error).__name__}: {one_line(error)}); "
                "run it again, and if this stays, update huggingface_hub"
            ) from error
        card = info.card_data.to_dict() if info.card_data else {}
        self.commit, self.listed = info.sha, True
        self.private, self.gated = bool(info.private), bool(info.gated)
        self.license, self.license_link = license_of(card)
        self.files = entries_of(info.siblings)

    def _list_cache(self, why):
        from huggingface_hub import errors

        try:
            folder = Path(hub_api().snapshot_download(self.repo, revision=self.revision, local_files_only=True))
        except (errors.LocalEntryNotFoundError, errors.HFValidationError, OSError) as error:
            raise BaseError(
                f"cannot reach the Hub for {self.repo}: {why}; and it is not in the local cache. Check the connection "
                "(and HF_HUB_OFFLINE), then run the same command again; if it is a folder: "
                f"{_no_folder(self.repo, self._beside)}"
            ) from error
        self.commit, self.files = folder.name, {}
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                blob = os.path.basename(os.path.realpath(path))  # LFS blobs are cached under their sha256
                entry = FileEntry(path.stat().st_size, blob if len(blob) == 64 else None)
                self.files[path.relative_to(folder).as_posix()] = entry

    def path(self, name: str) -> Path:
        """Where the file lies in the local cache, after fetching it if it is not there."""
        self._check_name(name)
        bar = bar_up_to(self.files[name].size)

        def fetched(revision):
            return retried(lambda: hub_api().hf_hub_download(self.repo, name, revision=revision, tqdm_class=bar))

        with self._explained(name):
            if name in (INDEX, MODULAR_INDEX) and self.revision != self.commit:
                # By the branch's name too: that records in the cache which commit it is, for a later run offline.
                fetched(self.revision)
            path = Path(fetched(self.commit))
        self._check_content(name, path)
        return path

    def _check_content(self, name, path):
        """Raise BaseError, and forget the file, if a small file is not what its name in the cache says.

        The cache names what is not in large file storage by its git blob id; a download is not checked against it.
        """
        from huggingface_hub.utils.sha import git_hash

        entry, blob = self.files[name], Path(os.path.realpath(path))
        if entry.sha256 is not None or entry.blob is None or blob.name != entry.blob or len(entry.blob) != 40:
            return
        data = blob.read_bytes()
        if entry.blob not in (git_hash(data), hashlib.sha1(data).hexdigest()):
            blob.unlink(missing_ok=True)
            path.unlink(missing_ok=True)
            raise BaseError(f"{name} of {self.repo} arrived damaged and was taken out of the cache; run it again")

    def header(self, name: str) -> dict[str, tuple[str, tuple[int, ...]]]:
        """{tensor name: (dtype by safetensors' name, shape)} of a weight file, by range requests for its header."""
        self._check_name(name)
        with self._explained(name):
            found = retried(lambda: hub_api().parse_safetensors_file_metadata(self.repo, name, revision=self.commit))
        return {tensor: (entry.dtype, tuple(entry.shape)) for tensor, entry in found.tensors.items()}

    def read_json(self, name: str) -> dict:
        """The content of a JSON file of the repository."""
        return read_json_file(self.path(name))

    def _check_name(self, name):
        if name not in self.files:
            raise BaseNotFoundError(f"{self.repo}@{self.commit[:12]} has no file {name}")  # pyright: ignore[reportOptionalSubscript]

    @contextmanager
    def _explained(self, name):
        from huggingface_hub import constants, errors

        try:
            yield
        except errors.GatedRepoError as error:
            raise self._gated() from error
        except errors.SafetensorsParsingError as error:
            raise BaseError(f"{name} of {self.repo} is no safetensors file: {one_line(error)}") from error
        except (errors.HfHubHTTPError, OSError, transport_error()) as error:
            if disk_problem(error):
                raise BaseError(
                    f"{name} of {self.repo} cannot be written to the Hub cache, {constants.HF_HUB_CACHE}: "
                    f"{one_line(error)}; make room or give access there, or set HF_HOME to another disk"
                ) from error
            raise BaseError(
                f"fetching {name} of {self.repo} failed: {one_line(error)}; run the same command again, what has "
                "arrived is kept"
            ) from error

    def _gated(self):
        return BaseError(f"{self.repo} is gated: accept its terms on its Hub page, then `hf auth login` as that user")


def native_resolution(denoiser_config: Mapping, vae_config: Mapping) -> int | None:
    """The side, in pixels, of the square images that a pipeline draws unasked; None where its configs do not tell."""
    sample_size, blocks = denoiser_config.get("sample_size"), vae_config.get("block_out_channels")
    if not isinstance(sample_size, int) or not blocks:
        return None
    return sample_size * 2 ** (len(blocks) - 1)  # the VAE halves the side between every two of its blocks


_REPOSITORY = re.compile(r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?$")


def is_local(name: str) -> bool:
    """Whether a name is written as a folder on this machine: ./x, ../x, ~/x or /x."""
    return name in (".", "..") or name.startswith(("./", "../", "~", "/"))


def local_folder(name: str | Path) -> Path | None:
    """The folder on this machine that `name` is, or None where it is a repository's; InputError where there is none."""
    try:
        folder = Path(name).expanduser()
        if folder.is_dir():
            return folder
    except (OSError, RuntimeError, ValueError) as error:  # a name too long, ~nobody, a zero byte
        raise InputError(f"{str(name)[:100]!r} is no folder: {getattr(error, 'strerror', None) or error}") from error
    if is_local(str(name)):
        raise InputError(_no_folder(str(name)))
    return None


def _no_folder(name, there=None):
    """That there is no such folder, with the one that is nearly called so, as it is written where this one was.

    there: the folder that `name` means, if it is not beside the current one.
    """
    written = Path(name).expanduser()
    there = there or written
    relative = "" if is_local(name) and not name.startswith("./") else "./"
    if os.path.isdir(there):  # and was taken for a repository, as nothing says that it is none
        return f'there is one, which is written "{relative}{written}"'
    try:
        around = [entry.name for entry in there.parent.iterdir() if entry.is_dir()][:1000]
    except OSError:
        around = []
    near = nearest(there.name, around)
    hint = f'; did you mean "{relative}{written.with_name(near)}"?' if near else ";"
    else_hub = "" if is_local(name) else " a Hub repository is written OWNER/NAME"
    return f"there is no folder {str(there)[:200]}{hint}{else_hub}".removesuffix(";")


def open_base(
    name: str, revision: str | None = None, folder: Path = Path(), local_files_only: bool = False
) -> LocalBase | HubBase:
    """The LocalBase or HubBase that `name` means; a relative folder starts at `folder`.

    Raises InputError for what is neither a folder nor OWNER/NAME, BaseError where it cannot be listed.
    """
    if is_local(name):
        if revision:
            raise InputError(f"{name} is a local folder and has no revision; leave base.revision out")
        return LocalBase(Path(folder) / _expanded(name), name)
    if not _REPOSITORY.match(name):
        raise InputError(f"{name!r} is neither a Hub repository (OWNER/NAME) nor a folder (written ./folder)")
    return HubBase(name, revision, local_files_only, Path(folder))


def _expanded(name):
    try:
        return Path(name).expanduser()
    except RuntimeError as error:
        raise InputError(f"{name[:100]!r} is no folder: {error}") from error


def open_weight_file(
    repo: str | None, file: str, revision: str | None = None, folder: Path = Path()
) -> tuple[LocalBase | HubBase, str]:
    """(base, file name) of one weight file: of a Hub repository, or on disk beside the recipe where `repo` is None."""
    if repo is None:
        if revision:
            raise InputError(f"{file} is a local file and has no revision; leave it out, or give its repo")
        path = Path(folder) / _expanded(file)
        if not os.path.isfile(path):
            what = f"the weight file {str(path)[:200]}"
            raise BaseNotFoundError(f"{what} is not there; give `repo` if it lies on the Hub")
        return SingleFile(path, file), path.name
    base = open_base(repo, revision, folder)
    if file not in base.files:
        near = nearest(file, base.files)
        hint = f'; did you mean "{near}"?' if near else ""
        raise BaseNotFoundError(f"{repo} has no file {file}{hint}")
    return base, file


class SingleFile(LocalBase):
    """A base of one file, so that a weight file beside the recipe is listed like one of a repository."""

    license = license_link = None

    def __init__(self, path: Path, name: str) -> None:
        self.folder, self.name = path.parent, name
        self.files = {path.name: FileEntry(path.stat().st_size)}
