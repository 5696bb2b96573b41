"""The sizes of images that an engine is for."""

import re
from dataclasses import dataclass

from surgery.errors import InputError

AXES = ("images", "height", "width")
_SHAPE = re.compile(r"(\d+)(?:\.\.(\d+))?x(\d+)(?:\.\.(\d+))?x(\d+)(?:\.\.(\d+))?")


@dataclass(frozen=True)
class Span:
    """A number's range, ends included, and the value that an engine is tuned for."""

    low: int
    usual: int
    high: int

    @property
    def is_fixed(self):
        """Whether there is but one value."""
        return self.low == self.high

    def __str__(self):
        return str(self.low) if self.is_fixed else f"{self.low}..{self.high}"


@dataclass(frozen=True)
class Profile:
    """How many images at once, and their height and width in pixels."""

    images: Span
    height: Span
    width: Span

    @classmethod
    def of(cls, images, height, width):
        """The profile of one fixed size."""
        return cls(*(Span(number, number, number) for number in (images, height, width)))

    @property
    def is_fixed(self):
        """Whether it is one size."""
        return all(span.is_fixed for span in (self.images, self.height, self.width))

    def sizes(self):
        """{"usual", "low", "high": (images, height, width)}: the corners that a compiler has to know, each once."""
        corners = {}
        for name in ("usual", "low", "high"):
            size = tuple(getattr(getattr(self, axis), name) for axis in AXES)
            if size not in corners.values():
                corners[name] = size
        return corners

    def problem(self, images, height, width):
        """Why a size is outside, as "height 768 is outside 1024"; None if it is inside. images: None where unknown."""
        for axis, number in zip(AXES, (images, height, width), strict=True):
            span = getattr(self, axis)
            if number is not None and not span.low <= number <= span.high:
                return f"{axis} {number} is outside the engine's {span}"
        return None

    def to_json(self):
        """{"images": [low, usual, high], "height": ..., "width": ...}"""
        return {axis: [span.low, span.usual, span.high] for axis in AXES for span in [getattr(self, axis)]}

    @classmethod
    def from_json(cls, data):
        """The inverse of to_json."""
        return cls(**{axis: Span(*data[axis]) for axis in AXES})

    def __str__(self):
        return "x".join(str(getattr(self, axis)) for axis in AXES)


def parse_profile(text):
    """The Profile in "IMAGESxHEIGHTxWIDTH", each a number or a range "512..1024"; several with commas between.

    "1x1024x1024" is that size alone. "1x1024x1024,4x512x512" is every size between the smallest and the largest of
    them, tuned for the first; of a range, for its upper end. Raises InputError for what cannot be read, and for heights
    and widths that are no multiples of 8.
    """
    spans = [[], [], []]
    for part in text.replace(" ", "").split(","):
        match = _SHAPE.fullmatch(part)
        if not match:
            raise InputError(
                f"--shapes {part!r} cannot be read; write IMAGESxHEIGHTxWIDTH, such as 1x1024x1024 or "
                "1..4x512..1024x512..1024"
            )
        numbers = match.groups()
        for axis in range(3):
            low = int(numbers[2 * axis])
            spans[axis].append((low, int(numbers[2 * axis + 1] or low)))
    made = []
    for axis, found in zip(AXES, spans, strict=True):
        span = Span(min(low for low, _ in found), found[0][1], max(high for _, high in found))
        if span.low < 1 or any(low > high for low, high in found):
            raise InputError(f"--shapes {text}: {axis} must be at least 1, and a range must rise")
        if axis != "images" and any(number % 8 for number in (span.low, span.usual, span.high)):
            raise InputError(f"--shapes {text}: {axis} must be a multiple of 8")
        made.append(span)
    return Profile(*made)
