"""The Hub of the tests, asked by the real huggingface_hub: repositories, commits and who may make them."""

import hashlib
import os
import warnings
from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete
from huggingface_hub.errors import (
    BadRequestError,
    GatedRepoError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import FileDuplicationError

from . import COMMIT, WRITE_TOKEN, git_blob_oid
from .conftest import READ
from .sample_files import README, REPO, push


def test_whoami_answers_for_the_token_and_refuses_others(hub, api):
    assert api.whoami()["name"] == "me" and api.whoami()["auth"]["accessToken"]["role"] == "write"
    scope = {"entity": {"type": "user", "name": "me"}, "permissions": ["repo.write"]}
    hub.tokens["hf_fine"] = {"name": "me", "role": "fineGrained", "fineGrained": {"scoped": [scope]}}
    assert api.whoami(token="hf_fine")["auth"]["accessToken"]["fineGrained"]["scoped"] == [scope]
    assert f"Bearer {WRITE_TOKEN}" in hub.authorizations
    for token in ("hf_unknown", "x"):
        with pytest.raises(HfHubHTTPError, match="Invalid user token"):
            api.whoami(token=token)
        with pytest.raises(HfHubHTTPError, match="Invalid credentials") as caught:
            api.model_info(REPO, token=token)
        assert caught.value.response.status_code == 401


def test_a_repository_is_created_once_and_where_one_may(hub, api, other):
    hub.tokens[WRITE_TOKEN]["orgs"] = [{"name": "lab", "roleInOrg": "write"}, {"name": "club", "roleInOrg": "read"}]
    assert api.create_repo(REPO).repo_id == REPO
    assert [commit.title for commit in api.list_repo_commits(REPO)] == ["initial commit"]
    assert api.list_repo_files(REPO) == [".gitattributes"]
    with pytest.raises(HfHubHTTPError, match="already created") as caught:
        api.create_repo(REPO)
    assert caught.value.response.status_code == 409
    assert api.create_repo(REPO, exist_ok=True).repo_id == REPO
    api.create_repo("lab/model", private=True)
    assert api.model_info("lab/model").private and not api.model_info(REPO).private
    for client, name in ((api, "club/model"), (api, "you/model"), (other, "me/new")):
        with pytest.raises(HfHubHTTPError, match="don't have the rights") as caught:
            client.create_repo(name)
        assert caught.value.response.status_code == 403
    with pytest.raises(HfHubHTTPError, match="403 Forbidden"):
        api.create_repo("me/new", token=READ)
    with pytest.raises(HfHubHTTPError, match="403 Forbidden"):
        other.delete_repo(REPO)
    api.delete_repo(REPO)
    assert not api.repo_exists(REPO)


def test_one_commit_holds_regular_and_large_files(hub, api):
    api.create_repo(REPO)
    weights, config = os.urandom(3_000_000), b'{"a": 1}'
    hub.reset_log()
    info = push(api, {"unet/w.safetensors": weights, "config.json": config, "README.md": README, "empty.bin": b""})
    assert 3_000_000 < hub.received_bytes() < 3_010_000
    assert hub.read(REPO, "unet/w.safetensors") == weights and hub.read(REPO, "empty.bin") == b""
    assert hub.commits(REPO)[0].oid == info.oid and len(hub.commits(REPO)) == 2
    listed = api.model_info(REPO, files_metadata=True)
    siblings = {sibling.rfilename: sibling for sibling in listed.siblings}
    assert siblings["unet/w.safetensors"].lfs.sha256 == hashlib.sha256(weights).hexdigest()
    assert siblings["config.json"].blob_id == git_blob_oid(config) and siblings["config.json"].lfs is None
    assert (listed.sha, listed.card_data.license) == (info.oid, "apache-2.0")
    assert api.model_info(REPO).siblings[0].size is None
    found = {entry.path: entry for entry in api.list_repo_tree(REPO, recursive=True, expand=True)}
    assert found["unet/w.safetensors"].xet_hash and found["unet"].last_commit.oid == info.oid
    assert found[".gitattributes"].last_commit.title == "initial commit"
    assert [entry.path for entry in api.list_repo_tree(REPO, "unet")] == ["unet/w.safetensors"]
    hub.page_size = 2
    assert len(list(api.list_repo_tree(REPO, recursive=True))) == 6


def test_what_is_there_already_is_neither_sent_nor_committed(hub, api):
    api.create_repo(REPO)
    files = {"w.safetensors": os.urandom(100_000), "config.json": b"{}"}
    first = push(api, files)
    hub.reset_log()
    assert push(api, files).oid == first.oid and hub.received_bytes() < 2000
    assert not [path for method, path in hub.requests if "/commit/" in path or method == "PUT"]
    moved = push(api, {"moved.safetensors": files["w.safetensors"]})  # the object is known, under another name
    assert moved.oid != first.oid and not [path for method, path in hub.requests if method == "PUT"]
    operations = [CommitOperationDelete("w.safetensors"), CommitOperationCopy("moved.safetensors", "c/w.safetensors")]
    api.create_commit(REPO, operations, commit_message="rename")
    assert set(hub.tree(REPO)) == {".gitattributes", "config.json", "moved.safetensors", "c/w.safetensors"}
    with pytest.raises(RemoteEntryNotFoundError, match="doesn't exist"):
        api.delete_file("nothing", REPO)
    api.delete_folder("c", REPO)
    assert "c/w.safetensors" not in hub.tree(REPO)


def test_a_commit_onto_an_old_head_is_refused_as_a_whole(hub, api):
    api.create_repo(REPO)
    parent = hub.commits(REPO)[0].oid
    theirs = []

    def before(_, path):
        if "/commit/" in path and not theirs:
            theirs.append(hub.commit_as_other(REPO, {"theirs.txt": b"1", "w.bin": b"2"}))

    hub.before = before
    with pytest.raises(HfHubHTTPError, match="A commit has happened since") as caught:
        push(api, {"mine.txt": b"1"}, parent_commit=parent)
    assert caught.value.response.status_code == 412
    assert hub.commits(REPO)[0].oid == theirs[0] and "mine.txt" not in hub.tree(REPO)
    push(api, {"mine.txt": b"1"}, parent_commit=theirs[0])
    assert set(hub.tree(REPO)) == {".gitattributes", "mine.txt", "theirs.txt", "w.bin"}


def test_a_large_file_that_never_arrived_cannot_be_committed(hub, api):
    api.create_repo(REPO)
    addition = CommitOperationAdd("w.safetensors", b"x" * 1000)
    addition._upload_mode, addition._is_uploaded, addition._should_ignore = "lfs", True, False
    with pytest.raises(BadRequestError, match="does not exist in your git lfs repository"):
        api.create_commit(REPO, [CommitOperationAdd("a.txt", b"1"), addition], commit_message="x")
    assert set(hub.tree(REPO)) == {".gitattributes"}
    hub.accept_xet = True
    addition = CommitOperationAdd("w.safetensors", b"x" * 1000)
    addition._upload_mode, addition._is_uploaded, addition._should_ignore = "lfs", True, False
    api.create_commit(REPO, [addition], commit_message="x")
    assert hub.tree(REPO)["w.safetensors"].size == 1000 and not hub.tree(REPO)["w.safetensors"].has_bytes


def test_a_file_is_copied_between_repositories_without_being_sent(hub, api, other, tmp_path):
    big = tmp_path / "source/w.safetensors"
    big.parent.mkdir()
    with big.open("wb") as file:
        file.truncate(24 << 30)  # sparse: nobody could read it in the time of this test
    (big.parent / "config.json").write_bytes(b"{}")
    hub.declared_sha256[str(big)] = "ab" * 32
    hub.create("owner/base", big.parent)
    hub.create("far/base", big.parent, region="eu")
    hub.create("owner/plain", big.parent, xet=False)
    hub.create("me/secret", big.parent, private=True)
    api.create_repo(REPO)

    def copy(source, client=api):
        names = ("w.safetensors", "config.json")
        operations = [CommitOperationCopy(name, name, src_repo_id=source, src_repo_type="model") for name in names]
        return client.create_commit(REPO, operations, commit_message="copy")

    for source, error, message in (
        ("far/base", BadRequestError, "across storage regions"),
        ("me/secret", HfHubHTTPError, "from a private repository"),
        ("owner/plain", ValueError, "file has no xet hash"),
    ):
        with pytest.raises(error, match=message):
            copy(source)
    with pytest.raises(HfHubHTTPError, match="403 Forbidden"):
        copy("owner/base", other)
    assert set(hub.tree(REPO)) == {".gitattributes"}
    hub.reset_log()
    copy("owner/base")
    entry = hub.tree(REPO)["w.safetensors"]
    assert (entry.size, entry.sha256) == (24 << 30, "ab" * 32) and hub.read(REPO, "config.json") == b"{}"
    assert hub.received_bytes() < 3000 and hub.sent_bytes() < 3000
    api._duplicate_lfs_files(REPO, copies=[], files_to_copy={})
    source = CommitOperationCopy("w.safetensors", "w", src_repo_id="owner/base", src_repo_type="model")
    (file,) = api.get_paths_info("owner/base", "w.safetensors")
    file.lfs.sha256 = "cd" * 32
    with pytest.raises(FileDuplicationError, match="is not in owner/base"):
        api._duplicate_lfs_files(
            REPO, copies=[source], files_to_copy={("owner/base", "model", "w.safetensors", None): file}
        )


def test_tags_and_branches_name_commits(hub, api, other):
    api.create_repo(REPO)
    first = push(api, {"a.txt": b"1"}).oid
    api.create_tag(REPO, tag="v1")
    api.create_branch(REPO, branch="fix/it", revision="v1")
    second = push(api, {"a.txt": b"2"}, revision="fix/it").oid
    refs = api.list_repo_refs(REPO)
    assert {ref.name: ref.target_commit for ref in refs.branches} == {"main": first, "fix/it": second}
    assert [(ref.ref, ref.target_commit) for ref in refs.tags] == [("refs/tags/v1", first)]
    assert api.model_info(REPO, revision="fix/it").sha == second and hub.read(REPO, "a.txt", "v1") == b"1"
    assert [commit.commit_id for commit in api.list_repo_commits(REPO, revision="fix/it")][:2] == [second, first]
    for again in (lambda: api.create_tag(REPO, tag="v1"), lambda: api.create_branch(REPO, branch="fix/it")):
        with pytest.raises(HfHubHTTPError) as caught:
            again()
        assert caught.value.response.status_code == 409
    api.create_tag(REPO, tag="v1", exist_ok=True)
    with pytest.raises(HfHubHTTPError, match="403 Forbidden"):
        other.create_tag(REPO, tag="v2")
    api.delete_tag(REPO, tag="v1")
    api.delete_branch(REPO, branch="fix/it")
    for revision in ("v1", "fix/it", "0" * 40):
        with pytest.raises(RevisionNotFoundError):
            api.model_info(REPO, revision=revision)


def test_who_may_not_write_may_open_a_pull_request(hub, api, other, tmp_path):
    api.create_repo(REPO)
    with pytest.raises(HfHubHTTPError, match="create_pr=1"):
        push(other, {"a.txt": b"1"})
    made = push(other, {"a.txt": b"1", "w.bin": b"2" * 100}, create_pr=True)
    assert (made.pr_num, made.pr_revision) == (1, "refs/pr/1")
    assert "a.txt" not in hub.tree(REPO) and hub.read(REPO, "w.bin", "refs/pr/1") == b"2" * 100
    (found,) = api.get_repo_discussions(REPO, discussion_type="pull_request", discussion_status="open")
    assert (found.num, found.title, found.author, found.git_reference) == (1, "push", "you", "refs/pr/1")
    assert not list(api.get_repo_discussions(REPO, author="me"))
    for _ in range(11):
        push(api, {"b.txt": b"1"}, create_pr=True)
    assert len(list(api.get_repo_discussions(REPO))) == 12
    push(other, {"a.txt": b"2"}, revision="refs/pr/1")
    path = other.hf_hub_download(REPO, "a.txt", revision="refs/pr/1", cache_dir=tmp_path)
    assert Path(path).read_bytes() == b"2" and hub.fetched() == ["a.txt"]
    assert len(api.list_repo_refs(REPO, include_pull_requests=True).pull_requests) == 12


def test_private_gated_and_missing_are_told_as_the_hub_does(hub, api, other, anonymous, tmp_path):
    (tmp_path / "a.txt").write_bytes(b"1")
    hub.create("me/private", tmp_path, private=True)
    hub.create("owner/gated", tmp_path, gated=True)
    hub.create("owner/strict", tmp_path)
    hub.gated.add("owner/strict")
    for client, status in ((other, 404), (anonymous, 401)):
        for name in ("me/private", "me/nothing"):
            with pytest.raises(RepositoryNotFoundError) as caught:
                client.model_info(name)
            assert caught.value.response.status_code == status and not isinstance(caught.value, GatedRepoError)
    assert api.model_info("me/private").private
    assert anonymous.model_info("owner/gated").gated == "auto"
    with pytest.raises(GatedRepoError):
        anonymous.model_info("owner/strict")
    for client in (api, anonymous):
        with pytest.raises(GatedRepoError):
            client.hf_hub_download("owner/gated", "a.txt", cache_dir=tmp_path / "cache")
        with pytest.raises(GatedRepoError):
            client.auth_check("owner/gated")
    hub.access.add(("owner/gated", "me"))
    assert api.hf_hub_download("owner/gated", "a.txt", cache_dir=tmp_path / "cache")
    api.auth_check("owner/gated")
    with pytest.raises(HfHubHTTPError, match="403 Forbidden"):
        api.auth_check("owner/gated", write=True)
    api.auth_check("me/private", write=True)
    with pytest.raises(RemoteEntryNotFoundError):
        api.hf_hub_download("me/private", "b.txt", cache_dir=tmp_path / "cache")
    with pytest.raises(RepositoryNotFoundError):
        anonymous.create_commit("owner/gated", [CommitOperationAdd("a", b"")], commit_message="x")


def test_a_card_with_bad_metadata_is_refused_before_anything_is_sent(hub, api):
    api.create_repo(REPO)
    hub.reset_log()
    with pytest.raises(ValueError, match="Error parsing YAML"):
        push(api, {"README.md": b"---\na: [1\n---\n", "w.bin": b"1" * 1000})
    assert [path for _, path in hub.requests] == ["/api/validate-yaml"]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        push(api, {"README.md": b"# nothing\n"})
    assert any("empty or missing yaml metadata" in str(warning.message) for warning in caught)


def test_a_folder_is_followed_until_somebody_commits(hub, api, tmp_path):
    hub.repositories[REPO] = tmp_path
    hub.cards[REPO] = {"license": "mit"}
    (tmp_path / "a.txt").write_bytes(b"1")
    assert api.list_repo_files(REPO) == ["a.txt"] and api.model_info(REPO).sha == COMMIT
    (tmp_path / "b.txt").write_bytes(b"2")
    assert api.list_repo_files(REPO) == ["a.txt", "b.txt"] and api.model_info(REPO).card_data.license == "mit"
    push(api, {"README.md": README})
    (tmp_path / "c.txt").write_bytes(b"3")
    assert api.list_repo_files(REPO) == ["README.md", "a.txt", "b.txt"]
    assert api.model_info(REPO).card_data.license == "apache-2.0"
