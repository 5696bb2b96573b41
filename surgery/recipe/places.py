"""Where the files of a base's components lie: each in a folder of its own or, of a modular pipeline, wherever its index
has it loaded from, which may be another repository.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from surgery.errors import BaseError
from surgery.hub import FileEntry, HubBase, LocalBase, open_base
from surgery.hub.base import is_local
from surgery.hub.listing import SOURCE, specs_of

Base = LocalBase | HubBase


@dataclass(frozen=True)
class Places:
    """files: {path in an artifact: its FileEntry}. sources: {such a path: (Base, path there)} where they differ."""

    files: Mapping[str, FileEntry]
    sources: Mapping[str, tuple[Base, str]] = field(default_factory=dict)

    def source_of(self, path: str, base: Base) -> tuple[Base, str]:
        """(Base, path there) of a path in an artifact of `base`."""
        return self.sources.get(path, (base, path))


def present(base: Base, index: Mapping) -> dict:
    """A base's index without the components that it has nowhere: those that a pipeline was saved without."""
    absent = {
        name
        for name, spec in specs_of(index).items()
        if spec.get(SOURCE) is None
        and not any(path.startswith(f"{spec.get('subfolder') or name}/") for path in base.files)
    }
    return {name: value for name, value in index.items() if name not in absent}


def places_of(base: Base, index: Mapping) -> Places:
    """The Places of all files of a base whose index is `index`.

    Raises BaseError where a component is to come from a folder that is not here, or from a repository that is not.
    """
    specs = specs_of(index)
    if not specs:
        return Places(base.files)
    opened: dict[tuple, Base] = {}
    files, sources = {}, {}
    for name, spec in specs.items():
        place, folder = _place(base, name, spec, opened)
        start = f"{folder}/" if folder else ""
        for path, entry in place.files.items():
            below = path.removeprefix(start)
            if path.startswith(start) and "/" not in below:
                files[f"{name}/{below}"] = entry
                sources[f"{name}/{below}"] = (place, path)
    return Places(files, sources)


def _place(base, name, spec, opened):
    """(Base, folder in it) of one component. What lies in the base itself is taken from there, as diffusers does."""
    folder, source, revision = (spec.get(key) for key in ("subfolder", SOURCE, "revision"))
    folder = folder or ("" if source else name)
    inside = any(path.startswith(f"{folder}/") for path in base.files) if folder else False
    if source in (None, base.name) or (inside and base.kind == "local"):
        return base, folder
    if not isinstance(revision, str | None) or not isinstance(folder, str):
        raise BaseError(f"{base.name}: its index does not say where {name} comes from; fetch the base again")
    if not isinstance(source, str) or is_local(source) or (base.kind == "local" and source.count("/") != 1):
        raise BaseError(
            f"{base.name}: its index has {name} come from {source!r}, which is not here; save the pipeline again, with "
            "all of its components"
        )
    key = (source, revision)
    opened[key] = opened.get(key) or open_base(source, revision)
    return opened[key], folder
