"""Whatever is done to the files of an artifact, a base or a recipe: what comes out is an error of ours, or a result."""

import contextlib
import copy
import functools
import hashlib
import json
import random
import shutil
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import surgery
from surgery.artifact import read_manifest
from surgery.artifact.manifest import Manifest
from surgery.artifact.scores import read_scores
from surgery.engines.record import read_engine
from surgery.errors import SurgeryError
from surgery.export.publish.card import model_card
from surgery.hub.tensors import read_header, read_pickle
from surgery.recipe.plan import make_plan
from surgery.recipe.schema import Publish

from ..publish.test_refusals import scores_of

FROZEN = max((Path(__file__).parent.parent / "frozen").glob("0.*")) / "artifact"
SHAPES = Path(__file__).parent.parent.parent / "recipes" / "shapes"
RECIPE = {
    "schema": 1,
    "name": "r",
    "summary": "",
    "base": {
        "pipeline": str(SHAPES),
        "scheduler": {"class": "LCMScheduler", "beta_start": 0.001, "num_train_timesteps": 1000},
    },
    "operations": [
        {
            "replace": "cross-attention",
            "layers": ["down", "mid"],
            "with": {"operator": "pladis", "alpha": 1.5, "scale": 2.0},
            "schedule": {"steps": [0, 2], "scale": [1.0, 2.0, 2.0]},
        },
        {"replace": "cross-attention", "layers": "up", "with": {"operator": "gag", "unit": "token"}},
    ],
    "sampling": {"timesteps": [900, 500, 100], "height": 64},
    "guidance": {"method": "pag", "scale": 2.0, "layers": ["mid"], "steps": [0, 2]},
    "validate": {"prompts": ["a", "b"], "metrics": ["clip_score"], "limit": 2},
    "export": [{"target": "inductor", "dtype": "fp32"}],
    "publish": {"license": "mit", "tags": ["a"]},
}
SIZES = {"images": [1, 1, 1], "height": [64, 64, 64], "width": [64, 64, 64]}
TENSOR = {"name": "sample", "dtype": "float32", "shape": [[2, 2], [4, 4]]}
DIGEST = {"size": 1, "sha256": "0" * 64}
ENGINE = {
    **{"schema_version": 1, "key": "unet-onnx-cpu", "backend": "onnx", "versions": {"onnxruntime": "1"}},
    **{"component": "unet", "artifact_hash": "0" * 64, "dtype": "float32", **SIZES, "weights": "engine"},
    **{"hyperparameters": "adjustable", "operator": "decomposed", "options": {"regional": False}, "inputs": [TENSOR]},
    "built_on": {**dict.fromkeys(["device", "architecture", "system", "torch", "name"], "x"), "cuda": None},
    "regions": [
        {"file": "a.onnx", "modules": [""], "inputs": [TENSOR], "constants": {}, "outputs": ["sample"], "output": "x"}
    ],
    "files": {"a.onnx": DIGEST},
    "seconds": {"compile": 1.0},
    "difference": {**dict.fromkeys(["largest", "mean", "relative", "tolerance", "after_change"], 0.1), "calls": 1},
}
DEEP = functools.reduce(lambda inner, _: [inner], range(200), [])
ODD = [None, True, -1, 0, 7, 10**30, 0.5, 1e300, float("nan"), float("inf"), "", "x" * 5000, "../../etc/passwd"]
ODD += ["/dev/zero", "unet", "\ud800", "a\nb\x00c", "<b>|`", [], {}, [[[]]], {"": None}, [None], DEEP]


def often(default, in_full):
    return pytest.mark.parametrize("examples", [default, pytest.param(in_full, marks=pytest.mark.slow)])


@contextlib.contextmanager
def replaced(folder, name, content, good):
    """A file with other content within the block; all of `good`, {name: bytes}, stands again after it."""
    try:
        (folder / name).write_bytes(content)
        yield
    finally:
        for path, kept in good.items():
            (folder / path).write_bytes(kept)


