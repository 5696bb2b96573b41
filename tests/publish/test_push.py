"""`push`: one commit, weights by reference, nothing twice, nobody else's work lost."""

import json
import shutil

import pytest

import surgery
from surgery.errors import PublishError

from ..loopback_hub import COMMIT
from .conftest import BASE

REPO = "me/patched"
WEIGHTS = [
    "text_encoder/model.safetensors",
    "unet/diffusion_pytorch_model.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
]


def publications(hub, repo=REPO, revision="main"):
    return [commit for commit in hub.commits(repo, revision) if commit.title.startswith("Publish ")]


def uploads(hub):
    return [path for method, path in hub.requests if method == "PUT"]


def test_one_commit_holds_all_and_the_weights_are_never_sent(hub, artifact):
    hub.reset_log()
    done = surgery.push(artifact, REPO, tag="v1")
    assert done.made and len(publications(hub)) == 1
    assert publications(hub)[0].parent == hub.commits(REPO)[1].oid
    commits = [path for method, path in hub.requests if method == "POST" and "/commit/" in path]
    assert len(commits) == 1
    tree, base = hub.tree(REPO), hub.tree(BASE)
    manifest = json.loads(hub.read(REPO, "surgery.json"))
    assert set(tree) == {*manifest["files"], "surgery.json", ".gitattributes"}
    for path in WEIGHTS:
        assert tree[path].sha256 == base[path].sha256 == manifest["files"][path]["sha256"]
    assert len(uploads(hub)) == 1  # the shard of buffers, a few kB
    assert hub.received_bytes() < 540_000
    repository = hub.repositories[REPO]
    assert repository.tags["v1"] == done.commit == hub.commits(REPO)[0].oid


def test_what_is_published_is_the_folder_file_by_file(hub, artifact):
    surgery.push(artifact, REPO)
    for path in artifact.rglob("*"):
        name = path.relative_to(artifact).as_posix()
        if path.is_file() and name not in (*WEIGHTS, "README.md", "surgery.json"):
            assert hub.read(REPO, name) == path.read_bytes(), name


def test_pushing_the_same_again_makes_no_commit_and_sends_nothing(hub, artifact, tmp_path):
    first = surgery.push(artifact, REPO, tag="v1")
    hub.reset_log()
    again = surgery.push(artifact, REPO, tag="v1")
    assert not again.made and again.commit == first.commit and len(publications(hub)) == 1
    assert not uploads(hub) and not [p for m, p in hub.requests if m == "POST" and ("/commit/" in p or "/tag/" in p)]
    shutil.copytree(artifact, tmp_path / "copy")
    assert not surgery.push(tmp_path / "copy", REPO).made


def test_a_tag_that_was_not_set_is_set_by_the_next_run(hub, artifact):
    surgery.push(artifact, REPO)
    done = surgery.push(artifact, REPO, tag="v1")
    assert not done.made and hub.repositories[REPO].tags == {"v1": done.commit}


def test_a_tag_that_names_something_else_is_not_moved(hub, artifact, write_recipe, tmp_path):
    surgery.push(artifact, REPO, tag="v1")
    other = surgery.apply(write_recipe(scale=2.0), tmp_path / "other").folder
    head = hub.commits(REPO)[0].oid
    with pytest.raises(PublishError, match="has a tag v1 already"):
        surgery.push(other, REPO, tag="v1")
    assert hub.commits(REPO)[0].oid == head


def test_a_dry_run_says_what_moves_and_changes_nothing(hub, artifact):
    hub.reset_log()
    plan = surgery.push(artifact, REPO, dry_run=True)
    assert REPO not in hub.repositories
    assert {method for method, _ in hub.requests} == {"GET", "POST"}
    assert all("paths-info" in path for method, path in hub.requests if method == "POST")
    by_action = {step.path: step.action for step in plan.steps}
    assert {path for path, action in by_action.items() if action == "copy"} == set(WEIGHTS)
    data = plan.to_json()
    assert data["copied_bytes"] == sum(hub.tree(BASE)[path].size for path in WEIGHTS)
    assert data["create_repository"] and data["commit_needed"] and 0 < data["sent_bytes"] < 400_000


