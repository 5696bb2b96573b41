"""Which compiled engines of an artifact are published: whole ones, built of this very artifact."""

from surgery.engines.fitting import engine_files
from surgery.engines.record import ENGINES_FOLDER, check_files, read_engine
from surgery.errors import ArtifactError


def published_engines(folder, manifest):
    """[(folder of an engine, Engine)]; what a build that was cut short left behind is no engine.

    Raises ArtifactError for one that was changed, or built of another artifact.
    """
    found = []
    for path in engine_files(folder):
        engine = read_engine(path.parent)
        if engine.artifact_hash != manifest.hash:
            raise ArtifactError(
                f"{path.parent} was built of another artifact ({engine.artifact_hash[:12]}, this is "
                f"{manifest.hash[:12]}); delete it, or build it again with `surgery export`"
            )
        check_files(path.parent, engine, manifest)
        found.append((path.parent, engine))
    return found


def files_of(folder, engines):
    """Paths of all files of the engines, and of what else lies in the folder but is no leftover of a build."""
    owned = [path for place, _ in engines for path in sorted(place.iterdir())]
    others = [path for path in sorted((folder / ENGINES_FOLDER).glob("*")) if path.is_symlink() or path.is_file()]
    return [*owned, *others]
