"""The tiny pipelines of every backbone."""

from .cross import FAMILIES as CROSS
from .flux import FAMILIES as FLUX
from .two_streams import FAMILIES as TWO_STREAMS
from .video import FAMILIES as VIDEO

FAMILIES = [*CROSS, *FLUX, *TWO_STREAMS, *VIDEO]
