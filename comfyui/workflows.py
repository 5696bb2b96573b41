"""Writes example_workflows/ with a picture of each, and icon.png.

    python comfyui/workflows.py       # from the project's root, after a change of the nodes

The registry is not given this script (.comfyignore).
"""

import json
import sys
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
_WIDTH, _STEP, _ROW, _LINE = 260, 310, 260, 22  # pixels of a node, between columns and rows, of a line

# {title: (column, row, type, {input: (title of a node, its output)}, [values of widgets], (outputs))}
_TEXT = "a corgi that wears a red top hat, beside a blue teapot"
_SDXL = {
    "checkpoint": (0, 0, "CheckpointLoaderSimple", {}, ["sd_xl_base_1.0.safetensors"], ("MODEL", "CLIP", "VAE")),
    "prompt": (1, 1, "CLIPTextEncode", {"clip": ("checkpoint", "CLIP")}, [_TEXT], ("CONDITIONING",)),
    "no prompt": (1, 2, "CLIPTextEncode", {"clip": ("checkpoint", "CLIP")}, [""], ("CONDITIONING",)),
    "latents": (1, 3, "EmptyLatentImage", {}, [1024, 1024, 1], ("LATENT",)),
    "PLADIS": (1, 0, "PladisSurgeryPLADIS", {"model": ("checkpoint", "MODEL")}, {}, ("MODEL", "STRING")),
}
_FLUX = {
    "checkpoint": (0, 0, "CheckpointLoaderSimple", {}, ["flux1-dev-fp8.safetensors"], ("MODEL", "CLIP", "VAE")),
    "prompt": (0, 1, "CLIPTextEncode", {"clip": ("checkpoint", "CLIP")}, [_TEXT], ("CONDITIONING",)),
    "what not": (0, 2, "CLIPTextEncode", {"clip": ("checkpoint", "CLIP")}, ["blurry, watermark"], ("CONDITIONING",)),
    "no prompt": (0, 3, "ConditioningZeroOut", {"conditioning": ("prompt", "CONDITIONING")}, [], ("CONDITIONING",)),
    "latents": (1, 3, "EmptySD3LatentImage", {}, [1024, 1024, 1], ("LATENT",)),
    "GAG": (1, 0, "PladisSurgeryGAG", {"model": ("checkpoint", "MODEL")}, {"sigma_low": 0.5}, ("MODEL", "STRING")),
    "NAG": (
        2,
        0,
        "PladisSurgeryNAG",
        {"model": ("GAG", "MODEL"), "negative": ("what not", "CONDITIONING")},
        {},
        ("MODEL", "STRING"),
    ),
}


def _drawn(graph: dict, model: str, column: int, sampler: list) -> dict:
    """A graph with what draws by a model, decodes, saves, and reports."""
    inputs = {"model": (model, "MODEL"), "positive": ("prompt", "CONDITIONING")}
    inputs |= {"negative": ("no prompt", "CONDITIONING"), "latent_image": ("latents", "LATENT")}
    return {
        **graph,
        "sampler": (column, 1, "KSampler", inputs, sampler, ("LATENT",)),
        "report": (
            column + 1,
            0,
            "PladisSurgeryReport",
            {"model": (model, "MODEL"), "after": ("sampler", "LATENT")},
            {},
            ("LATENT", "STRING"),
        ),
        "what became of it": (column + 2, 0, "PreviewAny", {"source": ("report", "STRING")}, [], ()),
        "image": (
            column + 1,
            2,
            "VAEDecode",
            {"samples": ("report", "LATENT"), "vae": ("checkpoint", "VAE")},
            [],
            ("IMAGE",),
        ),
        "saved": (column + 2, 2, "SaveImage", {"images": ("image", "IMAGE")}, ["pladis"], ()),
    }


WORKFLOWS = {
    "PLADIS on SDXL": _drawn(_SDXL, "PLADIS", 2, [0, "fixed", 25, 5.0, "euler", "normal", 1.0]),
    "GAG and NAG on FLUX": _drawn(_FLUX, "NAG", 3, [0, "fixed", 20, 1.0, "euler", "simple", 1.0]),
}


def _ours() -> dict[str, list]:
    """{node: its inputs that have widgets}."""
    sys.path.insert(0, str(FOLDER.parent))
    from comfyui.nodes import NODES

    return {node.identifier: [one for one in node.inputs if one.default is not None] for node in NODES}


