"""Bytes, time and memory of publishing SDXL- and FLUX-sized models on a Hub that runs on loopback.

    python benchmarks/sdxl_folder.py DIR && python benchmarks/publish.py DIR

Prints one JSON object:

- `push`: `surgery push` of an artifact whose base lies in the local cache, each time into a new repository; `again`,
  the same push with nothing left to do; `thin`, with --weights thin.
- `remote_sdxl` and `remote_flux`: `surgery apply RECIPE --push OWNER/NAME --remote` with an empty cache.

Each command runs as its user would start it, in a process of its own, three times where it starts from nothing; wall
time therefore includes starting Python and importing torch and diffusers, and peak memory is that of the process.
`received_bytes` and `sent_bytes` are the request and response bodies as the server counts them, so `received_bytes` is
what the command uploaded and `sent_bytes` what it downloaded; `mostly_received` and `mostly_sent` say in which
requests. The server is in the process of this script, which does nothing else meanwhile, and knows the sha256 of all
files before the first command starts. Loopback adds no time of its own: --delay 0.1 has the server wait before each
answer, as a Hub that is far away would; `requests` says how often. The bytes' own time on a line comes on top.

The bases' tokenizers have the sizes of the real ones, in random text: CLIP's vocab.json and merges.txt twice for SDXL,
CLIP's and T5's for FLUX; `tokenizer_bytes` is their sum, which a commit carries as base64. FLUX's own transformer is
not supported yet, so the FLUX-sized base is a UNet widened until its bfloat16 weights take 24 GB, in three shards as
diffusers writes them. All its weight files are sparse, with a real header and a made-up sha256; its text encoders and
VAE are as large as SDXL's.

Takes 7 GB of disk beside DIR for the cache that the push starts from, and removes it again.
"""

import argparse
import hashlib
import json
import math
import multiprocessing
import os
import platform
import random
import shutil
import string
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

# No torch here: Linux counts what a process held before it became a command into that command's peak memory.
from tests.loopback_hub import WRITE_TOKEN, environment, hub_server

RECIPE = """
schema: 1
name: {name}-benchmark
base: {{pipeline: {base}}}
operations: [{{replace: cross-attention, layers: all, with: {{operator: pladis}}}}]
"""
CLIP_TOKENIZER = {"vocab.json": 1_059_962, "merges.txt": 524_619}
T5_TOKENIZER = {"tokenizer.json": 2_424_257, "spiece.model": 791_656}
FLUX_SIZED = {"attention_head_dim": [11, 22, 45], "block_out_channels": [704, 1408, 2880]}
RUNS = 3


def main():
    """Run the commands and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base", type=Path, help="a folder that benchmarks/sdxl_folder.py wrote")
    parser.add_argument("--delay", type=float, default=0, metavar="SECONDS", help="the server waits before each answer")
    arguments = parser.parse_args()
    base = arguments.base.resolve()
    needed = bytes_in(base) + (1 << 30)
    if shutil.disk_usage(base.parent).free < needed:
        sys.exit(f"this takes {needed / 1e9:.1f} GB beside {base}, for a cache of its files; make room there first")
    with tempfile.TemporaryDirectory(dir=base.parent) as work, hub_server() as server:
        work = Path(work)
        sdxl, flux = work / "sdxl", work / "flux"
        shutil.copytree(base, sdxl, copy_function=os.link)
        write_tokenizer(sdxl / "tokenizer", CLIP_TOKENIZER)
        write_tokenizer(sdxl / "tokenizer_2", CLIP_TOKENIZER)
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            pool.apply(write_flux_sized, (base, flux))
        for path in flux.rglob("*.safetensors"):
            server.declared_sha256[str(path)] = hashlib.sha256(bytes(path)).hexdigest()
        for folder in (sdxl, flux):
            server.create(f"owner/{folder.name}", folder, card={"license": "apache-2.0"})
            for entry in server.tree(f"owner/{folder.name}").values():
                assert entry.oid  # computed now, remembered for the answers
        server.before = lambda *_: time.sleep(arguments.delay)
        bench = Bench(server, work)
        figures = {
            "machine": f"{os.cpu_count()} CPUs, {platform.platform()}, torch {version('torch')}",
            "delay_s": arguments.delay,
            "sdxl": described(sdxl),
            "flux": described(flux),
            "push": bench.push("owner/sdxl"),
            "remote_sdxl": bench.remote("owner/sdxl"),
            "remote_flux": bench.remote("owner/flux"),
        }
    print(json.dumps(figures, indent=2))


class Bench:
    """Runs commands against a server; all that they write is in the folder `work`."""

    def __init__(self, server, work):
        self.server, self.work = server, work

    def push(self, base):
        """The figures of applying a recipe with a Hub base once, then pushing the artifact in several ways."""
        home, out = self.work / "home", self.work / "artifact"
        applied = self.timed(home, "apply", self.recipe(base), "--out", out, "--json")
        runs = [self.published(home, f"me/pushed-{run}", "push", out) for run in range(RUNS)]
        again = self.published(home, "me/pushed-0", "push", out)
        thin = self.published(home, "me/thin", "push", out, "--weights", "thin")
        shutil.rmtree(home)
        return {
            "apply_before_it": {key: applied[key] for key in ("wall_s", "peak_memory_mb", "sent_bytes")},
            **merged(runs),
            "again": again,
            "thin": thin,
        }

    def remote(self, base):
        """The figures of applying and publishing in one go, with an empty cache each time."""
        runs, short = [], base.split("/")[1]
        for run in range(RUNS):
            home, out = self.work / f"home-{short}-{run}", self.work / f"artifact-{short}-{run}"
            runs.append(self.published(home, f"me/{short}-{run}", "apply", self.recipe(base), "--remote", "--out", out))
            runs[-1]["cache_and_artifact_kb"] = round((bytes_in(home) + bytes_in(out)) / 1e3)
        return merged(runs)

    def recipe(self, base):
        """The path of a recipe for a base."""
        path = self.work / f"{base.split('/')[1]}.yaml"
        path.write_text(RECIPE.format(base=base, name=path.stem))
        return path

    def published(self, home, repo, verb, *arguments):
        """The figures of a command that publishes in a repository, and what it did to that."""
        before = len(self.server.commits(repo)) if repo in self.server.repositories else 1  # the Hub's own first one
        figures = self.timed(home, verb, *arguments, "--push" if verb == "apply" else "--repo", repo, "--json")
        figures["commits"] = len(self.server.commits(repo)) - before
        figures["repository_gb"] = round(sum(entry.size for entry in self.server.tree(repo).values()) / 1e9, 2)
        return figures

    def timed(self, home, *command):
        """Wall seconds, peak memory and bytes of a command."""
        self.server.reset_log()
        variables = {**os.environ, **environment(self.server, home, token=WRITE_TOKEN)}
        arguments = [sys.executable, "-m", "surgery", *map(str, command)]
        before = time.monotonic()
        run = subprocess.Popen(arguments, stdout=subprocess.PIPE, env=variables)
        run.stdout.read()
        _, status, usage = os.wait4(run.pid, 0)
        seconds = time.monotonic() - before
        if status:
            sys.exit(f"surgery {' '.join(arguments[3:])} failed")
        return {
            "wall_s": round(seconds, 2),
            "cpu_s": round(usage.ru_utime + usage.ru_stime, 2),
            "peak_memory_mb": round(usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6),
            "requests": len(self.server.log),
            "received_bytes": self.server.received_bytes(),
            "sent_bytes": self.server.sent_bytes(),
            "mostly_received": self.mostly("received_bytes"),
            "mostly_sent": self.mostly("sent_bytes"),
        }

    def mostly(self, bytes_of):
        """The requests that make up most of the bytes, without the commits in their paths."""
        totals = {}
        for entry in self.server.log:
            name = f"{entry.method} {'/'.join(part for part in entry.path.split('/') if len(part) != 40)}"
            totals[name] = totals.get(name, 0) + getattr(entry, bytes_of)
        largest = sorted(totals.items(), key=lambda item: -item[1])[:5]
        return {name: total for name, total in largest if total}


def merged(runs):
    """The first run's figures, with the times of all runs and the highest peak; the bytes have to be alike."""
    for key in ("received_bytes", "sent_bytes"):
        assert all(abs(run[key] - runs[0][key]) < 1000 for run in runs), [run[key] for run in runs]
    times = {key: [run[key] for run in runs] for key in ("wall_s", "cpu_s")}
    return {**runs[0], **times, "peak_memory_mb": max(run["peak_memory_mb"] for run in runs)}


