"""What was published loads back: whole or thin, from caches, offline, by diffusers alone; not when it is damaged."""

import json
import shutil

import pytest
import torch

import surgery
from surgery.artifact.fetch import model_folder
from surgery.errors import ArtifactError, BaseError, InputError, SurgeryError

from ..frozen.make import draw
from ..loopback_hub import WRITE_TOKEN, environment
from .conftest import BASE
from .test_push import REPO, WEIGHTS


@pytest.fixture
def expected(artifact):
    return draw(surgery.load(artifact, dtype=torch.float32, quiet=True))


@pytest.fixture
def published(hub, artifact):
    surgery.push(artifact, REPO)
    surgery.push(artifact, "me/thin", weights="thin")
    return hub


def loaded(model=REPO, **options):
    return surgery.load(model, dtype=torch.float32, **options)


def weights_fetched(hub):
    return [path for path in hub.fetched() if path in WEIGHTS]


@pytest.mark.parametrize("repo", [REPO, "me/thin"])
def test_it_loads_and_draws_the_same(published, use_hub, expected, repo, capsys):
    use_hub(published, home="fresh")
    assert torch.equal(draw(loaded(repo)), expected)
    assert "weights when they arrived" in capsys.readouterr().err
    assert torch.equal(draw(loaded(repo, verify=True, revision="main")), expected)


@pytest.mark.parametrize("repo", [REPO, "me/thin"])
def test_weights_that_the_cache_has_of_the_base_are_not_fetched(published, expected, repo):
    published.reset_log()
    assert torch.equal(draw(loaded(repo, quiet=True)), expected)  # the artifact was made with this cache
    assert not weights_fetched(published)


def test_only_what_is_needed_is_fetched_and_only_once(published, use_hub):
    published.commit_as_other(REPO, {"huge.bin": b"0" * 1000, "unet/other.safetensors": b"0" * 1000})
    use_hub(published, home="fresh")
    published.reset_log()
    loaded(quiet=True)
    first = published.fetched()
    assert sorted(set(first)) == sorted(first) and sorted(weights_fetched(published)) == sorted(WEIGHTS)
    assert not {"README.md", "recipe.yaml", "huge.bin", "unet/other.safetensors"} & set(first)
    published.reset_log()
    loaded(quiet=True)
    assert not published.fetched()


def test_a_thin_one_brings_the_weights_into_the_bases_own_cache_entry(published, use_hub, run, tmp_path):
    use_hub(published, home="fresh")
    loaded("me/thin", quiet=True)
    published.reset_log()
    from huggingface_hub import hf_hub_download

    for path in WEIGHTS:
        hf_hub_download(BASE, path, revision=published.commits(BASE)[0].oid)
    assert not weights_fetched(published)


@pytest.mark.parametrize("repo", [REPO, "me/thin"])
def test_without_a_connection_it_loads_from_the_cache(published, use_hub, expected, repo):
    use_hub(published, home="fresh")
    loaded(repo, quiet=True)
    use_hub(published, home="fresh", offline=True)
    published.reset_log()
    assert torch.equal(draw(loaded(repo, quiet=True)), expected)
    assert not published.requests
    use_hub(published, home="empty", offline=True)
    with pytest.raises(BaseError, match="not in the local cache"):
        loaded(repo)


def test_revisions_tags_and_branches(hub, artifact, write_recipe, tmp_path, use_hub):
    surgery.push(artifact, REPO, tag="v1")
    other = surgery.apply(write_recipe(scale=2.5), tmp_path / "other").folder
    surgery.push(other, REPO, tag="v2")
    use_hub(hub, home="fresh")
    scales = [
        next(iter(loaded(revision=revision, quiet=True).unet.pladis_operations()))["scale"]
        for revision in ("v1", "v2", None, hub.commits(REPO)[1].oid)
    ]
    assert scales == [1.0, 2.5, 2.5, 1.0]
    with pytest.raises(BaseError, match="has no revision 'v9'"):
        loaded(revision="v9")


