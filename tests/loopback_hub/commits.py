"""A commit: files are announced, then all changes arrive as lines of JSON and are applied as a whole or not at all."""

import base64
import json

from .access import writable_revision
from .card import problems
from .entries import LFS_SIZE, Entry, kept_as_lfs
from .errors import HubError, answer
from .xet import folder_of, stored_files


def preupload(server, request, name, revision):
    """POST /api/models/{repo}/preupload/{revision}: how each file is to be sent, and what is there already."""
    repository = writable_revision(server, request, name, revision, request.flag("create_pr"))
    commit, files = repository.find(revision), []
    for file in request.json()["files"]:
        path = _checked(file["path"])
        mode = "lfs" if kept_as_lfs(path, file["size"]) else "regular"
        info = {"path": path, "uploadMode": mode, "shouldIgnore": False}
        entry = commit.tree.get(path)
        if entry is not None:
            info["oid"] = entry.sha256 if entry.is_lfs else entry.oid
        files.append(info)
    return answer({"commitOid": commit.oid, "files": files})


def commit(server, request, name, revision):
    """POST /api/models/{repo}/commit/{revision}, with create_pr=1 as a pull request to it."""
    create_pr = request.flag("create_pr")
    repository = writable_revision(server, request, name, revision, create_pr)
    head = repository.find(revision)
    if not create_pr and revision.removeprefix("refs/heads/") not in repository.branches:
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
    header, operations = _parsed(request.body)
    parent = header.get("parentCommit")
    if parent and create_pr:
        head = repository.find(parent)
    elif parent and parent != head.oid:
        raise HubError(412, "A commit has happened since. Please refresh and try again.")
    tree = _applied(server, repository, head.tree, operations)
    author, title = request.identity["name"], header["summary"]
    made = repository.add_commit(head.oid, title, header.get("description") or "", author, tree)
    answered = {"success": True, "commitOid": made.oid, "hookOutput": ""}
    answered["commitUrl"] = f"{server.url}/{name}/commit/{made.oid}"
    if create_pr:
        pull_request = repository.open_pull_request(title, author, revision)
        revision = f"refs/pr/{pull_request.num}"
        answered["pullRequestUrl"] = f"{server.url}/{name}/discussions/{pull_request.num}"
    repository.move(revision, made.oid)
    return answer(answered)


def _checked(path):
    """The path, if a repository can hold it."""
    if not path or path.startswith("/") or {"..", ".", "", ".git"} & set(path.split("/")):
        raise HubError(400, f"Invalid path in repository: {path!r}")
    return path


def _parsed(body):
    """The header and the [(key, value)] of the lines of a commit."""
    try:
        lines = [json.loads(line) for line in body.splitlines() if line.strip()]
        operations = [(line["key"], line["value"]) for line in lines]
    except (ValueError, KeyError, TypeError) as error:
        raise HubError(400, f"Invalid ndjson: {error}") from None
    headers = [value for key, value in operations if key == "header"]
    if len(headers) != 1 or not headers[0].get("summary"):
        raise HubError(400, "a commit needs one header with a summary")
    return headers[0], [(key, value) for key, value in operations if key != "header"]


def _applied(server, repository, before, operations):
    """The tree after all operations, deletions first; nothing of the repository is changed."""
    tree = dict(before)
    for key, value in operations:
        path = value["path"].rstrip("/") if key == "deletedFolder" else value["path"]
        if key == "deletedFile":
            gone = [path] if path in tree else []
        elif key == "deletedFolder":
            gone = [name for name in tree if name.startswith(path + "/")]
        elif key in ("file", "lfsFile"):
            continue
        else:
            raise HubError(400, f"unknown operation {key!r}")
        if not gone:
            raise HubError(404, "A file with this name doesn't exist", "EntryNotFound")
        for name in gone:
            del tree[name]
    for key, value in operations:
        if key == "file":
            tree[_checked(value["path"])] = _regular(repository, value)
        elif key == "lfsFile":
            tree[_checked(value["path"])] = _large(server, repository, value)
    return tree


def _regular(repository, value):
    """The entry of a file whose content is in the commit."""
    content = value["content"]
    data = base64.b64decode(content) if value.get("encoding") == "base64" else content.encode()
    if len(data) > LFS_SIZE:
        raise HubError(400, "Your push was rejected because it contains files larger than 10 MiB.")
    if value["path"] == "README.md" and (found := problems(data.decode("utf-8", "replace"))):
        raise HubError(400, "Invalid metadata in README.md", body={"error": found[0]})
    return Entry(len(data), False, data=data, xet=repository.xet)


def _large(server, repository, value):
    """The entry of a file in the large file storage, which must have arrived there for this repository."""
    oid, size = value["oid"], value.get("size")
    entry = repository.find_object(oid, size)
    if entry is not None and size not in (None, entry.size):
        raise HubError(400, f"LFS file {value['path']} has {entry.size} bytes, not {size}")
    if entry is None and repository.xet and size is not None:
        stored = stored_files(folder_of(server, repository.region)).get(oid) if repository.asked_xet else None
        if stored or server.accept_xet:
            entry = Entry(size, True, sha=oid, stored=stored)
    if entry is None:
        message = f"LFS pointer pointed to a file that does not exist in your git lfs repository: {value['path']} {oid}"
        raise HubError(400, message)
    return entry
