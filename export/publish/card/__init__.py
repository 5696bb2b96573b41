"""README.md of an artifact: the Hub's model card, filled from the manifest, the recipe and the scores alone."""

from surgery.hub.opening import is_local

from .front import citations, front_matter
from .measured import regression_lines, score_lines
from .sections import (
    cell,
    changes,
    engine_lines,
    headline,
    limits,
    loading,
    origins,
    pictures_lines,
    recipe_lines,
    sampling,
)

__all__ = ["model_card"]


def model_card(
    manifest, publish, recipe="", *, repo=None, scores=None, purpose=(), pictures=(), engines=(), licensing=None
):
    """The card's text: YAML front matter, what it is, how to load it, what was changed, what was measured.

    publish: the recipe's `publish` section; recipe: its text. repo: OWNER/NAME where it goes, None on disk.
    scores: a Scores or None, which the card says; purpose: the metrics that the recipe names as what the surgery is
    for: a significant loss on one is what the card begins with. pictures: those of its `images/` folder. engines: those
    that are published.
    licensing: once checked.
    """
    lines = [
        "---",
        front_matter(manifest, publish, scores, licensing, local=is_local(manifest.base["pipeline"])),
        "---",
        "",
        f"# {cell(manifest.name)}",
        "",
        *regression_lines(scores, purpose),
        *headline(manifest),
        *loading(manifest, repo),
        *engine_lines(engines, repo),
        *sampling(manifest),
        *pictures_lines(pictures),
        *changes(manifest),
        *score_lines(manifest, scores, purpose),
        *origins(manifest, licensing),
        *limits(manifest, scores),
        *recipe_lines(recipe),
        *citations(manifest),
        "## Made with",
        "",
        ", ".join(cell(f"{name} {version}") for name, version in manifest.versions.items())
        + f". Artifact hash `{manifest.hash}`.",
        "",
    ]
    return "\n".join(lines)
