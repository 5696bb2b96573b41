"""Draw with this model on Hugging Face Inference Endpoints, by diffusers alone: pladis-surgery is not needed.

Hugging Face's inference toolkit installs requirements.txt, makes one EndpointHandler of this folder, and calls it with
the JSON of each request:

    {"inputs": "two green stars", "parameters": {"seed": 7, "num_inference_steps": 20, "guidance_scale": 5.0}}

What a request leaves out is as the model's recipe has it. The image that comes back is a PIL one, which the toolkit
sends as base64 in JSON, or as a file where the request accepts an image. Written by pladis-surgery (Apache-2.0);
surgery.json has the sha256 of this file.
"""

import difflib
import hashlib
import inspect
import json
import logging
import math
import secrets
import threading
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

NUMBERS = {  # parameter: its type, the least and the largest
    "num_inference_steps": (int, 1, 1000),
    "guidance_scale": (float, 0, 1000),
    "true_cfg_scale": (float, 0, 1000),
    "height": (int, 8, 8192),
    "width": (int, 8, 8192),
    "max_sequence_length": (int, 1, 8192),
    "seed": (int, 0, 2**63 - 1),
}
TEXTS = ("negative_prompt", "scheduler")
LONGEST = 32_000  # characters of a text
USUAL = {"num_images_per_prompt": 1, "output_type": "pil"}  # what may be said, but not otherwise


