"""README.md of an artifact: the Hub's model card, filled from the manifest, the recipe and the scores alone."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from surgery.console import sampling_text
from surgery.hub.base import is_local

from .card_sections import (
    cell,
    changes,
    code,
    endpoint_lines,
    engine_lines,
    headline,
    limits,
    loading,
    origins,
    pictures_lines,
    recipe_lines,
    sampling,
)
from .licences import Licensing, find_license

if TYPE_CHECKING:
    from surgery.artifact.manifest import Manifest
    from surgery.artifact.scores import Metric, Scores
    from surgery.engines.record import Engine
    from surgery.recipe.schema import Publish

    from .content import Picture


def model_card(
    manifest: "Manifest",
    publish: "Publish",
    recipe: str = "",
    *,
    repo: str | None = None,
    scores: "Scores | None" = None,
    purpose: Sequence[str] = (),
    pictures: "Sequence[Picture]" = (),
    engines: "Sequence[Engine]" = (),
    licensing: Licensing | None = None,
    endpoint: bool = False,
) -> str:
    """The card's text: YAML front matter, what it is, how to load it, what was changed, what was measured.

    publish: the recipe's `publish` section; recipe: its text. repo: OWNER/NAME where it goes, None on disk.
    scores: a Scores or None, which the card says; purpose: the metrics that the recipe names as what the surgery is
    for: a significant loss on one is what the card begins with. pictures: those of its `images/` folder. engines: those
    that are published.
    licensing: once checked. endpoint: whether handler.py is beside it.
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
        *(endpoint_lines() if endpoint else []),
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


def regression_lines(scores: "Scores | None", purpose: Sequence[str]) -> list[str]:
    """The card's first lines where the patch hurts the model; none where it does not, or nothing was measured."""
    worse = scores.regressions(purpose) if scores else []
    if not worse:
        return []
    return [
        "> [!WARNING]",
        "> **This patch makes the model significantly worse than its untouched base** on "
        f"{cell(regression_text(worse))}. It is published as it was measured: see Scores.",
        "",
    ]


def regression_text(worse: "Iterable[Metric]") -> str:
    """ "Shape alignment (0.565 to 0.473, 95% interval of the difference -0.13 to -0.053)", with commas between."""
    return ", ".join(
        f"{metric.title or metric.name} ({metric.base:.4g} to {metric.patched:.4g}, 95% interval of the difference "
        f"{metric.interval[0]:+.3g} to {metric.interval[1]:+.3g}, n {metric.counted})"
        for metric in worse
    )


def score_lines(manifest: "Manifest", scores: "Scores | None", purpose: Sequence[str] = ()) -> list[str]:
    """The section on what was measured, and on what of the recipe's purpose was not."""
    if scores is None:
        return ["## Scores", "", "Not scored: nothing has been measured for this artifact.", ""]
    sets = ", ".join(
        cell(f"{prompts.name} ({prompts.count} prompts{f', sha256 {prompts.sha256[:12]}' if prompts.sha256 else ''})")
        for prompts in scores.prompts
    )
    worse = [_title(metric) for metric in scores.metrics if metric.verdict == "worse"]
    lines = [
        "## Scores",
        "",
        "Base and patched images share prompts and seeds. The difference is patched minus base, with its 95% "
        "confidence interval; where it holds zero and is wider than what matters in practice, so many prompts "
        "cannot tell.",
        "",
    ]
    unmeasured = [name for name in purpose if name not in [metric.name for metric in scores.metrics]]
    if unmeasured:
        names = cell(", ".join(unmeasured))
        lines += [f"**Not measured: {names}**, which the recipe names as the surgery's purpose.", ""]
    if worse:
        lines += [f"**Worse than the base on {', '.join(worse)}.**", ""]
    sided = [metric for metric in scores.metrics if metric.kind != "fidelity"]
    if sided:
        lines += [
            "| metric | better is | base | patched | difference | 95% interval | wins | n | verdict |",
            "|---|---|---|---|---|---|---|---|---|",
            *(_row(metric) for metric in sided),
            "",
        ]
    lines += [
        *_category_lines(scores),
        *_fidelity_lines(scores),
        f"Prompts: {sets}; {scores.images_per_prompt} image{'s' if scores.images_per_prompt != 1 else ''} each"
        + (f", seeds: {cell(str(scores.seeds))}" if scores.seeds else "")
        + ".",
        f"Left out: {scores.excluded} pairs in which a safety checker blackened an image." if scores.excluded else "",
        _reference_line(scores.reference) if scores.reference else "",
        f"Sampling: {cell(sampling_text(scores.sampling))}." if scores.sampling else "",
        f"Measured {cell(scores.date)} on {cell(scores.hardware)}, with "
        + ", ".join(f"{cell(name)} {cell(version)}" for name, version in scores.versions.items())
        + f"; artifact hash {code(scores.artifact_hash)}"
        + (", which is this one." if scores.artifact_hash == manifest.hash else "."),
        "",
    ]
    checkpoints = [f"{_title(metric)}: {cell(metric.checkpoint)}" for metric in scores.metrics if metric.checkpoint]
    lines = [line for line, before in zip(lines, ["x", *lines], strict=False) if line or before]  # no empty line twice
    return [*lines, *([f"Scored by {'; '.join(checkpoints)}.", ""] if checkpoints else [])]


