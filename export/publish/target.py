"""The repository that is published to, as it stands now, and what in it somebody else wrote."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from surgery.artifact.manifest import MANIFEST, Manifest, parse_manifest
from surgery.compat import transport_error
from surgery.errors import ArtifactError, BaseError, BaseNotFoundError, PublishError
from surgery.hub import FileEntry, HubBase
from surgery.hub.base import is_local
from surgery.hub.bounded import read_bytes
from surgery.hub.client import bar_up_to, hub_api, one_line, retried
from surgery.hub.listing import entries_of

if TYPE_CHECKING:
    from .content import Content, RepositoryFile


@dataclass(frozen=True)
class Source:
    """A repository or folder that weights come from: its listing at the pinned commit, or why there is none."""

    name: str
    revision: str | None
    base: HubBase | None
    reason: str = ""  # why it is not listed
    rewritten: bool = False  # whether some of its weights are in the artifact in an altered form

    @property
    def license(self) -> str | None:
        """What its card states, or None."""
        return self.base.license if self.base else None


def find_sources(files: Iterable, known: Mapping | None = None) -> dict:
    """{(name, revision): Source} of the weights among files that have an `origin`, as manifest and plan list them.

    known: Sources that were listed a moment ago.
    """
    found = {}
    for file in files:
        origins = [(file.origin.source, file.origin.revision)] if file.origin.source else []
        origins += [(lora["source"], lora["revision"]) for lora in file.origin.loras]
        for key in origins:
            rewritten = file.origin.kind in ("converted", "fused")
            if key not in found and known and key in known and known[key].rewritten == rewritten:
                found[key] = known[key]
            elif key not in found:
                found[key] = _find(*key, rewritten)
            elif rewritten and not found[key].rewritten:
                found[key] = replace(found[key], rewritten=True)
    return found


def _find(name, revision, rewritten):
    if revision is None or is_local(name):
        return Source(name, None, None, "it lies on this machine, not on the Hub", rewritten)
    try:
        base = HubBase(name, revision)
    except BaseNotFoundError:
        return Source(name, revision, None, f"{name}@{revision[:12]} is not on the Hub, or not for you", rewritten)
    except BaseError as error:
        raise PublishError(f"the Hub was asked for {name}, where weights come from: {error}") from error
    if not base.listed:
        raise PublishError(f"the Hub cannot be reached for {name}, where weights come from; run the same command again")
    return Source(name, revision, base, "", rewritten)


@dataclass(frozen=True)
class Target:
    """A branch of a repository; `head` is None where neither is there yet."""

    repo: str
    branch: str
    exists: bool
    head: str | None = None
    private: bool = False
    files: dict[str, FileEntry] = field(default_factory=dict)
    branch_exists: bool = False
    tags: dict[str, str] = field(default_factory=dict)  # name -> commit
    repo_type: str = "model"


def read_target(repo: str, branch: str, with_refs: bool = False, repo_type: str = "model") -> Target:
    """The Target of OWNER/NAME as the Hub lists it; PublishError where it cannot, or where the branch is a tag.

    with_refs: ask for branches and tags too.
    """
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    api = hub_api()
    try:
        try:
            info: Any = retried(lambda: api.repo_info(repo, revision=branch, files_metadata=True, repo_type=repo_type))
            branch_exists = True
        except RevisionNotFoundError:
            info = retried(
                lambda: api.repo_info(repo, files_metadata=True, repo_type=repo_type)
            )  # the branch will start from main
            branch_exists = False
        refs = retried(lambda: api.list_repo_refs(repo)) if with_refs else None
    except RepositoryNotFoundError:
        return Target(repo, branch, exists=False, repo_type=repo_type)
    except (HfHubHTTPError, OSError, transport_error(), KeyError, TypeError, ValueError) as error:
        raise PublishError(f"the Hub did not list {repo}: {one_line(error)}; nothing was sent, run it again") from error
    files = entries_of(info.siblings)
    tags = {tag.name: tag.target_commit for tag in refs.tags} if refs else {}
    if refs and branch in tags and branch not in {known.name for known in refs.branches}:
        raise PublishError(f"{branch} is a tag of {repo}, and only branches are committed to; leave --revision out")
    if branch.startswith("refs/") and not branch_exists:
        raise PublishError(f"{repo} has no {branch}; --create-pr opens a pull request")
    return Target(repo, branch, True, info.sha, bool(info.private), files, branch_exists, tags, repo_type)


def find_proposal(repo: str, user: str | None, content: "Content") -> int | None:
    """The number of an open pull request of this user that holds all of a Content already, or None."""
    from huggingface_hub.errors import HfHubHTTPError

    api = hub_api()
    try:
        found = list(
            api.get_repo_discussions(repo, author=user, discussion_type="pull_request", discussion_status="open")
        )
    except HfHubHTTPError:  # discussions may be switched off; then the commit says so
        return None
    for discussion in found:
        proposed = read_target(repo, f"refs/pr/{discussion.num}")
        if proposed.branch_exists and all(is_there(item, proposed.files) for item in content.items.values()):
            return discussion.num
    return None


def is_there(item: "RepositoryFile", files: Mapping[str, FileEntry]) -> bool:
    """Whether a listing has an RepositoryFile's very content at its path."""
    entry = files.get(item.path)
    if entry is None or entry.size != item.size:
        return False
    if entry.sha256 is not None:
        return entry.sha256 == item.sha256
    return item.is_here and entry.blob == item.git_blob


