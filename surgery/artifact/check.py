"""Whether a folder still is the artifact that its manifest describes."""

from pathlib import Path

from surgery.base import sha256_of
from surgery.errors import ArtifactError
from surgery.progress import progress_bar

from .manifest import read_manifest


def verify_artifact(folder, weights=False):
    """The Manifest of an artifact folder whose files are what it says; ArtifactError naming what is not.

    Sizes of all files, and sha256 of code, buffers, configs and text, always; sha256 of the weights with
    `weights=True`. README.md, scores.json and engines/ may change after the artifact was written.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    checked = {path: file for path, file in manifest.files.items() if path not in ("README.md", "recipe.yaml")}
    for path, file in checked.items():
        on_disk = folder / path
        if not on_disk.is_file():
            raise ArtifactError(f"{on_disk} is missing; build or fetch the artifact again")
        size = on_disk.stat().st_size
        if size != file.size:
            raise ArtifactError(
                f"{on_disk} has {size} bytes, the manifest says {file.size}: cut short or altered; "
                "build or fetch the artifact again"
            )
    hashed = {path: file for path, file in checked.items() if weights or not file.weights}
    with progress_bar("verifying", sum(file.size for file in hashed.values())) as advance:
        for path, file in hashed.items():
            if sha256_of(folder / path, advance) != file.sha256:
                raise ArtifactError(
                    f"{folder / path} is not the file that was written: its sha256 differs from the manifest's "
                    f"({file.sha256[:12]}...); build or fetch the artifact again"
                )
    return manifest
