"""Fixtures: the tiny trained pipeline, a written artifact, the command line in a process of its own."""

import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from .processes import Server

# Loaded tensors are not aligned alike, and MKL's results then differ in the last bit; this makes them the same.
os.environ.setdefault("MKL_CBWR", "AVX2,STRICT")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # more are processes that import torch
os.environ.setdefault("COLUMNS", "160")  # of tables, so that a test finds a cell's text in one line
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when the kernel is first used

TESTS = Path(__file__).parent
SHAPES = TESTS.parent / "recipes" / "shapes"
PROMPTS = ["a red circle to the left of a blue square", "two green stars"]


# The files that take longest. A run ends evenly where they come first: each is one process's (`--dist loadfile`).
LONGEST = (
    "validate/test_workers.py",
    "engines/test_engines.py",
    "nn/backbones/test_backbones.py",
    "guidance/test_backbones.py",
    "nn/test_triton_kernel.py",
    "serve/test_server.py",
    "nn/backbones/test_flux.py",
    "nn/test_papers.py",
    "nn/test_joint.py",
    "publish/test_faults.py",
    "models/test_patch_survives.py",
    "papers/test_reproduce.py",
    "nn/test_shipped.py",
    "nn/test_triton_compiles.py",
)


def pytest_collection_modifyitems(items):
    """Run those first, in that order."""
    place = {name: at for at, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.relative_to(TESTS).as_posix(), len(place)))


def pytest_collection_finish():
    """Leave what the tests import out of every search for garbage, and for what holds a model: most of their time."""
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def _frozen():
    """And what a file's tests have imported and kept, out of the next file's."""
    yield
    gc.collect()
    gc.freeze()


def pytest_sessionfinish():
    """Let what is taken apart at the end be found."""
    gc.unfreeze()


def load_shapes():
    """A fresh StableDiffusionPipeline of the tiny trained model, float32."""
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(SHAPES, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline, steps=2, **arguments):
    """Images of the test prompts as a tensor (2, 64, 64, 3) in [0, 1], always from the same seeds."""
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    arguments = {"guidance_scale": 4.0, "height": 64, "width": 64, "output_type": "np", **arguments}
    if "prompt_embeds" not in arguments:
        arguments["prompt"] = PROMPTS
    images = pipeline(generator=generators, num_inference_steps=steps, **arguments).images
    return torch.from_numpy(images)


@pytest.fixture
def pipeline():
    """A fresh tiny pipeline."""
    return load_shapes()


@pytest.fixture(scope="session")
def shapes_artifact(tmp_path_factory):
    """The folder of the shapes recipe's artifact; tests that change it copy it first."""
    import surgery

    return surgery.apply("shapes", tmp_path_factory.mktemp("artifacts") / "shapes").folder


@pytest.fixture(scope="session")
def processes(tmp_path_factory):
    """processes.start(arguments, python=None, env=None, cwd=None): a Process, which can be waited for or killed."""
    server = Server(tmp_path_factory.mktemp("processes"))
    yield server
    server.stop()


@pytest.fixture
def run(processes):
    """Run `surgery ...` (or python with `python=`) in a process of its own; returns the CompletedProcess.

    Without an environment of its own a command is forked from this process, which has everything imported already, and
    otherwise from one that has torch and diffusers. fresh: python is started anew.
    """

    def run(*arguments, python=None, env=None, cwd=None, check=None, fresh=False):
        if fresh:
            command = [sys.executable, "-c", python, *map(str, arguments)]
            done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=300)
        else:
            process = processes.start(arguments, python, env, cwd, here=python is None and env is None)
            done = subprocess.CompletedProcess(arguments, process.wait(), process.out(), process.errors())
        if check is not None:
            assert done.returncode == check, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    return run
