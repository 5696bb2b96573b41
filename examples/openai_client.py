"""Serve a model on this machine and draw from it by OpenAI's client: previews, images, and an edit of one of them.

pip install openai
surgery apply shapes --out out/shapes && python examples/openai_client.py out/shapes
"""

import base64
import socket
import sys
from pathlib import Path

from openai import OpenAI

import surgery

PROMPT = "a red circle to the left of a blue square"


def draw(url, out):
    """Write PNGs into a folder, drawn by the server at `url`, and print what was done."""
    client = OpenAI(base_url=f"{url}/v1", api_key="unused")
    for event in client.images.generate(prompt=PROMPT, stream=True, partial_images=2, extra_body={"seed": 0}):
        kind = event.type.rpartition(".")[2]
        name = f"preview-{event.partial_image_index}" if kind == "partial_image" else "image"
        print(out / f"{name}.png", "after some of the steps" if kind == "partial_image" else event.usage)
        (out / f"{name}.png").write_bytes(base64.b64decode(event.b64_json))
    edited = client.images.edit(image=(out / "image.png").open("rb"), prompt="two green stars")
    (out / "edited.png").write_bytes(base64.b64decode(edited.data[0].b64_json))
    print(out / "edited.png", "drawn from image.png, of", edited.size)


def main():
    """Serve the artifact that is named, and draw."""
    out = Path("out/served")
    out.mkdir(parents=True, exist_ok=True)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with surgery.serve(sys.argv[1], port=port) as server:
        print(f"{server.config.url} serves {', '.join(server.served.names())}")
        draw(server.config.url, out)


if __name__ == "__main__":
    main()
