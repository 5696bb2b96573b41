"""The verbs that write a PNG: `surgery generate`, `attention-maps` and `invert`."""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from surgery.console import quiet_bars
from surgery.errors import InputError
from surgery.hub.bounded import parse_yaml
from surgery.recipe.schema import sampling_problems

from .arguments import checkpoints_of, running
from .show import print_json, relative, table


def run_generate(arguments: argparse.Namespace) -> None:
    """Write a PNG with a row per prompt and a column per seed; of a patched pipeline, base and patched in pairs."""
    if arguments.images < 1:
        raise InputError("--images must be at least 1")
    out, given = _png_path(arguments.out), given_sampling(arguments)
    quiet_bars()
    from surgery.engines.compiling import call_times
    from surgery.models.patching import denoiser
    from surgery.runtime.draw import base_and_patched, generate, picture
    from surgery.runtime.load import open_model

    pipeline, recorded, artifact_hash = open_model(
        arguments.model, arguments.revision, arguments.device, arguments.verify, **running(arguments)
    )
    sampling = {**recorded, **given, **_given_guidance(arguments.guidance)}
    if arguments.steps is not None:
        sampling.pop("timesteps", None)
    seeds = [arguments.seed + index for index in range(arguments.images)]
    if _is_patched(pipeline):
        base, patched = base_and_patched(pipeline, arguments.prompts, seeds, sampling)
        columns = {"base": base, "patched": patched}
    else:
        columns = {"image": generate(pipeline, arguments.prompts, seeds, sampling)}
    record = {"prompts": arguments.prompts, "seeds": seeds, "columns": list(columns), "sampling": sampling}
    _save_png(picture(columns, arguments.prompts, seeds), out, {"artifact": artifact_hash, **record})
    if times := call_times(denoiser(pipeline)):
        record["compiled"] = times.report()
        first, steady = (record["compiled"][f"{name}_seconds"] for name in ("first_call", "steady"))
        later = f", {steady:.3g} s a call since" if steady else ""
        print(f"surgery: compiled ({times.mode}) in the first call, {first:.1f} s{later}", file=sys.stderr)
    if arguments.json:
        print_json({"file": out, **record})
    else:
        print(f"{' and '.join(columns)}, {len(seeds)} per prompt: {relative(out.absolute())}")


def _is_patched(pipeline):
    from surgery.models.patching import denoiser, patched_modules

    return bool(patched_modules(denoiser(pipeline)))


def run_attention_maps(arguments: argparse.Namespace) -> None:
    """Write a PNG with a row each for dense, sparse and the model's own attention and a map per word in it."""
    out, given = _png_path(arguments.out), given_sampling(arguments)
    words = None if arguments.words is None else [word for word in arguments.words.split(",") if word.strip()]
    if words == []:
        raise InputError("--words names none; give words of the prompt with commas between them")
    quiet_bars()
    from surgery.analysis.attention_maps import compare_attention, heat_colours, sheet
    from surgery.runtime.load import open_model

    heat_colours()  # the error that it is not installed comes before the work
    pipeline, recorded, artifact_hash = open_model(
        arguments.model, arguments.revision, arguments.device, arguments.verify
    )
    sampling = {**recorded, **given}
    if arguments.steps is not None:
        sampling.pop("timesteps", None)
    comparison = compare_attention(
        pipeline,
        arguments.prompt,
        words=words,
        special=arguments.special,
        layers=arguments.layers or "all",
        seed=arguments.seed,
        sampling=sampling,
    )
    record = {
        "prompt": comparison.prompt,
        "seed": comparison.seed,
        "sampling": sampling,
        "words": [{"word": column.label, "tokens": column.positions} for column in comparison.columns],
        "cut_off": comparison.cut_off,
        "modules": comparison.modules,
        "rows": [{"mode": row.mode, "setting": row.setting, "words": row.figures} for row in comparison.rows],
    }
    _save_png(sheet(comparison), out, {"artifact": artifact_hash, **record})
    if arguments.json:
        print_json({"schema_version": 1, "file": out, **record})
        return
    _print_figures(comparison)
    if comparison.cut_off:
        print(f"beyond the text encoder's length, in whole or in part: {', '.join(comparison.cut_off)}")
    print(f"attention maps of {len(comparison.columns)} words, {len(comparison.rows)} rows: {relative(out.absolute())}")


def _print_figures(comparison):
    sparsified = comparison.rows[1:]
    columns = ["word", *(row.mode for row in comparison.rows), *(f"{row.mode} <= 0" for row in sparsified)]
    columns += [f"{row.mode} entropy" for row in comparison.rows]
    rows = []
    for column in comparison.columns:
        of_rows = [row.figures[column.label] for row in comparison.rows]
        cells = [f"{figures['mass']:.4f}" for figures in of_rows]
        cells += [f"{figures['zeros'] + figures['negatives']:.1%}" for figures in of_rows[1:]]
        cells += ["-" if figures["entropy"] is None else f"{figures['entropy']:.4f}" for figures in of_rows]
        rows.append([column.label, *cells])
    title = "mean weight of each word, share of its weights that are not above 0, entropy of its map (1: even)"
    table(title, columns, rows)


