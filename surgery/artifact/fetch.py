"""From the name of a model to a local folder that holds all of it: fetched once, checked as it comes.

An artifact's folder is put together from links: its own small files, and weights from wherever they lie already, the
base's entry in the Hub cache included. A link to a weight file is made only after its sha256 was found right, so what
is linked need not be hashed again.
"""

import functools
import os
import secrets
from collections.abc import Collection
from pathlib import Path

from surgery.compat import cached_blob
from surgery.console import progress_bar
from surgery.errors import ArtifactError, BaseError, BaseNotFoundError, InputError, SurgeryError
from surgery.hub import HubBase, select_files, sha256_of
from surgery.hub.base import local_folder, read_index, read_json_file
from surgery.hub.bounded import files_below
from surgery.hub.listing import components_of, index_of, specs_of
from surgery.models.denoisers import DENOISERS

from .manifest import MANIFEST, is_elsewhere, read_manifest, unlisted_files


def model_folder(
    model: str | Path, revision: str | None = None, patched_only: bool = False, recheck: bool = False
) -> Path:
    """The local folder of a model given as folder or Hub id; from the Hub only what it takes to load it is fetched.

    patched_only: of a repository that holds nothing patched no weights are fetched, and InputError is raised.
    recheck: hash again the weights that were found right when they arrived.
    Raises InputError for what is no pipeline, BaseError for a repository that cannot be read, ArtifactError for an
    artifact that was altered or arrived damaged.
    """
    folder = local_folder(model)
    if folder is not None:
        if revision:
            raise InputError(f"{folder} is a local folder and has no revision")
        if not os.path.lexists(folder / MANIFEST):
            return folder
        manifest, here = read_manifest(folder), LocalFiles(folder)
        whole = manifest.weights != "thin" or all((folder / path).is_file() for path in manifest.needed)
        if whole and not unlisted_files(manifest, here.files):
            return folder
        return _put_together(manifest, here, recheck)
    base = HubBase(str(model), revision)
    if MANIFEST in base.files:
        return _put_together(read_manifest(base.path(MANIFEST).parent), base, recheck)
    if (index := index_of(base.files)) is None:
        raise InputError(f"{model} holds no pipeline: it has no model_index.json")
    folder = base.path(index).parent
    configs = [f"{name}/config.json" for name in components_of(base.read_json(index))]
    if patched_only and not any(_is_patched(base.read_json(name)) for name in configs if name in base.files):
        raise _unpatched(model)
    for name in _files_of_a_pipeline(base):
        base.path(name)
    return folder


def engine_folder(
    model: str | Path, folder: Path, revision: str | None = None, keys: Collection[str] | None = None
) -> Path:
    """The folder whose engines/ holds an artifact's engines; of a Hub repository what is asked for is fetched into it.

    folder: what `model_folder` gave. keys: the engines whose files are wanted; of all of them engine.json unless given.
    """
    given = local_folder(model)
    if given is not None:
        return given
    base = HubBase(str(model), revision)
    for path, file in read_manifest(folder).files.items():
        room, _, rest = path.partition("/")
        key, _, name = rest.partition("/")
        if room == "engines" and (name == "engine.json" if keys is None else key in keys):
            _link(_checked(base.path(path), file, path, base.name), folder / path)
    return folder


def saved_components(folder: str | Path) -> list[str]:
    """The patched components of a folder that save_pretrained wrote; InputError if nothing in it is patched."""
    configs = {name: Path(folder) / name / "config.json" for name in components_of(read_index(folder))}
    found = [name for name, path in configs.items() if path.is_file() and _is_patched(read_json_file(path))]
    if not found:
        raise _unpatched(folder)
    return [name for name in DENOISERS if name in found] or found


class LocalFiles:
    """The files of a folder, where a HubBase would have those of a repository."""

    commit = None

    def __init__(self, folder: str | Path) -> None:
        self.name = str(folder)
        self.folder = Path(os.path.abspath(folder))
        try:
            self.files = files_below(folder)
        except (OSError, ValueError) as error:
            raise InputError(f"{folder} cannot be listed: {error}") from error

    def path(self, name: str) -> Path:
        """Where the file lies."""
        return self.folder / name


def _is_patched(config):
    # By the component's own config: a pipeline that was not told of the patch names the stock class.
    return str(config.get("_class_name")).startswith("Pladis")


def _unpatched(model):
    return InputError(
        f"{model} is an unpatched pipeline: load it with diffusers and surgery.patch it, or `surgery apply` a recipe"
    )


def _files_of_a_pipeline(base):
    index = read_index(base)
    folders = {path.partition("/")[0] for path in base.files}
    foreign = specs_of(index).keys() - folders  # which loading fetches from where the index says
    selected = select_files(base.files, {name: value for name, value in index.items() if name not in foreign})
    code = [f"{name}/{library}.py" for name, (library, _) in components_of(index).items()]
    return [
        *(path for files in selected.values() for path in (*files.config, *files.weights, files.index) if path),
        *(path for path in code if path in base.files),
    ]


