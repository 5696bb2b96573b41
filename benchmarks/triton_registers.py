"""What the Triton kernels compile to for a GPU, without one: registers, spills, shared memory and instructions a score.

    python benchmarks/triton_registers.py [--capability 90] [--quick]

Compiles every tile that the kernels can choose, in every dtype, for operators with and without masks, log-sum-exp and
joint attention, with the argument types of both launchers (Triton's own and inductor's), by the assembler that comes
with Triton. What a tile is, and with which arguments it is launched, is asked of surgery.nn.kernels.triton_kernel.
Prints a line each; exits with 1 if anything in half precision spills or does not compile. On two cores all of it takes
hours, --quick half an hour.

Instructions are those of a thread over the scores that it holds at once: of the whole program text, and of each
innermost loop in the order of the text (in the short kernel a step of the solver for alpha 1.5, 2, 1.25 and any).
"""

import argparse
import collections
import concurrent.futures
import dataclasses
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).parent.parent))
from surgery.nn.kernels import triton_kernel
from surgery.nn.kernels.reference import empty_outputs
from surgery.nn.kernels.triton_long import MOST_HELD_KEYS
from surgery.nn.kernels.triton_short import MOST_SHORT_KEYS
from surgery.nn.operators import OPERATORS

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.uint8: "u8"}
HALVES = ("bfloat16", "float16")
DTYPES = (*HALVES, "float32")
LAUNCHERS = ("triton", "inductor")  # who hands qk_scale over as float32, and who as float64
# What is compiled of each operator: its name, unit, and which of the kernels that it takes, one after the other.
KERNELS = {
    "pladis": ("pladis", "head", 0),
    "sparse": ("sparse", "head", 0),
    "anderson": ("anderson", "head", 0),
    "gag": ("gag", "head", 0),
    "gag sums": ("gag", "token", 0),
    "gag rows": ("gag", "token", 1),
}
MASKS = ("", "keys", "rows")  # none, boolean per key, additive per row
EXTRAS = ("", "lse", "joined")
SHORT_KEYS = (16, 32, 64, 77, 128)  # one for each tile of keys that holds them all
CHANNELS = (16, 32, 40, 64, 72, 128, 160, 256)  # one for each tile of channels
HELD_KEYS = tuple(range(MOST_SHORT_KEYS + 64, MOST_HELD_KEYS + 1, 64))  # one for each number of tiles held
LONG_KEYS = MOST_HELD_KEYS + 88  # more than is ever held
KINDS = ("FMUL", "FADD", "FFMA", "FMNMX", "MUFU", "HMMA", "LDS", "STS", "SHFL", "BAR")  # of instructions; HGMMA is HMMA


