"""The card tells the truth: what the manifest says, what was measured, and nothing else."""

import json

import pytest
from huggingface_hub import ModelCard

import surgery

from .conftest import BASE
from .test_push import REPO
from .test_refusals import scores_of


def card_of(hub, repo=REPO):
    return ModelCard(hub.read(repo, "README.md").decode())


def section(card, title):
    return card.content.split(f"## {title}\n")[1].split("\n## ")[0]


def test_its_front_matter_is_what_the_hub_searches_by(hub, artifact):
    surgery.push(artifact, REPO)
    data = card_of(hub).data
    assert data.library_name == "diffusers" and data.pipeline_tag == "text-to-image"
    assert data.license == "apache-2.0" and "Apache-2.0" in data.license_link
    assert data.base_model == [BASE] and data.base_model_relation == "adapter"
    assert data.tags == ["pladis", "training-free", "diffusers", "tiny"] and not data.eval_results


def test_it_says_that_nothing_was_scored_and_names_every_module(hub, artifact):
    surgery.push(artifact, REPO)
    card, manifest = card_of(hub), json.loads(hub.read(REPO, "surgery.json"))
    assert "Not scored" in section(card, "Scores")
    changed = section(card, "What was changed")
    for path in manifest["operations"][0]["layers"]:
        assert f"| `{path}` | 0 |" in changed
    assert (
        f"pladis | alpha 1.5, scale 1, temperature 1 | every step | {len(manifest['operations'][0]['layers'])} |"
        in changed
    )
    assert f"Artifact hash `{manifest['hash']}`" in card.content
    assert (
        section(card, "The recipe").strip().strip("`").removeprefix("yaml").strip()
        == (artifact / "recipe.yaml").read_text().strip()
    )
    cited = section(card, "Cite")
    assert "2503.07677" in cited and "1905.05702" in cited and "2603.02531" not in cited
    origins = section(card, "Where the weights come from")
    assert origins.count("byte for byte") == 3 and f"{BASE}@c0ffeec0ffee" in origins
    assert f'surgery.load("{REPO}")' in card.content and "num_inference_steps=2" in section(card, "Sampling")


def test_scores_stand_with_their_base_interval_n_and_conditions(hub, artifact):
    own = json.loads((artifact / "surgery.json").read_text())["hash"]
    better = {"name": "PickScore", "higher_is_better": True, "n": 600, "base": 21.0, "patched": 21.5}
    better |= {"difference": 0.5, "interval": [0.4, 0.6], "win_rate": 0.61, "checkpoint": "yuvalkirstain/PickScore_v1"}
    even = {"name": "FID", "higher_is_better": False, "n": 600, "base": 30.0, "patched": 29.8}
    even |= {"difference": -0.2, "interval": [-1.0, 0.6]}
    scores = scores_of(own)
    scores["metrics"] += [better, even]
    scores |= {"seeds": "0 to 599", "sampling": {"steps": 20}}
    (artifact / "scores.json").write_text(json.dumps(scores))
    surgery.push(artifact, REPO, allow_regression=True)
    card = card_of(hub)
    text = section(card, "Scores")
    assert "**Worse than the base on Aligned.**" in text
    assert "| Aligned | higher | 0.565 | 0.473 | -0.092 | -0.13 to -0.053 | 41.0% | 600 | worse |" in text
    assert "| PickScore | higher | 21 | 21.5 | +0.5 | +0.4 to +0.6 | 61.0% | 600 | better |" in text
    assert "| FID | lower | 30 | 29.8 | -0.2 | -1 to +0.6 |  | 600 | cannot tell with 600 prompts |" in text
    assert "shapes (600 prompts, sha256 aaaaaaaaaaaa)" in text and "seeds: 0 to 599" in text
    assert "2026-11-21 on 2 CPU cores, with torch 2.13.0" in text and own in text and "which is this one" in text
    results = {result.metric_type: result for result in card.data.eval_results}
    assert results["pickscore"].metric_value == 21.5 and "base 21" in results["pickscore"].metric_name


