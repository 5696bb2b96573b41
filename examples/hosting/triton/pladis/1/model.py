"""A published artifact in NVIDIA Triton's Python backend; config.pbtxt names the folder.

tritonserver --model-repository examples/hosting/triton

takes a prompt and the parameters as JSON, as Hugging Face Inference Endpoints take them, and gives a PNG back.
"""

import io
import json
import sys

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    """One model in each instance."""

    def initialize(self, args):
        """Load it by its own handler.py; of this package nothing is needed."""
        folder = json.loads(args["model_config"])["parameters"]["folder"]["string_value"]
        sys.path.insert(0, folder)
        from handler import EndpointHandler

        self.handler = EndpointHandler(folder)

    def execute(self, requests):
        """A response for each request: the image, or what is wrong with the request."""
        return [self._answer(request) for request in requests]

    def _answer(self, request):
        values = {name: pb_utils.get_input_tensor_by_name(request, name) for name in ("inputs", "parameters")}
        texts = {name: tensor.as_numpy().reshape(-1)[0].decode() for name, tensor in values.items() if tensor}
        try:
            image = self.handler({"inputs": texts["inputs"], "parameters": json.loads(texts.get("parameters", "{}"))})
        except ValueError as error:
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error)))
        data = io.BytesIO()
        image.save(data, "PNG")
        return pb_utils.InferenceResponse([pb_utils.Tensor("image", np.array([data.getvalue()], dtype=object))])
