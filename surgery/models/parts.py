"""What the settings of recipes and of guidance share: how strict they are, and the types that several of them use."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from surgery.nn.operators import LARGEST

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=120)]
Text = Annotated[str, Field(min_length=1)]
LONGEST_SELECTOR = 300  # characters; matching takes the square of a selector's length
Selector = Annotated[str, Field(min_length=1, max_length=LONGEST_SELECTOR)]
Number = Annotated[float, Field(ge=-LARGEST, le=LARGEST)]  # float32 holds it, and so do the buffers


class Part(BaseModel):
    """A mapping of a recipe. Unknown keys and loose types are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, protected_namespaces=())


def as_list(value: object) -> object:
    """A text alone as a list of it."""
    return [value] if isinstance(value, str) else value


def finite(value: float) -> float:
    """The value, infinity as LARGEST."""
    return min(value, LARGEST)