@dataclasses.dataclass(frozen=True)
class Case:
    """What a kernel is compiled for."""

    keys: int
    head_dim: int
    dtype: str = "bfloat16"
    kernel: str = "pladis"  # of KERNELS
    mask: str = ""  # of MASKS
    extra: str = ""  # of EXTRAS
    group: int = 1  # heads of queries that share one of keys
    queries: int = 4096

    def __str__(self):
        more = f"{' mask per ' + self.mask if self.mask else ''}{' ' + self.extra if self.extra else ''}"
        more += f" heads by {self.group}" if self.group > 1 else ""
        return f"{self.dtype} {self.kernel}{more}, {self.keys} keys x {self.head_dim}"


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the assembler made of it. error: why there is nothing; the rest is then empty."""

    tile: str = ""
    registers: int = 0
    stack: int = 0  # bytes
    spilled: int = 0  # instructions that store registers in memory or load them back
    shared: int = 0  # bytes
    seconds: float = 0.0
    in_all: float = 0.0  # instructions a score
    loops: tuple = ()  # the same of each innermost loop
    counts: dict = dataclasses.field(default_factory=dict)  # the same of the longest of them, by kind
    barriers: int = 0  # in the whole text
    error: str = ""

    @property
    def spills(self):
        """Whether registers did not suffice."""
        return self.stack > 0 or self.spilled > 0

    def too_many_spill(self, case) -> bool:
        """Whether more do, in half precision, than the few bytes that are traded for more programs at once."""
        most = 128 if case.head_dim > 128 else 32 if case.mask == "rows" or case.kernel == "anderson" else 0
        return case.dtype in HALVES and self.spills and self.stack > most


def assembler_is_available():
    """Whether Triton brought what compiling takes."""
    return all((TOOLS / name).exists() for name in ("ptxas", "cuobjdump"))


def compiled(case, capability, launcher="triton"):
    """Compile a Case for a GPU of a compute capability (80, 90, ...) with the argument types of one of LAUNCHERS."""
    launch, values = _launched(case, capability)
    kernel = triton_kernel.jitted_kernels()[0 if launch.short else 1]
    signature, constants, attributes = {}, {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in launch.fixed:
            signature[name], constants[(index,)] = "constexpr", launch.fixed[name]
            continue
        value = values.pop(0)
        if isinstance(value, torch.Tensor):
            signature[name], attributes[(index,)] = f"*{TYPES[value.dtype]}", [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp64" if launcher == "inductor" else "fp32"
        elif value == 1:
            signature[name], constants[(index,)] = "constexpr", 1
        else:
            signature[name] = "i32" if value < 1 << 31 else "i64"
            if value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
    options = {name: value for name, value in launch.fixed.items() if name not in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    began = time.perf_counter()
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    seconds = time.perf_counter() - began
    return _read(made, launch.fixed, seconds)


def _launched(case, capability):
    """(launch, values of all arguments that are not fixed) as an eager call makes them, of tensors without memory."""
    dtype = getattr(torch, case.dtype)
    # laid out as a projection's output: (batch, length, heads, head_dim), transposed
    sizes = ((case.queries, 10 * case.group), (case.keys, 10), (case.keys, 10))
    made = [torch.empty(2, *size, case.head_dim, dtype=dtype, device="meta").transpose(1, 2) for size in sizes]
    mask = None
    if case.mask == "keys":
        mask = torch.empty(2, 1, 1, case.keys, dtype=torch.bool, device="meta")
    elif case.mask == "rows":
        mask = torch.empty(2, 1, case.queries, case.keys, dtype=dtype, device="meta")
    query, key, value, mask = triton_kernel._prepared(*made, mask)
    operator, unit, index = KERNELS[case.kernel]
    output, lse = empty_outputs(query, value, case.extra == "lse")
    dense = dense_lse = None
    if case.extra == "joined":
        (dense, dense_lse) = empty_outputs(query, value, True)
    codes = triton_kernel._codes(operator, unit)
    sums, code = triton_kernel._sums(query, codes), codes[index]
    launch = triton_kernel._Launch(
        query, key, value, mask, output, dense, code, 0.125, case.extra == "lse", capability // 10
    )
    number = torch.empty((), device="meta")
    settings = [number] * len(OPERATORS[operator].defaults)
    tensors = triton_kernel._arguments(
        query, key, value, mask, output, lse, sums, dense, dense_lse, settings, operator, launch.short
    )
    return launch, [*tensors, *launch.numbers]


def _read(made, fixed, seconds):
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(made.asm["cubin"])
        usage, text = (
            subprocess.run([TOOLS / "cuobjdump", what, binary], capture_output=True, text=True, check=True).stdout
            for what in ("-res-usage", "-sass")
        )
    found = re.findall(r"/\*([0-9a-f]{4,5})\*/\s+([^;]*);", text)
    lines = [(int(address, 16), line) for address, line in found if not line.startswith("NOP")]
    names = [(address, _name_of(line)) for address, line in lines]
    all_counts = collections.Counter(name for _, name in names)
    loops = [[name for address, name in names if start <= address <= end] for start, end in _innermost(lines)]
    sizes = [f"{name}{fixed[name]}" for name in ("D0", "D1", "M0", "M1", "W", "PAIRS", "ROWS") if fixed.get(name)]
    keys = fixed["M0"] + fixed["M1"] if "M0" in fixed else fixed["W"] * max(1, fixed["PAIRS"])
    scores = fixed["ROWS"] * keys / (32 * fixed["num_warps"])
    counts = collections.Counter(max(loops, key=len, default=[]))
    return Compiled(
        tile=" ".join([*sizes, f"warps{fixed['num_warps']}", f"stages{fixed['num_stages']}"]),
        registers=int(re.search(r"REG:(\d+)", usage)[1]),
        stack=int(re.search(r"STACK:(\d+)", usage)[1]),
        spilled=all_counts["LDL"] + all_counts["STL"],
        shared=made.metadata.shared,
        seconds=seconds,
        in_all=len(names) / scores,
        loops=tuple(len(loop) / scores for loop in loops),
        counts={name: counts[name] / scores for name in KINDS},
        barriers=all_counts["BAR"],
    )


def _name_of(line):
    """An instruction's name without its predicate and modifiers."""
    name = re.sub(r"^@!?U?P\w+\s+", "", line).split()[0].split(".")[0]
    return "HMMA" if name == "HGMMA" else name


def _innermost(lines):
    """(first, last address) of each loop that holds no other; waiting for a barrier is none."""
    loops = []
    for address, line in lines:
        target = re.search(r"\bBRA\b.*0x([0-9a-f]+)", line)
        if target and address - int(target[1], 16) > 256:
            loops.append((int(target[1], 16), address))
    return [loop for loop in loops if not any(o != loop and loop[0] <= o[0] <= o[1] <= loop[1] for o in loops)]


def all_tiles():
    """(keys, head_dim) of every tile of the short kernel, of the long one, and of the long one that holds scores."""
    return [(keys, head_dim) for keys in (*SHORT_KEYS, *HELD_KEYS, LONG_KEYS) for head_dim in CHANNELS]


def all_cases():
    """Every tile with every dtype, kernel, mask and what else a kernel is compiled for."""
    cases = []
    for keys, head_dim in all_tiles():
        for dtype in DTYPES:
            for kernel in KERNELS:
                for mask in MASKS:
                    for extra in _extras(kernel):
                        cases.append(_case(keys, head_dim, dtype, kernel, mask, extra))
    return _distinct(cases)