def test_a_dry_run_notes_what_becomes_of_a_private_or_gated_base(hub, artifact, tiny_base, write_recipe, tmp_path):
    def notes(folder=artifact, **options):
        return " ".join(surgery.push(folder, REPO, dry_run=True, **options).notes)

    assert "gated" not in notes()
    hub.repositories[BASE].gated = True
    assert f"{BASE} is gated and {REPO} will not be" in notes()
    assert "gated" not in notes(private=True) and "gated" not in notes(weights="thin")
    hub.create("me/own", tiny_base, card={"license": "apache-2.0"}, private=True)
    own = surgery.apply(write_recipe(base="me/own"), tmp_path / "own").folder
    assert f"me/own is private and {REPO} is public" in notes(own) and "is public" not in notes(own, private=True)


def test_a_second_version_replaces_the_first_and_leaves_none_of_its_files(hub, artifact, write_recipe, tmp_path):
    surgery.push(artifact, REPO)
    stale = b"of an older version"
    manifest = json.loads(hub.read(REPO, "surgery.json"))
    hub.commit_as_other(REPO, {"notes.md": b"mine"})
    other = surgery.apply(write_recipe(scale=2.0), tmp_path / "other").folder
    (other / "unet/modeling_old.py").write_bytes(stale)  # not in its manifest: not published
    hub.reset_log()
    surgery.push(other, REPO)
    assert hub.read(REPO, "notes.md") == b"mine" and "unet/modeling_old.py" not in hub.tree(REPO)
    assert len(publications(hub)) == 2 and len(uploads(hub)) == 1
    assert not [path for _, path in hub.requests if "duplicate" in path]  # the weights are there
    assert json.loads(hub.read(REPO, "surgery.json"))["hash"] != manifest["hash"]


def test_from_whole_to_thin_the_weights_go_and_come_back(hub, artifact):
    surgery.push(artifact, REPO)
    surgery.push(artifact, REPO, weights="thin")
    assert not set(WEIGHTS) & set(hub.tree(REPO))
    surgery.push(artifact, REPO)
    assert set(WEIGHTS) <= set(hub.tree(REPO))


def test_a_branch_is_made_from_main_and_main_stays(hub, artifact):
    surgery.push(artifact, REPO, revision="trial")
    assert "surgery.json" in hub.tree(REPO, "trial") and "surgery.json" not in hub.tree(REPO)
    assert not surgery.push(artifact, REPO, revision="trial").made


def test_a_private_repository_is_made_private_and_a_public_one_is_not_taken_for_it(hub, artifact):
    surgery.push(artifact, REPO, private=True)
    assert hub.repositories[REPO].private
    assert not surgery.push(artifact, REPO, private=True).made
    hub.create("me/open")
    with pytest.raises(PublishError, match="is public"):
        surgery.push(artifact, "me/open", private=True)


def test_a_pull_request_is_opened_once(hub, artifact):
    with pytest.raises(PublishError, match="does not exist"):
        surgery.push(artifact, "other/theirs", create_pr=True)
    hub.create("other/theirs")
    first = surgery.push(artifact, "other/theirs", create_pr=True)
    assert first.made and first.pull_request.endswith("/other/theirs/discussions/1")
    assert "surgery.json" in hub.tree("other/theirs", "refs/pr/1")
    assert "surgery.json" not in hub.tree("other/theirs")
    second = surgery.push(artifact, "other/theirs", create_pr=True)
    assert not second.made and second.pull_request == first.pull_request


def test_somebody_who_commits_in_the_middle_is_not_overwritten(hub, artifact):
    surgery.push(artifact, REPO, weights="thin")

    def intrude(method, path):
        if method == "POST" and "/preupload/" in path:
            hub.before = None
            hub.commit_as_other(REPO, {"notes.md": b"theirs"}, "Add notes")

    hub.before = intrude
    with pytest.raises(
        PublishError, match=r"somebody else committed to me/patched meanwhile: commit \w{12} \('Add notes'"
    ):
        surgery.push(artifact, REPO)
    assert len(publications(hub)) == 1 and hub.commits(REPO)[0].title == "Add notes"
    assert surgery.push(artifact, REPO).made  # as the message says
    assert hub.read(REPO, "notes.md") == b"theirs" and set(WEIGHTS) <= set(hub.tree(REPO))


