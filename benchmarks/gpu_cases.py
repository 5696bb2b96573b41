"""Section `correctness` of benchmarks/gpu.py: the GPU kernels against the float64 reference on many small inputs.

Triton compiles a kernel for nearly every case, so they are divided among processes; every pair of values of two axes
is met by the first of the cases, and the others are drawn at random until the time is up.
"""

import itertools
import random

import torch
from gpu_workers import spread

from surgery.nn import attention

OPERATORS = {
    "pladis": {"operator": "pladis", "scale": 2.0},
    "sparse": {"operator": "sparse"},
    "gag, head": {"operator": "gag", "scale": 2.0, "zeta": 0.3, "eta": 2.0, "unit": "head"},
    "gag, token": {"operator": "gag", "scale": 2.0, "zeta": 0.3, "eta": 2.0, "unit": "token"},
    "anderson": {"operator": "anderson"},
}
AXES = {
    "operator": tuple(OPERATORS),
    "alpha": (1.5, 2.0, 1.25, 1.75, 1.05, 1.0),
    "keys": (77, 13, 128, 300, 512, 600),
    "head_dim": (64, 40, 128, 72, 16, 256),
    "mask": ("none", "boolean per key", "boolean per row", "additive per key", "additive per row"),
    "dtype": ("bfloat16", "float16", "float32"),
    "lse": (True, False),
    "alpha_given_as": ("number", "tensor"),  # a module gives its buffer
    "spread": (2.0, 0.5, 8.0),  # of the scores
    "queries": (70, 1, 200),
    "temperature": (1.0, 0.7),
}
LIMITS = {"float32": 2e-5, "float16": 1.2e-3, "bfloat16": 8e-3}  # relative error of the output
LSE_LIMITS = {"float32": 2e-5, "float16": 1e-2, "bfloat16": 1e-2}  # largest error over 1 + the largest log-sum-exp
MOST = 480


def correctness(report):
    """The section."""
    found, total = spread(report, "gpu_cases", report.left() - 3)
    cases = items(report.device)
    done = [(cases[index], result) for index, result in found]
    for operator, dtype in itertools.product(AXES["operator"], AXES["dtype"]):
        results = [result for case, result in done if (case["operator"], case["dtype"]) == (operator, dtype)]
        measured = [result for result in results if "error" in result]
        if not results:
            continue
        report.row(
            what=operator,
            dtype=dtype,
            cases=len(measured),
            worst_error=max((result["error"] for result in measured), default=None),
            worst_lse_error=max((result["lse_error"] for result in measured), default=None),
            off=sum(bool(result["off"]) for result in measured),
            refused=sum("refused" in result for result in results),
            failed=sum("error_text" in result for result in results),
        )
    report.fact("cases", total)
    report.fact("done", len(done))
    bad = [(case, result) for case, result in done if result.get("off") or "error_text" in result]
    report.fact("bad", [{**case, **result} for case, result in bad[:30]])
    report.fact("refusals", sorted({result["refused"] for _, result in done if "refused" in result}))
    for case, result in bad[:10]:
        report.say(f"{case} {result}")


def items(device):
    """The cases, the same in every process: first such that every two values of two axes meet, then random ones."""
    draw = random.Random(0)
    axes = {**AXES, "keys": (77, 13), "head_dim": (16, 40), "queries": (5, 1)} if device == "cpu" else AXES

    def one():
        return {axis: draw.choice(values) for axis, values in axes.items()}

    missing = {
        pair
        for first, second in itertools.combinations(axes, 2)
        for pair in itertools.product([(first, v) for v in axes[first]], [(second, v) for v in axes[second]])
    }
    found = []
    while missing:
        best = max((one() for _ in range(40)), key=lambda case: len(missing & _pairs(case)))
        missing -= _pairs(best)
        found.append(best)
    return found[:4] if device == "cpu" else [*found, *(one() for _ in range(MOST - len(found)))]


def _pairs(case):
    return set(itertools.combinations(case.items(), 2))


