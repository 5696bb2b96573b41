"""The diagnostics: each statistic against float64 loops from the papers' text, and seen on every kind of backbone."""

import io
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from entmax import entmax_bisect
from PIL import Image

import surgery
from surgery.analysis.diagnostics import STATISTICS, picture
from surgery.analysis.diagnostics.statistics import Measured, statistics_of
from surgery.analysis.observing import AttentionCall, Observer
from surgery.errors import InputError
from surgery.models.patching import patched_modules

from ..conftest import PROMPTS, SHAPES, load_shapes
from ..nn.backbones import FAMILIES
from ..nn.backbones.checks import denoiser, draw

SAMPLING = {"steps": 2, "guidance_scale": 4.0, "height": 64, "width": 64}
MODULE = "up_blocks.1.attentions.0.transformer_blocks.0.attn2"


def call_of(heads=2, queries=9, keys=7, channels=4, spread=3.0, mask=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (
        torch.randn(1, heads, length, channels, generator=generator) for length in (queries, keys, keys)
    )
    return AttentionCall("m", SimpleNamespace(), 0, query * spread, key, value, mask, channels**-0.5)


def entmax(z, alpha):
    return z.softmax(-1) if alpha == 1 else entmax_bisect(z, alpha, n_iter=70) if alpha < 2 else sparsemax(z)


def sparsemax(z):
    """Martins and Astudillo 2016, Algorithm 1."""
    ordered = z.sort(descending=True).values
    sums, places = ordered.cumsum(-1), torch.arange(1, z.shape[-1] + 1)
    size = (1 + places * ordered > sums).sum(-1, keepdim=True)
    return (z - (sums.gather(-1, size - 1) - 1) / size).clamp_min(0)


def conjugate(z, p, alpha):
    """<p, z> + H(p), H Tsallis' entropy (GAG, eq. 22), Shannon's at alpha 1."""
    if alpha == 1:
        return float(p @ z - (p * p.clamp_min(1e-300).log()).sum())
    return float(p @ z + (p - p**alpha).sum() / (alpha * (alpha - 1)))


def by_loops(call, measured, kept):
    """{statistic: value} from the text, a query at a time, in float64."""
    alpha, beta = measured.alpha, call.qk_scale / measured.temperature
    sparse_beta = beta / measured.sparse_temperature
    of_rows = {name: [] for name in ("support", "nearer", "aligned", "separated", "margin")}
    of_rows |= {f"energy_{way}{when}": [] for way in ("dense", "sparse") for when in ("", "_after")}
    heads, queries = call.query.shape[1:3]
    r, t_s, t_d = {}, {}, {}
    for h in range(heads):
        keys, stored = call.key[0, h][kept].double(), call.value[0, h][kept].double()
        count, m = len(keys), max(float(v.norm()) for v in stored)
        for q in range(queries):
            x = call.query[0, h, q].double()
            z = beta * keys @ x
            p, ps = z.softmax(0), entmax(z / measured.sparse_temperature, alpha)
            t_d[h, q], t_s[h, q] = p @ stored, ps @ stored
            r[h, q] = t_s[h, q] - t_d[h, q]
            mu = int(z.argmax())
            xi, kappa = stored[mu], int((ps > 0).sum())
            of_rows["support"].append(kappa / count)
            error = float((t_s[h, q] - xi).norm())
            of_rows["nearer"].append(error <= float((t_d[h, q] - xi).norm()))
            of_rows["aligned"].append(float(r[h, q] @ (xi - t_d[h, q])) >= 0)
            inner = sorted((float(k @ x) for k in keys), reverse=True)
            delta = inner[0] - inner[1]
            rho = min(float(xi @ xi - stored[j] @ xi) for j in range(count) if j != mu)
            of_rows["separated"].append(rho > 0 and beta > math.log(4 * m * (count - 1) / rho) / delta)
            if alpha == 1:
                bound = 2 * m * (count - 1) * math.exp(-sparse_beta * delta)  # eq. 25
            else:  # eq. 26, beta in the convention for kappa = count
                beyond = (
                    inner[kappa]
                    if kappa < count
                    else inner[count - 1] - count ** (1 - alpha) / ((alpha - 1) * sparse_beta)
                )
                bound = m + m * kappa * ((alpha - 1) * sparse_beta * (inner[0] - beyond)) ** (1 / (alpha - 1))
            of_rows["margin"].append((bound - error) / m)
            for way, weights, a, b in (("dense", p, 1.0, beta), ("sparse", ps, alpha, sparse_beta)):
                after = weights @ keys
                for when, state in (("", x), ("_after", after)):
                    scores = b * keys @ state
                    energy = -conjugate(scores, entmax(scores, a), a) / b + float(state @ state) / 2
                    of_rows[f"energy_{way}{when}"].append(energy)
    found = {name: float(np.mean(values)) for name, values in of_rows.items()}
    found["least_margin"] = min(of_rows["margin"])
    total = [sum(float(each @ each) for each in part.values()) for part in (r, t_d)]
    found["change"] = math.sqrt(total[0] / total[1])
    groups = {"head": [[cell] for cell in r], "image": [list(r)]}
    groups["token"] = [[(h, q) for h in range(heads)] for q in range(queries)]
    lengths, residuals, products = [], [], []
    for cells in groups[measured.unit]:
        whole_r, whole_t = (torch.cat([part[cell] for cell in cells]) for part in (r, t_s))
        r_par = (whole_r @ whole_t) / (whole_t @ whole_t) * whole_t
        lengths.append(float((measured.parallel * r_par + measured.zeta * (whole_r - r_par)).norm()))
        residuals.append(float(whole_r.norm()))
        products.append(float(whole_r @ whole_t))
    found |= {"residual": np.mean(residuals), "update": np.mean(lengths), "largest_update": max(lengths)}
    found |= {"bounded": np.mean(np.array(lengths) > measured.eta), "negative": np.mean(np.array(products) < 0)}
    return found


def values(call, measured, kinds=None):
    totals = statistics_of(call, measured, kinds)
    return {name: (t.value / t.count) ** (0.5 if name == "change" else 1) for name, t in totals.items()}


@pytest.mark.parametrize(
    ("measured", "spread"),
    [
        (Measured(alpha=1.5), 3.0),
        (Measured(alpha=2.0, zeta=0.5, eta=0.6), 3.0),
        (Measured(alpha=1.25, temperature=0.5, zeta=1.0, eta=1.0, unit="token"), 5.0),
        (Measured(alpha=1.5, zeta=0.25, eta=3.0, unit="image"), 1.0),
        (Measured(alpha=1.0), 3.0),
        (Measured(alpha=1.0, sparse_temperature=0.5), 3.0),
        (Measured(alpha=1.5, sparse_temperature=0.6, parallel=0.0, zeta=1.0, eta=0.7), 3.0),
        (Measured(alpha=1.5, eta=0.02), 8.0),  # where the condition on beta holds for some
        (Measured(alpha=1.5, temperature=4.0), 0.3),  # all keys keep weight: kappa = M
    ],
)
@pytest.mark.parametrize("masked", [None, "bool", "additive"])
def test_every_statistic_is_what_loops_over_the_papers_text_give(measured, spread, masked):
    kept = torch.tensor([True] * 5 + [False] * 2 if masked else [True] * 7)
    mask = None if masked is None else kept.view(1, 1, 1, 7)
    mask = torch.where(kept, 0.0, -10000.0).view(1, 1, 1, 7) if masked == "additive" else mask
    call = call_of(spread=spread, mask=mask)
    found, wanted = values(call, measured), by_loops(call, measured, kept)
    assert found.keys() == wanted.keys() == STATISTICS.keys()
    for name, value in wanted.items():
        assert found[name] == pytest.approx(value, rel=2e-4, abs=2e-5), name


def test_the_cases_above_tell_the_shares_apart():
    found = by_loops(call_of(spread=8.0), Measured(alpha=1.5, eta=0.02), torch.ones(7, dtype=torch.bool))
    for name in ("bounded", "negative", "separated"):
        assert 0 < found[name] < 1, name


@pytest.mark.parametrize("alpha", [1.0, 1.25, 1.5, 2.0])
def test_the_energy_is_the_conjugates_and_falls_with_each_retrieval(alpha):
    call = call_of(queries=1, heads=1)
    keys, query = call.key[0, 0].double(), call.query[0, 0, 0].double()
    scores = call.qk_scale * keys @ query
    points = torch.distributions.Dirichlet(torch.full((7,), 0.3, dtype=torch.float64)).sample((4000,))
    best = max(conjugate(scores, point, alpha) for point in [*points, entmax(scores, alpha)])
    found = values(call, Measured(alpha=alpha))
    assert found["energy_sparse"] == pytest.approx(-best / call.qk_scale + float(query @ query) / 2, rel=1e-5)
    assert found["energy_sparse_after"] < found["energy_sparse"]
    if alpha == 1:
        assert found["energy_sparse"] == pytest.approx(found["energy_dense"], rel=1e-5)


def test_the_bound_holds_and_queries_without_keys_count_nowhere():
    mask = torch.ones(1, 1, 9, 7, dtype=torch.bool)
    mask[:, :, 4:] = False
    call = call_of(mask=mask)
    few = AttentionCall(*(call.path, call.module, 0, call.query[:, :, :4], call.key, call.value, None, call.qk_scale))
    assert values(call, Measured(alpha=1.5)) == pytest.approx(values(few, Measured(alpha=1.5)))
    for alpha in (1.1, 1.5, 2.0):
        assert values(call_of(queries=400, seed=3), Measured(alpha=alpha))["least_margin"] >= 0


@pytest.mark.parametrize("unit", ["head", "token", "image"])
def test_a_long_call_is_measured_in_pieces_that_add_up(unit):
    call = call_of(heads=3, queries=5000, keys=96)
    found = values(call, Measured(alpha=2.0, zeta=0.5, eta=0.5, unit=unit), {"first": [0, 1]})
    z = call.query.double() @ call.key.double().mT * call.qk_scale
    p, ps = z.softmax(-1), sparsemax(z)
    r, t_s = (weights @ call.value.double() for weights in (ps - p, ps))
    dims = {"head": -1, "token": (1, 3), "image": (1, 2, 3)}[unit]
    r_par = (r * t_s).sum(dims, keepdim=True) / t_s.square().sum(dims, keepdim=True) * t_s
    lengths = (r_par + 0.5 * (r - r_par)).square().sum(dims).sqrt()
    assert found["update"] == pytest.approx(float(lengths.mean()), rel=1e-4)
    assert found["largest_update"] == pytest.approx(float(lengths.max()), rel=1e-4)
    assert found["bounded"] == pytest.approx(float((lengths > 0.5).double().mean()), abs=1e-3)
    assert found["support"] == pytest.approx(float((ps > 0).double().mean()), rel=1e-3)
    assert found["sparse first"] == pytest.approx(float(ps[..., :2].sum(-1).mean()), rel=1e-4)


@pytest.mark.parametrize("name", ["pixart", "flux", "sd3", "wan"])
def test_what_is_seen_is_what_diffusers_own_modules_compute_of_the_prompts_half(name, monkeypatch):
    family = next(family for family in FAMILIES if family.name == name)
    pipeline, arguments = family.build()
    stock, computed = F.scaled_dot_product_attention, []

    def recording(query, key, value, *more, **named):
        computed.append((query, key, value))
        return stock(query, key, value, *more, **named)

    monkeypatch.setattr(F, "scaled_dot_product_attention", recording)
    draw(pipeline, arguments)
    monkeypatch.undo()
    surgery.patch(pipeline, scale=0.0)  # the same run, but for rounding
    seen = []
    paths = list(patched_modules(denoiser(pipeline)))
    with Observer(pipeline, paths, seen.append):
        draw(pipeline, arguments)
    assert [call.path for call in seen] == paths * 2 and [call.step for call in seen] == [0] * len(paths) + [1] * len(
        paths
    )
    for call in seen:
        text, image = call.key.shape[2], call.query.shape[2]
        matches = []
        for place, (query, key, value) in enumerate(computed):
            if family.is_joint and key.shape[2] == text + image:
                first = text if family.text_first else image
                texts, images = [slice(0, first), slice(first, None)][:: 1 if family.text_first else -1]
                query, key, value = query[:, :, images], key[:, :, texts], value[:, :, texts]
            if (query.shape[2], key.shape[2]) == (image, text):
                for entry in range(len(query)):
                    pairs = zip((query, key, value), (call.query, call.key, call.value), strict=True)
                    if all(torch.allclose(one[entry], other[0], rtol=1e-3, atol=1e-4) for one, other in pairs):
                        matches.append((place, entry, len(query)))
        assert matches, call.path
        if name in ("pixart", "sd3"):  # [without prompt, with prompt]
            assert {entry for _, entry, batch in matches if batch == 2} == {1}


def test_a_run_that_is_watched_draws_the_same_bits_and_is_left_as_it_was():
    pipeline = load_shapes()
    surgery.patch(pipeline, operator="gag", zeta=0.3, parallel=0.5, unit="image", layers="up")
    model, jobs = pipeline.unet, ([PROMPTS[0]], [5], SAMPLING)
    plain = surgery.generate(pipeline, *jobs)[PROMPTS[0], 5]
    seen = []
    with Observer(pipeline, [MODULE], seen.append):
        watched = surgery.generate(pipeline, *jobs)[PROMPTS[0], 5]
    assert watched.tobytes() == plain.tobytes() and len(seen) == 2
    operations = model.pladis_operations()
    found = surgery.diagnose(pipeline, PROMPTS[:1], sampling=SAMPLING, seed=5)
    assert model.pladis_operations() == operations and len(found.totals) == 4 and found.steps == 2
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert found.settings[MODULE]["zeta"] == pytest.approx(0.3) and found.drawn == "the model's own settings"
    wanted = values(seen[0], Measured(alpha=1.5, zeta=0.3, parallel=0.5, unit="image"))
    first = {name: found.values(name)[MODULE][0] for name in STATISTICS}
    assert first == pytest.approx(wanted)


def test_the_weights_of_kinds_of_tokens_add_up_and_the_base_is_drawn_densely():
    pipeline = load_shapes()
    base = surgery.diagnose(pipeline, PROMPTS, sampling=SAMPLING, each_word=True)
    assert base.drawn == "dense attention" and not patched_modules(pipeline.unet)
    of_all = base.by_block()["all"]
    for way in ("dense", "sparse"):
        assert sum(of_all[f"{way} {kind}"] for kind in ("start", "words", "end", "padding")) == pytest.approx(
            1, abs=1e-4
        )
    assert 0 < of_all["sparse word 2"] < of_all["sparse words"] and base.names[-1] == "sparse word 10"
    surgery.patch(pipeline, operator="gag", scale=30.0)
    same = surgery.diagnose(pipeline, PROMPTS, sampling=SAMPLING, base=True)
    assert same.by_block()["all"]["residual"] == pytest.approx(of_all["residual"], rel=1e-4)
    own = surgery.diagnose(pipeline, PROMPTS, sampling=SAMPLING)
    assert own.by_block()["all"]["residual"] != pytest.approx(of_all["residual"], rel=1e-2)
    sparser = surgery.diagnose(pipeline, PROMPTS[:1], sampling=SAMPLING, base=True, alpha=2.0, layers="mid")
    assert list(sparser.by_block()) == ["mid", "all"] and sparser.settings[next(iter(sparser.totals))]["alpha"] == 2.0


def test_a_schedule_counts_step_by_step():
    pipeline = load_shapes()
    surgery.patch(pipeline, operator="gag", layers="mid", schedule={"steps": [1, None]})
    found = surgery.diagnose(pipeline, PROMPTS[:1], sampling=SAMPLING).by_step()
    assert found["1"]["residual"] == 0 and found["1"]["support"] == 1
    assert found["2"]["residual"] > 0.01 and found["2"]["support"] < 0.9


def test_the_plot_is_a_png_and_json_is_plain():
    found = surgery.diagnose(load_shapes(), PROMPTS[:1], sampling={**SAMPLING, "steps": 3}, layers="down")
    image = Image.open(io.BytesIO(picture(found, "a $title")))
    assert image.format == "PNG" and image.width > 1000
    plain = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert plain["schema_version"] == 1 and set(plain["statistics"]) == set(plain["modules"]) == set(found.names)
    assert list(plain["steps"]) == ["1", "2", "3", "all"] and list(plain["blocks"]) == ["down.1", "down.2", "all"]


def test_what_cannot_be_diagnosed_is_refused():
    pipeline = load_shapes()
    with pytest.raises(InputError, match="no prompt"):
        surgery.diagnose(pipeline, [])
    with pytest.raises(InputError, match="layers: 'upp' matches no module"):
        surgery.diagnose(pipeline, PROMPTS, layers="upp")
    pipeline.unet.compile(backend="eager")
    with pytest.raises(InputError, match="compiled"):
        surgery.diagnose(pipeline, PROMPTS)


def test_the_command_writes_a_plot_and_its_figures(run, tmp_path):
    options = ["--prompts", "shapes-dev", "--limit", "1", "--steps", "2", "--guidance-scale", "4"]
    done = run("diagnose", SHAPES, *options, "--category", "two_objects", "--words", "--out", tmp_path / "d", check=0)
    assert "up.1" in done.stdout and "|r~|" in done.stdout
    made = json.loads((tmp_path / "d" / "diagnostics.json").read_text())
    assert made["drawn"] == "dense attention" and made["blocks"]["all"]["dense word 1"] > 0
    assert Image.open(tmp_path / "d" / "diagnostics.png").format == "PNG"
    for wrong, message in (
        (["--category", "none"], "has no category 'none'; it has"),
        (["--out", SHAPES / "model_index.json"], "is a file; name a folder"),
        (["--limit", "0"], "--limit must be at least 1"),
    ):
        failed = run("diagnose", SHAPES, *options, *wrong, cwd=tmp_path, check=2)
        assert message in failed.stderr and "Traceback" not in failed.stderr
