"""The tiny pipelines of every backbone."""

from .cross import FAMILIES as CROSS
from .flux import FAMILIES as FLUX
from .flux_copies import FAMILIES as FLUX_COPIES
from .hosted_cross import FAMILIES as HOSTED_CROSS
from .hosted_text_first import FAMILIES as HOSTED_TEXT_FIRST
from .hosted_text_last import FAMILIES as HOSTED_TEXT_LAST
from .one_stream import FAMILIES as ONE_STREAM
from .two_streams import FAMILIES as TWO_STREAMS
from .video import FAMILIES as VIDEO

FAMILIES = [
    *CROSS,
    *FLUX,
    *FLUX_COPIES,
    *HOSTED_CROSS,
    *HOSTED_TEXT_FIRST,
    *HOSTED_TEXT_LAST,
    *TWO_STREAMS,
    *ONE_STREAM,
    *VIDEO,
]
