"""What an operator does inside a model while it draws: GAG's and PLADIS's quantities by module and denoising step.

found = surgery.diagnose(pipeline, ["a red circle"], sampling={"steps": 25})
found.by_block()["all"]["bounded"]                 # share of GAG's steps that eta cuts short
open("diagnostics.png", "wb").write(picture(found, "my model"))
"""

from .diagnosing import Diagnosis, diagnose
from .picture import picture
from .statistics import STATISTICS

__all__ = ["STATISTICS", "Diagnosis", "diagnose", "picture"]