def test_the_code_of_the_repository_is_never_run(published, use_hub, monkeypatch):
    use_hub(published, home="fresh")
    import importlib

    import diffusers.utils.dynamic_modules_utils as remote

    monkeypatch.setattr(remote, "get_class_in_module", lambda *a, **k: pytest.fail("remote code was imported"))
    monkeypatch.setattr(importlib.util, "spec_from_file_location", lambda *a, **k: pytest.fail("a file was imported"))
    loaded(quiet=True)


@pytest.mark.parametrize(
    "name",
    [
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
        "unet/diffusion_pytorch_model-00002-of-00002.safetensors",
        "unet/config.json",
        "tokenizer/tokenizer.json",
        "code",
    ],
)
def test_a_file_that_arrives_damaged_is_refused_and_the_next_run_mends_it(published, use_hub, expected, name):
    use_hub(published, home="fresh")
    name = name if name != "code" else next(p for p in published.tree(REPO) if "modeling_" in p)
    published.corrupted.add(name)
    with pytest.raises(SurgeryError, match=rf"{name} of me/patched .*arrived damaged.* taken out of the cache"):
        loaded()
    published.corrupted.clear()
    assert torch.equal(draw(loaded(quiet=True)), expected)


def test_a_repository_that_was_altered_is_refused_every_time(published, use_hub):
    code = next(path for path in published.tree(REPO) if "modeling_" in path)
    published.commit_as_other(REPO, {code: published.read(REPO, code) + b"\nprint('mine')\n"})
    use_hub(published, home="fresh")
    for _ in range(2):
        with pytest.raises(ArtifactError, match="the repository itself was altered: do not load it"):
            loaded()
    published.commit_as_other(REPO, {code: None})
    with pytest.raises(ArtifactError, match="lacks unet/modeling"):
        loaded()


def test_an_edited_manifest_config_or_weight_is_refused(published, use_hub, tiny_base):
    use_hub(published, home="fresh")
    manifest = json.loads(published.read(REPO, "surgery.json"))
    manifest["operations"][0]["scale"] = 5.0
    published.commit_as_other(REPO, {"surgery.json": json.dumps(manifest).encode()})
    with pytest.raises(ArtifactError, match="was edited: its hash does not fit"):
        loaded()


def test_gated_private_missing_and_what_is_no_artifact(published, use_hub, tiny_base, no_waiting):
    use_hub(published, home="fresh", token=None)
    cases = {
        "me/nothing": (BaseError, "no model repository me/nothing on the Hub, or it is private"),
        "me/secret": (BaseError, "no model repository me/secret on the Hub, or it is private"),
        "me/gated": (BaseError, "is gated: accept its terms"),
        BASE: (InputError, "is an unpatched pipeline"),
        "me/empty": (InputError, "holds no pipeline"),
        "../nowhere": (InputError, "there is no folder"),
    }
    published.create("me/secret", private=True)
    published.create("me/gated", tiny_base, gated=True)
    published.create("me/empty")
    for model, (error, match) in cases.items():
        published.reset_log()
        with pytest.raises(error, match=match):
            loaded(model)
        assert not weights_fetched(published)


def test_a_thin_one_whose_base_is_gone_or_gated_says_so(published, use_hub, no_waiting):
    use_hub(published, home="fresh", token=None)
    published.repositories[BASE].gated = True
    with pytest.raises(BaseError, match="owner/base is gated"):
        loaded("me/thin")
    published.repositories.pop(BASE)
    with pytest.raises(
        SurgeryError, match="is thin: .* is fetched from owner/base@c0ffeec0ffee, which is not to be had"
    ):
        loaded("me/thin")
    loaded(REPO, quiet=True)  # the whole one does not need it


def test_a_private_one_loads_with_its_owners_token(hub, artifact, use_hub):
    surgery.push(artifact, "me/secret", private=True)
    use_hub(hub, home="fresh")
    loaded("me/secret", quiet=True)


def test_a_thin_folder_on_disk_fetches_too(published, use_hub, expected, tmp_path):
    use_hub(published, home="fresh")
    for path in published.tree("me/thin"):
        target = tmp_path / "cloned" / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(published.read("me/thin", path))
    assert torch.equal(draw(loaded(tmp_path / "cloned", quiet=True)), expected)
    shutil.rmtree(tmp_path / "fresh")  # whoever clears the cache loses nothing but time
    assert torch.equal(draw(loaded(tmp_path / "cloned", quiet=True)), expected)


