"""The card's sections on what the artifact is, how it is loaded, what was changed, and what it cannot do."""

import json
import re
from typing import TYPE_CHECKING
from urllib.parse import quote

from surgery.console import guidance_text, sampling_text, schedule_text, settings_text
from surgery.hub.base import is_local
from surgery.models.selection import DESTROYS
from surgery.nn.operators import OPERATIONS
from surgery.recipe.guidance_scale import is_range

if TYPE_CHECKING:
    from collections.abc import Sequence

    from surgery.artifact.manifest import Manifest
    from surgery.artifact.scores import Scores
    from surgery.engines.record import Engine

    from .content import Picture
    from .licences import Licensing

_LINK = ":/?#@!&=+,;%~"  # what an address is written with, besides words; no bracket, which would end it


def headline(manifest: "Manifest") -> list[str]:
    """What it is, in two sentences."""
    base = manifest.base
    replaced = len({path for operation in manifest.operations for path in operation.layers})
    at = f" at {code(base['revision'][:12])}" if base.get("revision") else ""
    name = cell(base["pipeline"])
    by = "; and by ".join(OPERATIONS[operator].title for operator in _operators(manifest))
    name = name if is_local(base["pipeline"]) else f"[{name}]({_page(base)})"
    if base.get("single_file"):
        name = f"{cell(base['single_file'])} (sha256 {code(base['single_file_sha256'][:12])}), as {name}"
    experiment = any(operation.replace for operation in manifest.operations)
    where = "" if experiment else "where the image attends to the text, "
    return [
        *([cell(manifest.summary), ""] if manifest.summary else []),
        f"{name}{at} with {replaced} of its attention modules replaced, {where}by "
        f"{by}. Training-free: {_weights_sentence(manifest)}",
        "",
        *([f"**Warning**: {DESTROYS}.", ""] if experiment else []),
    ]


def loading(manifest: "Manifest", repo: str | None) -> list[str]:
    """The three ways to load it, each as code that runs."""
    where = repo or "./FOLDER"
    thin = manifest.weights == "thin"
    lines = [
        "## Load it",
        "",
        "With the package pladis-surgery: everything is checked against its sha256, no code from here is run, "
        + ("and the weights come from the base." if thin else "and weights that you have of the base are not fetched."),
        "",
        "```python",
        "import surgery",
        "",
        f'pipe = surgery.load("{where}")' + ("" if repo else "  # this folder, or the repository as OWNER/NAME"),
        "```",
        "",
    ]
    if thin:
        lines += [
            "Without the package it cannot be loaded: this repository holds nothing of the base but the name, commit "
            "and sha256 of its files (surgery.json).",
            "",
        ]
    else:
        lines += [
            "With diffusers alone, which runs the one Python file that is in this repository:",
            "",
            "```python",
            *_with_diffusers(manifest, f'"{where}"', "trust_remote_code=True"),
            "```",
            "",
        ]
    return [*lines, *_thin_way(manifest)]


def endpoint_lines() -> list[str]:
    """How it is asked on Hugging Face Inference Endpoints, which run its handler.py."""
    return [
        "## On Hugging Face Inference Endpoints",
        "",
        "`handler.py` is what runs there. An endpoint draws as the recipe says; it is asked by",
        "",
        "```python",
        "from huggingface_hub import InferenceClient",
        "",
        'image = InferenceClient("https://YOUR-ENDPOINT").text_to_image("a prompt", seed=7)',
        "```",
        "",
    ]


def _thin_way(manifest):
    """How to patch the base itself, fetching nothing from here; empty where that takes more than one call."""
    base = manifest.base
    files = manifest.files.values()
    rewritten = any(file.weights and file.origin.kind != "base" for file in files)
    scheduler = manifest.files.get("scheduler/scheduler_config.json")
    rewritten |= scheduler is not None and scheduler.origin.kind == "surgery"
    if is_local(base["pipeline"]) or not base.get("revision") or rewritten or len(manifest.operations) != 1:
        return []
    operation = manifest.operations[0]
    settings = operation.model_dump(exclude={"layers"})
    unselected = any(reason == "no operation selects it" for reason in manifest.skipped.values())
    layers = _python(list(operation.layers)) if unselected else '"all"'
    given = ", ".join(f"{key}={_python(value)}" for key, value in settings.items())
    pipeline, revision = _python(base["pipeline"]), _python(base["revision"])
    return [
        "Thin, onto the base that you have already:",
        "",
        "```python",
        "import surgery",
        *_with_diffusers(manifest, f"{pipeline}, revision={revision}"),
        f"surgery.patch(pipe, {given}, layers={layers})",
        "```",
        "",
    ]


