"""All that only a GPU can show, in one command: what matters most first, stopping in time, keeping what there is.

    python benchmarks/gpu.py                                    # seven minutes; writes docs/gpu.json and docs/gpu.md
    python benchmarks/gpu.py --only correctness,kernels --minutes 4
    python benchmarks/gpu.py --table docs/gpu.json              # the tables of an earlier run; needs no GPU
    python benchmarks/gpu.py --device cpu --only kernels        # that the script works, on tiny inputs

Every section is a process of its own with a limit, so an error of the GPU or a compiler that hangs ends that section
alone; its rows up to there are kept. The results are written anew after every row. Sections that are not run keep what
an earlier run wrote, with that run's date, machine and versions; a section that is not reached says why.
"""

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import gpu_table
from gpu_report import REPOSITORY, Report, first_lines, import_from_repository, read_json, write_json


@dataclass(frozen=True)
class Section:
    """title: in the tables. place: module:function. cap: seconds it may take. least: with fewer it is not begun."""

    title: str
    place: str
    cap: int
    least: int = 20


SECTIONS = {  # what matters most first
    "correctness": Section("Kernels against the float64 reference", "gpu_cases:correctness", 100),
    "kernels": Section("Kernels beside scaled_dot_product_attention", "gpu_kernels:kernels", 110),
    "unet": Section("A step of the full SDXL UNet, bfloat16, batch 2", "gpu_models:unet", 300),
    "flux": Section("FLUX-sized blocks, 4,096 image and 512 text tokens, bfloat16", "gpu_models:flux", 120),
    "backbones": Section("Every tiny backbone", "gpu_backbones:backbones", 200),
    "engine": Section("An AOTInductor engine of the shapes pipeline", "gpu_verbs:engine", 200),
    "verbs": Section("The command line on the shapes pipeline", "gpu_verbs:verbs", 120),
}


def main():
    """Run the sections, or print the tables of a file."""
    options = parsed()
    if options.table:
        print(gpu_table.document(read_json(options.table)), end="")
        return 0
    if options.section:
        return run_section(options)
    if options.device == "cuda" and (problem := gpu_problem()):
        print(f"{problem}; --device cpu shows on tiny inputs that the script works", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a section's processes are ended too
    if find_spec("surgery") is None:  # not installed: the checkout is the package too
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH"))))
    run_sections(options)
    return 0


def run_sections(options):
    """Run what is wanted, in the order of SECTIONS, and print the tables."""
    results = Results(options.out)
    started, stop = time.time(), time.time() + options.minutes * 60
    for name in options.only:
        section, left = SECTIONS[name], stop - time.time() - 2
        if left < section.least:
            results.not_reached(name, f"{max(0, left):.0f} s were left of {options.minutes:g} minutes")
            continue
        carry_out(name, min(section.cap * options.patience, left), options.device, started, results)
    print("\n" + results.text())
    print(f"{results.path} and {results.path.with_suffix('.md')}, {time.time() - started:.0f} s")


def parsed():
    """The command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=7, help="for all of it (default: 7)")
    parser.add_argument("--patience", type=float, default=1, help="so many times a section's own limit (default: 1)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--only", type=names, nargs="+", metavar="SECTION", help=f"of {', '.join(SECTIONS)}")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "docs" / "gpu.json", help="a JSON file")
    parser.add_argument("--table", type=Path, metavar="JSON", help="print that file's tables, and run nothing")
    parser.add_argument("--section", help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--started", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    chosen = [name for group in options.only or () for name in group]
    options.only = [name for name in SECTIONS if not chosen or name in chosen]
    return options


def names(text):
    """The sections of a list with commas."""
    found = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in found if name not in SECTIONS]
    if unknown:
        raise argparse.ArgumentTypeError(f"there is no section {unknown[0]}; there are {', '.join(SECTIONS)}")
    return found


def gpu_problem():
    """Why no section can run on a GPU here; None where it can."""
    import torch

    if not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no GPU here"
    return None


class Results:
    """The sections' results, on disk after every change."""

    def __init__(self, path):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self.sections = (read_json(path) or {}).get("sections", {})

    def keep(self, name, section):
        """Put in a section's results in place of an older run's."""
        self.sections[name] = {"title": SECTIONS[name].title, **section}
        self._write()

    def not_reached(self, name, why):
        """Say that a section was not run; an older run's results stay beside that."""
        older = self.sections.get(name)
        if older and older.get("rows"):
            self.sections[name] = {**older, "later": f"not reached again, {why}"}
        else:
            self.sections[name] = {"title": SECTIONS[name].title, "status": "not reached", "why": why}
        self._write()
        print(f"{name}: not reached, {why}", flush=True)

    def text(self):
        """The tables as Markdown."""
        return gpu_table.document(self._document())

    def _document(self):
        ordered = {name: self.sections[name] for name in SECTIONS if name in self.sections}
        return {"schema_version": 1, "sections": ordered}

    def _write(self):
        write_json(self.path, self._document())
        self.path.with_suffix(".md").write_text(self.text(), encoding="utf-8")


def carry_out(name, seconds, device, started, results):
    """Run a section in a process of its own, and keep what it writes as it writes it."""
    print(f"[{time.time() - started:6.1f} s] {name}: {SECTIONS[name].title}, at most {seconds:.0f} s", flush=True)
    environment = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": str(len(os.sched_getaffinity(0)))}
    if device == "cpu":  # two processes with threads for every core would wait for each other
        environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    begun = time.time()
    with tempfile.TemporaryDirectory() as folder:
        file, log = Path(folder) / "section.json", Path(folder) / "errors"
        command = [sys.executable, __file__, "--section", SECTIONS[name].place, "--device", device, "--out", str(file)]
        command += ["--until", str(begun + seconds), "--started", str(started)]
        with log.open("w") as errors:
            process = subprocess.Popen(command, stderr=errors, env=environment, start_new_session=True)
        try:
            seen = None
            while process.poll() is None and time.time() < begun + seconds:
                time.sleep(0.2)
                written = file.stat().st_mtime_ns if file.exists() else None
                if written != seen:
                    seen = written
                    results.keep(
                        name, {"status": "stopped", "why": "the run was ended from outside", **read_json(file)}
                    )
        finally:
            end(process)
        ending = ended(process.returncode, file, log, seconds)
        results.keep(name, {**(read_json(file) or {}), "seconds": round(time.time() - begun, 1), **ending})
        if ending["status"] != "done":
            print(f"{name}: {ending['status']}, {ending['why']}", flush=True)


def end(process):
    """Kill a section's process and all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def ended(status, file, log, seconds):
    """{"status", "why"} of a section whose process is over."""
    if status == 0:
        return {"status": "done"}
    if status == -signal.SIGKILL:
        return {"status": "stopped", "why": f"its {seconds:.0f} s were over"}
    said = (read_json(file) or {}).get("facts", {}).get("error_text")
    lines = log.read_text(errors="replace").strip().splitlines()
    return {"status": "failed", "why": said or (lines[-1][:300] if lines else f"exit status {status}")}


def run_section(options):
    """What a section's own process does; 1 where it fails."""
    import_from_repository()
    report = Report(options.out, options.device, options.until, options.started)
    module, function = options.section.split(":")
    try:
        section = getattr(import_module(module), function)
        if "torch" in sys.modules:  # that a section imports it is for the section to decide
            sys.modules["torch"].set_grad_enabled(False)
        section(report)
    except Exception as error:
        report.fact("error_text", first_lines(error))
        raise
    return 0


if __name__ == "__main__":
    sys.exit(main())