def quick_cases():
    """One of `all_cases` for each tile in half precision and in float32, everything else rotating over them."""
    cases = []
    for turn, (keys, head_dim) in enumerate(all_tiles()):
        kernel = tuple(KERNELS)[turn % len(KERNELS)]
        extras = _extras(kernel)
        extra = extras[turn // 6 % len(extras)]
        mask = MASKS[(turn // 2 + turn // 8) % len(MASKS)]
        for dtype in (HALVES[turn // 3 % 2], "float32"):
            cases.append(_case(keys, head_dim, dtype, kernel, mask, extra))
    return _distinct(cases)


def _extras(kernel):
    """What a kernel is compiled for with and without: sums of heads are the same whatever comes after them."""
    return EXTRAS[:1] if kernel == "gag sums" else EXTRAS


def _case(keys, head_dim, dtype, kernel, mask, extra):
    """Where there is a mask, rows end within a block, which costs registers; with an extra, heads share keys."""
    return Case(keys, head_dim, dtype, kernel, mask, extra, 4 if extra else 1, 4090 if mask else 4096)


def _distinct(cases):
    """The cases without those whose kernel is another's, to the last constant: the long one does not see how many."""
    found = {}
    for case in cases:
        launch, values = _launched(case, 90)
        older, _ = _launched(case, 80)
        seen = [value % 16 if isinstance(value, int) else getattr(value, "dtype", value) for value in values]
        found.setdefault((launch.short, str(launch.fixed), str(older.fixed), str(seen)), case)
    return list(found.values())


def attempt(case, capability, launcher):
    """`compiled`, or a Compiled that says why not."""
    try:
        return compiled(case, capability, launcher)
    except Exception as error:
        return Compiled(error=f"{type(error).__name__}: {(str(error).strip().splitlines() or ['?'])[-1][:200]}")


def from_standard_input():
    """For the tests: read a JSON list of [case, capability, launcher], print {"case", ...} as JSON, a line each."""
    for fields, capability, launcher in json.load(sys.stdin):
        case = Case(**fields)
        found = attempt(case, capability, launcher)
        row = {"case": f"{case}, capability {capability}, {launcher}'s types", "dtype": case.dtype}
        print(json.dumps({**row, **dataclasses.asdict(found), "bad": found.too_many_spill(case)}), flush=True)


def line_of(case, launcher, found):
    """A line of the table."""
    if found.error:
        return f"{case!s:58s} {launcher:8s} FAILS: {found.error}"
    loops = "/".join(f"{size:.1f}" for size in found.loops)
    counts = " ".join(f"{name} {count:.1f}" for name, count in found.counts.items() if count)
    spilled = f"{found.stack:4d} B {found.spilled:3d}" if found.spills else "   0      "
    return (
        f"{case!s:58s} {launcher:8s} {found.tile:46s} {found.registers:3d} {spilled} {found.shared / 1024:6.1f} KiB "
        f"{found.in_all:6.1f} {loops:28s} {found.barriers:3d} {found.seconds:5.1f} s  {counts}"
    )


def main():
    """Compile the cases in parallel and print what they take; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--capability", type=int, nargs="*", default=[80, 90], help="80 is A100, 90 H100 and H200")
    parser.add_argument("--quick", action="store_true", help="each tile with one operator, mask and launcher")
    parser.add_argument("--only", default="", help="only cases whose name matches this regular expression")
    parser.add_argument("--cases", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("unset TRITON_INTERPRET: interpreted, nothing is compiled")
    if not assembler_is_available():
        sys.exit(f"this Triton has no assembler in {TOOLS}")
    if arguments.cases:
        from_standard_input()
        return 0
    cases = quick_cases() if arguments.quick else all_cases()
    cases = [case for case in cases if re.search(arguments.only, str(case))]
    bad = []
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache  # or the seconds would be those of reading what an earlier run compiled
        workers = concurrent.futures.ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn"))
        with workers:
            for capability in arguments.capability:
                print(f"Triton {triton.__version__}, compute capability {capability / 10}, {len(cases)} cases")
                print(
                    "case, launcher, tile: registers, spilled (bytes, loads and stores), shared memory, instructions "
                    "a score in all and in each innermost loop, barriers, seconds, the longest loop's by kind"
                )
                jobs = []
                for index, case in enumerate(cases):
                    for launcher in LAUNCHERS[index % 2 :][:1] if arguments.quick else LAUNCHERS:
                        jobs.append((case, launcher, workers.submit(attempt, case, capability, launcher)))
                for case, launcher, job in jobs:
                    line = line_of(case, launcher, job.result())
                    print(line, flush=True)
                    if job.result().error or job.result().too_many_spill(case):
                        bad.append(f"{capability / 10}: {line}")
    print(
        "\n".join([f"\n{len(bad)} that must not be:", *bad])
        if bad
        else "\nNothing in half precision spills but a few bytes: anderson, masks with rows, beyond 128 channels."
    )
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