def test_a_card_that_was_edited_on_the_hub_is_not_overwritten_unless_told_to(hub, artifact, write_recipe, tmp_path):
    surgery.push(artifact, REPO)
    edited = hub.read(REPO, "README.md") + b"\nMy own words.\n"
    hub.commit_as_other(REPO, {"README.md": edited})
    other = surgery.apply(write_recipe(scale=2.0), tmp_path / "other").folder
    for folder in (artifact, other):
        with pytest.raises(
            PublishError, match=r"holds README\.md that this tool did not put there, or that was changed"
        ):
            surgery.push(folder, REPO)
        assert hub.read(REPO, "README.md") == edited
    surgery.push(other, REPO, overwrite=True)
    assert b"My own words" not in hub.read(REPO, "README.md")


def test_another_models_repository_is_not_taken_over(hub, artifact):
    hub.create(REPO)
    hub.commit_as_other(REPO, {"model_index.json": b"{}", "README.md": b"# Mine\n"})
    with pytest.raises(PublishError, match="holds README.md, model_index.json that this tool did not put there"):
        surgery.push(artifact, REPO)
    hub.create("me/form")  # as the Hub's own form leaves it
    hub.commit_as_other("me/form", {"README.md": b"---\nlicense: mit\n---\n"})
    assert surgery.push(artifact, "me/form").made


def test_a_manifest_that_was_altered_on_the_hub_is_noticed(hub, artifact):
    surgery.push(artifact, REPO)
    altered = hub.read(REPO, "surgery.json").replace(b'"alpha": 1.5', b'"alpha": 1.6')
    hub.commit_as_other(REPO, {"surgery.json": altered})
    with pytest.raises(PublishError, match="was altered"):
        surgery.push(artifact, REPO)
    assert surgery.push(artifact, REPO, overwrite=True).made


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda hub, base: setattr(hub.repositories[BASE], "private", True), "is private"),
        (lambda hub, base: setattr(hub.repositories[BASE], "region", "eu"), "storage regions"),
        (lambda hub, base: hub.create(BASE, base, xet=False, card={"license": "mit"}), "cannot copy from"),
        (lambda hub, base: hub.repositories.pop(BASE), "not on the Hub"),
    ],
    ids=["private", "region", "not in Xet storage", "gone"],
)
def test_where_the_hub_cannot_copy_the_weights_are_sent_and_the_plan_says_why(
    hub, artifact, write_recipe, tmp_path, tiny_base, change, why
):
    stated = surgery.apply(write_recipe(license="apache-2.0"), tmp_path / "stated").folder
    hub.tokens["hf_" + "w" * 34]["orgs"] = [{"name": "owner", "roleInOrg": "read"}]  # to see the private base
    change(hub, tiny_base)
    hub.reset_log()
    plans = []
    surgery.push(stated, REPO, announce=plans.append)
    sent = {step.path: step.why for step in plans[-1].steps if step.path in WEIGHTS}
    assert all(why in reason for reason in sent.values()), sent
    assert plans[-1].totals["sent_bytes"] > sum(hub.tree(REPO)[path].size for path in WEIGHTS)
    assert len(uploads(hub)) == 4 and len(publications(hub)) == 1
    for path in WEIGHTS:
        assert hub.read(REPO, path) == (stated / path).read_bytes()


def test_a_local_base_and_a_fused_lora_are_sent(hub, tiny_base, write_recipe, tmp_path):
    local = surgery.apply(write_recipe(base=tiny_base, license="mit"), tmp_path / "local").folder
    plans = []
    surgery.push(local, "me/local", announce=plans.append)
    assert {step.why for step in plans[0].steps if step.path in WEIGHTS} == {"it lies on this machine, not on the Hub"}
    assert hub.read("me/local", WEIGHTS[1]) == (local / WEIGHTS[1]).read_bytes()
    assert str(tiny_base) not in json.dumps(plans[0].to_json()["steps"])


