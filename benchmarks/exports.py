"""Engines of every backbone: a tiny artifact of each of tests/nn/backbones, exported and held against eager.

Where the tiny pipeline draws from a prompt, inputs are taken as `surgery export` takes them; else they are those of the
denoiser's calls in the tests.

    python benchmarks/exports.py onnx                     # the whole denoiser; about half a minute each
    python benchmarks/exports.py inductor                 # by block (--regional)
    python benchmarks/exports.py inductor flux sd3        # those alone

Prints a row for each: how many functions were compiled for how many modules, the largest difference from eager over the
root mean square of eager's output, on every call, before and after a change of every hyperparameter; or
why no engine could be built. Random weights, GAG, float32, on the CPU.
"""

import argparse
import functools
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import yaml

import surgery
from surgery.errors import SurgeryError
from surgery.export.engines.build import Wanted, build_engine

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tests.nn.backbones import FAMILIES
from tests.nn.backbones.checks import recorded_call

# What a recipe says of sampling; the rest of a tiny pipeline's call (its tokenizer's, say) becomes its default.
SAMPLING = ("height", "width", "num_frames", "guidance_scale", "true_cfg_scale", "max_sequence_length")
HALF = 0.05  # diffusers' Kandinsky 5 rounds its queries and keys to bfloat16 in a float32 model too
OF_THE_CALL = ("prompt", "negative_prompt", "prompt_embeds", "negative_prompt_embeds", "image", "output_type")


def main():
    """Print a row of each backbone."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=("inductor", "onnx"))
    parser.add_argument("backbones", nargs="*", help="all of them unless given")
    options = parser.parse_args()
    wanted = Wanted(target=options.target, regional=options.target == "inductor", device="cpu")
    print("| backbone | functions | modules | from eager | after a change | seconds |\n|---|---|---|---|---|---|")
    for family in FAMILIES:
        if not options.backbones or family.name in options.backbones:
            print(f"| {family} | {' | '.join(row(family, wanted))} |", flush=True)


def row(family, wanted):
    """The cells of a backbone's row."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            made, calls = artifact(family, Path(folder))
            tolerance = HALF if family.name == "kandinsky5" else None
            engine, _, _ = build_engine(made, replace(wanted, tolerance=tolerance), calls=calls)
        except SurgeryError as error:
            return (f"none: {error}", "", "", "", "")
        except Exception as error:  # of the exporter or the compiler: its own reason, in its first line
            return (f"none: {type(error).__name__}: {str(error).strip().splitlines()[0][:300]}", "", "", "", "")
    difference = engine.difference
    modules = sum(len(region.modules) for region in engine.regions)
    seconds = f"{sum(engine.seconds.values()):.0f}"
    return (
        str(len(engine.regions)),
        str(modules),
        f"{difference.relative:.1e}",
        f"{difference.after_change:.1e}",
        seconds,
    )


def artifact(family, folder):
    """(The folder of an artifact of a tiny backbone, under `folder`; calls of its denoiser, None where it draws)."""
    pipeline, call = family.build()
    sampling, calls = {"steps": 2, "height": 32, "width": 32}, None
    by_prompt = family.draws and "prompt" in call and "image" not in call
    if by_prompt and family.name != "bria_fibo":  # whose empty prompt is a token of Llama's
        sampling |= {key: call[key] for key in SAMPLING if key in call}
        sampling |= {"negative_prompt": "bad"} if "true_cfg_scale" in call else {}
        known = (*sampling, *OF_THE_CALL, "num_inference_steps")
        set_defaults(type(pipeline), {key: value for key, value in call.items() if key not in known})
    else:
        calls = [recorded_call(pipeline, call) if family.draws else call]
    pipeline.save_pretrained(folder / "base")
    recipe = {
        "schema": 1,
        "name": f"tiny-{family.name.replace('_', '-')}",
        "base": {"pipeline": "./base"},
        "operations": [
            {
                "replace": "joint-attention" if family.is_joint else "cross-attention",
                "with": {"operator": "gag"},
            }
        ],
        "sampling": sampling,
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return surgery.apply(folder / "recipe.yaml", folder / "artifact").folder, calls


def set_defaults(pipeline_class, defaults):
    """Give a pipeline class's call other defaults, in this process."""
    call = pipeline_class.__call__

    @functools.wraps(call)
    def call_with_defaults(self, *args, **kwargs):
        return call(self, *args, **{**defaults, **kwargs})

    pipeline_class.__call__ = call_with_defaults


if __name__ == "__main__":
    main()
