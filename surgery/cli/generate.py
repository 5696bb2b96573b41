"""`surgery generate`: images or videos, of an artifact base and patched side by side."""

import argparse
import json
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from surgery.console import quiet_bars
from surgery.errors import InputError
from surgery.hub.bounded import parse_yaml

from .files import file_path, save_png, write
from .given import check_threads, dtype_of, fields_of, given_sampling, running
from .show import print_json, relative


def run_generate(arguments: argparse.Namespace) -> None:
    """Write a PNG with a row per prompt and a column per seed; of a patched pipeline, base and patched in pairs.

    Of a pipeline of videos it is one video with all of them. Beside it is a folder with each of them.
    """
    if arguments.images < 1:
        raise InputError("--images must be at least 1")
    given = {**given_sampling(arguments, "num_frames", "fps", "negative_prompt"), **_given_arguments(arguments)}
    if arguments.region:
        from surgery.models.regions import region_of_text, regions_of

        given["regions"] = [region_of_text(text) for text in arguments.region]
        regions_of(given["regions"])  # what is wrong with one is told before the model is loaded
    tuned, guidance = _given_hyperparameters(arguments), _given_guidance(arguments.guidance)
    check_threads(arguments)
    if Path(arguments.out or "x.png").suffix.lower() not in (".png", *_VIDEO_SUFFIXES):
        raise InputError(f"--out must name a .png file, of videos a .mp4, .webp or .gif, not {arguments.out}")
    quiet_bars()
    is_video = _is_of_videos(arguments.model, arguments.revision)
    suffixes = _VIDEO_SUFFIXES if is_video else (".png",)
    out = file_path(arguments.out, _DEFAULT_OUT[is_video], arguments.force, suffixes)
    import torch

    from surgery.engines.compiling import call_times
    from surgery.models.patching import denoiser, tune
    from surgery.recipe.guidance_scale import is_range, scale_of
    from surgery.recipe.schema import sampling_with
    from surgery.runtime.draw import base_and_patched, generate
    from surgery.runtime.inputs import Inputs, with_inputs
    from surgery.runtime.load import open_model

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    keep = _keeper(out, arguments.prompts, is_video)
    inputs = fields_of(Inputs, arguments)
    inputs.check()
    images = inputs.images()  # what is wrong with one is told before the model is loaded
    pipeline, recorded, artifact_hash = open_model(
        arguments.model,
        arguments.revision,
        arguments.device,
        arguments.verify,
        dtype=dtype_of(arguments.dtype),
        **running(arguments),
    )
    if tuned:
        tune(pipeline, **tuned)
    if arguments.region and not _is_patched(pipeline):
        raise InputError("--region: the model is not patched; apply a recipe with the operation regions")
    sampling = sampling_with(recorded, given)
    if guidance is not None:
        sampling["guidance"] = guidance.pinned(denoiser(pipeline)).model_dump()
    pipeline, drawn_with = with_inputs(pipeline, inputs, images, sampling)
    seeds = [arguments.seed + index for index in range(arguments.images)]
    if _is_patched(pipeline):
        base, patched = base_and_patched(pipeline, arguments.prompts, seeds, drawn_with, keep)
        columns: dict[str, Any] = {"base": base, "patched": patched}
    else:
        label = "video" if is_video else "image"
        columns = {label: generate(pipeline, arguments.prompts, seeds, drawn_with, keep=partial(keep, label))}
    record = {"prompts": arguments.prompts, "seeds": seeds, "columns": list(columns), "sampling": sampling}
    record |= {"set": tuned} if tuned else {}
    record |= {name: value for name, value in asdict(inputs).items() if value}
    if is_range(sampling):
        record["guidance_scales"] = {str(seed): scale_of(sampling, seed) for seed in seeds}
    written = {"artifact": artifact_hash, **record}
    if is_video:
        record["preview"] = _save_videos(columns, arguments.prompts, seeds, out, written)
    else:
        from surgery.runtime.sheet import picture

        save_png(picture(columns, arguments.prompts, seeds), out, written)
    if times := call_times(denoiser(pipeline)):
        record["compiled"] = times.report()
        first, steady = (record["compiled"][f"{name}_seconds"] for name in ("first_call", "steady"))
        later = f", {steady:.3g} s a call since" if steady else ""
        print(f"surgery: compiled ({times.mode}) in the first call, {first:.1f} s{later}", file=sys.stderr)
    if arguments.json:
        print_json({"schema_version": 1, "file": out, "folder": out.with_suffix(""), **record})
    else:
        print(f"{' and '.join(columns)}, {len(seeds)} per prompt: {relative(out.absolute())}")
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


def _given_hyperparameters(arguments):
    """{hyperparameter: number} of --scale and --set NAME=NUMBER."""
    given = {} if arguments.scale is None else {"scale": arguments.scale}
    for text in arguments.set:
        name, _, value = text.partition("=")
        try:
            given[name.strip()] = float(value)
        except ValueError:
            raise InputError(f"--set {text[:100]}: write NAME=NUMBER, NAME being a hyperparameter as scale") from None
    return given


def _is_of_videos(model, revision):
    """Whether a model draws videos, before it is loaded; what it lacks is for loading to tell."""
    from surgery.artifact.fetch import model_folder
    from surgery.hub.base import read_index
    from surgery.models.videos import draws_videos

    return draws_videos(read_index(model_folder(model, revision)).get("_class_name"))


def _keeper(out, prompts, is_video):
    """The function that writes each of them as it is done, so that a run that is cut short keeps what it has drawn."""
    from surgery.runtime.sheet import png_of
    from surgery.runtime.video import require_mp4, video_file

    form = out.suffix.lower()[1:]
    if form == "mp4":
        require_mp4()
    numbers = {prompt: number for number, prompt in enumerate(prompts)}

    def keep(side, prompt, seed, drawn):
        data = video_file(drawn, form) if is_video else png_of(drawn)
        write(out.with_suffix("") / f"{side}-{numbers[prompt]}-{seed}.{form}", data)

    return keep


def _save_videos(columns, prompts, seeds, out, record):
    """Write the video of all videos and how they were drawn; of an mp4 a preview as WebP too, whose path comes back."""
    from surgery.runtime.sheet import moving_picture
    from surgery.runtime.video import video_file

    sheet = moving_picture(columns, prompts, seeds)
    write(out, video_file(sheet, out.suffix.lower()[1:]))
    write(out.with_suffix(".json"), json.dumps({"schema_version": 1, **record}, ensure_ascii=False).encode())
    if out.suffix.lower() != ".mp4":
        return out
    preview = out.with_suffix(".webp")
    write(preview, video_file(sheet.within(_PREVIEW), "webp"))
    return preview


def _is_patched(pipeline):
    from surgery.models.patching import patched_modules

    return bool(patched_modules(pipeline))


def _given_guidance(text):
    """The method of --guidance, None without it; InputError for what is no method or setting of one."""
    if text is None:
        return None
    import yaml

    from surgery.guidance.methods import guidance_of

    try:
        return guidance_of(parse_yaml(text))
    except (ValueError, yaml.YAMLError) as error:
        raise InputError(f"--guidance {text[:100]}: {' '.join(str(error).split())[:500]}") from error
