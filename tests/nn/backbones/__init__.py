"""The tiny pipelines of every backbone."""

from .cross import FAMILIES as CROSS
from .flux import FAMILIES as FLUX
from .flux_copies import FAMILIES as FLUX_COPIES
from .hosted import FAMILIES as HOSTED
from .one_stream import FAMILIES as ONE_STREAM
from .two_streams import FAMILIES as TWO_STREAMS
from .video import FAMILIES as VIDEO

FAMILIES = [*CROSS, *FLUX, *FLUX_COPIES, *HOSTED, *TWO_STREAMS, *ONE_STREAM, *VIDEO]
