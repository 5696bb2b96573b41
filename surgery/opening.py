"""A model ready to draw with: fetched, loaded, on its device, with the sampling settings that it was made for."""

import os

from surgery.artifact import read_manifest
from surgery.artifact.manifest import MANIFEST
from surgery.devices import best_device, on_device
from surgery.engines.compiling import compile_model
from surgery.errors import InputError
from surgery.fetching import model_folder
from surgery.foreign import check_lengths, check_sizes, reading
from surgery.loading import default_dtype, load
from surgery.patching import denoiser


def open_model(model, revision=None, device=None, verify=False, dtype=None, **running):
    """(pipeline on its device, the sampling settings that its manifest records, its hash); {} and None without one.

    model: an artifact or a plain pipeline, a folder or a Hub repository. device: the best there is unless given; it
    decides the dtype too, unless that is given (`surgery.loading.default_dtype`). verify: hash the weights too.
    running: `engine`, `trust_engines`, `fallback` and `compile` of `surgery.load`; a plain pipeline has no engines.
    Raises InputError for what is no pipeline or a device that is not here, and what `surgery.load` raises.
    """
    running = {key: value for key, value in running.items() if value}
    device = device or best_device()
    folder = model_folder(model, revision)
    if os.path.lexists(folder / MANIFEST):  # what is no file is refused
        manifest = read_manifest(folder)
        # engines lie where the model was found, which may be a repository
        where = {"model": model, "revision": revision} if "engine" in running else {"model": folder}
        return load(**where, verify=verify, dtype=dtype, device=device, **running), manifest.sampling, manifest.hash
    if "engine" in running:
        raise InputError(f"{model} is no artifact, so it has no engines; leave --engine out")
    pipeline = _open_without_manifest(folder, verify, dtype, device)
    if "compile" in running:
        compile_model(denoiser(pipeline), running["compile"])
    return pipeline, {}, None


def _open_without_manifest(folder, verify, dtype, device):
    from diffusers import DiffusionPipeline

    from surgery.anatomy import denoiser_of
    from surgery.base.local import read_json_file

    path = folder / "model_index.json"
    if not path.is_file():
        raise InputError(f"{folder} holds no pipeline: it has no model_index.json")
    component, class_name = denoiser_of(read_json_file(path))
    if class_name.startswith("Pladis"):
        return load(folder, verify=verify, dtype=dtype, device=device)
    dtype = dtype or default_dtype(folder / component, device)
    check_sizes(folder)
    with reading(f"diffusers cannot load the pipeline in {folder}", folder):
        pipeline = DiffusionPipeline.from_pretrained(folder, dtype=dtype)
    check_lengths(pipeline, folder)
    return on_device(pipeline, device)