def _with_diffusers(manifest, model, trust=""):
    """The lines that load a model with diffusers; `trust` lets it run the code of the repository."""
    if manifest.index is not None:
        loading = [f"pipe = ModularPipeline.from_pretrained({model})", f"pipe.load_components({trust})"]
        return ["from diffusers import ModularPipeline", "", *loading]
    variant = f", variant={_python(manifest.weight_variant())}" if manifest.weight_variant() else ""
    trusted = f", {trust}" if trust else ""
    loading = f"pipe = DiffusionPipeline.from_pretrained({model}{variant}{trusted})"
    return ["from diffusers import DiffusionPipeline", "", loading]


def _python(value):
    return json.dumps(value) if isinstance(value, str) else ascii(value)


def sampling(manifest: "Manifest") -> list[str]:
    """The settings that it is meant to be sampled with, and how a schedule is carried out."""
    names = {"steps": "num_inference_steps"}
    drawn = ["guidance_scale"] if is_range(manifest.sampling) else []
    known = {names.get(key, key): value for key, value in manifest.sampling.items() if key not in ("guidance", *drawn)}
    scale = known.pop("guidance_scale", None) if manifest.index is not None else None
    settings = ", ".join(f"{key}={_python(value)}" for key, value in known.items())
    lines = ["## Sampling", "", code(f"pipe(prompt, {settings})"), ""] if settings else []
    if scale is not None and scale > 1:  # a modular pipeline's is no argument of its call
        lines += [f"with {code(f'pipe.guider.guidance_scale = {scale}')}", ""]
    if drawn:
        low, high = manifest.sampling["guidance_scale"]["uniform"]
        lines += [f"`guidance_scale`: another for each image, drawn evenly from {low:g} to {high:g} by its seed.", ""]
    lines += _guidance(manifest.sampling.get("guidance"))
    if not any(operation.schedule for operation in manifest.operations):
        return lines
    timesteps = manifest.sampling.get("timesteps")
    steps = len(timesteps) if timesteps else manifest.sampling.get("steps", 25)
    length = f"timesteps={timesteps}" if timesteps else f"num_inference_steps={steps}"
    return [
        *lines,
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


def _guidance(guidance):
    """How the method that it is guided with is turned on; empty without one."""
    if guidance is None:
        return []
    settings = "".join(f", {key}={_python(value)}" for key, value in guidance.items() if key != "method")
    return [
        f"Guided by {cell(guidance_text(guidance))}, beside the surgery. `surgery` does that when it draws; in Python:",
        "",
        "```python",
        f'surgery.guide(pipe, "{guidance["method"]}"{settings})  # until surgery.unguide(pipe)',
        "```",
        "",
        "Without it the pipeline samples with classifier-free guidance.",
        "",
    ]


def pictures_lines(pictures: "Sequence[Picture]") -> list[str]:
    """The side-by-side images, each with its prompts and seeds; empty without any."""
    if not pictures:
        return []
    lines = [
        "## Base and patched, side by side",
        "",
        "The same prompts, seeds and settings; drawn of this artifact.",
        "",
    ]
    for picture in pictures:
        prompts = "; ".join(cell(prompt) for prompt in picture.prompts)
        settings = cell(sampling_text(picture.sampling))
        seeds = ", ".join(map(cell, picture.seeds))
        lines += [
            f"![{' and '.join(map(cell, picture.columns))}]({quote(picture.path)})",
            "",
            f"Prompts: {prompts}. Seeds {seeds}{f'; {settings}' if settings else ''}.",
            "",
        ]
    return lines


def changes(manifest: "Manifest") -> list[str]:
    """What was changed: the operations, their formulas, and every module by its path."""
    rows = [(path, index) for index, operation in enumerate(manifest.operations) for path in operation.layers]
    reasons = {}
    for path, reason in manifest.skipped.items():
        reasons.setdefault(reason, []).append(path)
    return [
        "## What was changed",
        "",
        "| operation | operator | settings | schedule | modules |",
        "|---|---|---|---|---|",
        *(
            f"| {index} | {o.operator} | {cell(settings_text(o.model_dump()))} | "
            f"{cell(schedule_text(o.schedule)) if o.schedule else 'every step'} | {len(o.layers)} |"
            for index, o in enumerate(manifest.operations)
        ),
        "",
        "With `z` the attention scores over the temperature, `T_d = softmax(z) V` and `T_s = entmax_alpha(z) V`, the "
        "output is",
        "",
        *(f"- {name}: {OPERATIONS[name].formula} ({OPERATIONS[name].source})" for name in _operators(manifest)),
        "",
        f"<details><summary>The {len(rows)} modules, in {' and '.join(manifest.patched)}</summary>",
        "",
        "| module | operation |",
        "|---|---|",
        *(f"| {code(path).replace('|', chr(92) + '|')} | {index} |" for path, index in rows),
        "",
        "</details>",
        "",
        *(f"Left as they are: {len(paths)} ({cell(reason)})." for reason, paths in reasons.items()),
        "",
    ]


def origins(manifest: "Manifest", licensing: "Licensing | None") -> list[str]:
    """Where each weight file comes from, byte for byte or not, and under which licence."""
    weights = {path: file for path, file in manifest.files.items() if file.weights}
    how = {"base": "byte for byte", "component": "byte for byte", "converted": "converted to safetensors"}
    lines = ["## Where the weights come from", "", "| file | from | how | sha256 |", "|---|---|---|---|"]
    for path, file in weights.items():
        origin = file.origin
        at = f"@{origin.revision[:12]}" if origin.revision else ""
        loras = " + ".join(f"{lora['scale']:g} x {lora['source']}/{lora['path']}" for lora in origin.loras)
        done = how.get(origin.kind, f"with {loras} fused in")
        lines.append(
            f"| {cell(path)} | {cell(f'{origin.source}{at} {origin.path}')} | {cell(done)} | `{file.sha256[:16]}` |"
        )
    lines += ["", "`surgery verify` compares each with the base's own, and the code with that of a release.", ""]
    if licensing is None:
        return lines
    name = cell(licensing.name)
    name = f"[{name}]({quote(licensing.link, safe=_LINK)})" if licensing.link else name
    lines += ["## Licence", "", f"{name}{f': {cell(licensing.note)}' if licensing.note else ''}.", ""]
    stated = [cell(f"{source}: {license}") for source, license in licensing.sources if license]
    return [*lines, *([f"As the sources' own cards state it: {'; '.join(stated)}.", ""] if stated else [])]


def limits(manifest: "Manifest", scores: "Scores | None") -> list[str]:
    """What must not be expected of it."""
    lines = [
        "## Limits",
        "",
        "- Everything that the base cannot or should not do holds here: its biases, its terms, its failures.",
        "- Cross-attention alone is changed; IP-Adapter branches stay dense. Whether it helps depends on the model and "
        + ("on the prompts: see Scores." if scores else "on the prompts, and has not been measured here."),
        "- The settings above are hyperparameters, not learned: `surgery.tune(pipe, scale=...)` changes them live.",
    ]
    if manifest.weights == "thin":
        lines.append(
            "- It loads only as long as the base's repository, at the commit named here, is there and open to you."
        )
    return [*lines, ""]


def recipe_lines(recipe: str) -> list[str]:
    """The recipe itself."""
    if not recipe:
        return []
    longest = max((len(run) for run in re.findall(r"`+", recipe)), default=0)
    fence = "`" * max(3, longest + 1)
    return ["## The recipe", "", f"{fence}yaml", recipe.rstrip("\n"), fence, ""]


def _operators(manifest: "Manifest") -> list[str]:
    """Each operator once, in the order of the operations."""
    return list(dict.fromkeys(operation.operator for operation in manifest.operations))


def _page(base):
    return f"https://huggingface.co/{quote(base['pipeline'])}"


def cell(text: object) -> str:
    """A text in one line that is shown as it is: neither Markdown nor HTML, and no end of a table's cell."""
    text = _one_line(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    # An underscore within a word, a dash or a number within a line are no Markdown.
    text = re.sub(r"([\\`*\[\]|~$]|(?<!\w)_|_(?!\w)|^[-+=#]|(?<=^\d)[.)](?=\s))", r"\\\1", text)
    return re.sub(r"(?i)(https?|www|mailto|ftp)([:.])", r"\1&#8203;\2", text)  # which would become a link by itself


def code(text: object) -> str:
    """A text in one line within the backticks of code."""
    text = _one_line(text)
    fence = "`" * (max((len(run) for run in re.findall(r"`+", text)), default=0) + 1)
    return f"{fence} {text} {fence}" if "`" in text else f"`{text}`"


def _one_line(text):
    return "".join(character for character in " ".join(str(text).split()) if character.isprintable())


def _weights_sentence(manifest):
    weights = [file for file in manifest.files.values() if file.weights]
    altered = [file for file in weights if file.origin.kind in ("converted", "fused")]
    if manifest.base.get("single_file"):
        return _single_file_sentence(manifest, altered)
    others = [file for file in weights if file.origin.kind == "component"]
    if altered:
        sources = cell(", ".join(sorted({f"{file.origin.source}/{file.origin.path}" for file in altered})))
        loras = sorted({f"{lora['source']}/{lora['path']}" for file in altered for lora in file.origin.loras})
        fused = f" with {cell(', '.join(loras))} fused in" if loras else ", converted to safetensors"
        return f"the denoiser's weights are those of {sources}{fused}; the other weights are the base's."
    if others:
        sources = cell(", ".join(sorted({f"{file.origin.source}/{file.origin.path}" for file in others})))
        parts = {path.partition("/")[0] for path, file in manifest.files.items() if file in others}
        whose = "denoiser" if parts == {manifest.component} and not manifest.further else " and ".join(sorted(parts))
        return f"the {whose}'s weights are {sources}, byte for byte; the other weights are the base's."
    if manifest.weights == "thin":
        return "the weights are the base's own files, which are not in here but named by commit and sha256."
    return "the weights are the base's own files, byte for byte."


def _single_file_sentence(manifest, altered):
    parts = sorted({path.partition("/")[0] for path, file in manifest.files.items() if file in altered})
    loras = sorted({f"{lora['source']}/{lora['path']}" for file in altered for lora in file.origin.loras})
    fused = f" with {cell(', '.join(loras))} fused into the {manifest.component}" if loras else ""
    return (
        f"the weights of {cell(', '.join(parts))} are that file's, converted to diffusers' layout{fused}; all else is "
        f"that of {cell(manifest.base['pipeline'])}."
    )


def engine_lines(engines: "Sequence[Engine]", repo: str | None) -> list[str]:
    """A table of the engines, as `engine.json` has them, and how they are used; empty without any."""
    if not engines:
        return []
    rows = [
        [
            engine.component,
            engine.backend,
            f"{engine.built_on.device} {engine.built_on.architecture}, torch {engine.built_on.torch}",
            engine.dtype,
            engine.profile,
            f"{engine.difference.relative:.1e}",
        ]
        for engine in sorted(engines, key=lambda engine: engine.key)
    ]
    return [
        "## Compiled engines",
        "",
        "| component | compiled by | runs on | dtype | images x height x width | difference from eager |",
        "|---|---|---|---|---|---|",
        *(f"| {' | '.join(cell(str(value)) for value in row)} |" for row in rows),
        "",
        "The difference is the largest of an output's element over the root mean square of eager's, on the pipeline's "
        "own inputs. An engine runs only where it fits, and is native code: it runs only for those who trust it.",
        "",
        "```python",
        f'pipe = surgery.load("{repo or "./FOLDER"}", engine="auto", trust_engines=True)',
        "```",
        "",
    ]
