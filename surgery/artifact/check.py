"""Whether a folder still is the artifact that its manifest describes."""

from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path

from surgery.errors import ArtifactError
from surgery.hub import sha256_of_all
from surgery.hub.foreign import damage_of

from .manifest import MANIFEST, NOT_HASHED, Manifest, ManifestFile, read_manifest

_TEXTS = (".md", ".png", ".jpg", ".jpeg", ".webp", ".pdf", ".html")  # which nothing loads


def verify_artifact(folder: str | Path, weights: bool = False) -> Manifest:
    """The Manifest of an artifact folder whose files are what it says; ArtifactError naming what is not.

    Sizes of all files, the headers of weights, and sha256 of code, buffers and configs, always; sha256 of the weights
    with `weights=True`.
    README.md, recipe.yaml, scores.json, images/ and engines/ may change after the artifact was written. The base's own
    files in a thin artifact may lie elsewhere; those that are there are checked.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    checked = dict(manifest.needed)
    if manifest.weights == "thin":
        checked = {path: file for path, file in checked.items() if (folder / path).exists() or not is_elsewhere(file)}
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
    hashed = [path for path, file in checked.items() if weights or not file.weights]
    for path, digest in sha256_of_all(folder, hashed, "verifying").items():
        if digest != checked[path].sha256:
            raise ArtifactError(
                f"{folder / path} is not the file that was written: its sha256 differs from the manifest's "
                f"({checked[path].sha256[:12]}...); build or fetch the artifact again"
            )
    for path in checked:
        if path.endswith(".safetensors") and (problem := damage_of(folder / path)):
            raise ArtifactError(f"{folder / path} is damaged: {problem}; build or fetch the artifact again")
    return manifest


def unlisted_files(manifest: Manifest, paths: Iterable[str]) -> list[str]:
    """Of an artifact's paths those that surgery.json does not list and diffusers or transformers would read.

    A second index swaps the weights, an adapter_config.json loads an adapter: what is not listed is never loaded.
    """
    folders = {path.rpartition("/")[0] for path in manifest.needed} - {""}
    return [
        path
        for path in sorted(set(paths) - {MANIFEST, *manifest.files})
        if not path.startswith(NOT_HASHED)
        and not path.rpartition("/")[2].startswith(".")
        and (path.endswith(".json") or any(path.startswith(f"{folder}/") for folder in folders))
        and not path.endswith(_TEXTS)
    ]


def foreign_code(model_index: Mapping, component: str) -> str | None:
    """What in a model_index.json would have code of the repository run besides the denoiser's own; None if nothing."""
    if not isinstance(model_index.get("_class_name"), str):
        return "names a pipeline class of its own"
    for name, value in model_index.items():
        if name.startswith("_") or not isinstance(value, list) or not value or not isinstance(value[0], str):
            continue
        own = name == component and str(value[0]).startswith("modeling_pladis_")
        if value[0] not in ("diffusers", "transformers") and not own and not _is_pipeline_module(value[0]):
            return f"takes {name} from {value[0]!r}, which is neither diffusers nor transformers"
    return None


def _is_pipeline_module(name):
    """Whether diffusers itself has a module of that name beside its pipelines, such as stable_diffusion."""
    return isinstance(name, str) and name.isidentifier() and find_spec(f"diffusers.pipelines.{name}") is not None


def is_elsewhere(file: ManifestFile) -> bool:
    """Whether a file of a manifest can be had, byte for byte, from the repository that it comes from."""
    return file.origin.kind in ("base", "component") and file.origin.revision is not None
