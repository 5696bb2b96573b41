"""A published artifact as a cog (Replicate): cog predict -i prompt="two green stars"

The folder `model` beside this file is what `hf download OWNER/NAME --local-dir model` fetched, and so is its
requirements.txt, which cog.yaml names; of this package nothing is needed.
"""

import sys
import tempfile
from pathlib import Path as Folder

from cog import BasePredictor, Input, Path


class Predictor(BasePredictor):
    """One model."""

    def setup(self) -> None:
        """Load it by its own handler.py."""
        folder = str(Folder(__file__).parent / "model")
        sys.path.insert(0, folder)
        from handler import EndpointHandler

        self.handler = EndpointHandler(folder)

    def predict(
        self,
        prompt: str = Input(description="what to draw"),
        negative_prompt: str = Input(description="what not to; the recipe's where left out", default=None),
        steps: int = Input(description="the recipe's where left out", default=None),
        guidance_scale: float = Input(description="the recipe's where left out", default=None),
        seed: int = Input(description="another for each image where left out", default=None),
    ) -> Path:
        """A PNG."""
        parameters = {
            "negative_prompt": negative_prompt,
            "num_inference_steps": steps,
            "guidance_scale": guidance_scale,
            "seed": seed,
        }
        image = self.handler({"inputs": prompt, "parameters": parameters})
        path = Path(tempfile.mkdtemp()) / "image.png"
        image.save(path)
        return path