def bytes_in(folder):
    """The bytes of the files in a folder; what has several names there counts once."""
    stats = [path.lstat() for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    return sum({(stat.st_dev, stat.st_ino): stat.st_size for stat in stats}.values())


def described(folder):
    """The sizes of a base."""
    weights = [path.stat().st_size for path in folder.rglob("*.safetensors")]
    tokenizers = sum(bytes_in(path) for path in folder.glob("tokenizer*"))
    return {"weights_gb": round(sum(weights) / 1e9, 2), "weight_files": len(weights), "tokenizer_bytes": tokenizers}


def write_tokenizer(folder, sizes):
    """Put files of random text beside a stub's config."""
    for name, size in sizes.items():
        text = "".join(random.Random(f"{folder.name}/{name}").choices(string.ascii_letters + '":,\n', k=size))
        (folder / name).unlink(missing_ok=True)  # it may be a link to the base's own
        (folder / name).write_text(text)


def write_flux_sized(base, folder):
    """Write the FLUX-sized base: the SDXL folder's configs, a wider denoiser, and weight files without bytes."""
    import torch
    from diffusers import UNet2DConditionModel
    from huggingface_hub import split_torch_state_dict_into_shards

    shutil.copytree(base, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    for path in base.rglob("*.safetensors"):
        if path.parent.name != "unet":
            with open(path, "rb") as file:
                start = file.read(8)
                start += file.read(int.from_bytes(start, "little"))
            write_sparse(folder / path.relative_to(base), start, path.stat().st_size)
    write_tokenizer(folder / "tokenizer", CLIP_TOKENIZER)
    write_tokenizer(folder / "tokenizer_2", T5_TOKENIZER)

    torch.set_default_dtype(torch.bfloat16)
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config({**UNet2DConditionModel.load_config(base / "unet"), **FLUX_SIZED})
    unet.save_config(folder / "unet")
    state, pattern = unet.state_dict(), "diffusion_pytorch_model{suffix}.safetensors"
    shards = split_torch_state_dict_into_shards(state, filename_pattern=pattern, max_shard_size="10GB")
    for name, keys in shards.filename_to_tensors.items():
        header, offset = {"__metadata__": {"format": "pt"}}, 0
        for key in keys:
            shape, end = list(state[key].shape), offset + 2 * math.prod(state[key].shape)
            header[key] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        write_sparse(folder / "unet" / name, len(text).to_bytes(8, "little") + text, 8 + len(text) + offset)
    index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
    (folder / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def write_sparse(path, start, size):
    """Write a file that begins with the bytes `start` and goes on as a hole."""
    with open(path, "wb") as file:
        file.write(start)
        file.truncate(size)


if __name__ == "__main__":
    main()
