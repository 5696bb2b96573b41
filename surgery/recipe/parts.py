"""What all parts of a recipe's schema share: how strict they are, and the types that several of them use."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

LARGEST = 1e30  # what .inf is kept as, because JSON has no infinity; as in surgery/nn/operators.py
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=120)]
Text = Annotated[str, Field(min_length=1)]
LONGEST_SELECTOR = 300  # characters; matching takes the square of a selector's length
Selector = Annotated[str, Field(min_length=1, max_length=LONGEST_SELECTOR)]
Number = Annotated[float, Field(ge=-1e30, le=1e30)]  # float32 holds it, and so do the buffers


class Part(BaseModel):
    """A mapping of a recipe. Unknown keys and loose types are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, protected_namespaces=())


def as_list(value):
    """A text alone as a list of it."""
    return [value] if isinstance(value, str) else value


def finite(value):
    """The value, infinity as LARGEST."""
    return min(value, LARGEST)


FIDELITY_METRICS = ("ssim", "psnr", "lpips")  # they compare with the base's images, and so have no better side
DISTANCE_METRICS = ("fid", "kid")  # they compare with reference images
METRIC_NAMES = (
    "clip_score",
    "pick_score",
    "hps_v2",
    "hps_v2.1",
    "image_reward",
    "geneval",
    "shape_alignment",
    *DISTANCE_METRICS,
    *FIDELITY_METRICS,
)
