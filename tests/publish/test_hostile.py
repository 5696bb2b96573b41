"""Repositories that mean harm, and people who meet in the middle: nothing of the user's is lost or run."""

import contextlib
import json
import os
import shutil
import threading

import pytest

import surgery
from surgery.artifact.manifest import Manifest
from surgery.errors import ArtifactError, InputError, PublishError, SurgeryError

from ..loopback_hub import WRITE_TOKEN
from .conftest import BASE
from .test_push import REPO, WEIGHTS, publications
from .test_verify import failures


@pytest.fixture
def forge(hub, artifact):
    """forge(change, extra files, weights): a repository whose manifest was changed and given a hash that fits again."""

    def forge(change=lambda manifest: None, extra=None, weights="copy", repo="bad/model"):
        surgery.push(artifact, "me/good", weights=weights, overwrite=True)
        files = {path: hub.read("me/good", path) for path in hub.tree("me/good")} | (extra or {})
        manifest = json.loads(files["surgery.json"])
        change(manifest)
        with contextlib.suppress(ValueError):  # the form itself is refused
            manifest["hash"] = Manifest.model_validate(manifest).computed_hash()
        files["surgery.json"] = json.dumps(manifest).encode()
        hub.create(repo)
        hub.commit_as_other(repo, files)
        return repo

    return forge


def blobs(tmp_path):
    return {path: path.read_bytes() for path in (tmp_path / "home/hub").glob("models--owner--base/blobs/*")}


def entry_of(data, weights=False):
    import hashlib

    return {
        "size": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        "weights": weights,
        "origin": {"kind": "surgery"},
    }


def test_a_manifest_cannot_have_a_users_file_deleted(forge, tmp_path):
    precious = tmp_path / "blobs/precious"
    precious.parent.mkdir()
    precious.write_text("mine")

    def point_at_it(manifest):
        manifest["files"][WEIGHTS[0]]["sha256"] = str(precious)

    with pytest.raises(ArtifactError, match="is damaged at"):
        surgery.load(forge(point_at_it, weights="thin"))
    assert precious.read_text() == "mine"


def test_a_manifest_cannot_have_the_cached_base_deleted(forge, tmp_path):
    before = blobs(tmp_path)
    assert before

    def lie(manifest):
        manifest["files"][WEIGHTS[0]]["sha256"] = "0" * 64

    with pytest.raises(ArtifactError, match="the repository itself was altered"):
        surgery.load(forge(lie, weights="thin"))
    assert blobs(tmp_path) == before


def test_a_damaged_local_folder_is_left_as_it_is(artifact, tmp_path):
    folder = tmp_path / "blobs"
    shutil.copytree(artifact, folder)
    manifest = json.loads((folder / "surgery.json").read_text()) | {"weights": "thin"}
    (folder / "surgery.json").write_text(json.dumps(manifest))
    (folder / WEIGHTS[0]).unlink()
    (folder / "model_index.json").write_text("{}")
    with pytest.raises(ArtifactError):
        surgery.load(folder)
    assert (folder / "model_index.json").read_text() == "{}"


EVIL = b"raise SystemExit('code of a repository was run')\n"


def test_other_code_is_found_and_never_run(forge, hub):
    def with_code(manifest):
        manifest["files"]["scheduler/evil.py"] = entry_of(EVIL)

    repo = forge(with_code, {"scheduler/evil.py": EVIL})
    with pytest.raises(ArtifactError, match="other code than its own"):
        surgery.load(repo)
    with pytest.raises(ArtifactError, match="other code than its own"):
        surgery.verify(repo)
    beside = forge(extra={"evil.py": EVIL}, repo="bad/beside")
    assert ("code", "evil.py") in failures(surgery.verify(beside))
    with pytest.raises(InputError, match="runs no code of a repository"):
        surgery.load(beside, trust_remote_code=True)


