"""The card's YAML: what the Hub searches by, and the scores in its own model-index form."""

from ..licences import find_license

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


def citations(manifest):
    """The section with BibTeX of what the artifact's operators come from."""
    operators = {operation.operator for operation in manifest.operations}
    entries = [_PLADIS, *([_GAG] if operators & {"gag", "anderson"} else []), _ENTMAX]
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


def front_matter(manifest, publish, scores, licensing, local):
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


def pipeline_tag(pipeline_class):
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
    from surgery.hub.opening import is_local

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
            metric_name=f"{metric.title or metric.name} ({_beside(metric)}, n {metric.n})",
            metric_value=metric.patched,
        )
        for metric in scores.metrics
    ]


def _beside(metric):
    return "to the base's images" if metric.base is None else f"base {metric.base:g}"
