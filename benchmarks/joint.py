"""FLUX-sized blocks of joint attention, patched beside unpatched, in one run: time, and the peak of memory.

    python benchmarks/joint.py                     # CPU: about two minutes a round
    python benchmarks/joint.py --device cuda --rounds 15 --compiled

A FLUX.1 transformer of one block of two streams and one of a single stream, at full width (3,072 channels, 24 heads),
4,096 image and 512 text tokens, random weights. It is patched and unpatched between two calls, so weights and memory
are the same. Prints medians and their ratio to the unpatched model. Memory is the peak of one call above what was held
before it, of a process of its own.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys

import torch
from attention import machine, peak_of_call
from diffusers import FluxTransformer2DModel
from unet import seconds_of

import surgery

TEXT = 512
SETTINGS = {  # label -> arguments of surgery.patch, None for the untouched model
    "unpatched": None,
    "PLADIS": {"operator": "pladis"},
    "PLADIS, double blocks": {"operator": "pladis", "blocks": "double"},
    "PLADIS, single blocks": {"operator": "pladis", "blocks": "single"},
    "GAG": {"operator": "gag"},
}


def transformer(dtype, device, heads):
    """The model of two blocks."""
    torch.manual_seed(0)
    with torch.device(device):
        model = FluxTransformer2DModel(num_layers=1, num_single_layers=1, num_attention_heads=heads)
    return model.to(dtype).eval()


def inputs(model, dtype, device, image):
    """Keyword arguments of one call, batch 1; image: tokens, a square number."""
    generator = torch.Generator().manual_seed(0)
    config, side = model.config, round(image**0.5)
    made = {
        "hidden_states": torch.randn(1, image, config.in_channels, generator=generator),
        "encoder_hidden_states": torch.randn(1, TEXT, config.joint_attention_dim, generator=generator),
        "pooled_projections": torch.randn(1, config.pooled_projection_dim, generator=generator),
        "timestep": torch.tensor([0.5]),
    }
    places = torch.zeros(side, side, 3)
    places[..., 1] = torch.arange(side)[:, None]
    places[..., 2] = torch.arange(side)[None]
    made = {name: tensor.to(device, dtype) for name, tensor in made.items()}
    return {**made, "img_ids": places.reshape(-1, 3).to(device), "txt_ids": torch.zeros(TEXT, 3, device=device)}


def prepared(model, setting, compiled):
    """What to call for a setting; the model is patched so from here on."""
    if setting is not None:
        surgery.patch(model, **setting)
    return torch.compile(model, fullgraph=True) if compiled else model


def measure(options, dtype):
    """{label: seconds of each round}."""
    model = transformer(dtype, options.device, options.heads)
    arguments = inputs(model, dtype, options.device, options.image)
    times = {label: [] for label in options.only}
    for done in range(options.rounds + 1):  # the first is not counted
        for label in options.only:
            setting = SETTINGS[label]
            call = prepared(model, setting, options.compiled)
            if options.compiled or done == 0:
                call(**arguments)
            seconds = seconds_of(lambda call=call: call(**arguments), options.device)
            if done:
                times[label].append(seconds)
            if setting is not None:
                surgery.unpatch(model)
        print(f"\r  round {done} of {options.rounds}", end="", file=sys.stderr, flush=True)
    print("\r" + " " * 30 + "\r", end="", file=sys.stderr)
    return times


def peak_bytes(label, options):
    """The peak of one call in a process of its own."""
    command = [sys.executable, __file__, "--peak-of", label, "--device", options.device, "--dtype", options.dtype]
    command += ["--image", str(options.image), "--heads", str(options.heads)]
    freeing = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=freeing)
    return int(done.stdout.split()[-1])


def main():
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", help="bfloat16 on a GPU, float32 on a CPU unless given")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--image", type=int, default=4096, help="image tokens, a square number")
    parser.add_argument("--heads", type=int, default=24, help="of 128 channels each")
    parser.add_argument("--compiled", action="store_true", help="torch.compile the model for each setting")
    parser.add_argument("--only", nargs="+", choices=SETTINGS, default=list(SETTINGS), metavar="SETTING")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--peak-of", choices=SETTINGS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    options.only = list(dict.fromkeys(["unpatched", *options.only]))
    options.dtype = options.dtype or ("bfloat16" if options.device == "cuda" else "float32")
    dtype = getattr(torch, options.dtype)
    if options.peak_of:
        model = transformer(dtype, options.device, options.heads)
        call = prepared(model, SETTINGS[options.peak_of], compiled=False)
        call(**inputs(model, dtype, options.device, 64))  # loads what is loaded at the first call
        arguments = inputs(model, dtype, options.device, options.image)
        print(peak_of_call(lambda: call(**arguments), options.device))
        return
    medians = {label: statistics.median(seconds) for label, seconds in measure(options, dtype).items()}
    rows = [
        {
            "what": label,
            "seconds": seconds,
            "ratio": seconds / medians["unpatched"],
            "peak_bytes": peak_bytes(label, options),
        }
        for label, seconds in medians.items()
    ]
    if options.json:
        print(json.dumps({"machine": machine(options.device), "dtype": options.dtype, "rows": rows}, indent=2))
        return
    how = f"{options.dtype}, {'compiled' if options.compiled else 'eager'}, {options.rounds} rounds"
    print(f"{machine(options.device)}; {options.heads} heads, {options.image} + {TEXT} tokens, {how}")
    for row in rows:
        peak = f"peak {row['peak_bytes'] / rows[0]['peak_bytes']:.3f}x"
        print(f"  {row['what']:24s} {row['seconds']:9.4f} s {row['ratio']:7.3f}x  {peak}")


if __name__ == "__main__":
    main()
