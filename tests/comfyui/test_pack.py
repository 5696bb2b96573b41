"""The ComfyUI nodes without ComfyUI: their schemas, how they are wired, and what their attention calls compute."""

import ast
import json
import re
import sys
import tomllib
from types import SimpleNamespace

import pytest
import torch

from surgery.nn import attention, joint_attention
from surgery.nn.operators import OPERATIONS

from ..nn.oracle import entmax_oracle
from . import stand_in
from .pack import FOLDER, NAME, load, node

EXACT = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture
def comfy(monkeypatch):
    """A ComfyUI that asks for an override."""
    stand_in.install(monkeypatch)


def states(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


IMAGE, TEXT = states(2, 12, 8), states(2, 5, 8, seed=1)


def report_of(model):
    return node("Report")(model, after="latent")[1]


def test_its_operators_are_those_that_artifacts_ship(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import join

    for name, text in join.texts().items():
        assert (FOLDER / name).read_text(encoding="utf-8") == text, "run python comfyui/join.py"
    heads = [one for one in ast.parse(text).body if isinstance(one, (ast.Import, ast.ImportFrom))]
    named = [one.module if isinstance(one, ast.ImportFrom) else alias.name for one in heads for alias in one.names]
    assert {name.split(".")[0] for name in named} - set(sys.stdlib_module_names) == {"torch"}


class Io:
    """As comfy_api.latest.io: what schemas are made of."""

    class ComfyNode:
        pass

    def __getattr__(self, kind):
        def made(*args, **kwargs):
            return SimpleNamespace(kind=kind, args=args, **kwargs)

        if kind in ("Schema", "NodeOutput"):
            return made
        return SimpleNamespace(
            Input=lambda name, **more: SimpleNamespace(name=name, kind=kind, **more),
            Output=lambda **more: SimpleNamespace(kind=kind, **more),
        )


def test_both_kinds_of_class_say_the_same_of_each_node(comfy):
    load()
    schemas = sys.modules[f"{NAME}.schemas"]
    older = schemas.v1()
    newer = {cls.define_schema().node_id: cls for cls in schemas.v3(Io())}
    assert older.keys() == newer.keys() and len(older) == 16
    for name, cls in older.items():
        schema, types = newer[name].define_schema(), cls.INPUT_TYPES()
        both = {**types["required"], **types["optional"]}
        assert [one.name for one in schema.inputs] == list(both)
        assert [one.kind.upper() for one in schema.outputs] == list(cls.RETURN_TYPES)
        for one in schema.inputs:
            kind, more = both[one.name]
            assert (kind == one.options) if isinstance(kind, list) else (kind == one.kind.upper())
            assert more.get("default") == getattr(one, "default", None) and one.tooltip
        assert cls.DESCRIPTION and hasattr(cls(), cls.FUNCTION)
    shown = older["PladisSurgeryGAG"].INPUT_TYPES()["required"]
    assert all(shown[name][1]["default"] == default for name, default in OPERATIONS["gag"].defaults.items())
    model = stand_in.Patcher(stand_in.UNet())
    given = {"model": model, **OPERATIONS["pladis"].defaults, "layers": "all", "sigma_low": 0.0, "sigma_high": 1000.0}
    assert older["PladisSurgeryPLADIS"]().execute(**given)[1] == newer["PladisSurgeryPLADIS"].execute(**given).args[1]


def test_cross_attention_is_pladis_by_the_paper(comfy):
    """PLADIS, eq. 15, in float64: T_d + scale (T_s - T_d) where the image attends to the text, once each block."""
    model, _ = node("PLADIS")(stand_in.Patcher(stand_in.UNet()), alpha=1.5, scale=2.0, layers="mid")
    found = model.run(IMAGE, TEXT, sigmas=(1.0,))

    def split(x):
        return x.double().unflatten(-1, (2, -1)).transpose(1, 2)

    def dense(query, key):
        return (query @ key.mT / 2.0).softmax(-1) @ key

    x = IMAGE.double()
    for place in ("down", "down", "down", "mid", "up", "up"):  # the blocks of stand_in.UNet
        own = split(x)
        x = x + dense(own, own).transpose(1, 2).flatten(2)
        query, key = split(x), split(TEXT)
        changed = dense(query, key)
        if place == "mid":
            changed = changed + 2.0 * (entmax_oracle(query @ key.mT / 2.0, 1.5) @ key - changed)
        x = x + changed.transpose(1, 2).flatten(2)
    torch.testing.assert_close(found.double(), x, atol=1e-4, rtol=1e-4)


def test_a_model_without_the_node_computes_every_bit_as_before(comfy):
    plain = stand_in.Patcher(stand_in.UNet())
    before = plain.run(IMAGE, TEXT)
    model, what = node("PLADIS")(plain)
    assert "6 of 6 cross-attentions of UNetModel" in what
    after = model.run(IMAGE, TEXT)
    assert not torch.equal(after, before) and torch.equal(plain.run(IMAGE, TEXT), before)
    assert "12 of 12 attention calls changed, in 2 calls of the model" in report_of(model)
    assert not any(one._forward_pre_hooks or one._forward_hooks for one in plain.model.diffusion_model.modules())
    model, _ = node("PLADIS")(plain, scale=0.0)
    torch.testing.assert_close(model.run(IMAGE, TEXT), before, **EXACT)


@pytest.mark.parametrize("kind", ["Flux", "HunyuanVideo"])
def test_in_joint_attention_the_text_is_where_the_model_has_it(comfy, kind):
    network = getattr(stand_in, kind)()
    model, _ = node("Sparse")(stand_in.Patcher(network), alpha=2.0)
    found = model.run(IMAGE, TEXT, sigmas=(0.5,))
    image, text, first = IMAGE, TEXT, network.text_first

    def joined(*parts):
        return torch.cat(parts if first else parts[::-1], dim=1)

    def step(both):
        query = both.unflatten(-1, (2, -1)).transpose(1, 2)
        given = {"text_length": 5, "text_first": first, "operator": "sparse", "alpha": 2.0}
        return both + joint_attention(query, query, query, **given).transpose(1, 2).flatten(2)

    both = step(step(joined(text, image)))
    torch.testing.assert_close(found, both[:, 5:] if first else both[:, :12], **EXACT)
    assert "2 of 2 attention calls changed" in report_of(model)


MASKS = {
    "queries and keys": states(12, 5, seed=2),
    "with a batch": states(2, 12, 5, seed=2),
    "of each head": states(2, 2, 12, 5, seed=2),
    "boolean": states(2, 1, 1, 5, seed=3) > -0.5,
}


@pytest.mark.parametrize("mask", [None, *MASKS])
@pytest.mark.parametrize("heads_first", [False, True])
@pytest.mark.parametrize("keeps_heads", [False, True])
def test_a_call_takes_what_comfyui_s_attention_takes(comfy, mask, heads_first, keeps_heads):
    """Shapes in and out, by comfy.ldm.modules.attention: with and without skip_reshape and skip_output_reshape."""
    network = stand_in.UNet()
    model, _ = node("PLADIS")(stand_in.Patcher(network), scale=2.0, layers="mid")
    hook = model.model_options["transformer_options"]["pladis_surgery"]
    site = next(
        one for one in hook.sites(network, sys.modules[f"{NAME}.layouts"].layout_of(network)) if one.block == "mid"
    )
    query, key, value = (states(2, 2, length, 4, seed=length) for length in (12, 5, 5))
    mask = MASKS.get(mask)
    place = hook._place(site, 0, 5)
    given = [one if heads_first else one.transpose(1, 2).flatten(2) for one in (query, key, value)]
    found = hook.attended(place, *given, 2, mask, skip_reshape=heads_first, skip_output_reshape=keeps_heads)
    whole = mask if mask is None or mask.ndim == 4 else mask[None, None] if mask.ndim == 2 else mask[:, None]
    wanted = attention(query, key, value, scale=2.0, mask=whole)
    torch.testing.assert_close(found, wanted if keeps_heads else wanted.transpose(1, 2).flatten(2), **EXACT)


def test_an_image_s_tokens_stay_dense_and_the_text_s_do_not(comfy):
    """Wan from an image: its cross-attention asks twice, first with the image's keys."""
    context = torch.cat([states(2, 5, 8, seed=4), TEXT], dim=1)  # as many of both
    model, _ = node("Sparse")(stand_in.Patcher(stand_in.Wan()), alpha=2.0)
    found = model.run(IMAGE, context, sigmas=(0.5,), clip_len=5)
    query, image, text = (one.unflatten(-1, (2, -1)).transpose(1, 2) for one in (IMAGE, context[:, :5], TEXT))
    both = attention(query, image, image, scale=0.0) + attention(query, text, text, operator="sparse", alpha=2.0)
    torch.testing.assert_close(found, IMAGE + both.transpose(1, 2).flatten(2), **EXACT)
    report = report_of(model)
    assert "1 of 2 attention calls changed" in report and "another image's" in report


def test_what_changes_nothing_says_so_and_why(comfy, caplog):
    unknown = stand_in.Patcher(stand_in.Unknown())
    model, what = node("PLADIS")(unknown)
    assert "NOTHING WILL CHANGE: this pack does not know where ComfyUI's Unknown has its text" in what
    assert torch.equal(model.run(IMAGE, TEXT), unknown.run(IMAGE, TEXT))
    assert "NOTHING WAS CHANGED" in report_of(model) and "Unknown" in caplog.text
    known = stand_in.Patcher(stand_in.UNet())
    model, what = node("PLADIS")(known, layers="dwon")
    assert "NOTHING WILL CHANGE" in what and "layers 'dwon' matches nothing here; did you mean 'down'?" in what
    model, _ = node("PLADIS")(known, sigma_low=7.0)
    assert torch.equal(model.run(IMAGE, TEXT), known.run(IMAGE, TEXT))
    assert "12 dense: outside the window of every operation" in report_of(model)
    model, _ = node("PLADIS")(known)
    model.run(IMAGE, TEXT[:, :1])
    assert "12 dense: there is a single key" in report_of(model)
    assert "no run yet" in report_of(node("PLADIS")(known)[0])
    assert "none of this pack's nodes" in report_of(known)


def test_a_window_and_layers_choose_calls(comfy):
    model, _ = node("PLADIS")(stand_in.Patcher(stand_in.UNet()), layers="down_blocks.1.*, mid", sigma_high=2.0)
    model.run(IMAGE, TEXT)
    report = report_of(model)
    assert (
        "3 of 12 attention calls changed" in report and "3 dense: outside" in report and "6 dense: not among" in report
    )


def test_what_does_not_go_together_is_refused_with_a_reason(comfy):
    model = stand_in.Patcher(stand_in.UNet())
    two = [[TEXT[:1], {}], [TEXT[1:], {}]]
    with pytest.raises(ValueError, match="it combines 2 prompts"):
        node("NAG")(model, negative=two)
    with pytest.raises(ValueError, match="alpha must lie in"):
        node("PLADIS")(model, alpha=3.0)
    with pytest.raises(ValueError, match=r"schedule\.sigma must rise"):
        node("PLADIS")(model, sigma_low=3.0, sigma_high=2.0)
    history, _ = node("AndersonHistory")(model)
    with pytest.raises(ValueError, match="nag does not go with anderson_history"):
        node("NAG")(history, negative=two[:1])
    model, _ = node("NAG")(model, negative=[[states(1, 5, 4), {}]])
    model.run(IMAGE, TEXT)
    assert "encode it with the text encoder of this model" in report_of(model)


def test_a_negative_prompt_acts_on_the_rows_with_a_prompt(comfy):
    """As its own negative prompt a prompt changes nothing; and CFG's other half is never led away."""
    plain = stand_in.Patcher(stand_in.UNet())
    base = plain.run(IMAGE, TEXT, conds=(1, 0))
    model, _ = node("NAG")(plain, negative=[[TEXT[1:], {}]])
    torch.testing.assert_close(model.run(IMAGE, TEXT, conds=(1, 0)), base, **EXACT)
    for conds, row in (((1, 0), 1), ((0, 1), 0)):
        model, _ = node("NAG")(plain, negative=[[states(1, 7, 8, seed=9), {}]])
        found = model.run(IMAGE, TEXT, conds=conds)
        torch.testing.assert_close(found[1 - row], base[1 - row], **EXACT)
        assert (found[row] - base[row]).abs().max() > 1e-3
    assert torch.equal(model.run(IMAGE, TEXT, conds=(1, 1)), base)


def artifact(folder, operations, **more):
    (folder / "surgery.json").write_text(json.dumps({"name": "x", "operations": operations, **more}))
    return str(folder)


GOOD = {
    "operator": "pladis",
    "alpha": 1.5,
    "scale": 2.0,
    "layers": ["mid_block.attentions.0.transformer_blocks.0.attn2"],
}
BAD = {
    "unknown operator": ({**GOOD, "operator": "plaids"}, "operator 'plaids' is none of"),
    "out of range": ({**GOOD, "alpha": 7.0}, r"operations\[0\]: alpha must lie in"),
    "without layers": ({key: GOOD[key] for key in ("operator", "alpha")}, "lacks or misspells 'layers'"),
    "an experiment": ({**GOOD, "replace": "self-attention"}, "not for use"),
    "a schedule": ({**GOOD, "schedule": {"stpes": [0, 1]}}, "is no window"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_artifact_is_refused_with_its_file_and_place(comfy, case, tmp_path):
    operation, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        node("LoadArtifact")(stand_in.Patcher(stand_in.UNet()), path=artifact(tmp_path, [operation]))


def test_an_artifact_of_another_model_or_of_none_says_so(comfy, tmp_path):
    model = stand_in.Patcher(stand_in.UNet())
    with pytest.raises(ValueError, match="is not there; name an artifact's folder"):
        node("LoadArtifact")(model, path=str(tmp_path / "missing"))
    (tmp_path / "surgery.json").write_text('{"operations": [')
    with pytest.raises(ValueError, match="cannot be read as JSON"):
        node("LoadArtifact")(model, path=str(tmp_path))
    path = artifact(tmp_path, [{**GOOD, "layers": ["transformer_blocks.0.attn"]}], base={"pipeline": "a/b"})
    _, what = node("LoadArtifact")(model, path=path)
    assert "x for a/b" in what and "NOTHING WILL CHANGE" in what and "matches nothing here" in what


def test_frozen_artifacts_can_be_put_on_a_unet(comfy):
    for path in sorted((FOLDER.parent / "tests" / "frozen").glob("*/artifact/surgery.json")):
        model, what = node("LoadArtifact")(stand_in.Patcher(stand_in.UNet()), path=str(path))
        hook = model.model_options["transformer_options"]["pladis_surgery"]
        assert len(hook.operations) == len(json.loads(path.read_text())["operations"]), what


def test_older_versions_without_the_override_have_the_unet_s_modules_replaced(monkeypatch):
    stand_in.install(monkeypatch, override=False)
    model, _ = node("PLADIS")(stand_in.Patcher(stand_in.UNet()), sigma_high=2.0)
    options = model.model_options["transformer_options"]
    assert "optimized_attention_override" not in options
    replaced = options["patches_replace"]["attn2"]
    assert set(replaced) == {
        *[("input", 1, 0), ("input", 3, 0), ("input", 3, 1), ("middle", 0, 0), ("output", 1, 0), ("output", 2, 0)]
    }
    flat = [one.transpose(1, 2).flatten(2) for one in (states(2, 2, 12, 4), states(2, 2, 5, 4, seed=1))]
    query, key = (one.unflatten(-1, (2, -1)).transpose(1, 2) for one in flat)
    for sigma, scale in ((1.0, 2.0), (5.0, 0.0)):
        told = {"n_heads": 2, "sigmas": torch.tensor([sigma]), "sample_sigmas": torch.tensor([5.0, 1.0, 0.0])}
        found = replaced["middle", 0, 0](flat[0], flat[1], flat[1], told)
        wanted = attention(query, key, key, scale=scale).transpose(1, 2).flatten(2)
        torch.testing.assert_close(found, wanted, **EXACT)
    model, what = node("PLADIS")(stand_in.Patcher(stand_in.Flux()))
    assert "NOTHING WILL CHANGE: this ComfyUI has no optimized_attention_override" in what


def test_the_example_workflows_are_what_the_script_makes_of_the_nodes_now(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import workflows

    files = {path.stem: json.loads(path.read_text()) for path in (FOLDER / "example_workflows").glob("*.json")}
    assert files == {name: workflows.workflow(graph) for name, graph in workflows.WORKFLOWS.items()}
    assert all((FOLDER / "example_workflows" / f"{name}.jpg").is_file() for name in files)


def test_what_the_registry_reads_is_there():
    """docs.comfy.org/registry/specifications: names, a version of three numbers, and files that are named."""
    told = tomllib.loads((FOLDER / "pyproject.toml").read_text())
    assert re.fullmatch(r"[a-z][a-z0-9._-]{1,99}", told["project"]["name"]) and "comfyui" not in told["project"]["name"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", told["project"]["version"])
    assert told["tool"]["comfy"].keys() >= {"PublisherId", "DisplayName", "Icon"}
    assert told["project"]["dependencies"] == []
    assert (FOLDER / "LICENSE").read_bytes() == (FOLDER.parent / "LICENSE").read_bytes()
    assert (FOLDER / "icon.png").read_bytes()[:4] == b"\x89PNG"
    mine = tomllib.loads((FOLDER.parent / "pyproject.toml").read_text())
    assert told["project"]["requires-python"] == mine["project"]["requires-python"]
    left_out = (FOLDER / ".comfyignore").read_text().split()
    assert all((FOLDER / name).is_file() for name in left_out)


class Clip:
    """As a CLIP object of ComfyUI's: a number for each letter between a start and an end, padded."""

    def tokenize(self, text):
        numbers = [1, *(ord(letter) for letter in text), 2]
        return {"l": [[(number, 1.0) for number in (numbers + [0] * 5)[:5]]]}


@pytest.mark.parametrize("kind", ["Wan", "Flux", "HunyuanVideo"])
def test_maps_are_the_softmax_weights_of_a_word_s_tokens(comfy, kind):
    """The mean over heads and layers, of the rows with the prompt alone, in float64."""
    network, image, text = getattr(stand_in, kind)(), states(2, 16, 16), states(2, 5, 16, seed=1)
    model, _ = node("RecordAttention")(stand_in.Patcher(network))
    model, _ = node("PLADIS")(model, scale=0.0)
    with pytest.raises(ValueError, match="no maps were recorded"):
        node("AttentionMaps")(model, after=None, clip=Clip(), text="a b", words="b")
    model.run(image, text, conds=(1, 0))
    _, shown = node("AttentionMaps")(model, after="latent", clip=Clip(), text="aba", words="b, a")
    assert shown.shape == (2, 128, 128, 3) and shown.min() >= 0.0 and shown.max() <= 1.0
    layers, x, words = [], image[1].double(), text[1].double()
    for _ in range(1 if kind == "Wan" else 2):  # blocks
        both = words if kind == "Wan" else torch.cat([words, x])
        query, key = (one.unflatten(-1, (2, 8)).transpose(0, 1) for one in (x, both))
        layers.append((query @ key.mT / 8**0.5).softmax(-1).mean(0)[:, :5].T.unflatten(-1, (4, 4)))
        query = both.unflatten(-1, (2, 8)).transpose(0, 1)
        step = both + ((query @ key.mT / 8**0.5).softmax(-1) @ key).transpose(0, 1).flatten(1)
        words, x = step[:5], step[5:]
    maps = sys.modules[f"{NAME}.attach"].maps_of(model).mean()
    wanted = torch.stack(layers).mean(0)
    wanted = torch.nn.functional.interpolate(wanted[None], (16, 16), mode="bilinear")[0]
    torch.testing.assert_close(maps.double(), wanted, **EXACT)
    picture = sys.modules[f"{NAME}.maps"].picture
    torch.testing.assert_close(shown, torch.cat([picture(maps[[2]].mean(0)), picture(maps[[1, 3]].mean(0))]))
    for text, words, message in (("aba", "c", "'c' is not among"), ("aba", " ", "name one or more")):
        with pytest.raises(ValueError, match=message):
            node("AttentionMaps")(model, after=None, clip=Clip(), text=text, words=words)
    with pytest.raises(ValueError, match="records no attention"):
        node("AttentionMaps")(stand_in.Patcher(network), after=None, clip=Clip(), text="a", words="a")


def test_values_that_are_split_already_and_halves_are_taken(comfy):
    """SD 3 gives its values as (batch, length, heads, head_dim)."""
    network = stand_in.UNet()
    model, _ = node("PLADIS")(stand_in.Patcher(network), scale=2.0)
    hook = model.model_options["transformer_options"]["pladis_surgery"]
    site = hook.sites(network, sys.modules[f"{NAME}.layouts"].layout_of(network))[0]
    query, key, value = (states(2, length, 8, seed=length) for length in (12, 5, 5))
    whole = hook.attended(hook._place(site, 0, 5), query, key, value, 2)
    split = hook.attended(hook._place(site, 0, 5), query, key, value.unflatten(-1, (2, 4)), 2)
    assert torch.equal(whole, split)
    half = hook.attended(hook._place(site, 0, 5), *(one.bfloat16() for one in (query, key, value)), 2)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), whole, atol=0.05, rtol=0.05)


def test_a_prompt_that_comfyui_repeats_is_chosen_from_once(comfy):
    """As its batches do, to give prompts of two lengths one: without it sparse attention would choose among copies."""
    model, _ = node("PLADIS")(stand_in.Patcher(stand_in.UNet()), alpha=2.0, scale=3.0)
    longer = states(1, 10, 8, seed=5)
    found = model.run(IMAGE, torch.cat([TEXT[:1].repeat(1, 2, 1), longer]), conds=(1, 0))
    torch.testing.assert_close(found[:1], model.run(IMAGE[:1], TEXT[:1]), **EXACT)
    torch.testing.assert_close(found[1:], model.run(IMAGE[1:], longer), **EXACT)