def published_manifest(target: Target) -> Manifest | None:
    """The Manifest that the repository holds, None where it holds none; PublishError where that one was altered."""
    if MANIFEST not in target.files:
        return None
    try:
        return parse_manifest(read_file(target, MANIFEST).decode("utf-8"), f"{target.repo}/{MANIFEST}")
    except (ArtifactError, UnicodeDecodeError) as error:
        raise PublishError(
            f"{target.repo} holds a {MANIFEST} that was altered or is of another version ({error}); "
            "--overwrite replaces it"
        ) from error


def foreign_files(target: Target, content: "Content", published: Manifest | None) -> list[str]:
    """The paths that a push would overwrite or remove although somebody else wrote them: the repository's own.

    A file is ours where the published manifest lists it with this very content. A card that is nothing but front
    matter, as the Hub's own form makes it, is nobody's work.
    """
    foreign = []
    touched = [path for path, item in content.items.items() if path != MANIFEST and not is_there(item, target.files)]
    touched += stale_files(target, content, published)
    for path in touched:
        entry = target.files.get(path)
        if entry is None:
            continue
        ours = published.files.get(path) if published else None
        if entry.sha256 is not None:
            is_ours = ours is not None and ours.sha256 == entry.sha256
        elif ours is None:
            is_ours = path == "README.md" and is_front_matter_alone(read_file(target, path))
        else:
            is_ours = hashlib.sha256(read_file(target, path)).hexdigest() == ours.sha256
        if not is_ours:
            foreign.append(path)
    return foreign


def stale_files(target: Target, content: "Content", published: Manifest | None) -> list[str]:
    """The paths of an earlier publication that this one does not have."""
    listed = [*published.files, MANIFEST] if published else []
    return [path for path in listed if path in target.files and path not in content.items]


def read_file(target: Target, path: str) -> bytes:
    """The bytes of a file of a Target; PublishError where they cannot be had."""
    from huggingface_hub.errors import HfHubHTTPError

    where = {"repo_type": target.repo_type, "revision": target.head, "tqdm_class": bar_up_to(target.files[path].size)}
    try:
        fetched = retried(lambda: hub_api().hf_hub_download(target.repo, path, **where))
        return read_bytes(fetched)
    except (HfHubHTTPError, OSError, ValueError, transport_error()) as error:
        raise PublishError(f"fetching {path} of {target.repo} failed: {one_line(error)}; nothing was sent") from error


def is_front_matter_alone(data: bytes) -> bool:
    """Whether a card is nothing but front matter, as the Hub's own form makes it."""
    parts = data.decode("utf-8", errors="replace").split("---", 2)
    return not data.strip() or (len(parts) == 3 and not parts[0].strip() and not parts[2].strip())
