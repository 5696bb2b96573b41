"""Print the trtexec command for an ONNX engine, with the sizes that its engine.json has.

    surgery export out/sdxl-pladis --target onnx
    python examples/trtexec.py out/sdxl-pladis/engines/<key>

It tunes for the largest size. A graph in half precision keeps float32 where it must, so it is taken as typed. The
command was not run by us.
"""

import json
import sys
from pathlib import Path


def command(folder):
    """The command's words."""
    (region,) = json.loads((Path(folder) / "engine.json").read_text())["regions"]
    bounds = dict(zip(region["input_names"], (tensor["shape"] for tensor in region["inputs"]), strict=False))
    bounds |= {name: [[len(values)] * 2] for name, values in region["values"].items()}

    def shapes(end):
        sized = {name: "x".join(str(axis[end]) for axis in axes) for name, axes in bounds.items() if axes}
        return ",".join(f"{name}:{size}" for name, size in sized.items())

    graph = Path(folder) / region["file"]
    ranges = [f"--minShapes={shapes(0)}", f"--optShapes={shapes(1)}", f"--maxShapes={shapes(1)}"]
    return ["trtexec", f"--onnx={graph}", "--stronglyTyped", "--noTF32", *ranges, f"--saveEngine={graph.stem}.plan"]


if __name__ == "__main__":
    print(" ".join(command(sys.argv[1])))