def test_large_files_go_up_in_parts_and_through_xet_too(hub, tiny_base, write_recipe, tmp_path, run):
    from ..loopback_hub import WRITE_TOKEN, environment

    local = surgery.apply(write_recipe(base=tiny_base, license="mit"), tmp_path / "local").folder
    hub.multipart_size = 50_000
    surgery.push(local, "me/parts")
    assert hub.read("me/parts", WEIGHTS[1]) == (local / WEIGHTS[1]).read_bytes()
    settings = {**environment(hub, tmp_path / "xet-home", WRITE_TOKEN), "HF_HUB_DISABLE_XET": "0"}
    run("push", local, "--repo", "me/xet", env=settings, check=0)
    sent = {path: entry.sha256 for path, entry in hub.tree("me/xet").items() if entry.is_lfs}
    assert sent[WEIGHTS[1]] == hub.tree("me/parts")[WEIGHTS[1]].sha256 and len(sent) == 4


def test_licence_texts_of_the_base_go_along(hub, tiny_base, write_recipe, tmp_path):
    shutil.copytree(tiny_base, tmp_path / "licensed")
    (tmp_path / "licensed/LICENSE.md").write_text("the terms")
    hub.create("owner/licensed", tmp_path / "licensed", card={"license": "openrail++"})
    made = surgery.apply(write_recipe(base="owner/licensed"), tmp_path / "licensed-out").folder
    surgery.push(made, REPO)
    assert hub.read(REPO, "LICENSE.md") == b"the terms"
    assert not surgery.push(made, REPO).made
    surgery.load(REPO, quiet=True)


def test_the_command_prints_the_plan_and_the_commit_and_never_the_token(hub, artifact, run):
    from ..loopback_hub import WRITE_TOKEN, environment

    settings = environment(hub, artifact.parent / "cli-home", WRITE_TOKEN)
    dry = run("push", artifact, "--repo", REPO, "--dry-run", env=settings, check=0)
    assert "dry run: nothing was sent" in dry.stdout and REPO not in hub.repositories
    done = run("push", artifact, "--repo", REPO, "--tag", "v1", "--debug", env=settings, check=0)
    assert "copied on the Hub" in done.stdout and f"{REPO} at {hub.commits(REPO)[0].oid[:12]}, tag v1" in done.stdout
    again = json.loads(run("push", artifact, "--repo", REPO, "--json", env=settings, check=0).stdout)
    assert again["made"] is False and again["commit"] == hub.commits(REPO)[0].oid
    assert again["plan"]["kept_bytes"] and not again["plan"]["commit_needed"]
    hub.tokens[WRITE_TOKEN]["role"] = "read"
    refused = run("push", artifact, "--repo", REPO, "--debug", env=settings, check=1)
    assert "may read only" in refused.stderr
    for text in (dry, done, refused):
        assert WRITE_TOKEN not in text.stdout + text.stderr
    assert not any(WRITE_TOKEN.encode() in hub.read(REPO, p) for p, e in hub.tree(REPO).items() if not e.is_lfs)
    assert COMMIT[:12] in done.stdout


def test_apply_and_push_goes_on_from_the_folder_unless_its_sources_changed(hub, tiny_base, write_recipe, tmp_path, run):
    shutil.copytree(tiny_base, tmp_path / "mine")
    recipe = write_recipe(base=tmp_path / "mine", license="mit")
    again = ("apply", recipe, "--out", tmp_path / "mine-out", "--push", "me/mine")
    run(*again, check=0)
    done = run(*again, check=0)
    assert "holds the artifact of this recipe already" in done.stdout and len(publications(hub, "me/mine")) == 1
    weights = tmp_path / "mine/vae/diffusion_pytorch_model.safetensors"
    data = weights.read_bytes()
    weights.unlink()
    weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert "exists already; --force replaces it" in run(*again, check=2).stderr
    run(*again, "--force", check=0)
    assert hub.read("me/mine", "vae/diffusion_pytorch_model.safetensors") == weights.read_bytes()
