"""`apply --push --remote`: from recipe to repository without the weights ever coming here."""

import json
import shutil

import pytest
import torch

import surgery

from ..frozen.make import draw
from ..loopback_hub import WRITE_TOKEN
from .conftest import BASE
from .test_push import REPO, WEIGHTS, publications, uploads


@pytest.fixture
def remote(hub, run, tmp_path, write_recipe, use_hub):
    """Run `surgery apply RECIPE --push REPO --remote ...` with an empty cache of its own."""

    def apply(*more, recipe=None, home="remote-home", out="remote-out", check=0):
        use_hub(hub, home=home)  # which a forked process takes over
        recipe = recipe or write_recipe()
        arguments = ("apply", recipe, "--out", tmp_path / out, "--push", REPO, "--remote", *more)
        return run(*arguments, check=check)

    return apply


def ranges_only(hub):
    """Whether of every weight file no more than its header was sent."""
    sent = {e.path: e.sent_bytes for e in hub.log if e.method == "GET" and "/resolve/" in e.path}
    return all(size <= 100_001 for path, size in sent.items() if path.endswith(".safetensors"))


def test_it_publishes_what_the_other_way_publishes(hub, remote, artifact, use_hub, monkeypatch):
    surgery.push(artifact, "me/usual")
    hub.reset_log()
    done = remote()
    assert "named, none fetched" in done.stdout
    assert set(hub.tree(REPO)) == set(hub.tree("me/usual")) and len(publications(hub)) == 1
    for path in hub.tree(REPO):
        if path not in (*WEIGHTS, "README.md", "surgery.json"):
            assert hub.read(REPO, path) == hub.read("me/usual", path), path
    manifests = [json.loads(hub.read(repo, "surgery.json")) for repo in (REPO, "me/usual")]
    assert manifests[0]["hash"] == manifests[1]["hash"]
    assert ranges_only(hub) and len(uploads(hub)) == 1
    fetched = [path for path in hub.fetched() if path.endswith(".safetensors")]
    assert set(fetched) == {"unet/diffusion_pytorch_model.safetensors"}  # its header
    use_hub(hub, home="fresh")
    images = [draw(surgery.load(model, dtype=torch.float32, quiet=True)) for model in (REPO, artifact)]
    assert torch.equal(*images) and surgery.verify(REPO).verified


def test_a_sharded_base(hub, remote, tiny_base, write_recipe, tmp_path):
    from diffusers import UNet2DConditionModel

    shutil.copytree(
        tiny_base, tmp_path / "sharded", ignore=shutil.ignore_patterns("diffusion_pytorch_model.safetensors")
    )
    shutil.copy(tiny_base / "vae/diffusion_pytorch_model.safetensors", tmp_path / "sharded/vae")
    unet = UNet2DConditionModel.from_pretrained(tiny_base / "unet")
    unet.save_pretrained(tmp_path / "sharded/unet", max_shard_size="80KB")
    hub.create("owner/sharded", tmp_path / "sharded", card={"license": "mit"})
    hub.reset_log()
    remote(recipe=write_recipe(base="owner/sharded"))
    shards = [path for path in hub.tree(REPO) if path.startswith("unet/") and path.endswith(".safetensors")]
    assert len(shards) >= 4 and ranges_only(hub)
    pipeline = surgery.load(REPO, dtype=torch.float32, quiet=True)
    weight = pipeline.unet.conv_in.weight
    assert torch.equal(weight, unet.to(torch.float32).conv_in.weight)


def test_again_it_does_nothing_and_from_a_thin_folder_push_goes_on(hub, remote, run, tmp_path):
    remote("--tag", "v1")
    again = remote("--tag", "v1")
    assert "holds the artifact of this recipe already" in again.stdout and "nothing to do" in again.stdout
    assert len(publications(hub)) == 1
    run("push", tmp_path / "remote-out", "--repo", "me/second", check=0)
    assert set(WEIGHTS) <= set(hub.tree("me/second"))


def test_a_dry_run_publishes_nothing(hub, remote):
    data = json.loads(remote("--dry-run", "--json").stdout)
    plan = data["plan"]  # the weights are copied on the Hub; the code that is sent is as large as this tiny pipeline
    assert data["dry_run"] and plan["copied_bytes"] > 150_000 and plan["sent_bytes"] < 400_000
    assert data["artifact"]["weights"] == "thin" and REPO not in hub.repositories


def test_thin_and_remote_leave_all_of_the_base_where_it_is(hub, remote, use_hub):
    hub.reset_log()
    remote("--weights", "thin")
    assert not [path for method, path in hub.requests if "duplicate" in path]
    tree = hub.tree(REPO)
    assert not set(WEIGHTS) & set(tree) and "tokenizer/tokenizer.json" not in tree
    use_hub(hub, home="fresh")
    surgery.load(REPO, quiet=True)


@pytest.mark.parametrize(
    ("override", "match"),
    [
        (
            "base.loras=[{repo: owner/lora, file: lora.safetensors}]",
            "gets a LoRA fused in, for which the weights are needed",
        ),
        ("base.components.unet={repo: owner/lora, file: unet.bin}", "is converted from unet.bin"),
        ("base.components.unet={file: local.safetensors}", "on this machine, not from the Hub"),
    ],
)
def test_recipes_that_need_the_weights_are_refused(hub, remote, tmp_path, tiny_base, override, match):
    (tmp_path / "lora").mkdir()
    for name in ("lora/lora.safetensors", "lora/unet.bin", "local.safetensors"):
        shutil.copy(tiny_base / "unet/diffusion_pytorch_model.safetensors", tmp_path / name)
    hub.create("owner/lora", tmp_path / "lora", card={"license": "mit"})
    done = remote("--set", override, check=2)
    assert "--remote is not for this recipe" in done.stderr and match in done.stderr
    assert REPO not in hub.repositories and not (tmp_path / "remote-out").exists()


def test_a_local_base_is_refused_and_remote_needs_push(hub, remote, tiny_base, write_recipe, run):
    done = remote(recipe=write_recipe(base=tiny_base, license="mit"), check=2)
    assert "on this machine, not from the Hub" in done.stderr
    assert "--remote goes with --push" in run("apply", "shapes", "--remote", check=2).stderr


@pytest.mark.parametrize("reason", ["region", "private"])
def test_what_the_hub_will_not_copy_is_refused_with_the_reason(hub, remote, reason):
    hub.tokens[WRITE_TOKEN]["orgs"] = [{"name": "owner", "roleInOrg": "read"}]
    setattr(hub.repositories[BASE], reason, {"region": "eu", "private": True}[reason])
    done = remote(check=1)
    assert "cannot be copied on the Hub" in done.stderr and "without --remote" in done.stderr
    assert {"region": "storage regions", "private": "is private"}[reason] in done.stderr
    assert REPO not in hub.repositories or "surgery.json" not in hub.tree(REPO)


def test_large_files_besides_weights_are_copied_too(hub, remote, tiny_base, tmp_path, write_recipe, use_hub):
    shutil.copytree(tiny_base, tmp_path / "t5")
    (tmp_path / "t5/tokenizer/spiece.model").write_bytes(b"a sentencepiece model" * 1000)
    hub.create("owner/t5", tmp_path / "t5", card={"license": "mit"})
    hub.reset_log()
    remote(recipe=write_recipe(base="owner/t5"))
    assert "tokenizer/spiece.model" not in hub.fetched() and len(uploads(hub)) == 1
    assert hub.read(REPO, "tokenizer/spiece.model") == b"a sentencepiece model" * 1000
    use_hub(hub, home="fresh")
    surgery.load(REPO, quiet=True)
