"""Section `backbones` of benchmarks/gpu.py: every tiny backbone of the tests, patched and compiled, on the device.

    python benchmarks/gpu_backbones.py flux sd3 --device cpu      # these alone, as JSON lines

A difference is the root mean square of it over that of what it is compared with. What compiling moves is given of the
unpatched model beside the patched one: a compiler keeps in float32 what eager rounds to bfloat16 between two
operations, so the two differ without any patch. How far either is from the same model in float32, with the same rounded
weights and inputs, tells which of them is right.
"""

import argparse
import copy
import json
import sys
from functools import cache

import torch
import torch._dynamo
from gpu_models import relative
from gpu_report import first_lines, import_from_repository
from gpu_workers import spread

import surgery
from surgery.models.patching import denoiser, patched_modules

DTYPES = ("bfloat16", "float32")


def backbones(report):
    """The section."""
    found, total = spread(report, "gpu_backbones", report.left() - 3)
    things = items(report.device)
    for index, result in found:
        name, dtype = things[index]
        report.row(what=name, dtype=dtype, **result)
    report.fact("backbones_and_dtypes", total)
    report.fact("done", len(found))


def items(device):
    """(backbone, dtype): joint attention in bfloat16 first, where compiling moves most."""
    families = sorted(_families().values(), key=lambda family: not family.is_joint)
    names = [family.name for family in families]
    return [("sana", "float32")] if device == "cpu" else [(name, dtype) for dtype in DTYPES for name in names]


def work(item, device):
    """The differences of one backbone in one dtype; where something fails, those up to there and the error."""
    found = {}
    try:
        _measure(item, device, found)
    except Exception as error:
        found["error_text"] = first_lines(error)
    return found


def _measure(item, device, found):
    name, dtype = item
    dtype = getattr(torch, dtype)
    torch.backends.cudnn.allow_tf32 = False  # float32 is what the others are held to
    model, given = prepared(_families()[name], device, dtype)
    wide, wide_given = copy.deepcopy(model).float(), cast(given, device, torch.float32)
    stock = output(model, given)
    found.update(differences(model, given, stock, output(wide, wide_given), "stock_"))
    surgery.patch(model)
    surgery.patch(wide)
    patched = output(model, given)
    found["changed"] = relative(patched, stock)
    found.update(differences(model, given, patched, output(wide, wide_given), ""))
    for module in patched_modules(model).values():
        module.pladis_implementation = "reference"
    found["reference"] = relative(patched, output(model, given))
    surgery.unpatch(model)
    found["restored"] = "bit for bit" if torch.equal(output(model, given), stock) else "differs"


def differences(model, given, eager, wide, prefix):
    """How far eager is from float32, and compiled from eager and from float32."""
    found = {f"{prefix}rounding": relative(eager, wide)}
    try:
        compiled, fullgraph = compiled_output(model, given)
    except Exception as error:
        return {**found, f"{prefix}compile_error": first_lines(error)}
    found |= {f"{prefix}compiled": relative(compiled, eager), f"{prefix}compiled_rounding": relative(compiled, wide)}
    found[f"{prefix}compiled_largest"] = ((compiled - eager).abs().max() / eager.square().mean().sqrt()).item()
    return found if fullgraph else {**found, f"{prefix}graph": "broken"}


def compiled_output(model, given):
    """(what the compiled model returns, whether it is one graph)."""
    torch._dynamo.reset()
    try:
        return output(torch.compile(model, fullgraph=True), given), True
    except torch._dynamo.exc.Unsupported:
        torch._dynamo.reset()
        return output(torch.compile(model), given), False


def prepared(family, device, dtype):
    """(the denoiser on its device, the arguments of a real call of it)."""
    from tests.nn.backbones.checks import recorded_call

    pipeline, arguments = family.build()
    call = recorded_call(pipeline, arguments)
    return denoiser(pipeline).to(device, dtype).eval(), cast({**call, "return_dict": False}, device, dtype)


def cast(value, device, dtype):
    """A call's arguments on a device, what is floating in a dtype."""
    if isinstance(value, torch.Tensor):
        return value.to(device, dtype if value.is_floating_point() else value.dtype)
    if isinstance(value, dict):
        return {key: cast(part, device, dtype) for key, part in value.items()}
    return type(value)(cast(part, device, dtype) for part in value) if isinstance(value, (list, tuple)) else value


def output(model, given):
    """The first output of a call, in float64."""
    with torch.no_grad():
        return model(**given)[0].double()


@cache
def _families():
    import_from_repository()
    from tests.nn.backbones import FAMILIES

    return {family.name: family for family in FAMILIES}


def main():
    """Print what `work` finds of some backbones."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("backbones", nargs="+")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"])
    options = parser.parse_args()
    for name in options.backbones:
        for dtype in options.dtypes:
            print(json.dumps({"backbone": name, "dtype": dtype, **work((name, dtype), options.device)}), flush=True)


if __name__ == "__main__":
    sys.exit(main())
