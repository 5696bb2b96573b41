"""Every backbone: what a patched one computes, keeps, saves and refuses, on a tiny pipeline of its own."""

import json

import pytest
import torch

import surgery
from surgery.models.anatomy import attention_sites
from surgery.models.patching import operate
from surgery.models.selection import REPLACED
from surgery.nn import BACKBONES, is_pladis
from surgery.nn.operators import OPERATORS

from ...quick import quick
from . import FAMILIES
from .checks import denoiser, draw, forward, predicted, recorded_call, with_brute_force

# One of each layout and way of being told where the text is: the others' longer checks are made in test-all.
SAMPLE = (
    "shapes",
    "sdxl",
    "flux",
    "flux2",
    "sd3",
    "ltx",
    "wan_from_image",
    "mochi",
    "krea2",
    "z_image",
    "prx",
    "cosmos25",
)
COMPILED = ("flux2", "ltx")  # the UNets' class is in tests/models/test_patch_survives.py


def only(names):
    """Parametrize by the families, those of other names slow."""
    wanted = [family for family in FAMILIES if family.name in names]
    return pytest.mark.parametrize("built", quick(FAMILIES, *wanted), ids=str, indirect=True)


# A short step: the papers' scale of 10 multiplies float32's rounding by as much in every layer.
GAG = {"operator": "gag", "scale": 1.0, "zeta": 0.5, "eta": 2.0}


@pytest.fixture(scope="module", params=FAMILIES, ids=str)
def built(request):
    """(Family, its pipeline, the arguments of a call, the denoiser's arguments in it, its output unpatched)."""
    family = request.param
    pipeline, arguments = family.build()
    call = recorded_call(pipeline, arguments) if family.draws else arguments
    return family, pipeline, arguments, call, forward(pipeline, call)


@pytest.fixture
def tiny(built, request, record_property):
    """As `built`; whatever a test patches is taken out again. What ran is recorded for benchmarks/matrix.py."""
    given = request.node.callspec.params
    operators = given.get("operator") or given.get("settings", {}).get("operator")
    record_property("backbone", built[0].name)
    record_property("model_class", built[0].model_class)
    record_property("operators", operators or getattr(request.function, "operators", "pladis"))
    record_property("check", request.node.originalname)
    yield built
    pipeline = built[1]
    if any(is_pladis(module) for module in denoiser(pipeline).modules()):
        surgery.unpatch(pipeline)


def gap(one, other):
    """The largest difference over the second one's root mean square."""
    return ((one - other).abs().max() / other.square().mean().sqrt()).item()


def patched_modules(pipeline):
    return {path: module for path, module in denoiser(pipeline).named_modules() if is_pladis(module)}


def test_scale_0_is_the_base_a_larger_one_is_not_and_unpatching_gives_every_bit_back(tiny):
    family, pipeline, _, call, base = tiny
    assert type(denoiser(pipeline)).__name__ == family.model_class and family.model_class in BACKBONES
    surgery.patch(pipeline, scale=0.0)
    assert len(patched_modules(pipeline)) == family.modules
    assert gap(forward(pipeline, call), base) < 2e-5
    surgery.tune(pipeline, scale=2.0)
    assert gap(forward(pipeline, call), base) > 1e-3
    surgery.unpatch(pipeline)
    assert type(denoiser(pipeline)).__name__ == family.model_class and torch.equal(forward(pipeline, call), base)


@pytest.mark.parametrize(
    ("built", "settings"),
    [
        *((family, {"operator": "pladis", "alpha": 2.0, "scale": -1.0}) for family in FAMILIES),
        *quick([(family, GAG) for family in FAMILIES], *((one, GAG) for one in FAMILIES if one.name in SAMPLE)),
    ],
    ids=str,
    indirect=["built"],
)
def test_it_is_diffusers_own_code_around_the_formula_by_brute_force(monkeypatch, tiny, settings):
    family, pipeline, _, call, base = tiny
    defaults = OPERATORS[settings["operator"]].defaults
    numbers = {name: value for name, value in {**defaults, **settings}.items() if name != "temperature"}
    expected, times = with_brute_force(monkeypatch, pipeline, call, family, **numbers)
    assert times == family.modules and gap(expected, base) > 1e-3
    surgery.patch(pipeline, **settings)
    assert gap(forward(pipeline, call), expected) < 1e-4


@only(SAMPLE[::2])
@pytest.mark.parametrize("operator", ["anderson", "sparse"])
def test_the_other_operators_run_and_differ(tiny, operator):
    _, pipeline, _, call, base = tiny
    surgery.patch(pipeline, operator=operator)
    found = forward(pipeline, call)
    assert found.isfinite().all() and gap(found, base) > 1e-3


