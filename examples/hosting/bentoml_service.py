"""Serve a published artifact by BentoML: FOLDER=... bentoml serve bentoml_service:Pladis

curl localhost:3000/draw --json '{"inputs": "two green stars", "parameters": {"seed": 7}}' --output star.png

FOLDER is what `hf download OWNER/NAME --local-dir FOLDER` fetched; of this package nothing is needed.
"""

import os
import sys

import bentoml
from bentoml.exceptions import InvalidArgument
from PIL.Image import Image


@bentoml.service(traffic={"timeout": 300})
class Pladis:
    """One model in each worker."""

    def __init__(self) -> None:
        folder = os.environ["FOLDER"]
        sys.path.insert(0, folder)
        from handler import EndpointHandler

        self.handler = EndpointHandler(folder)

    @bentoml.api
    def draw(self, inputs: str, parameters: dict | None = None) -> Image:
        """The image of a request, which is JSON as Hugging Face Inference Endpoints take it."""
        try:
            return self.handler({"inputs": inputs, "parameters": parameters})
        except ValueError as error:
            raise InvalidArgument(str(error)) from error
