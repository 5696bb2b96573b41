"""Which device a pipeline runs on."""

from surgery.errors import InputError


def best_device():
    """ "cuda", "mps" or "cpu": the fastest that this machine has."""
    import torch

    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def device_type(device):
    """ "cpu", "cuda" and so on of a device or its name; InputError for what is none, or holds no values."""
    import torch

    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise _unusable(device, error) from error
    if kind == "meta":
        raise _unusable(device, "it holds no values")
    return kind


def on_device(pipeline, device=None):
    """The pipeline, moved to a device; InputError where that cannot be used here."""
    device = device or best_device()
    device_type(device)
    try:
        return pipeline.to(device)
    except (RuntimeError, AssertionError) as error:
        raise _unusable(device, error) from error


def _unusable(device, reason):
    return InputError(f"--device {device} cannot be used here: {str(reason).splitlines()[0]}")