def run_invert(arguments: argparse.Namespace) -> None:
    """Write a PNG with a row for each image and print each side's scores, beside dense attention's."""
    out, given = _png_path(arguments.out), given_sampling(arguments)
    checkpoints = checkpoints_of(arguments.checkpoints)
    quiet_bars()
    from surgery.analysis.inversion import DEFAULTS, PRESETS, captioned_images, invert
    from surgery.analysis.inversion.pictures import check_images, sheet
    from surgery.runtime.load import open_model

    images, prompts = captioned_images(arguments.images, arguments.prompt, arguments.prompts)
    check_images(images)  # the error that one is not there comes before the model is loaded
    pipeline, recorded, artifact_hash = open_model(
        arguments.model, arguments.revision, arguments.device, arguments.verify
    )
    size = {name: recorded[name] for name in ("height", "width") if recorded.get(name)}
    chosen = {name: getattr(arguments, name) for name in DEFAULTS if getattr(arguments, name) is not None}
    if "operators" in chosen:
        chosen["operators"] = [name.strip() for name in chosen["operators"].split(",") if name.strip()]
    preset = {**DEFAULTS, **PRESETS.get(arguments.preset, {})}
    settings = {**preset, **size, **chosen, **given}
    found = invert(pipeline, images, prompts, checkpoints=checkpoints, batch=arguments.batch, **settings)
    record = {
        "files": [str(path) for path in images],
        "prompts": found.prompts,
        "settings": found.settings,
        "sides": [{"side": name, "setting": side.setting, "scores": side.scores} for name, side in found.rows.items()],
    }
    shown = {
        "artifact": artifact_hash,
        "rows": len(found.images),
        "settings": found.settings,
        "sides": list(found.rows),
    }
    _save_png(sheet(found), out, shown)
    if arguments.json:
        values = [
            {name: _values(side, index) for name, side in found.rows.items()} for index in range(len(found.prompts))
        ]
        print_json({"schema_version": 1, "file": out, "artifact": artifact_hash, **record, "values": values})
        return
    _print_scores(found)
    shown = len(found.images)
    cut = f", the first {shown} of {len(images)}" if shown < len(images) else ""
    print(f"images, their way through the VAE, and the reconstructions{cut}: {relative(out.absolute())}")


def _values(side, index):
    """{target: {metric: value}} of one image."""
    return {target: {name: float(found[index]) for name, found in of.items()} for target, of in side.values.items()}


def _print_scores(found):
    for target, title in (("image", "to the image"), ("round_trip", "to its VAE round trip")):
        columns = ["side"]
        for info in found.metrics.values():
            columns += [info.title, "from dense", "95% interval"]
        rows = []
        for name, side in found.rows.items():
            if target not in side.scores:
                continue
            rows.append([name, *(cell for mean in side.scores[target].values() for cell in _cells(mean))])
        table(f"{title}, mean of {len(found.prompts)}", columns, rows)
    for name, side in found.sides.items():
        if side.setting:
            print(f"{name}: {side.setting}")
    settings = found.settings
    inverted = "each by its own operator" if settings["inverted_by"] == "same" else "all by dense attention"
    print(
        f"{settings['steps']} DDIM steps ({settings['timestep_spacing']}) to noise, {inverted}, and as many back at "
        f"guidance {settings['guidance_scale']:g}"
    )


def _cells(mean):
    if mean.difference is None:
        return [f"{mean.mean:.4g}", "", ""]
    interval = "" if mean.interval is None else "{:+.3g} to {:+.3g}".format(*mean.interval)
    return [f"{mean.mean:.4g}", f"{mean.difference:+.3g}", interval]


def _png_path(text):
    """The path of the PNG to write; InputError for what is none."""
    out = Path(text)
    if out.suffix.lower() != ".png":
        raise InputError(f"--out must name a .png file, not {out}")
    if out.is_dir():
        raise InputError(f"--out {out} is a folder; name a .png file in it")
    return out


def given_sampling(arguments: argparse.Namespace) -> dict[str, Any]:
    """{setting: value} of the sampling settings on the command line; InputError for values out of range."""
    names = ("steps", "guidance_scale", "height", "width")
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    if problems := sampling_problems(given):
        raise InputError("\n  ".join(problems))
    return given


def _given_guidance(text):
    """{"guidance": mapping} of --guidance, {} without it; InputError for what is no method or setting of one."""
    if text is None:
        return {}
    import yaml

    from surgery.guidance.methods import guidance_of

    try:
        return {"guidance": guidance_of(parse_yaml(text)).model_dump()}
    except (ValueError, yaml.YAMLError) as error:
        raise InputError(f"--guidance {text[:100]}: {' '.join(str(error).split())[:300]}") from error


def _save_png(image, out, record):
    """Write a PNG that carries how it was drawn, so that a model card can show it with its prompts and its artifact."""
    from PIL.PngImagePlugin import PngInfo

    text = PngInfo()
    text.add_itxt("surgery", json.dumps(record, ensure_ascii=False))
    partial = out.with_name(f".{out.name}.partial")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        image.save(partial, format="PNG", pnginfo=text)
        os.replace(partial, out)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise InputError(f"cannot write {out}: {error.strerror or error}") from error
