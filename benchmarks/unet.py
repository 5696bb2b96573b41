"""One denoising step of a full-size UNet with random weights, patched beside unpatched, eager and compiled, in one run.

    python benchmarks/unet.py --model sdxl --compiled      # on a GPU: the figures of a whole model
    python benchmarks/unet.py --model sd15                 # on a CPU: about a minute a round

The patched model is the same object: it is patched and unpatched between two calls, so weights and memory are the same.
Prints medians, their ratio to the unpatched model, and compile times apart.
"""

import argparse
import statistics
import sys
import time

import torch
from diffusers import UNet2DConditionModel
from sdxl_folder import UNET as SDXL

import surgery

SD15 = {
    "sample_size": 64,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
    "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
    "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
}
SMALL = {**SD15, "block_out_channels": [64, 128, 256, 256], "cross_attention_dim": 64, "sample_size": 32}
MODELS = {"sdxl": SDXL, "sd15": SD15, "small": SMALL}


def inputs(model, dtype, device):
    """Keyword arguments of one call at the model's own size, guidance's batch of two, 77 tokens."""
    generator = torch.Generator().manual_seed(0)
    config = model.config
    size = config.sample_size
    made = {
        "sample": torch.randn(2, config.in_channels, size, size, generator=generator),
        "encoder_hidden_states": torch.randn(2, 77, config.cross_attention_dim, generator=generator),
    }
    made = {name: tensor.to(device, dtype) for name, tensor in made.items()}
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        made["added_cond_kwargs"] = {
            "text_embeds": torch.randn(2, pooled, generator=generator).to(device, dtype),
            "time_ids": torch.ones(2, 6, device=device, dtype=dtype),
        }
    return {**made, "timestep": torch.tensor(500, device=device)}


def seconds_of(call, device):
    """Wall time of one call, the device's work included."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def variants(compiled):
    """{label: (patch arguments or None, compiled?)}."""
    made = {
        "unpatched": None,
        "PLADIS alpha 1.5": {"operator": "pladis"},
        "PLADIS alpha 1.75": {"operator": "pladis", "alpha": 1.75},
        "GAG": {"operator": "gag"},
        "entmax package": {"operator": "pladis", "implementation": "entmax"},
    }
    eager = {label: (arguments, False) for label, arguments in made.items()}
    graphs = {f"{label}, compiled": (made[label], True) for label in list(made)[:4]} if compiled else {}
    return {**eager, **graphs}


def measure(build, chosen, rounds, device, dtype):
    """({label: median seconds}, {label: seconds to compile}), every variant called once a round."""
    model = build()
    arguments = inputs(model, dtype, device)
    compile_seconds, graphs = {}, {}
    for label, (_, is_compiled) in chosen.items():
        graphs[label] = torch.compile(model) if is_compiled else model
    times = {label: [] for label in chosen}
    for done in range(-1, rounds):  # the first round compiles and warms up
        for label, (patch, is_compiled) in chosen.items():
            if patch:
                surgery.patch(model, **patch)
            call = lambda graph=graphs[label]: graph(**arguments, return_dict=False)  # noqa: E731
            took = seconds_of(call, device)
            if done < 0:
                compile_seconds[label] = took if is_compiled else 0.0
                seconds_of(call, device)
            else:
                times[label].append(took)
            if patch:
                surgery.unpatch(model)
        print(f"\r  round {done + 1} of {rounds}", end="", file=sys.stderr, flush=True)
    print("\r" + " " * 30 + "\r", end="", file=sys.stderr)
    return {label: statistics.median(values) for label, values in times.items()}, compile_seconds


def main():
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="sdxl")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--compiled", action="store_true", help="also as compiled graphs")
    arguments = parser.parse_args()
    torch.set_grad_enabled(False)
    dtype = torch.bfloat16 if arguments.device == "cuda" else torch.float32

    def build():
        torch.manual_seed(0)
        with torch.device(arguments.device):
            return UNet2DConditionModel(**MODELS[arguments.model]).to(dtype).eval()

    medians, compile_seconds = measure(build, variants(arguments.compiled), arguments.rounds, arguments.device, dtype)
    name = torch.cuda.get_device_name() if arguments.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{arguments.model} UNet, {name}, {dtype}, medians of {arguments.rounds} rounds")
    for label, seconds in medians.items():
        base = medians["unpatched, compiled" if "compiled" in label else "unpatched"]
        took = f"  (first call {compile_seconds[label]:.0f} s)" if "compiled" in label else ""
        print(f"  {label:30s} {seconds * 1000:10.2f} ms {seconds / base:7.3f}x{took}")


if __name__ == "__main__":
    main()
