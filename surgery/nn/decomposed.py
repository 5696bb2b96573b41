"""The operators as plain operations, for a backend that knows torch's own alone."""

from .fused import attention_decompositions
from .joint import joint_decompositions


def decompositions():
    """{operator: plain torch function}, for `exported_program.run_decompositions` and the like.

    Everything but the operators of this package stays as it is; merge it into a backend's own table.
    """
    return {**attention_decompositions(), **joint_decompositions()}