@pytest.fixture
def tried(examples, record_property):
    """Run a function of a random.Random so often; what is not our error is the test's failure."""

    def run(function):
        ended = {"cases": 0, "refused": 0}

        @settings(max_examples=examples, deadline=None, database=None, derandomize=examples in (20, 30, 40, 60, 200))
        @given(seed=st.integers(0, 2**64))
        def ours_alone(seed):
            ended["cases"] += 1
            try:
                function(random.Random(seed))
            except SurgeryError:
                ended["refused"] += 1

        try:
            ours_alone()
        finally:
            for name, count in ended.items():
                record_property(name, count)

    return run


def places(value):
    """(container, key) of everything in JSON data."""
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, part in parts for place in [(value, key), *places(part)]]


def mutated(chance, value):
    """JSON data with one to three of its values replaced, taken out, added or put elsewhere."""
    value = copy.deepcopy(value)
    for _ in range(chance.randint(1, 3)):
        if not (found := places(value)):
            break
        holder, key = chance.choice(found)
        act = chance.choice(["replace", "replace", "remove", "add", "swap"])
        if act == "replace":
            holder[key] = copy.deepcopy(chance.choice(ODD))
        elif act == "remove":
            del holder[key]
        elif act == "add" and isinstance(holder, dict):
            holder[chance.choice(["x", "", "_class_name", "x" * 300])] = copy.deepcopy(chance.choice(ODD))
        else:
            other, name = chance.choice(found)
            holder[key] = copy.deepcopy(other[name])
    return value


def mutated_bytes(chance, content):
    """Bytes with one to four changed, cut off, or put in; half of them where a format has its lengths and names."""
    content = bytearray(content)
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(min(chance.choice([16, 400, len(content)]), len(content)) + 1)
        act = chance.choice(["flip", "flip", "cut", "insert"])
        if act == "flip" and at < len(content):
            content[at] ^= chance.randint(1, 255)
        elif act == "cut":
            del content[at:]
        else:
            content[at:at] = chance.randbytes(chance.randint(1, 9))
    return bytes(content)