def _title(metric):
    return cell(metric.title or metric.name)


def _row(metric):
    low, high = metric.interval
    wins = f"{100 * metric.win_rate:.1f}%" if metric.win_rate is not None else ""
    direction = "higher" if metric.higher_is_better else "lower"
    return (
        f"| {_title(metric)} | {direction} | {metric.base:.4g} | {metric.patched:.4g} | {metric.difference:+.4g} | "
        f"{low:+.4g} to {high:+.4g} | {wins} | {metric.counted} | {metric.verdict} |"
    )


def _category_lines(scores):
    """What each category's base and patched values are, where a metric has categories."""
    lines = []
    for metric in scores.metrics:
        if metric.kind == "fidelity" or not metric.categories:
            continue
        parts = "; ".join(
            f"{cell(part.name)} {part.base:.4g} to {part.patched:.4g} "
            f"({part.interval[0]:+.3g} to {part.interval[1]:+.3g})"
            for part in metric.categories
        )
        lines += [f"{_title(metric)} by category, base to patched (95% interval of the difference): {parts}.", ""]
    return lines


def _fidelity_lines(scores):
    """How far the patch moves the images from the base's own."""
    found = [metric for metric in scores.metrics if metric.kind == "fidelity"]
    if not found:
        return []
    parts = "; ".join(
        f"{_title(metric)} {metric.patched:.4g} ({metric.interval[0]:.4g} to {metric.interval[1]:.4g})"
        for metric in found
    )
    return [f"How near the patched images are to the base's of the same seed, mean and 95% interval: {parts}.", ""]


def _reference_line(reference):
    count = f"{reference.count} images" if reference.count else "stored statistics"
    return f"Compared with: {cell(reference.name)} ({count}, sha256 {cell(reference.sha256[:12])})."


_PLADIS = """@article{kim2025pladis,
  title   = {{PLADIS}: Pushing the Limits of Attention in Diffusion Models at Inference Time by Leveraging Sparsity},
  author  = {Kim, Kwanyoung and Sim, Byeongsu},
  journal = {arXiv preprint arXiv:2503.07677},
  year    = {2025}
}"""
_GAG = """@article{kim2026gag,
  title   = {Geometry-Aware Attention Guidance for Diffusion Models via Modern Hopfield Dynamics},
  author  = {Kim, Kwanyoung},
  journal = {arXiv preprint arXiv:2603.02531},
  year    = {2026}
}"""
_ENTMAX = """@inproceedings{peters2019entmax,
  title     = {Sparse Sequence-to-Sequence Models},
  author    = {Peters, Ben and Niculae, Vlad and Martins, Andr{\\'e} F. T.},
  booktitle = {Proceedings of ACL},
  year      = {2019},
  note      = {arXiv:1905.05702}
}"""


