"""README.md of an artifact: the Hub's model card, filled from the manifest alone."""

import yaml

from surgery.base.opening import is_local

_PAPER = "PLADIS (Kim et al. 2025, arXiv 2503.07677)"


def model_card(manifest, tags=()):
    """The card's text: YAML front matter, how to load it, what was changed, where the weights come from."""
    base = manifest.base
    local = is_local(base["pipeline"])
    front = {
        "license": base.get("license") or "unknown",
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        **({} if local else {"base_model": base["pipeline"]}),
        "tags": ["pladis", "training-free", *tags],
    }
    replaced = sum(len(operation.layers) for operation in manifest.operations)
    lines = [
        "---",
        yaml.safe_dump(front, sort_keys=False).strip(),
        "---",
        "",
        f"# {manifest.name}",
        "",
        manifest.summary or "",
        "",
        f"{base['pipeline']}{_at(base)} with {replaced} of its cross-attention modules replaced by {_PAPER}, eq. 15: "
        "`((1 - scale) softmax(z) + scale entmax_alpha(z)) V`. Training-free: "
        f"{_weights_sentence(manifest)}",
        "",
        "## Load it",
        "",
        "```python",
        "import surgery",
        "",
        'pipe = surgery.load("./FOLDER")  # this folder, or the repository as OWNER/NAME; runs no remote code',
        "```",
        "",
        "or without the package:",
        "",
        "```python",
        "from diffusers import DiffusionPipeline",
        "",
        f'pipe = DiffusionPipeline.from_pretrained("./FOLDER"{_variant(manifest)}, trust_remote_code=True)',
        "```",
        "",
        *_sampling(manifest),
        "## What was changed",
        "",
        "| operator | alpha | scale | temperature | modules |",
        "|---|---|---|---|---|",
        *(
            f"| {o.operator} | {o.alpha:g} | {o.scale:g} | {o.temperature:g} | {len(o.layers)} |"
            for o in manifest.operations
        ),
        "",
        "The paths are in surgery.json, with every file's size, sha256 and origin.",
        "",
        "## Scores",
        "",
        "None have been measured for this artifact.",
        "",
        "## Made with",
        "",
        ", ".join(f"{name} {version}" for name, version in manifest.versions.items())
        + f". Artifact hash `{manifest.hash}`.",
        "",
    ]
    return "\n".join(lines)


def _at(base):
    return f" at {base['revision'][:12]}" if base.get("revision") else ""


def _variant(manifest):
    return f', variant="{manifest.weight_variant()}"' if manifest.weight_variant() else ""


def _sampling(manifest):
    names = {"steps": "num_inference_steps"}
    settings = ", ".join(f"{names.get(key, key)}={value}" for key, value in manifest.sampling.items())
    return [f"Sample it with `{settings}`.", ""] if settings else []


def _weights_sentence(manifest):
    weights = [file for file in manifest.files.values() if file.weights]
    altered = [file for file in weights if file.origin.kind in ("converted", "fused")]
    others = [file for file in weights if file.origin.kind == "component"]
    if altered:
        sources = sorted({f"{file.origin.source}/{file.origin.path}" for file in altered})
        loras = sorted({f"{lora['source']}/{lora['path']}" for file in altered for lora in file.origin.loras})
        fused = f" with {', '.join(loras)} fused in" if loras else ", converted to safetensors"
        return f"the denoiser's weights are those of {', '.join(sources)}{fused}; the other weights are the base's."
    if others:
        sources = sorted({f"{file.origin.source}/{file.origin.path}" for file in others})
        return f"the denoiser's weights are {', '.join(sources)}, byte for byte; the other weights are the base's."
    return "the weights are the base's own files, byte for byte."
