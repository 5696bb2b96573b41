"""A recipe becomes an artifact: plan, write, describe."""

from pathlib import Path

from surgery.artifact import write_artifact
from surgery.export.card import model_card
from surgery.plan import make_plan


def apply(recipe, out=None, *, overrides=(), force=False):
    """Apply a recipe (a path, or the name of one that ships) and return the Artifact.

    out: the folder to write, `out/<recipe's name>` unless given. overrides: as --set takes them,
    "operations.0.with.scale=1.5". force: replace an artifact that is there.
    Raises RecipeError, BaseError, UnsupportedModelError, InputError, SurgeryError; nothing is left behind then.
    """
    planned = make_plan(recipe, overrides)
    return carry_out(planned, out, force=force)


def carry_out(planned, out=None, *, force=False):
    """Write the artifact of a Planned; as `apply` without the planning."""
    out = default_folder(planned) if out is None else Path(out)
    tags = planned.recipe_file.recipe.publish.tags
    return write_artifact(planned, out, force, card=lambda manifest: model_card(manifest, tags))


def default_folder(planned):
    """Where an artifact goes unless told: out/<name> in the working folder."""
    return Path("out") / planned.plan.name
