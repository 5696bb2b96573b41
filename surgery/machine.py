"""What this machine is and has: devices, dtypes, versions, backends."""

import gc
import os
import platform
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import TYPE_CHECKING

from surgery.errors import InputError

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline


def share_the_cpu() -> None:
    """Let threads wait for each other only a little before they sleep; before torch is imported, unless told otherwise.

    By default they spin long, and on a CPU that others use too the one that works is kept from it by those that wait.
    Asleep at once they cost a small model 2.6 times one thread's time where nobody else is (benchmarks/threads.py).
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def collect_seldom() -> None:
    """Look for garbage after 10,000 new objects, not 700: a tenth of the time in which torch and diffusers import."""
    gc.set_threshold(10_000, 10, 10)


def best_device() -> str:
    """ "cuda", "mps" or "cpu": the fastest that this machine has."""
    import torch

    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def device_type(device: "str | torch.device") -> str:
    """ "cpu", "cuda" and so on of a device or its name; InputError for what is none, or holds no values."""
    import torch

    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise _unusable(device, error) from error
    if kind == "meta":
        raise _unusable(device, "it holds no values")
    return kind


def usable_device(device: "str | torch.device | None" = None) -> "torch.device":
    """A device, the best there is unless given; InputError where it cannot be used here."""
    import torch

    device = device or best_device()
    device_type(device)
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise _unusable(device, error) from error


def on_device(pipeline: "DiffusionPipeline", device: "str | torch.device | None" = None) -> "DiffusionPipeline":
    """The pipeline, moved to a device; InputError where that cannot be used here."""
    device = device or best_device()
    device_type(device)
    try:
        return pipeline.to(device)
    except (RuntimeError, AssertionError) as error:
        raise _unusable(device, error) from error


def _unusable(device, reason):
    return InputError(f"--device {device} cannot be used here: {str(reason).splitlines()[0]}")


SHORT_NAMES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
DTYPES = tuple(SHORT_NAMES.values())


_PACKAGES = ("pladis-surgery", "torch", "diffusers", "transformers", "safetensors")


def versions() -> dict[str, str]:
    """{package: version} of what is installed."""
    return {package: metadata.version(package) for package in _PACKAGES}


# Each holds what stands before it; what torch calls a CPU's capability.
INSTRUCTION_SETS = ("DEFAULT", "AVX2", "AVX512")


@dataclass(frozen=True)
class Machine:
    """Where an engine was built, or is to run.

    device: "cpu" or "cuda". architecture: "sm_90", or a CPU's "x86_64 AVX512". system: "Linux". torch, cuda: versions,
    cuda None on a CPU. name: the device's own, for people to read.
    """

    device: str
    architecture: str
    system: str
    torch: str
    cuda: str | None
    name: str

    def to_json(self) -> dict:
        """As plain data."""
        return asdict(self)


def this_machine(device: "str | torch.device") -> Machine:
    """The Machine that a torch device of this process is."""
    import torch

    device = torch.device(device)
    version = torch.__version__.partition("+")[0]
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        name = torch.cuda.get_device_name(device)
        return Machine("cuda", f"sm_{major}{minor}", platform.system(), version, torch.version.cuda, name)
    architecture = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return Machine(device.type, architecture, platform.system(), version, None, platform.processor() or "CPU")


def backend_version(package: str) -> str | None:
    """The version of an installed package; None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def misfits(built: Machine, here: Machine) -> list[str]:
    """What keeps code built on one Machine from running on another: sentences, none if nothing does."""
    reasons = []
    if built.system != here.system:
        reasons.append(f"this is {here.system}, the engine is for {built.system}")
    if built.device != here.device:
        reasons.append(f"it is for {built.device}, the pipeline is on {here.device}")
    elif built.device == "cpu":
        (machine, known), (own, has) = (m.architecture.split(" ", 1) for m in (built, here))
        if machine != own:
            reasons.append(f"CPU {own}, engine {machine}")
        elif known != has and not (
            known in INSTRUCTION_SETS
            and has in INSTRUCTION_SETS
            and INSTRUCTION_SETS.index(known) < INSTRUCTION_SETS.index(has)
        ):
            reasons.append(f"CPU with {has}, engine with {known}")
    elif built.architecture != here.architecture:
        reasons.append(f"GPU {here.architecture} ({here.name}), engine {built.architecture} ({built.name})")
    if _release(built.torch) != _release(here.torch):
        reasons.append(f"torch {_release(here.torch)}, engine {_release(built.torch)}")
    if built.device == here.device == "cuda" and _release(built.cuda) != _release(here.cuda):
        reasons.append(f"CUDA {here.cuda}, engine {built.cuda}")
    return reasons


def _release(version):
    return ".".join(str(version).split(".")[:2])
