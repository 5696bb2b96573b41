"""A recipe becomes an artifact: plan, write, describe."""

import os
from collections.abc import Sequence
from pathlib import Path

from surgery.artifact import verify_artifact
from surgery.artifact.manifest import MANIFEST, Manifest
from surgery.artifact.write import Artifact, write_artifact
from surgery.errors import ArtifactError
from surgery.export.publish.card import model_card
from surgery.hub import sha256_of
from surgery.recipe.plan import Planned, make_plan


def apply(
    recipe: str | Path, out: str | Path | None = None, *, overrides: Sequence[str] = (), force: bool = False
) -> Artifact:
    """Apply a recipe (a path, or the name of one that ships) and return the Artifact.

    out: the folder to write, `out/<recipe's name>` unless given. overrides: as --set takes them,
    "operations.0.with.scale=1.5". force: replace an artifact that is there.
    Raises RecipeError, BaseError, UnsupportedModelError, InputError, SurgeryError; nothing is left behind then.
    """
    planned = make_plan(recipe, overrides)
    return carry_out(planned, out, force=force)


def carry_out(planned: Planned, out: str | Path | None = None, *, force: bool = False, thin: bool = False) -> Artifact:
    """Write the artifact of a Planned; as `apply` without the planning. thin: without the weights, unfetched."""
    out = default_folder(planned) if out is None else Path(out)
    recipe_file = planned.recipe_file

    def card(manifest):
        return model_card(manifest, recipe_file.recipe.publish, recipe_file.applied_text)

    return write_artifact(planned, out, force, card, thin)


def kept_artifact(planned: Planned, folder: str | Path) -> Path:
    """A folder in `folder` with the artifact of a Planned, named by its plan; written unless it is there already."""
    found = Path(folder) / f"artifact-{planned.plan.hash[:12]}"
    if not same_artifact(planned, found, False):
        carry_out(planned, found, force=True)
    return found


def same_artifact(planned: Planned, out: str | Path, thin: bool) -> Manifest | None:
    """The Manifest of the artifact in `out` if it is just what this Planned would write there, else None.

    So that a run that was cut short while publishing goes on from what it wrote.
    """
    from surgery.machine import versions

    if not os.path.isfile(Path(out) / MANIFEST):
        return None
    try:
        manifest = verify_artifact(out)
    except ArtifactError:
        return None
    same = (
        manifest.plan_hash == planned.plan.hash
        and {name: files.code for name, files in manifest.patched.items()} == planned.plan.code
    )
    same = same and versions().items() <= manifest.versions.items() and (thin or manifest.weights != "thin")
    return manifest if same and _sources_are_the_same(planned, manifest) else None


def _sources_are_the_same(planned, manifest):
    """Whether files in folders still are those that an artifact was made of; the Hub's are pinned by commit."""
    for file in planned.plan.files:
        if file.origin.kind == "surgery" or (
            file.origin.revision and all(lora["revision"] for lora in file.origin.loras)
        ):
            continue
        base, name = planned.sources[file.path]
        rewritten = file.origin.kind in ("converted", "fused")  # then its bytes do not tell
        if rewritten or sha256_of(base.path(name)) != manifest.files[file.path].sha256:
            return False
    return True


def default_folder(planned: Planned) -> Path:
    """Where an artifact goes unless told: out/<name> in the working folder."""
    return Path("out") / planned.plan.name
