"""A recipe's `sampling.guidance_scale`: one number, or a range from which each image's seed draws its own."""

import hashlib
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Discriminator, Field, Tag, field_validator

from surgery.models.parts import Part

_Scale = Annotated[float, Field(ge=0)]


class ScaleRange(Part):
    """A guidance_scale drawn evenly from [from, to] for each image.

    The papers' w is guidance_scale - 1, so the PLADIS paper's w ~ U(3, 5) (arXiv 2503.07677, App. C) is
    `uniform: [4, 6]`.
    """

    uniform: Annotated[list[_Scale], Field(min_length=2, max_length=2)]

    @field_validator("uniform")
    @classmethod
    def _rises(cls, ends):
        if ends[0] >= ends[1]:
            raise ValueError("must rise, as [4.0, 6.0]")
        return ends


# The branches of the union by their tags. pydantic puts a tag into an error's location; none of these could be a key.
SCALE_BRANCHES = {"one guidance_scale": _Scale, "range of guidance_scale": ScaleRange}


def _branch_of(value):
    return "range of guidance_scale" if isinstance(value, (dict, ScaleRange)) else "one guidance_scale"


GuidanceScale = Annotated[
    Annotated[_Scale, Tag("one guidance_scale")] | Annotated[ScaleRange, Tag("range of guidance_scale")],
    Discriminator(_branch_of),
]


def is_range(sampling: Mapping[str, Any]) -> bool:
    """Whether the guidance_scale of a manifest's or a call's sampling settings is another for each image."""
    return isinstance(sampling.get("guidance_scale"), Mapping)


def scale_of(sampling: Mapping[str, Any], seed: int) -> float:
    """The guidance_scale of an image where it is a range {"uniform": [from, to]}: the number that its seed draws.

    It depends on the seed and the range alone, so base and patched image, and an image in any batch, have the same.
    """
    low, high = sampling["guidance_scale"]["uniform"]
    bits = int.from_bytes(hashlib.sha256(f"guidance_scale|{seed}".encode()).digest()[:6])
    return low + (high - low) * bits / 2**48


def largest_scale(sampling: Mapping[str, Any]) -> float | None:
    """The guidance_scale, or the upper end of its range."""
    return max(sampling["guidance_scale"]["uniform"]) if is_range(sampling) else sampling.get("guidance_scale")
