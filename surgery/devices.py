"""Which device a pipeline runs on."""

from surgery.errors import InputError


def best_device():
    """ "cuda", "mps" or "cpu": the fastest that this machine has."""
    import torch

    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


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
