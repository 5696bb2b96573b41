"""The verbs that write pictures: `surgery generate`, which draws videos too, `attention-maps` and `invert`."""

import argparse
import io
import json
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from surgery.artifact.manifest import replace_file
from surgery.console import quiet_bars
from surgery.errors import InputError, SurgeryError, disk_problem
from surgery.hub.bounded import parse_yaml

from .given import checkpoints_of, fields_of, given_sampling, running, sampling_with
from .show import print_json, relative, table


def run_generate(arguments: argparse.Namespace) -> None:
    """Write a PNG with a row per prompt and a column per seed; of a patched pipeline, base and patched in pairs.

    Of a pipeline of videos it is one video with all of them, and a folder with each.
    """
    if arguments.images < 1:
        raise InputError("--images must be at least 1")
    given = {**given_sampling(arguments, "num_frames", "fps"), **_given_arguments(arguments)}
    if Path(arguments.out or "x.png").suffix.lower() not in (".png", *_VIDEO_SUFFIXES):
        raise InputError(f"--out must name a .png file, of videos a .mp4, .webp or .gif, not {arguments.out}")
    quiet_bars()
    is_video = _is_of_videos(arguments.model, arguments.revision)
    out = _file_path(arguments.out or _DEFAULT_OUT[is_video], _VIDEO_SUFFIXES if is_video else (".png",))
    from surgery.engines.compiling import call_times
    from surgery.models.patching import denoiser
    from surgery.recipe.guidance_scale import is_range, scale_of
    from surgery.runtime.draw import base_and_patched, generate
    from surgery.runtime.inputs import Inputs, with_inputs
    from surgery.runtime.load import open_model

    keep = _keeper(out, arguments.prompts) if is_video else None
    inputs = fields_of(Inputs, arguments)
    inputs.check()
    images = inputs.images()  # what is wrong with one is told before the model is loaded
    pipeline, recorded, artifact_hash = open_model(
        arguments.model, arguments.revision, arguments.device, arguments.verify, **running(arguments)
    )
    sampling = {**sampling_with(recorded, given), **_given_guidance(arguments.guidance, denoiser(pipeline))}
    pipeline, drawn_with = with_inputs(pipeline, inputs, images, sampling)
    seeds = [arguments.seed + index for index in range(arguments.images)]
    if _is_patched(pipeline):
        base, patched = base_and_patched(pipeline, arguments.prompts, seeds, drawn_with, keep)
        columns: dict[str, Any] = {"base": base, "patched": patched}
    else:
        label = "video" if is_video else "image"
        alone = None if keep is None else partial(keep, label)
        columns = {label: generate(pipeline, arguments.prompts, seeds, drawn_with, keep=alone)}
    record = {"prompts": arguments.prompts, "seeds": seeds, "columns": list(columns), "sampling": sampling}
    record |= {name: value for name, value in asdict(inputs).items() if value}
    if is_range(sampling):
        record["guidance_scales"] = {str(seed): scale_of(sampling, seed) for seed in seeds}
    written = {"artifact": artifact_hash, **record}
    if is_video:
        record["preview"] = _save_videos(columns, arguments.prompts, seeds, out, written)
    else:
        from surgery.runtime.sheet import picture

        _save_png(picture(columns, arguments.prompts, seeds), out, written)
    if times := call_times(denoiser(pipeline)):
        record["compiled"] = times.report()
        first, steady = (record["compiled"][f"{name}_seconds"] for name in ("first_call", "steady"))
        later = f", {steady:.3g} s a call since" if steady else ""
        print(f"surgery: compiled ({times.mode}) in the first call, {first:.1f} s{later}", file=sys.stderr)
    if arguments.json:
        print_json({"file": out, **record})
    else:
        print(f"{' and '.join(columns)}, {len(seeds)} per prompt: {relative(out.absolute())}")
        if is_video:
            print(f"each of them alone: {relative(out.with_suffix('').absolute())}/")


_VIDEO_SUFFIXES = (".mp4", ".webp", ".gif")
_DEFAULT_OUT = {False: "out/images.png", True: "out/videos.mp4"}
_PREVIEW = 960  # pixels, the widest


