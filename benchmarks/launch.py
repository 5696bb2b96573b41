"""What a patched attention module's call costs beside its stock class's where the tensors are next to nothing.

    python benchmarks/launch.py                                        # CPU, one thread, float32
    python benchmarks/launch.py --device cuda --out launch.json        # bfloat16
    python benchmarks/launch.py --only SD3 "FLUX double block"

On tensors this small arithmetic costs nothing: what is timed is Python, the launches of operators and the patched
module's own path to its kernel. Both modules have the same weights, settings and inputs. Every round calls each of the
two so many times in a row, in turn; a figure is the median over rounds of a round's mean, the ratio that of medians.
"""

import argparse
import copy
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from attention import machine
from diffusers.models.attention_processor import Attention, JointAttnProcessor2_0
from diffusers.models.transformers.transformer_flux import FluxAttention

from surgery.artifact.manifest import write_json
from surgery.nn import PladisAttention
from surgery.nn.backbones.flux import PladisFluxAttention
from surgery.nn.backbones.sd3 import PladisSD3Attention

BATCH, HEADS, HEAD_DIM = 1, 2, 16
CHANNELS = HEADS * HEAD_DIM
IMAGE = 16  # tokens, in all modules
CROSS_TEXT, JOINT_TEXT = 77, 32  # tokens
_FLUX = {"query_dim": CHANNELS, "dim_head": HEAD_DIM, "heads": HEADS, "out_dim": CHANNELS, "bias": True, "eps": 1e-6}
_SD3 = {**_FLUX, "added_kv_proj_dim": CHANNELS, "context_pre_only": False}


def cases(device, dtype):
    """{label: (stock module, patched module, arguments of a call, further ones of a patched module's call)}."""
    torch.manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, device=device, dtype=dtype)

    image, joint_text = random(BATCH, IMAGE, CHANNELS), random(BATCH, JOINT_TEXT, CHANNELS)
    cross = {"hidden_states": image, "encoder_hidden_states": random(BATCH, CROSS_TEXT, CHANNELS)}
    padding = torch.zeros(BATCH, 1, CROSS_TEXT, device=device, dtype=dtype)
    padding[:, :, 20:] = -10000.0  # as PixArt's model makes it
    angles = torch.rand(JOINT_TEXT + IMAGE, HEAD_DIM, device=device)
    turns = (angles.cos(), angles.sin())
    double = {"hidden_states": image, "encoder_hidden_states": joint_text, "image_rotary_emb": turns}
    single = {"hidden_states": torch.cat([joint_text, image], dim=1), "image_rotary_emb": turns}
    told = {"pladis_text_length": JOINT_TEXT}

    unet = Attention(query_dim=CHANNELS, cross_attention_dim=CHANNELS, heads=HEADS, dim_head=HEAD_DIM)
    pixart = Attention(query_dim=CHANNELS, cross_attention_dim=CHANNELS, heads=HEADS, dim_head=HEAD_DIM, bias=True)
    flux_double = FluxAttention(**_FLUX, added_kv_proj_dim=CHANNELS, context_pre_only=False)
    flux_single = FluxAttention(**_FLUX, pre_only=True)
    sd3 = Attention(**_SD3, processor=JointAttnProcessor2_0())
    sd35 = Attention(**_SD3, processor=JointAttnProcessor2_0(), qk_norm="rms_norm")
    joint = {"hidden_states": image, "encoder_hidden_states": joint_text}
    made = {
        "UNet cross-attention": (unet, PladisAttention, "pladis", cross, {}),
        "UNet cross-attention, GAG": (unet, PladisAttention, "gag", cross, {}),
        "PixArt, masked": (pixart, PladisAttention, "pladis", {**cross, "attention_mask": padding}, {}),
        "FLUX double block": (flux_double, PladisFluxAttention, "pladis", double, {}),
        "FLUX double block, GAG": (flux_double, PladisFluxAttention, "gag", double, {}),
        "FLUX single block": (flux_single, PladisFluxAttention, "pladis", single, told),
        "SD3": (sd3, PladisSD3Attention, "pladis", joint, {}),
        "SD3.5": (sd35, PladisSD3Attention, "pladis", joint, {}),
    }
    return {
        label: (
            stock.to(device, dtype).eval(),
            form.convert(copy.deepcopy(stock).to(device, dtype).eval(), operator),
            arguments,
            more,
        )
        for label, (stock, form, operator, arguments, more) in made.items()
    }


def measure(case, rounds, calls, device):
    """(seconds a call of the stock module, of the patched one): medians over rounds, after a round not counted."""
    stock, patched, arguments, more = case
    times = ([], [])
    for done in range(rounds + 1):
        for module, keywords, seconds in ((stock, arguments, times[0]), (patched, {**arguments, **more}, times[1])):
            found = _seconds_a_call(module, keywords, calls, device)
            if done:
                seconds.append(found)
    return tuple(statistics.median(seconds) for seconds in times)


def _seconds_a_call(module, keywords, calls, device):
    if device == "cpu":  # the thread's own time: what else the machine does meanwhile is not in it
        start = time.thread_time()
        for _ in range(calls):
            module(**keywords)
        return (time.thread_time() - start) / calls
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        module(**keywords)
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / calls


def main():
    """Measure, print a table, and write it as JSON if told where."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", help="bfloat16 on a GPU, float32 on a CPU unless given")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--calls", type=int, default=100, help="of each module in a round")
    parser.add_argument("--only", nargs="+", metavar="MODULE", help="labels of the table, or parts of them")
    parser.add_argument("--json", action="store_true", help="print the table as JSON")
    parser.add_argument("--out", type=Path, help="a JSON file to write")
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    torch.set_num_threads(1)
    dtype = options.dtype or ("bfloat16" if options.device == "cuda" else "float32")
    rows = []
    for label, case in cases(options.device, getattr(torch, dtype)).items():
        if options.only and not any(part in label for part in options.only):
            continue
        print(f"\r  {label:40s}", end="", file=sys.stderr, flush=True)
        stock, patched = measure(case, options.rounds, options.calls, options.device)
        microseconds = {"stock_microseconds": round(stock * 1e6, 2), "patched_microseconds": round(patched * 1e6, 2)}
        rows.append({"what": label, **microseconds, "ratio": round(patched / stock, 3)})
    print("\r" + " " * 44 + "\r", end="", file=sys.stderr)
    results = {"schema_version": 1, "machine": machine(options.device), "dtype": dtype, "rounds": options.rounds}
    results = {**results, "calls": options.calls, "rows": rows}
    if options.json:
        print(json.dumps(results, indent=2))
    else:
        print(f"{results['machine']}; {dtype}, eager, medians of {options.rounds} rounds of {options.calls} calls")
        for row in rows:
            figures = f"{row['stock_microseconds']:9.1f} us {row['patched_microseconds']:9.1f} us {row['ratio']:6.2f}x"
            print(f"  {row['what']:28s} {figures}")
    if options.out:
        write_json(options.out, results)


if __name__ == "__main__":
    main()