def _put_together(manifest, origin, recheck):
    """A folder in the Hub cache's assets that holds an artifact whole; `origin` is the HubBase or LocalFiles of it."""
    from huggingface_hub import cached_assets_path, constants

    try:
        folder = Path(cached_assets_path("pladis-surgery", "artifacts", f"{manifest.name}-{manifest.hash[:16]}"))
        _fill(folder, manifest, origin, recheck)
    except (OSError, ValueError) as error:
        raise SurgeryError(
            f"{origin.name} cannot be put together in {constants.HF_ASSETS_CACHE}: {error}; make room or give access "
            "there, or set HF_ASSETS_CACHE to another folder"
        ) from error
    return folder


def _fill(folder, manifest, origin, recheck):
    absent = [path for path in manifest.needed if path not in origin.files]
    partial = manifest.weights == "thin" or (isinstance(origin, HubBase) and not origin.listed)  # offline: the cache
    absent = [path for path in absent if not (partial and is_elsewhere(manifest.needed[path]))]
    if absent:
        raise ArtifactError(
            f"{origin.name} lacks {absent[0]}, which its manifest names; it is not whole, do not load it"
        )
    listed = functools.cache(HubBase)  # a base is listed once, however many of its files are lacking
    with progress_bar("fetching", len(manifest.needed), "files") as advance:
        for path, file in manifest.needed.items():
            target = folder / path
            arrived = file.weights and target.is_symlink() and target.is_file() and target.stat().st_size == file.size
            if recheck or not arrived:
                source, owner = _find(path, file, origin, listed)
                _link(_checked(source, file, path, owner), target)
            advance(1)
    if strangers := unlisted_files(manifest, files_below(folder)):
        raise ArtifactError(f"{folder / strangers[0]} was put there by somebody else; delete that folder of the cache")
    _link(origin.path(MANIFEST), folder / MANIFEST)


def _find(path, file, origin, listed):
    """(path on disk, whose it is) of a file: what the cache has of the base or the artifact, or a download.

    listed(source, revision): the HubBase of a base.
    """
    made_from = file.origin if is_elsewhere(file) else None
    if path in origin.files and not (file.weights and isinstance(origin, HubBase)):
        return origin.path(path), origin.name
    cached = [(origin.name, path, origin.commit)] if isinstance(origin, HubBase) else []
    cached += [(made_from.source, made_from.path, made_from.revision)] if made_from else []
    for repo, name, commit in cached:
        if found := _in_cache(repo, name, commit, file.sha256):
            return found, repo
    if isinstance(origin, HubBase) and path in origin.files:
        return origin.path(path), origin.name
    if made_from is None:
        raise ArtifactError(f"{origin.name} lacks {path}, and its manifest names no repository that has it")
    try:
        return listed(made_from.source, made_from.revision).path(made_from.path), made_from.source
    except BaseNotFoundError as error:
        raise BaseError(
            f"{origin.name} is thin: {path} is fetched from {made_from.source}@{made_from.revision[:12]}, which is not "
            f"to be had: {error}"
        ) from error


def _in_cache(repo, name, commit, expected):
    """The path of a repository's file in the Hub cache, by commit or, from any other commit, by its sha256; or None."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(repo, name, revision=commit)
    except HFValidationError as error:
        raise ArtifactError(f"the manifest names {repo!r}, which cannot be a repository; do not load it") from error
    return Path(found) if isinstance(found, str) else cached_blob(repo, expected)


def _checked(path, file, name, owner):
    """`path`, if its sha256 is the manifest's, else ArtifactError; a damaged blob of the Hub cache is removed."""
    with progress_bar(f"verifying {Path(name).name}", path.stat().st_size if file.weights else 0) as advance:
        actual = sha256_of(path, advance)
    if actual == file.sha256:
        return path
    if _is_damaged_blob(Path(os.path.realpath(path)), actual):
        os.unlink(os.path.realpath(path))
        path.unlink(missing_ok=True)
        removed = " It was taken out of the cache: run the same command again."
    else:
        removed = ""
    raise ArtifactError(
        f"{name} of {owner} is not the file that the manifest names (sha256 {file.sha256[:12]}...): it arrived "
        f"damaged, or was altered.{removed} If this comes again, the repository itself was altered: do not load it"
    )


def _is_damaged_blob(path, actual):
    """Whether a file is a blob of the Hub cache that is not what its own name says it is.

    One that is keeps its place, whatever a manifest says: others use it.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils.sha import git_hash

    cache = Path(os.path.realpath(constants.HF_HUB_CACHE))
    if path.parent.name != "blobs" or path.parents[2] != cache:
        return False
    if len(path.name) == 64:
        return path.name != actual
    return len(path.name) != 40 or path.name != git_hash(path.read_bytes())


def _link(source, target):
    """Make `target` a symbolic link to a file of the cache, in one step, where it is not that already."""
    source = os.path.realpath(source)
    if target.is_symlink() and os.readlink(target) == source:
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")
    os.symlink(source, partial)
    os.replace(partial, target)
