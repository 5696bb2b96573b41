"""A model ready to draw with: fetched, loaded, on its device, with the sampling settings that it was made for."""

from surgery.artifact import read_manifest
from surgery.artifact.manifest import NAME
from surgery.errors import InputError
from surgery.fetching import model_folder
from surgery.loading import default_dtype, load


def open_model(model, revision=None, device=None, verify=False, dtype=None):
    """(pipeline on its device, the sampling settings that its manifest records, its hash); {} and None without one.

    model: an artifact or a plain pipeline, a folder or a Hub repository. device: the best there is unless given.
    verify: hash the weights too. Raises InputError for what is no pipeline or a device that is not here, and what
    `surgery.load` raises.
    """
    folder = model_folder(model, revision)
    sampling, artifact_hash = {}, None
    if (folder / NAME).is_file():
        manifest = read_manifest(folder)
        sampling, artifact_hash = manifest.sampling, manifest.hash
        pipeline = load(folder, verify=verify, dtype=dtype)
    else:
        pipeline = _open_without_manifest(folder, verify, dtype)
    return on_device(pipeline, device), sampling, artifact_hash


def on_device(pipeline, device=None):
    """The pipeline, moved to a device; InputError where that cannot be used here."""
    import torch

    device = device or best_device()
    try:
        if torch.device(device).type == "meta":
            raise RuntimeError("it holds no values")
        return pipeline.to(device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {device} cannot be used here: {str(error).splitlines()[0]}") from error


def best_device():
    """ "cuda", "mps" or "cpu": the fastest that this machine has."""
    import torch

    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


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