def citations(manifest: "Manifest") -> list[str]:
    """The section with BibTeX of what the artifact's operators come from."""
    operators = {operation.operator for operation in manifest.operations}
    entries = [_PLADIS, *([_GAG] if any(o == "gag" or o.startswith("anderson") for o in operators) else []), _ENTMAX]
    return [
        "## Cite",
        "",
        "What these papers report is their authors' measurement, on their own set-up; it is not quoted here, and none "
        "of it was measured for this artifact unless it stands under Scores.",
        "",
        "```bibtex",
        *entries,
        "```",
        "",
    ]


def front_matter(
    manifest: "Manifest", publish: "Publish", scores: "Scores | None", licensing: Licensing | None, local: bool
) -> str:
    """The YAML between the card's dashes. local: whether the base lies on a disk and has no page to link to."""
    from huggingface_hub import ModelCardData

    operators = list(dict.fromkeys(operation.operator for operation in manifest.operations))
    tags = ["pladis", *(["gag"] if "gag" in operators else []), "training-free", "diffusers", *publish.tags]
    data = ModelCardData(
        **_license_of(manifest, licensing),
        library_name="diffusers",
        pipeline_tag=pipeline_tag(manifest.base.get("pipeline_class") or ""),
        tags=tags,
        **({} if local else _base_model(manifest)),
        **({"model_name": manifest.name, "eval_results": _eval_results(manifest, scores)} if scores else {}),
    )
    return data.to_yaml(line_break="\n")


def pipeline_tag(pipeline_class: str) -> str:
    """The Hub's task of a diffusers pipeline class."""
    if any(word in pipeline_class for word in ("Img2Img", "Inpaint", "Upscale", "Edit", "Kontext", "Depth2Img")):
        return "image-to-image"
    if any(word in pipeline_class for word in ("Video", "Mochi", "Wan", "LTX", "CogVideo", "AnimateDiff")):
        return "image-to-video" if "ImageToVideo" in pipeline_class else "text-to-video"
    return "text-to-image"


def _base_model(manifest):
    """base_model, and its relation: the weights are the base's and a few scalars go on top, unless some are merged."""
    weights = [file for file in manifest.files.values() if file.weights]
    others = [file.origin.source for file in weights if file.origin.source != manifest.base["pipeline"]]
    others += [lora["source"] for file in weights for lora in file.origin.loras]
    models = list(dict.fromkeys([manifest.base["pipeline"], *filter(_on_the_hub, others)]))
    merged = len(models) > 1 or any(file.origin.kind == "fused" for file in weights)
    return {"base_model": models, "base_model_relation": "merge" if merged else "adapter"}


def _on_the_hub(source):
    return source and not is_local(source) and source.count("/") == 1


def _license_of(manifest, licensing):
    # Before anything is published nobody has looked at the licence: the card on disk says what the base's card says.
    stated = licensing.id if licensing else manifest.base.get("license")
    link = licensing.link if licensing else manifest.base.get("license_link")
    known = find_license(stated)
    if (known and known.listed) or not stated:
        name = {"license": known.id if known else "unknown"}
    else:
        name = {"license": "other", "license_name": stated}
    return name | ({"license_link": link} if link else {})


def _eval_results(manifest, scores):
    from huggingface_hub import EvalResult

    sets = " + ".join(prompts.name for prompts in scores.prompts)
    first = scores.prompts[0]
    return [
        EvalResult(
            task_type=pipeline_tag(manifest.base.get("pipeline_class") or ""),
            dataset_type=first.source or first.name,
            dataset_name=sets,
            dataset_revision=first.revision,
            metric_type=metric.name.lower(),
            metric_name=f"{metric.title or metric.name} ({_beside(metric)}, n {metric.counted})",
            metric_value=metric.patched,
        )
        for metric in scores.metrics
    ]


def _beside(metric):
    return "to the base's images" if metric.base is None else f"base {metric.base:g}"
