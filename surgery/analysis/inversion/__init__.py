"""Images to noise by DDIM inversion and back, by each attention operator (GAG, arXiv 2603.02531, Appendix I).

found = surgery.invert(pipeline, ["photo.png"], "a red circle", steps=50)
found.sides["gag"].scores["image"]["ssim"].mean
sheet(found).save("inversion.png")
"""

from .inverting import DEFAULTS, PRESETS, Inversion, Mean, Reconstruction, invert
from .pictures import captioned_images, sheet

__all__ = ["DEFAULTS", "PRESETS", "Inversion", "Mean", "Reconstruction", "captioned_images", "invert", "sheet"]
