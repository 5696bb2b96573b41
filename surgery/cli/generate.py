"""`surgery generate`: images of a pipeline, or base and patched side by side, as one PNG."""

import os
from pathlib import Path

from surgery.errors import InputError
from surgery.recipe.schema import sampling_problems

from .show import print_json, quiet_bars, relative


def run(arguments):
    """Write a PNG with a row per prompt and a column per seed; of a patched pipeline, base and patched in pairs."""
    if arguments.images < 1:
        raise InputError("--images must be at least 1")
    out = Path(arguments.out)
    if out.suffix.lower() != ".png":
        raise InputError(f"--out must name a .png file, not {out}")
    if out.is_dir():
        raise InputError(f"--out {out} is a folder; name a .png file in it")
    given = {"steps": arguments.steps, "guidance_scale": arguments.guidance_scale}
    given |= {"height": arguments.height, "width": arguments.width}
    given = {key: value for key, value in given.items() if value is not None}
    if problems := sampling_problems(given):
        raise InputError("\n  ".join(problems))
    quiet_bars()
    from surgery.generating import base_and_patched, generate, picture

    pipeline, recorded, artifact_hash = _open(arguments)
    sampling = {**recorded, **given}
    if arguments.steps is not None:
        sampling.pop("timesteps", None)
    seeds = [arguments.seed + index for index in range(arguments.images)]
    if _is_patched(pipeline):
        base, patched = base_and_patched(pipeline, arguments.prompts, seeds, sampling)
        columns = {"base": base, "patched": patched}
    else:
        columns = {"image": generate(pipeline, arguments.prompts, seeds, sampling)}
    record = {"prompts": arguments.prompts, "seeds": seeds, "columns": list(columns), "sampling": sampling}
    _save(picture(columns, arguments.prompts, seeds), out, {"artifact": artifact_hash, **record})
    if arguments.json:
        print_json({"file": out, **record})
    else:
        print(f"{' and '.join(columns)}, {len(seeds)} per prompt: {relative(out.absolute())}")


def _open(arguments):
    """(pipeline on its device, the sampling settings that its manifest records, its hash); {} and None without one."""
    import torch

    from surgery.artifact import read_manifest
    from surgery.artifact.manifest import NAME
    from surgery.fetching import model_folder
    from surgery.loading import load

    folder = model_folder(arguments.model, arguments.revision)
    sampling, artifact_hash = {}, None
    if (folder / NAME).is_file():
        manifest = read_manifest(folder)
        sampling, artifact_hash = manifest.sampling, manifest.hash
        pipeline = load(folder, verify=arguments.verify)
    else:
        pipeline = _open_without_manifest(folder, arguments.verify)
    accelerator = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    device = arguments.device or accelerator
    try:
        if torch.device(device).type == "meta":
            raise RuntimeError("it holds no values")
        return pipeline.to(device), sampling, artifact_hash
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {device} cannot be used here: {str(error).splitlines()[0]}") from error


def _open_without_manifest(folder, verify):
    from diffusers import DiffusionPipeline

    from surgery.anatomy import denoiser_of
    from surgery.base.local import read_json_file
    from surgery.loading import default_dtype, load

    path = folder / "model_index.json"
    if not path.is_file():
        raise InputError(f"{folder} holds no pipeline: it has no model_index.json")
    component, class_name = denoiser_of(read_json_file(path))
    if class_name.startswith("Pladis"):
        return load(folder, verify=verify)
    return DiffusionPipeline.from_pretrained(folder, dtype=default_dtype(folder / component))


def _is_patched(pipeline):
    from surgery.patching import denoiser, patched_modules

    return bool(patched_modules(denoiser(pipeline)))


def _save(image, out, record):
    """Write a PNG that carries how it was drawn, so that a model card can show it with its prompts and its artifact."""
    import json

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