def workflow(graph: dict) -> dict[str, Any]:
    """A graph as ComfyUI's page saves it."""
    ours = _ours()
    numbers = {title: number for number, title in enumerate(graph, start=1)}
    nodes, links = [], []
    for title, (column, row, kind, inputs, values, outputs) in graph.items():
        if kind in ours:
            values = [values.get(one.name, one.default) for one in ours[kind]]
        sockets = []
        for name, (source, output) in inputs.items():
            slot = graph[source][5].index(output)
            links.append([len(links) + 1, numbers[source], slot, numbers[title], len(sockets), output])
            sockets.append({"name": name, "type": output if kind != "PreviewAny" else "*", "link": len(links)})
        nodes.append(
            {
                "id": numbers[title],
                "type": kind,
                "title": title,
                "pos": [column * _STEP, row * _ROW],
                "size": [_WIDTH, 40 + _LINE * (max(len(sockets), len(outputs)) + len(values))],
                "flags": {},
                "order": numbers[title] - 1,
                "mode": 0,
                "inputs": sockets,
                "outputs": [{"name": output, "type": output, "links": []} for output in outputs],
                "properties": {"Node name for S&R": kind},
                "widgets_values": values,
            }
        )
    for link in links:
        nodes[link[1] - 1]["outputs"][link[2]]["links"].append(link[0])
    shape = {"last_node_id": len(nodes), "last_link_id": len(links), "nodes": nodes, "links": links}
    return {"revision": 0, **shape, "groups": [], "config": {}, "extra": {}, "version": 0.4}


def picture(made: dict[str, Any]) -> Any:
    """A drawing of a workflow: its nodes with their inputs and values, and the links between them."""
    from PIL import Image, ImageDraw

    right, bottom = (max(node["pos"][axis] + node["size"][axis] for node in made["nodes"]) for axis in (0, 1))
    image = Image.new("RGB", (int(right) + 40, int(bottom) + 40), "#1c1e22")
    draw = ImageDraw.Draw(image)
    sockets, ours = {}, _ours()
    for node in made["nodes"]:
        x, y = (place + 20 for place in node["pos"])
        draw.rounded_rectangle((x, y, x + node["size"][0], y + node["size"][1]), 8, "#33363d", "#5a5f69")
        draw.text((x + 10, y + 6), node["title"], "#ffb454" if node["type"] in ours else "#e8e8e8", font_size=16)
        for slot, output in enumerate(node["outputs"]):
            place = x + node["size"][0], y + 38 + _LINE * slot
            sockets["out", node["id"], slot] = place
            draw.text((place[0] - 8, place[1]), output["name"], "#9aa4b2", font_size=12, anchor="rm")
        for slot, socket in enumerate(node["inputs"]):
            place = x, y + 38 + _LINE * slot
            sockets["in", node["id"], slot] = place
            draw.text((place[0] + 8, place[1]), socket["name"], "#9aa4b2", font_size=12, anchor="lm")
        first = 38 + _LINE * max(len(node["inputs"]), len(node["outputs"]))
        names = [f"{one.name}: " for one in ours.get(node["type"], ())] or [""] * len(node["widgets_values"])
        for line, (name, value) in enumerate(zip(names, node["widgets_values"], strict=True)):
            draw.text((x + 14, y + first + _LINE * line), f"{name}{value}"[:38], "#c8d0da", font_size=12, anchor="lm")
    for _, source, output, target, slot, _ in made["links"]:
        ends = sockets["out", source, output], sockets["in", target, slot]
        draw.line(ends, "#6ea8d8", 2)
        for x, y in ends:
            draw.ellipse((x - 4, y - 4, x + 4, y + 4), "#6ea8d8")
    return image


def icon() -> Any:
    """Four hundred pixels square: a row of weights, of which all but a few are nothing."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (400, 400), "#1c1e22")
    draw = ImageDraw.Draw(image)
    for place, height in enumerate((30, 60, 200, 90, 260, 45, 25)):
        left, kept = 50 + 44 * place, height > 100
        draw.rounded_rectangle((left, 320 - height, left + 34, 320), 6, "#ffb454" if kept else None, "#7d8794", 3)
    return image


def main() -> None:
    """Write all of it."""
    folder = FOLDER / "example_workflows"
    folder.mkdir(exist_ok=True)
    for name, graph in WORKFLOWS.items():
        made = workflow(graph)
        (folder / f"{name}.json").write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
        picture(made).save(folder / f"{name}.jpg", quality=88)
    icon().save(FOLDER / "icon.png", optimize=True)


if __name__ == "__main__":
    main()
