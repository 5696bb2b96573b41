"""What a section of benchmarks/gpu.py writes while it runs: rows in a file that is whole at any moment."""

import hashlib
import json
import os
import platform
import sys
import time
from datetime import UTC, datetime
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "triton", "diffusers", "transformers", "entmax", "adasplash")


class Report:
    """A section's rows, facts and deadline; every change is on disk at once, so what ends it early loses nothing."""

    def __init__(self, path, device, deadline, started=None):
        self.path, self.device, self.deadline = Path(path), device, deadline
        self.started = started or time.time()
        self.rows, self.facts = [], {}
        self.about = {"date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC", "machine": machine(device)}
        self._write()

    @property
    def is_tiny(self):
        """Whether this is a run without a GPU, which only shows that the script works."""
        return self.device == "cpu"

    def left(self):
        """Seconds until the section is cut off."""
        return self.deadline - time.time()

    def row(self, **values):
        """Keep a row, and say it."""
        self.rows.append(values)
        self._write()
        self.say(", ".join(f"{key} {_short(value)}" for key, value in values.items() if value is not None))

    def fact(self, name, value):
        """Keep something that is no row."""
        self.facts[name] = value
        self._write()

    def say(self, text):
        """A line of progress, with the seconds since the run began."""
        print(f"[{time.time() - self.started:6.1f} s] {text}", flush=True)

    def attempt(self, what, function, **labels):
        """function(), or None and a row with the error's first lines where it fails."""
        try:
            return function()
        except Exception as error:
            self.row(what=what, **labels, error_text=first_lines(error))
            return None

    def _write(self):
        write_json(self.path, {**self.about, "rows": self.rows, "facts": self.facts})


def machine(device):
    """What a section ran on and with, for its place in the results."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    name = f"CPU ({platform.machine()})"
    if device == "cuda":
        import torch

        name = torch.cuda.get_device_name()
    return {"device": name, "cores": len(os.sched_getaffinity(0)), "code": code_hash(), "versions": versions}


def code_hash():
    """Twelve digits of the sha256 over surgery/nn, C++ too: which kernels and modules a figure belongs to."""
    digest = hashlib.sha256()
    (package,) = find_spec("surgery").submodule_search_locations
    for path in sorted(path for path in (Path(package) / "nn").rglob("*") if path.suffix in (".py", ".cpp", ".h")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def first_lines(error, lines=3, width=300):
    """An error's type and the first lines of what it says, in one line."""
    text = " / ".join(line.strip() for line in str(error).strip().splitlines()[:lines] if line.strip())
    return f"{type(error).__name__}: {text}"[:width]


def write_json(path, value):
    """Write a JSON file so that a reader finds the old one or the new one, whole."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)


def read_json(path, default=None):
    """What a JSON file holds; `default` where there is none."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return default


def import_from_repository():
    """Let a section import the tests' tiny pipelines, which no installed package has."""
    import_module("surgery")  # before: where one is installed, that one is meant
    sys.path.insert(0, str(REPOSITORY))


def _short(value):
    return f"{value:.4g}" if isinstance(value, float) else value
