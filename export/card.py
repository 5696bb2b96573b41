"""README.md of an artifact: the Hub's model card, filled from the manifest alone."""

import yaml

from surgery.base.opening import is_local
from surgery.wording import schedule_text, settings_text

_PLADIS = "PLADIS (Kim et al. 2025, arXiv 2503.07677)"
_GAG = (
    "GAG (Kim 2026, Geometry-Aware Attention Guidance for Diffusion Models via Modern Hopfield Dynamics, "
    "arXiv 2603.02531)"
)
_NAMES = {
    "pladis": _PLADIS,
    "sparse": f"purely sparse attention, which is {_PLADIS} at scale 1",
    "gag": f"{_GAG}, a refinement of {_PLADIS}",
    "anderson": f"the Anderson surrogate of {_GAG}, an extension of {_PLADIS}",
}
# As in surgery/nn/operators.py.
_FORMULAS = {
    "pladis": "`T_d + scale (T_s - T_d)` (PLADIS, eq. 15)",
    "sparse": "`T_s`",
    "gag": (
        "`T_s + scale min(1, eta / |u|) u`, where `u = r_par + zeta r_orth` and `r = T_s - T_d` is split along `T_s` "
        "(GAG, eq. 11-13)"
    ),
    "anderson": (
        "`scale T_s + scale_low T_low + (1 - scale - scale_low) T_d`, where `T_low = entmax_alpha_low(z) V` "
        "(GAG, Appendix F)"
    ),
}


def model_card(manifest, tags=()):
    """The card's text: YAML front matter, how to load it, what was changed, where the weights come from."""
    base = manifest.base
    local = is_local(base["pipeline"])
    operators = list(dict.fromkeys(operation.operator for operation in manifest.operations))
    front = {
        "license": base.get("license") or "unknown",
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        **({} if local else {"base_model": base["pipeline"]}),
        "tags": ["pladis", *(["gag"] if "gag" in operators else []), "training-free", *tags],
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
        f"{base['pipeline']}{_at(base)} with {replaced} of its cross-attention modules replaced by "
        f"{'; and by '.join(_NAMES[operator] for operator in operators)}. Training-free: {_weights_sentence(manifest)}",
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
        *_schedule_usage(manifest),
        "## What was changed",
        "",
        "| operator | settings | schedule | modules |",
        "|---|---|---|---|",
        *(
            f"| {o.operator} | {settings_text(o.model_dump())} | {_schedule(o)} | {len(o.layers)} |"
            for o in manifest.operations
        ),
        "",
        "With `z` the attention scores over the temperature, `T_d = softmax(z) V` and `T_s = entmax_alpha(z) V`, the "
        "output is",
        "",
        *(f"- {operator}: {_FORMULAS[operator]}" for operator in operators),
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


def _schedule(operation):
    return schedule_text(operation.schedule) if operation.schedule else "every step"


def _schedule_usage(manifest):
    """The section on how to carry out the schedules, with code that runs as it stands; empty without one."""
    if not any(operation.schedule for operation in manifest.operations):
        return []
    timesteps = manifest.sampling.get("timesteps")
    steps = len(timesteps) if timesteps else manifest.sampling.get("steps", 25)
    length = f"timesteps={timesteps}" if timesteps else f"num_inference_steps={steps}"
    return [
        "## Its schedule",
        "",
        "The operator changes from one denoising step to the next, as the table below says. This carries it out:",
        "",
        "```python",
        f"with pipe.{manifest.component}.scheduled(pipe, steps={steps}) as callback:",
        f'    pipe("a prompt", {length}, callback_on_step_end=callback)',
        "```",
        "",
        "Without it the operator acts at every step with its plain values, those of the table's settings.",
        "",
    ]


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