def test_a_thin_folder_that_has_its_weights_is_used_where_it_is(published, use_hub, tmp_path):
    use_hub(published, home="fresh")
    for path in {**published.tree(REPO), **published.tree("me/thin")}:
        target = tmp_path / "filled" / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(published.read("me/thin" if path in published.tree("me/thin") else REPO, path))
    assert model_folder(tmp_path / "filled") == tmp_path / "filled"
    (tmp_path / "filled" / "vae/diffusion_pytorch_model.safetensors").unlink()
    assert model_folder(tmp_path / "filled") != tmp_path / "filled"


def test_an_incomplete_copy_is_refused(published, use_hub):
    name = "vae/diffusion_pytorch_model.safetensors"
    published.commit_as_other(REPO, {name: None})
    use_hub(published, home="fresh")
    with pytest.raises(ArtifactError, match=f"me/patched lacks {name}, which its manifest names; it is not whole"):
        loaded()


def test_diffusers_alone_loads_it_from_the_hub_bit_for_bit(published, run, tmp_path, expected):
    torch.save(expected, tmp_path / "expected.pt")
    code = (
        "import sys; sys.modules['surgery'] = None\n"
        "import torch\n"
        "from diffusers import DiffusionPipeline\n"
        f"pipe = DiffusionPipeline.from_pretrained('{REPO}', trust_remote_code=True, dtype=torch.float32)\n"
        "def same():\n"
        "    pipe.set_progress_bar_config(disable=True)\n"
        "    draw = dict(prompt='a cat', height=16, width=16, num_inference_steps=3, guidance_scale=3.0)\n"
        "    image = pipe(**draw, generator=torch.Generator().manual_seed(0), output_type='np').images\n"
        f"    return torch.equal(torch.from_numpy(image), torch.load({str(tmp_path / 'expected.pt')!r}))\n"
        "print(same())\n"
        "from diffusers import AutoModel\n"
        f"unet = dict(pretrained_model_or_path='{REPO}', subfolder='unet', dtype=torch.float32)\n"
        "try:\n"
        "    AutoModel.from_pretrained(**unet)\n"
        "except ValueError as error:\n"
        "    print('trust_remote_code=True' in str(error))\n"
        "pipe.unet = AutoModel.from_pretrained(**unet, trust_remote_code=True)\n"
        "print(type(pipe.unet).__name__, same())\n"
    )
    done = run(python=code, env=environment(published, tmp_path / "other-home", WRITE_TOKEN), check=0)
    assert done.stdout.split()[-4:] == ["True", "True", "PladisUNet2DConditionModel", "True"]


@pytest.mark.parametrize("repo", [REPO, pytest.param("me/thin", marks=pytest.mark.slow)])
def test_every_way_that_the_card_names_works_as_written(published, run, tmp_path, expected, repo):
    torch.save(expected, tmp_path / "expected.pt")
    card = published.read(repo, "README.md").decode().split("## Load it")[1].split("\n## ")[0]
    blocks = [part.split("```")[0] for part in card.split("```python\n")[1:]]
    assert len(blocks) == (3 if repo == REPO else 2)
    check = (
        "pipe.to(dtype=__import__('torch').float32)\n"
        "import torch\n"
        "pipe.set_progress_bar_config(disable=True)\n"
        "draw = dict(prompt='a cat', height=16, width=16, num_inference_steps=3, guidance_scale=3.0)\n"
        "image = pipe(**draw, generator=torch.Generator().manual_seed(0), output_type='np').images\n"
        f"print('same', torch.equal(torch.from_numpy(image), torch.load({str(tmp_path / 'expected.pt')!r})))\n"
    )
    code = "".join(block + check for block in blocks)
    done = run(python=code, env=environment(published, tmp_path / "ways", WRITE_TOKEN), check=0)
    assert done.stdout.count("same True") == len(blocks)