@only(SAMPLE[1::2])
def test_some_layers_can_be_left_as_they_are(tiny):
    family, pipeline, _, call, base = tiny
    sites = [site for site in attention_sites(denoiser(pipeline)) if site.kind in REPLACED]
    assert len([site for site in sites if not site.refusal]) == family.modules
    surgery.patch(pipeline, layers=[sites[0].path])
    first = forward(pipeline, call)
    assert list(patched_modules(pipeline)) == [sites[0].path] and gap(first, base) > 1e-4
    surgery.unpatch(pipeline)
    surgery.patch(pipeline)
    assert gap(forward(pipeline, call), first) > 1e-4


def test_tokens_of_padding_change_nothing(tiny):
    family, pipeline, _, call, _ = tiny
    if family.mask is None:
        pytest.skip("it has no mask")
    surgery.patch(pipeline, scale=2.0)
    mask = torch.ones_like(call[family.mask])
    mask[:, -3:] = 0
    found = forward(pipeline, {**call, family.mask: mask})
    other = call[family.embeds].clone()
    other[:, -3:] += 5.0
    assert gap(forward(pipeline, {**call, family.mask: mask, family.embeds: other}), found) < 1e-5
    assert gap(forward(pipeline, {**call, family.embeds: other, family.mask: torch.ones_like(mask)}), found) > 1e-3


def with_both(test):
    """Mark a test that runs PLADIS and GAG in one model."""
    test.operators = "pladis gag"
    return test


def both_operators(pipeline):
    """Operations that give the first module that surgery fits GAG and every other one PLADIS."""
    sites = [site for site in attention_sites(denoiser(pipeline)) if site.kind in REPLACED and not site.refusal]
    first, *others = [site.path for site in sites]
    gag = {"operator": "gag", **OPERATORS["gag"].defaults, "unit": "head", "layers": [first]}
    return [gag, {"operator": "pladis", **OPERATORS["pladis"].defaults, "layers": others}]


@with_both
@only(COMPILED)
def test_it_compiles_whole_and_a_changed_scale_needs_no_other_graph(tiny):
    family, pipeline, _, call, _ = tiny
    if family.name == "shapes" or not family.compiles:
        pytest.skip("its class is compiled as sdxl's, or diffusers' own forward() is not one graph")
    operate(pipeline, both_operators(pipeline))
    eager = forward(pipeline, call)
    torch._dynamo.reset()
    compiled = torch.compile(denoiser(pipeline), fullgraph=True, backend="eager")
    assert gap(predicted(compiled, call), eager) < 1e-4
    surgery.tune(pipeline, scale=0.5)
    with torch.compiler.set_stance("fail_on_recompile"):
        again = predicted(compiled, call)
    assert gap(again, forward(pipeline, call)) < 1e-4 < gap(again, eager)


@with_both
@only(("shapes", "flux", "sd3", "wan_from_image", "z_image", "cosmos25"))
def test_an_artifact_of_it_loads_as_it_was_and_never_unpatched(tiny, tmp_path):
    import diffusers

    family, pipeline, arguments, call, _ = tiny
    pipeline.save_pretrained(tmp_path / "base")
    operations = both_operators(pipeline)
    recipe = {
        "schema": 1,
        "name": family.name,
        "base": {"pipeline": "./base"},
        "operations": [
            {
                "replace": "cross-attention",
                "layers": operation["layers"],
                "with": {key: value for key, value in operation.items() if key != "layers"},
            }
            for operation in operations
        ],
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    artifact = surgery.apply(tmp_path / "recipe.yaml", tmp_path / "artifact")
    loaded = surgery.load(artifact.folder, dtype=torch.float32)
    operate(pipeline, operations)
    expected = forward(pipeline, call)
    assert gap(forward(loaded, call), expected) < 1e-5
    if family.draws:
        assert gap(draw(loaded, arguments), draw(pipeline, arguments)) < 1e-3
    loaded.save_pretrained(tmp_path / "again")
    for folder in (artifact.folder, tmp_path / "again"):
        with pytest.raises(ValueError, match="trust_remote_code"):
            diffusers.DiffusionPipeline.from_pretrained(folder)
        again = diffusers.DiffusionPipeline.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
        assert type(denoiser(again)).__name__ == f"Pladis{family.model_class}"
        assert gap(forward(again, call), expected) < 1e-5
    component = "transformer" if hasattr(pipeline, "transformer") else "unet"
    with pytest.raises((TypeError, ValueError)):
        getattr(diffusers, family.model_class).from_pretrained(artifact.folder, subfolder=component)