class EndpointHandler:
    """One model; called with the JSON of a request it returns an image."""

    def __init__(self, path: str = "") -> None:
        """Load the model in the folder `path`, on the accelerator if there is one; ValueError if it was altered."""
        import torch
        from diffusers import DiffusionPipeline

        folder = Path(path or Path(__file__).parent)
        manifest = json.loads((folder / "surgery.json").read_text(encoding="utf-8"))
        component = manifest["component"]
        _check_code(folder, manifest)
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        dtype = torch.float32 if device == "cpu" else getattr(torch, _dtype_of(folder / component))
        self.pipeline: Any = DiffusionPipeline.from_pretrained(
            folder, variant=manifest["base"].get("variant"), torch_dtype=dtype, trust_remote_code=True
        ).to(device)
        self.pipeline.set_progress_bar_config(disable=True)
        self.denoiser = getattr(self.pipeline, component)
        if not hasattr(self.denoiser, "pladis_operations"):
            raise ValueError(f"the {component} was loaded without its patch; install what requirements.txt names")
        self.has_schedule = any(operation.get("schedule") for operation in manifest["operations"])
        self.sampling = {key: value for key, value in manifest["sampling"].items() if value is not None}
        self.accepted = inspect.signature(self.pipeline.__call__).parameters
        self.lock = threading.Lock()

    def __call__(self, data: dict) -> Any:
        """The PIL image that a request asks for; ValueError with all that is wrong with it."""
        prompt, given = self._read(data)
        with self.lock:
            return self._draw(prompt, given)

    def _read(self, data):
        """(prompt, {parameter: value}) of a request."""
        if not isinstance(data, dict) or "inputs" not in data:
            raise ValueError("a request is a JSON object with `inputs`, the prompt, and perhaps `parameters`")
        prompt, parameters = data["inputs"], data.get("parameters")
        if isinstance(prompt, dict) and set(prompt) == {"prompt"}:
            prompt = prompt["prompt"]
        parameters = {} if parameters is None else parameters
        if not isinstance(parameters, dict):
            raise ValueError(f"`parameters` must be an object, not {parameters!r}")
        problems, given = [], {}
        if not isinstance(prompt, str) or len(prompt) > LONGEST:
            problems.append(f"`inputs` must be one prompt, a text of up to {LONGEST} characters")
        size = parameters.get("target_size")
        if size is not None and not (isinstance(size, dict) and set(size) <= {"height", "width"}):
            problems.append('target_size must be an object such as {"width": 1024, "height": 768}')
            size = None
        for name, value in {**parameters, **(size or {})}.items():
            if value is None or name == "target_size":
                continue
            problem = self._problem(name, value)
            if problem:
                problems.append(problem)
            elif name not in USUAL:
                given[name] = NUMBERS[name][0](value) if name in NUMBERS else value
        if problems:
            raise ValueError("; ".join(problems))
        return prompt, given

    def _problem(self, name, value):
        """What is wrong with a parameter, or None."""
        ours = [known for known in (*NUMBERS, *TEXTS) if known in ("seed", "scheduler") or known in self.accepted]
        if name in USUAL:
            return None if value == USUAL[name] else f"{name} can only be {USUAL[name]} here"
        if name not in ours:
            near = difflib.get_close_matches(name, ours, 1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join([*ours, 'target_size'])}"
            return f"this model has no parameter {name}: {hint}"
        if name in TEXTS:
            if not isinstance(value, str) or len(value) > LONGEST:
                return f"{name} must be a text of up to {LONGEST} characters"
            return self._scheduler_problem(value) if name == "scheduler" else None
        kind, low, high = NUMBERS[name]
        if name == "num_inference_steps":
            high = min(high, self.pipeline.scheduler.config.get("num_train_timesteps", high))
        try:  # a query's parameters are texts
            number = value if isinstance(value, (int, float)) and not isinstance(value, bool) else float(str(value))
        except ValueError:
            number = math.nan
        if not low <= number <= high or (kind is int and number != int(number)):
            return (
                f"{name} must be {'a whole number' if kind is int else 'a number'} from {low} to {high}, not {value!r}"
            )
        return f"{name} must be a multiple of 8, not {value}" if name in ("height", "width") and number % 8 else None

    def _scheduler_problem(self, name):
        known = sorted(each.__name__ for each in self.pipeline.scheduler.compatibles)
        return None if name in known else f"scheduler {name!r} does not fit this model: there are {', '.join(known)}"

    def _draw(self, prompt, given):
        import torch

        pipeline, scheduler = self.pipeline, self.pipeline.scheduler
        seed = given.pop("seed", None)
        seed = secrets.randbits(32) if seed is None else seed
        logger.info("seed %d", seed)
        other = given.pop("scheduler", None)
        arguments = self._arguments(given, seed)
        if other is not None:
            made = next(each for each in scheduler.compatibles if each.__name__ == other)
            pipeline.register_modules(scheduler=made.from_config(scheduler.config))
        try:
            with torch.inference_mode():
                generator = torch.Generator("cpu").manual_seed(seed)
                return self._carried_out(prompt, generator=generator, **arguments).images[0]
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            raise ValueError("this machine's memory does not hold an image of that size: ask for a smaller") from None
        finally:
            pipeline.register_modules(scheduler=scheduler)

    def _arguments(self, given, seed):
        """The pipeline's arguments: the recipe's sampling with what the request says in its place."""
        arguments = {"num_inference_steps" if key == "steps" else key: value for key, value in self.sampling.items()}
        scale = arguments.get("guidance_scale")
        if isinstance(scale, dict):  # a range, of which each seed has its own number
            low, high = scale["uniform"]
            bits = int.from_bytes(hashlib.sha256(f"guidance_scale|{seed}".encode()).digest()[:6], "big")
            arguments["guidance_scale"] = low + (high - low) * bits / 2**48
        if "num_inference_steps" in given:
            arguments.pop("timesteps", None)
        elif "timesteps" in arguments:
            arguments.pop("num_inference_steps", None)
        return {**arguments, **given}

    def _carried_out(self, prompt, **arguments):
        """The pipeline's result, with the operators' schedules carried out where the model has any."""
        if not self.has_schedule:
            return self.pipeline(prompt=prompt, **arguments)
        with self.denoiser.scheduled(self.pipeline) as callback:
            if "callback_on_step_end" in self.accepted:
                return self.pipeline(prompt=prompt, callback_on_step_end=callback, **arguments)

            def older(step, timestep, latents):
                callback(self.pipeline, step, timestep, {"latents": latents})

            return self.pipeline(prompt=prompt, callback=older, **arguments)


def _check_code(folder, manifest):
    """Raise ValueError unless code, configs and buffers of the patched models are the ones that surgery.json lists."""
    parts = {manifest["component"]: manifest, **manifest.get("further", {})}
    for component, files in parts.items():
        for name in (files["code"], files["buffers"], f"{component}/config.json"):
            path = folder / name
            if not path.is_file():
                raise ValueError(f"{name} is missing: the repository was not fetched as a whole")
            if hashlib.sha256(path.read_bytes()).hexdigest() != manifest["files"][name]["sha256"]:
                raise ValueError(f"{name} is not the file that surgery.json lists: publish the model again")


def _dtype_of(folder):
    """The name of the dtype that most of a component's weights have."""
    names = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}
    held = dict.fromkeys(names, 0)
    largest = max(folder.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    with largest.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    for entry in header.values():
        if entry.get("dtype") in held:
            held[entry["dtype"]] += entry["data_offsets"][1] - entry["data_offsets"][0]
    return names[max(held, key=lambda name: held[name])]
