"""`surgery generate`: images of a pipeline, or base and patched side by side, as one PNG."""

import sys

from surgery.console import quiet_bars
from surgery.errors import InputError

from .arguments import running
from .pictures import given_guidance, given_sampling, png_path, save_png
from .show import print_json, relative


def run(arguments):
    """Write a PNG with a row per prompt and a column per seed; of a patched pipeline, base and patched in pairs."""
    if arguments.images < 1:
        raise InputError("--images must be at least 1")
    out, given = png_path(arguments.out), given_sampling(arguments)
    quiet_bars()
    from surgery.engines.compiling import call_times
    from surgery.models.patching import denoiser
    from surgery.runtime.draw import base_and_patched, generate, picture
    from surgery.runtime.load import open_model

    pipeline, recorded, artifact_hash = open_model(
        arguments.model, arguments.revision, arguments.device, arguments.verify, **running(arguments)
    )
    sampling = {**recorded, **given, **given_guidance(arguments.guidance)}
    if arguments.steps is not None:
        sampling.pop("timesteps", None)
    seeds = [arguments.seed + index for index in range(arguments.images)]
    if _is_patched(pipeline):
        base, patched = base_and_patched(pipeline, arguments.prompts, seeds, sampling)
        columns = {"base": base, "patched": patched}
    else:
        columns = {"image": generate(pipeline, arguments.prompts, seeds, sampling)}
    record = {"prompts": arguments.prompts, "seeds": seeds, "columns": list(columns), "sampling": sampling}
    save_png(picture(columns, arguments.prompts, seeds), out, {"artifact": artifact_hash, **record})
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
