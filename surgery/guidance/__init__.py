"""Guidance beside the surgery: the methods of a recipe's `guidance`, in any pipeline, with patched modules or without.

    surgery.guide(pipe, "seg", layers="mid", scale=3.0)      # until surgery.unguide(pipe)
    image = pipe("two green stars", guidance_scale=4.0)

diffusers' guiders work in its modular pipelines alone. Here the denoiser's call is intercepted (driver.py), so every
pipeline class keeps its own loop, and a modular one its guider beside (guiders.py): the model is called as the pipeline
would, then once more weakened (weakening.py), and what it gives back is the guided output. Its attention modules are
the pipeline's own, patched ones among them.
"""

from .attaching import guide, guided, unguide

__all__ = ["guide", "guided", "unguide"]