def test_pictures_carry_how_they_were_drawn(hub, artifact, run):
    out = artifact / "images/cats.png"
    run("generate", artifact, "a cat", "a | dog", "--images", "1", "--out", out, "--device", "cpu", check=0)
    surgery.push(artifact, REPO)
    text = section(card_of(hub), "Base and patched, side by side")
    assert "![base and patched](images/cats.png)" in text and "Prompts: a cat; a \\| dog. Seeds 0" in text
    assert hub.read(REPO, "images/cats.png") == out.read_bytes()
    assert surgery.verify(REPO).verified and not surgery.push(artifact, REPO).made
    hub.reset_log()
    surgery.load(REPO, quiet=True)
    assert "images/cats.png" not in hub.fetched()


def test_several_operations_schedules_and_gag(hub, tmp_path):
    recipe = tmp_path / "mixed.yaml"
    recipe.write_text(f"""
schema: 1
name: mixed
base: {{pipeline: {BASE}}}
operations:
  - {{replace: cross-attention, layers: down, with: {{operator: gag, eta: .inf}}}}
  - replace: cross-attention
    layers: up
    with: {{operator: pladis, scale: 2.0}}
    schedule: {{steps: [1, null]}}
sampling: {{steps: 4}}
""")
    surgery.push(surgery.apply(recipe, tmp_path / "mixed").folder, REPO)
    card = card_of(hub)
    assert card.data.tags[:2] == ["pladis", "gag"]
    text = section(card, "What was changed")
    assert "eta infinite, unit head" in text and r"steps \[1, null\]" in text and "no operation selects it" in text
    assert "2603.02531" in section(card, "Cite") and "unet.scheduled(pipe, steps=4)" in section(card, "Its schedule")
    assert "surgery.patch(" not in card.content  # two operations are not one call


def test_a_part_of_the_layers_is_named_in_the_thin_way(hub, tmp_path, write_recipe):
    part = surgery.apply(write_recipe(), tmp_path / "part", overrides=["operations.0.layers=[mid]"]).folder
    surgery.push(part, REPO)
    loading = section(card_of(hub), "Load it")
    assert "layers=['mid_block.attentions.0.transformer_blocks.0.attn2']" in loading


def test_a_local_base_is_not_linked_and_a_thin_card_says_what_is_not_there(
    hub, artifact, tiny_base, write_recipe, tmp_path
):
    local = surgery.apply(write_recipe(base=tiny_base, license="mit"), tmp_path / "local").folder
    surgery.push(local, "me/local")
    card = card_of(hub, "me/local")
    assert (
        card.data.base_model is None
        and card.data.license == "mit"
        and "huggingface.co/" not in card.text.split("##")[0]
    )
    surgery.push(artifact, "me/thin", weights="thin")
    text = card_of(hub, "me/thin").content
    assert "Without the package it cannot be loaded" in text and "trust_remote_code" not in text
    assert "loads only as long as the base's repository" in text


def test_a_recipe_with_a_fence_stays_inside_its_own(hub, tmp_path, write_recipe):
    recipe = write_recipe(more="# ```\n# # Not a heading\n")
    surgery.push(surgery.apply(recipe, tmp_path / "fenced").folder, REPO)
    text = card_of(hub).content
    assert "````yaml\n" in text and text.count("````") == 2


@pytest.mark.parametrize(
    ("pipeline", "tag"),
    [
        ("StableDiffusionXLPipeline", "text-to-image"),
        ("StableDiffusionXLImg2ImgPipeline", "image-to-image"),
        ("StableDiffusionInpaintPipeline", "image-to-image"),
        ("WanPipeline", "text-to-video"),
        ("WanImageToVideoPipeline", "image-to-video"),
        ("FluxPipeline", "text-to-image"),
    ],
)
def test_tasks_by_pipeline_class(pipeline, tag):
    from surgery.export.publish.card import pipeline_tag

    assert pipeline_tag(pipeline) == tag
