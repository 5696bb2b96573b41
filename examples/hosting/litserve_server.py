"""Serve a published artifact by LitServe: python litserve_server.py FOLDER

curl localhost:8000/predict --json '{"inputs": "two green stars", "parameters": {"seed": 7}}' --output star.png

FOLDER is what `hf download OWNER/NAME --local-dir FOLDER` fetched; of this package nothing is needed.
"""

import io
import sys

import litserve
from fastapi import HTTPException, Response


class Api(litserve.LitAPI):
    """One model on one device."""

    def __init__(self, folder):
        super().__init__()
        self.folder = folder

    def setup(self, device):
        """Load it by its own handler.py, on the best device that the worker sees."""
        sys.path.insert(0, self.folder)
        from handler import EndpointHandler

        self.handler = EndpointHandler(self.folder)

    def predict(self, request):
        """The image of a request, which is JSON as Hugging Face Inference Endpoints take it."""
        try:
            return self.handler(request)
        except ValueError as error:
            raise HTTPException(400, str(error)) from error

    def encode_response(self, output):
        """A PNG."""
        data = io.BytesIO()
        output.save(data, "PNG")
        return Response(data.getvalue(), media_type="image/png")


if __name__ == "__main__":
    litserve.LitServer(Api(sys.argv[1])).run(port=8000, generate_client_file=False)