def test_a_scheduler_of_its_own_is_found_and_refused(forge, hub, artifact):
    index = json.loads((artifact / "model_index.json").read_text())
    index["scheduler"] = ["evil", "Evil"]
    data = json.dumps(index).encode()

    def with_index(manifest):
        manifest["files"]["model_index.json"] = entry_of(data)

    repo = forge(with_index, {"model_index.json": data})
    assert ("code", "model_index.json") in failures(surgery.verify(repo))
    with pytest.raises(ArtifactError, match="takes scheduler from 'evil'"):
        surgery.load(repo)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda m: m["files"][WEIGHTS[2]].update(weights=False), "a weight file that the manifest does not call one"),
        (lambda m: m["files"][WEIGHTS[2]]["origin"].update(kind="fused"), "no bytes of a base to compare it with"),
        (lambda m: m["files"][WEIGHTS[2]]["origin"].update(source="./x", revision=None), "its base is a folder"),
        (lambda m: m["files"].pop(WEIGHTS[2]), "names no weights of this component"),
    ],
    ids=["not called weights", "called fused", "called local", "left out"],
)
def test_a_false_word_on_weights_is_not_verified(forge, change, what):
    report = surgery.verify(forge(change))
    assert not report.verified
    assert any(what in check.detail for check in report.checks if check.status in ("failed", "unknown"))


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.update(component="nix"),
        lambda m: m.update(name="x" * 300),
        lambda m: m.update(name="../x"),
        lambda m: m["files"][WEIGHTS[0]]["origin"].update(source=None),
        lambda m: m["files"][WEIGHTS[0]]["origin"].update(source="a/b/../c"),
        lambda m: [file.update(weights=False) for file in m["files"].values()],
        lambda m: m["files"].pop("model_index.json"),
        lambda m: m["files"].update({"a/../../x": m["files"]["model_index.json"]}),
    ],
)
def test_manifests_that_make_no_sense_are_refused_in_words(forge, change):
    with pytest.raises(SurgeryError):
        surgery.load(forge(change, weights="thin"))


def test_deep_json_and_a_garbage_shard_are_errors_in_words(hub, forge, artifact, tmp_path):
    repo = forge()
    hub.commit_as_other(repo, {"surgery.json": b"[" * 100_000})
    for act in (surgery.load, surgery.verify):
        with pytest.raises(ArtifactError, match="cannot be read"):
            act(repo)
    shutil.copytree(artifact, tmp_path / "garbage")
    next((tmp_path / "garbage").glob("unet/*-00002-of-00002.safetensors")).write_bytes(b"garbage")
    assert "buffers" in {what for what, _ in failures(surgery.verify(tmp_path / "garbage"))}


def test_a_link_out_of_the_folder_is_not_published(hub, artifact):
    (artifact / "engines").mkdir()
    (artifact / "engines/x").symlink_to("/etc/hostname")
    with pytest.raises(ArtifactError, match="a link to a file outside the artifact"):
        surgery.push(artifact, REPO)
    assert REPO not in hub.repositories


@pytest.mark.parametrize("private", [False, True])
def test_a_repository_that_appears_in_the_middle_is_somebody_elses(hub, artifact, private):
    def appear(method, path):
        if (method, path) == ("POST", "/api/repos/create"):
            hub.before = None
            hub.create(REPO)
            hub.commit_as_other(REPO, {} if private else {"README.md": b"# Theirs\n"})

    hub.before = appear
    with pytest.raises(
        PublishError, match="is public" if private else "holds README.md that this tool did not put there"
    ):
        surgery.push(artifact, REPO, private=private)
    assert not publications(hub)


def test_two_pushes_of_one_artifact_at_once_make_one_commit(hub, artifact, no_waiting):
    results = []

    def push():
        try:
            results.append(surgery.push(artifact, REPO))
        except SurgeryError as error:
            results.append(error)

    threads = [threading.Thread(target=push) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    surgery.push(artifact, REPO)
    assert len(publications(hub)) == 1 and set(WEIGHTS) <= set(hub.tree(REPO))


def test_many_loads_at_once(hub, artifact, use_hub):
    from surgery.artifact.fetch import model_folder

    surgery.push(artifact, REPO)
    use_hub(hub, home="fresh")
    failed = []

    def fetch():
        try:
            model_folder(REPO)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=fetch) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


