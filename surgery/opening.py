"""A model ready to draw with: fetched, loaded, on its device, with the sampling settings that it was made for."""

from surgery.artifact import read_manifest
from surgery.artifact.manifest import NAME
from surgery.devices import on_device
from surgery.engines.compiling import compile_model
from surgery.errors import InputError
from surgery.fetching import model_folder
from surgery.loading import default_dtype, load
from surgery.patching import denoiser


def open_model(model, revision=None, device=None, verify=False, dtype=None, **running):
    """(pipeline on its device, the sampling settings that its manifest records, its hash); {} and None without one.

    model: an artifact or a plain pipeline, a folder or a Hub repository. device: the best there is unless given.
    verify: hash the weights too. running: `engine`, `trust_engines`, `fallback` and `compile` of `surgery.load`; a
    plain pipeline has no engines. Raises InputError for what is no pipeline or a device that is not here, and what
    `surgery.load` raises.
    """
    running = {key: value for key, value in running.items() if value}
    folder = model_folder(model, revision)
    sampling, artifact_hash = {}, None
    if (folder / NAME).is_file():
        manifest = read_manifest(folder)
        sampling, artifact_hash = manifest.sampling, manifest.hash
        if "engine" in running:  # which is for the device that the pipeline is on then
            pipeline = load(model, revision=revision, verify=verify, dtype=dtype, device=device, **running)
            return pipeline, sampling, artifact_hash
        pipeline = load(folder, verify=verify, dtype=dtype, **running)
    else:
        if "engine" in running:
            raise InputError(f"{model} is no artifact, so it has no engines; leave --engine out")
        pipeline = _open_without_manifest(folder, verify, dtype)
        if "compile" in running:
            compile_model(denoiser(pipeline), running["compile"])
    return on_device(pipeline, device), sampling, artifact_hash


def _open_without_manifest(folder, verify, dtype):
    from diffusers import DiffusionPipeline

    from surgery.anatomy import denoiser_of
    from surgery.base.local import read_json_file

    path = folder / "model_index.json"
    if not path.is_file():
        raise InputError(f"{folder} holds no pipeline: it has no model_index.json")
    component, class_name = denoiser_of(read_json_file(path))
    if class_name.startswith("Pladis"):
        return load(folder, verify=verify, dtype=dtype)
    return DiffusionPipeline.from_pretrained(folder, dtype=dtype or default_dtype(folder / component))