def _given_arguments(arguments):
    """{name: value} of --strength and --argument NAME=VALUE; values as YAML has them."""
    import yaml

    given = {} if arguments.strength is None else {"strength": arguments.strength}
    for text in arguments.argument:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier() or name in ("prompt", "image", "generator", "latents", "output_type"):
            raise InputError(f"--argument {text[:100]}: write NAME=VALUE, NAME being an argument of the pipeline")
        try:
            given[name] = parse_yaml(value)
        except (ValueError, yaml.YAMLError) as error:
            raise InputError(f"--argument {text[:100]}: {' '.join(str(error).split())[:300]}") from error
    return given


def _is_of_videos(model, revision):
    """Whether a model draws videos, before it is loaded; what it lacks is for loading to tell."""
    from surgery.artifact.fetch import model_folder
    from surgery.hub.base import read_index
    from surgery.models.videos import draws_videos

    return draws_videos(read_index(model_folder(model, revision)).get("_class_name"))


def _keeper(out, prompts):
    """The function that writes each video as it is done, so that a run that is cut short keeps what it has drawn."""
    from surgery.runtime.video import require_mp4, video_file

    form = out.suffix.lower()[1:]
    if form == "mp4":
        require_mp4()
    numbers = {prompt: number for number, prompt in enumerate(prompts)}

    def keep(side, prompt, seed, video):
        _write(out.with_suffix("") / f"{side}-{numbers[prompt]}-{seed}.{form}", video_file(video, form))

    return keep


def _save_videos(columns, prompts, seeds, out, record):
    """Write the video of all videos and how they were drawn; of an mp4 a preview as WebP too, whose path comes back."""
    from surgery.runtime.sheet import moving_picture
    from surgery.runtime.video import video_file

    sheet = moving_picture(columns, prompts, seeds)
    _write(out, video_file(sheet, out.suffix.lower()[1:]))
    _write(out.with_suffix(".json"), json.dumps({"schema_version": 1, **record}, ensure_ascii=False).encode())
    if out.suffix.lower() != ".mp4":
        return out
    preview = out.with_suffix(".webp")
    _write(preview, video_file(sheet.within(_PREVIEW), "webp"))
    return preview


def _is_patched(pipeline):
    from surgery.models.patching import denoiser, patched_modules

    return bool(patched_modules(denoiser(pipeline)))


def run_attention_maps(arguments: argparse.Namespace) -> None:
    """Write a PNG with a row each for dense, sparse and the model's own attention and a map per word in it."""
    out, given = _file_path(arguments.out), given_sampling(arguments)
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
    _save_png(sheet(comparison), out, {"artifact": artifact_hash, **record})
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
        _write(paths[mode], file.getvalue())
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
    out, given = _file_path(arguments.out), given_sampling(arguments)
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


def _file_path(text, suffixes=(".png",)):
    """The path of the file to write; InputError for one of another kind."""
    out = Path(text)
    if out.suffix.lower() not in suffixes:
        raise InputError(f"--out must name a {' or '.join(suffixes)} file, not {out}")
    if out.is_dir():
        raise InputError(f"--out {out} is a folder; name a {suffixes[0]} file in it")
    return out


def _given_guidance(text, model):
    """{"guidance": mapping} of --guidance, {} without it; InputError for what is no method or setting of one."""
    if text is None:
        return {}
    import yaml

    from surgery.guidance.methods import guidance_of

    try:
        return {"guidance": guidance_of(parse_yaml(text)).pinned(model).model_dump()}
    except (ValueError, yaml.YAMLError) as error:
        raise InputError(f"--guidance {text[:100]}: {' '.join(str(error).split())[:300]}") from error


def _save_png(image, out, record):
    """Write a PNG that carries how it was drawn, so that a model card can show it with its prompts and its artifact."""
    from PIL.PngImagePlugin import PngInfo

    from surgery.runtime.sheet import png_of

    text = PngInfo()
    text.add_itxt("surgery", json.dumps(record, ensure_ascii=False))
    _write(out, png_of(image, text))


def _write(out, data):
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        replace_file(out, data)
    except OSError as error:
        if disk_problem(error) == "full":
            raise SurgeryError(f"cannot write {out}: the disk is full; what was written before it is kept") from error
        raise InputError(f"cannot write {out}: {error.strerror or error}") from error