def test_weights_that_rotted_in_the_cache_are_found_by_verify_and_mended(hub, artifact, use_hub):
    surgery.push(artifact, REPO)
    use_hub(hub, home="fresh")
    from surgery.artifact.fetch import model_folder

    blob = os.path.realpath(model_folder(REPO) / WEIGHTS[1])
    with open(blob, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    with pytest.raises(ArtifactError, match="taken out of the cache"):
        surgery.load(REPO, verify=True, quiet=True)
    surgery.load(REPO, verify=True, quiet=True)


@pytest.mark.parametrize("stated", ["unknown", "other", "cc-by-nc-nd-4.0"])
def test_a_stated_licence_must_be_one_and_allow_copies(hub, tiny_base, write_recipe, tmp_path, stated):
    hub.create(BASE, tiny_base, card={})
    folder = surgery.apply(write_recipe(license=stated), tmp_path / "stated").folder
    with pytest.raises(PublishError, match="which is none|forbids a copy"):
        surgery.push(folder, REPO)


@pytest.mark.parametrize("license", [["mit", "apache-2.0"], 1.0, False, {"a": 1}])
def test_a_licence_that_is_no_text_is_none(hub, tiny_base, write_recipe, tmp_path, license):
    hub.create(BASE, tiny_base, card={"license": license})
    folder = surgery.apply(write_recipe(), tmp_path / "odd").folder
    with pytest.raises(PublishError, match="licence of owner/base is unknown"):
        surgery.push(folder, REPO)


def test_a_stated_licence_that_is_not_the_sources_is_noted(hub, write_recipe, tmp_path):
    folder = surgery.apply(write_recipe(license="mit"), tmp_path / "mit").folder
    plan = surgery.push(folder, REPO, dry_run=True)
    assert any("owner/base apache-2.0" in note for note in plan.notes)


def test_a_licence_text_that_changes_or_goes_is_ours_to_change(hub, tiny_base, write_recipe, tmp_path):
    shutil.copytree(tiny_base, tmp_path / "terms")
    (tmp_path / "terms/LICENSE.md").write_text("one")
    hub.create("owner/terms", tmp_path / "terms", card={"license": "openrail++"})
    surgery.push(surgery.apply(write_recipe(base="owner/terms"), tmp_path / "a").folder, REPO)
    hub.commit_as_other("owner/terms", {"LICENSE.md": b"two"})
    surgery.push(surgery.apply(write_recipe(base="owner/terms"), tmp_path / "b").folder, REPO)
    assert hub.read(REPO, "LICENSE.md") == b"two"
    hub.commit_as_other("owner/terms", {"LICENSE.md": None})
    surgery.push(surgery.apply(write_recipe(base="owner/terms"), tmp_path / "c").folder, REPO)
    assert "LICENSE.md" not in hub.tree(REPO) and surgery.verify(REPO).verified


def test_a_tag_is_no_branch_and_odd_names_are_refused(hub, artifact):
    surgery.push(artifact, REPO, tag="v1")
    hub.reset_log()
    with pytest.raises(PublishError, match="v1 is a tag"):
        surgery.push(artifact, REPO, revision="v1")
    with pytest.raises(PublishError, match="has no refs/pr/9"):
        surgery.push(artifact, REPO, revision="refs/pr/9")
    assert not [path for method, path in hub.requests if method in ("POST", "PUT")]
    for name in ("v1..2", "a.lock", "/x", "x/", "@{", "-x", "a\tb", "@", "a//b", ".x", ""):
        with pytest.raises(InputError, match="no name that git takes"):
            surgery.push(artifact, REPO, tag=name)


def test_a_base_that_answers_under_another_name_ends_in_sending(hub, artifact, monkeypatch):
    from surgery.export.publish import commit

    refusals = []
    original = commit._commit

    def once(api, plan, publication, target):
        if any(step.action == "copy" for step in plan.changes):
            refusals.append(plan)
            assert len(refusals) < 3
            raise commit._CopyRefused("new/name", "it was renamed")
        return original(api, plan, publication, target)

    monkeypatch.setattr(commit, "_commit", once)
    surgery.push(artifact, REPO)
    assert len(refusals) == 1 and hub.read(REPO, WEIGHTS[1]) == (artifact / WEIGHTS[1]).read_bytes()


def test_a_token_with_odd_characters_is_not_shown(hub, artifact, use_hub):
    use_hub(hub, token="hf_" + "ü" * 34)
    with pytest.raises(PublishError, match="malformed") as caught:
        surgery.push(artifact, REPO)
    assert "ü" not in str(caught.value) and WRITE_TOKEN not in str(caught.value)
