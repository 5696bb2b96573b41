"""The verbs that look into attention and write a picture: `surgery attention-maps` and `invert`."""

import argparse
import io

from surgery.console import quiet_bars
from surgery.errors import InputError

from .files import file_path, save_png, write
from .given import checkpoints_of, given_sampling
from .show import print_json, relative, table


def run_attention_maps(arguments: argparse.Namespace) -> None:
    """Write a PNG with a row each for dense, sparse and the model's own attention and a map per word in it."""
    out, given = file_path(arguments.out, "out/attention.png", arguments.force), given_sampling(arguments)
    words = None if arguments.words is None else [word for word in arguments.words.split(",") if word.strip()]
    if words == []:
        raise InputError("--words names none; give words of the prompt with commas between them")
    quiet_bars()
    from surgery.analysis.attention_maps import compare_attention, heat_colours, sheet
    from surgery.recipe.schema import sampling_with
    from surgery.runtime.load import open_model

    heat_colours()  # the error that it is not installed comes before the work
    pipeline, recorded, artifact_hash = open_model(
        arguments.model, arguments.revision, arguments.device, arguments.verify
    )
    sampling = sampling_with(recorded, given)
    comparison = compare_attention(
        pipeline,
        arguments.prompt,
        words=words,
        special=arguments.special,
        layers=arguments.layers or "all",
        seed=arguments.seed,
        sampling=sampling,
        by=arguments.by,
        each_call=arguments.npy,
    )
    arrays = _save_arrays(comparison, out) if arguments.npy else {}
    record = {
        "prompt": comparison.prompt,
        "seed": comparison.seed,
        "sampling": sampling,
        "words": [{"word": column.label, "tokens": column.positions} for column in comparison.columns],
        "cut_off": comparison.cut_off,
        "modules": comparison.modules,
        "rows": [{"mode": row.mode, "setting": row.setting, "words": row.figures} for row in comparison.rows],
        "arrays": {mode: str(path) for mode, path in arrays.items()},
    }
    save_png(sheet(comparison), out, {"artifact": artifact_hash, **record})
    if arguments.json:
        print_json({"schema_version": 1, "file": out, **record})
        return
    if comparison.by == "mode":
        _print_figures(comparison)
    for path in arrays.values():
        print(f"maps (words, steps, modules, frames, height, width): {relative(path)}")
    if comparison.cut_off:
        print(f"beyond the text encoder's length, in whole or in part: {', '.join(comparison.cut_off)}")
    print(f"attention maps of {len(comparison.columns)} words, {len(comparison.rows)} rows: {relative(out.absolute())}")


def _save_arrays(comparison, out):
    """{mode: the .npy file beside the PNG that has its maps}."""
    import numpy as np

    paths = {}
    for mode, calls in comparison.calls.items():
        file = io.BytesIO()
        np.save(file, calls)
        paths[mode] = out.absolute().with_name(f"{out.stem}.{mode.replace(' + ', '-')}.npy")
        write(paths[mode], file.getvalue())
    return paths


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
    out, given = file_path(arguments.out, "out/inversion.png", arguments.force), given_sampling(arguments)
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
    save_png(sheet(found), out, shown)
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