def sign(folder):
    """Give an artifact's manifest the sizes, digests and hash of what is in its folder now, where it is one at all."""
    path = folder / "surgery.json"
    manifest = json.loads(path.read_text())
    for name, file in manifest["files"].items():
        content = (folder / name).read_bytes() if (folder / name).is_file() else b""
        file |= {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    path.write_text(json.dumps(manifest | {"hash": Manifest.model_validate(manifest).computed_hash()}))


@pytest.fixture
def artifact(tmp_path):
    return shutil.copytree(FROZEN, tmp_path / "a")


@often(16, 400)
def test_manifests(tried, artifact):
    assert surgery.verify(artifact).verified  # what is not changed is well
    good = json.loads((artifact / "surgery.json").read_text())

    @tried
    def check(chance):
        manifest = mutated(chance, good)
        with contextlib.suppress(ValueError, TypeError, AttributeError):  # the form itself is refused
            manifest["hash"] = Manifest.model_validate(manifest).computed_hash()
        (artifact / "surgery.json").write_text(json.dumps(manifest))
        read = read_manifest(artifact)
        model_card(read, Publish()).encode("utf-8")
        surgery.verify(artifact)
        surgery.load(artifact, quiet=True)


@often(10, 200)
@pytest.mark.parametrize("changed", ["json", "bytes"])
def test_configs_indexes_and_tokenizers(tried, changed, artifact):
    names = [path for path, file in read_manifest(artifact).needed.items() if path.endswith(".json")]
    good = {name: (artifact / name).read_bytes() for name in [*names, "surgery.json"]}

    @tried
    def check(chance):
        name = chance.choice(names)
        if changed == "json":
            content = json.dumps(mutated(chance, json.loads(good[name]))).encode()
        else:
            content = mutated_bytes(chance, good[name])
        with replaced(artifact, name, content, good):
            sign(artifact)
            surgery.verify(artifact)
            surgery.load(artifact, quiet=True)


@often(24, 600)
@pytest.mark.parametrize("changed", ["values", "bytes"])
def test_recipes(tried, changed, tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(RECIPE))
    assert make_plan(path).plan.name == "r"

    @tried
    def check(chance):
        if changed == "values":
            path.write_text(yaml.safe_dump(mutated(chance, RECIPE)))
        else:
            path.write_bytes(mutated_bytes(chance, yaml.safe_dump(RECIPE).encode()))
        make_plan(path)


@often(12, 300)
def test_bases(tried, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(SHAPES, base, ignore=shutil.ignore_patterns("*.py", "training"))
    names = ["model_index.json", "unet/config.json", "scheduler/scheduler_config.json"]
    good = {name: json.loads((base / name).read_text()) for name in names}
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump({**RECIPE, "base": {**RECIPE["base"], "pipeline": "./base"}}))
    assert make_plan(path).plan.name == "r"

    @tried
    def check(chance):
        name = chance.choice(names)
        try:
            (base / name).write_text(json.dumps(mutated(chance, good[name])))
            make_plan(path)
        finally:
            (base / name).write_text(json.dumps(good[name]))


@often(16, 400)
def test_weights(tried, artifact):
    names = [path for path in read_manifest(artifact).needed if path.endswith(".safetensors")]
    good = {name: (artifact / name).read_bytes() for name in [*names, "surgery.json"]}

    @tried
    def check(chance):
        name = chance.choice(names)
        with replaced(artifact, name, mutated_bytes(chance, good[name]), good):
            sign(artifact)
            with contextlib.suppress(SurgeryError):
                read_header(artifact / name)
            surgery.verify(artifact)
            surgery.load(artifact, quiet=True)


@often(200, 2000)
@pytest.mark.parametrize("old", [False, True])
def test_pickles(tried, old, tmp_path):
    import torch

    path = tmp_path / "x.bin"
    torch.save({"a": torch.ones(3), "b": torch.ones(2).half()}, path, _use_new_zipfile_serialization=not old)
    good = path.read_bytes()

    @tried
    def check(chance):
        path.write_bytes(mutated_bytes(chance, good))
        read_pickle(path)


@often(200, 2000)
def test_scores(tried, tmp_path):
    good = scores_of("0" * 64)
    (tmp_path / "scores.json").write_text(json.dumps(good))
    assert read_scores(tmp_path, "0" * 64).metrics

    @tried
    def check(chance):
        (tmp_path / "scores.json").write_text(json.dumps(mutated(chance, good)))
        read_scores(tmp_path, "0" * 64)


@often(200, 2000)
def test_engines(tried, tmp_path):
    (tmp_path / "engine.json").write_text(json.dumps(ENGINE))
    assert read_engine(tmp_path).key == ENGINE["key"]

    @tried
    def check(chance):
        (tmp_path / "engine.json").write_text(json.dumps(mutated(chance, ENGINE)))
        read_engine(tmp_path)


@pytest.mark.parametrize("said", [["x"], ["diffusers", 1], ["diffusers", "__version__"], "LCMScheduler", {}, None])
def test_a_base_whose_index_names_no_scheduler(said, tmp_path):
    base = shutil.copytree(SHAPES, tmp_path / "base", ignore=shutil.ignore_patterns("*.py", "training"))
    index = json.loads((base / "model_index.json").read_text())
    (base / "model_index.json").write_text(json.dumps({**index, "scheduler": said}))
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump({**RECIPE, "base": {**RECIPE["base"], "pipeline": "./base"}}))
    with pytest.raises(SurgeryError, match="scheduler"):
        make_plan(path)


@pytest.mark.parametrize("said", [{}, ["x"], None, "NoPipeline"])
def test_a_base_whose_index_names_no_pipeline(said, tmp_path):
    base = shutil.copytree(SHAPES, tmp_path / "base", ignore=shutil.ignore_patterns("*.py", "training"))
    index = json.loads((base / "model_index.json").read_text())
    (base / "model_index.json").write_text(json.dumps({**index, "_class_name": said}))
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({**RECIPE, "base": {**RECIPE["base"], "pipeline": "./base"}}))
    with pytest.raises(SurgeryError, match="names the pipeline class"):
        make_plan(tmp_path / "r.yaml")
