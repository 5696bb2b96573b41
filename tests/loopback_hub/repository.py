"""A repository: commits with immutable trees, branches, tags, pull requests, and the large files that it knows."""

import hashlib
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from .entries import Entry, folder_signature, folder_tree
from .errors import HubError

COMMIT = "c0ffee" * 6 + "c0ff"
GITATTRIBUTES = "".join(
    f"*.{suffix} filter=lfs diff=lfs merge=lfs -text\n"
    for suffix in ("7z", "bin", "gz", "h5", "jpg", "model", "onnx", "png", "pt", "safetensors", "zip")
).encode()
EPOCH = datetime(2025, 1, 1, tzinfo=UTC)


SPACE_README = b"""---
title: Space
sdk: gradio
app_file: app.py
---

Check out the configuration reference at https://huggingface.co/docs/hub/spaces-config-reference
"""


@dataclass(frozen=True)
class Commit:
    """A commit; `tree` maps each path to its Entry and is never changed."""

    oid: str
    parent: str | None
    title: str
    message: str
    author: str
    date: str
    tree: dict


@dataclass
class PullRequest:
    """A pull request: its commits are at refs/pr/`num`."""

    num: int
    title: str
    author: str
    created: str
    base: str = "main"
    status: str = "open"


@dataclass
class Repository:
    """One model repository. Made from a `folder` it follows that folder until somebody commits to it."""

    name: str
    folder: object = None
    private: bool = False
    gated: bool = False
    xet: bool = True
    card: dict | None = None
    region: str = "us"
    creator: str = ""
    declared: dict = field(default_factory=dict)
    commits: dict = field(default_factory=dict)
    branches: dict = field(default_factory=dict)
    tags: dict = field(default_factory=dict)
    pull_requests: dict = field(default_factory=dict)
    objects: dict = field(default_factory=dict)
    asked_xet: bool = False
    _signature: object = None
    _made: int = 0

    @property
    def owner(self):
        """The user or organisation that owns it."""
        return self.name.removeprefix("datasets/").removeprefix("spaces/").split("/")[0]

    @property
    def committed(self):
        """Whether somebody changed it since it was made."""
        return any(oid != COMMIT for oid in self.commits)

    def start(self):
        """The first commit, of a repository made without a folder."""
        tree = {".gitattributes": Entry(len(GITATTRIBUTES), False, data=GITATTRIBUTES, xet=self.xet)}
        if self.name.startswith("spaces/"):  # which have the Hub's own README from the first
            tree["README.md"] = Entry.of_bytes("README.md", SPACE_README, self.xet)
        self.branches["main"] = self.add_commit(None, "initial commit", "", "system", tree).oid

    def refresh(self):
        """Take the snapshot of the folder, again if the folder changed and nobody committed."""
        if self.folder is None or self.committed:
            return
        signature = (folder_signature(self.folder), dict(self.declared))
        if signature != self._signature:
            tree = folder_tree(signature[0], self.folder, self.declared, self.xet)
            date = f"{EPOCH:%Y-%m-%dT%H:%M:%S}.000Z"
            self.commits[COMMIT] = Commit(COMMIT, None, "Upload model", "", self.owner, date, tree)
            self.branches.setdefault("main", COMMIT)
            self._signature = signature

    def add_commit(self, parent, title, message, author, tree):
        """A new commit; no branch is moved."""
        self._made += 1
        seed = f"{self.name}\0{parent}\0{self._made}\0{title}"
        date = f"{EPOCH + timedelta(minutes=self._made):%Y-%m-%dT%H:%M:%S}.000Z"
        commit = Commit(hashlib.sha1(seed.encode()).hexdigest(), parent, title, message, author, date, dict(tree))
        self.commits[commit.oid] = commit
        return commit

    def find(self, revision):
        """The commit that a branch, tag, refs/pr/N or (short) oid names; RevisionNotFound if none does."""
        oid = self.references().get(revision) or self.references().get(revision.removeprefix("refs/heads/"))
        if oid is None and len(revision) >= 7:
            oid = next((oid for oid in self.commits if oid.startswith(revision)), None)
        if oid is None:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[oid]

    def references(self):
        """Every name of a commit: branches before tags."""
        return {**self.tags, **self.branches}

    def move(self, revision, oid):
        """Point the branch (or refs/pr/N) to a commit."""
        self.branches[revision.removeprefix("refs/heads/")] = oid

    def history(self, commit):
        """The commit and those before it, newest first."""
        while commit is not None:
            yield commit
            commit = self.commits.get(commit.parent)

    def find_object(self, sha256, size=None):
        """The large file that this repository knows: uploaded, duplicated into it, or in one of its commits."""
        if sha256 in self.objects:
            return self.objects[sha256]
        for commit in self.commits.values():
            for entry in commit.tree.values():
                if entry.is_lfs and size in (None, entry.size) and entry.sha256 == sha256:
                    return entry
        return None

    def open_pull_request(self, title, author, base):
        """A new pull request, without commits yet."""
        num = len(self.pull_requests) + 1
        created = f"{EPOCH + timedelta(minutes=self._made, seconds=num):%Y-%m-%dT%H:%M:%S}.000Z"
        self.pull_requests[num] = PullRequest(num, title, author, created, base)
        return self.pull_requests[num]