def work(case, device):
    """{"error", "lse_error", "off"} of a case, or {"refused": why the kernel does not take it}."""
    batch, heads, queries, keys, head_dim = 2, 3, case["queries"], case["keys"], case["head_dim"]
    dtype = getattr(torch, case["dtype"])
    generator = torch.Generator().manual_seed(0)

    def noise(length):  # as projections lie in memory
        made = torch.randn(batch, length, heads, head_dim, generator=generator)
        return made.to(device, dtype).transpose(1, 2)

    query, key, value = noise(queries) * case["spread"], noise(keys), noise(keys)
    mask = _mask(case["mask"], (batch, heads, queries, keys), generator)
    mask = None if mask is None else mask.to(device, dtype if mask.is_floating_point() else torch.bool)
    more = {"temperature": case["temperature"], **OPERATORS[case["operator"]]}
    alpha = torch.tensor(case["alpha"], device=device) if case["alpha_given_as"] == "tensor" else case["alpha"]
    wide = mask.double() if mask is not None and mask.is_floating_point() else mask
    wanted, wanted_lse = attention(
        *(tensor.double() for tensor in (query, key, value)),
        alpha=float(torch.tensor(case["alpha"])),  # rounded as the kernel's
        mask=wide,
        implementation="reference",
        return_lse=True,
        **more,
    )
    try:
        got = attention(
            query, key, value, alpha=alpha, mask=mask, implementation="triton", return_lse=case["lse"], **more
        )
    except ValueError as error:
        if "cannot take this" not in str(error):
            raise
        return {"refused": str(error).partition("cannot take this: ")[2]}
    got, lse = got if case["lse"] else (got, None)
    result = compare(case, got, wanted, lse, wanted_lse)
    if "output" in result["off"]:  # where weights cancel, their rounding is more of what is left: as in plain torch?
        plain = attention(query, key, value, alpha=alpha, mask=mask, implementation="reference", **more)
        result["plain_error"] = relative(plain, wanted)
        if result["error"] <= 1.5 * result["plain_error"]:
            result["off"] = result["off"].replace("output", "").strip(", ")
    return result


def relative(got, wanted):
    """The error over what was wanted, both as root mean squares; 1e30 for what is not finite."""
    norm = wanted.norm().item() or 1.0
    return ((got.double() - wanted).norm() / norm).nan_to_num(nan=1e30, posinf=1e30).item()


def compare(case, got, wanted, lse, wanted_lse):
    """{"error", "lse_error", "off": what is wrong, if anything}."""
    error, lse_error = relative(got, wanted), 0.0
    off = [] if error <= LIMITS[case["dtype"]] else ["output"]
    keyless = wanted_lse == float("-inf")
    if not (got.isfinite().all() and (got[keyless] == 0).all()):
        off.append("rows without a key, or not finite")
    if lse is not None:
        kept = ~keyless
        if not (lse.isfinite() == kept).all():
            off.append("log-sum-exp of rows without a key")
        elif kept.any():
            largest = 1 + wanted_lse[kept].abs().max()
            lse_error = ((lse.double() - wanted_lse)[kept].abs().max() / largest).nan_to_num(nan=1e30).item()
            off += [] if lse_error <= LSE_LIMITS[case["dtype"]] else ["log-sum-exp"]
    return {"error": error, "lse_error": lse_error, "off": ", ".join(off)}


def _mask(kind, shape, generator):
    batch, _, queries, keys = shape
    if kind == "none":
        return None
    if kind.endswith("per key"):
        kept = torch.rand(batch, 1, 1, keys, generator=generator) > 0.3
        kept[..., 0] = True
        return kept if kind.startswith("boolean") else torch.randn(kept.shape, generator=generator)
    kept = torch.rand(batch, 1, queries, keys, generator=generator) > 0.3
    kept[:, :, : queries // 10] = False  # rows without any key
    if kind.startswith("boolean"):
        return kept
    return torch.where(kept, torch.randn(shape, generator=generator), float("-inf"))
