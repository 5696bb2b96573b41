"""What a repository holds: model info, trees, commits, references, paths, pull requests."""

import hashlib
import json
from urllib.parse import parse_qs, urlencode

from .access import visible
from .card import card_data
from .entries import POINTER_SIZE
from .errors import HubError, answer

PAGE = 1000


def _sibling(path, entry, blobs):
    """A file as model info lists it; its hashes only if asked for."""
    if not blobs:
        return {"rfilename": path}
    sibling = {"rfilename": path, "blobId": entry.oid, "size": entry.size}
    if entry.is_lfs:
        sibling["lfs"] = {"sha256": entry.sha256, "size": entry.size, "pointerSize": POINTER_SIZE}
    return sibling


def model_info(server, request, name, revision="main"):
    """GET /api/models/{repo} and /revision/{revision}."""
    repository = visible(server, request, name)
    commit = repository.find(revision)
    card = card_data(server, repository, commit)
    tags = [str(tag) for tag in card.get("tags") or []]
    tags += [f"license:{card['license']}"] if card.get("license") else []
    siblings = [_sibling(path, entry, request.flag("blobs")) for path, entry in sorted(commit.tree.items())]
    return answer(
        {
            "_id": hashlib.sha1(name.encode()).hexdigest()[:24],
            "id": name,
            "modelId": name,
            "author": repository.owner,
            "sha": commit.oid,
            "lastModified": commit.date,
            "createdAt": next(iter(repository.commits.values())).date,
            "private": repository.private,
            "gated": "auto" if repository.gated else False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "library_name": card.get("library_name"),
            "tags": [*tags, f"region:{repository.region}"],
            "cardData": card,
            "siblings": siblings,
            "spaces": [],
            "usedStorage": sum(entry.size for entry in commit.tree.values()),
        }
    )


def _path_info(path, entry):
    """A file as the tree lists it."""
    info = {"type": "file", "oid": entry.oid, "size": entry.size, "path": path}
    if entry.is_lfs:
        info["lfs"] = {"oid": entry.sha256, "size": entry.size, "pointerSize": POINTER_SIZE}
        if entry.xet_hash:
            info["xetHash"] = entry.xet_hash
    return info


def _folder_info(path):
    """A folder as the tree lists it."""
    return {"type": "directory", "oid": hashlib.sha1(path.encode()).hexdigest(), "size": 0, "path": path}


def _folders(files):
    """Every folder that holds one of the files."""
    return {"/".join(path.split("/")[:depth]) for path in files for depth in range(1, path.count("/") + 1)}


def _expanded(repository, commit, info):
    """The info with its last commit, and for a file the state of its security scan."""
    path = info["path"]

    def content(step):
        """What the path holds in that commit."""
        return {key: id(entry) for key, entry in step.tree.items() if key == path or key.startswith(path + "/")}

    last = commit
    for step in repository.history(commit):
        if content(step) != content(commit):
            break
        last = step
    more = {"lastCommit": {"id": last.oid, "title": last.title, "date": last.date}}
    if info["type"] == "file":
        scan = {"status": "safe", "avScan": None, "pickleImportScan": None}
        more["securityFileStatus"] = scan
    return {**info, **more}


def tree(server, request, name, revision, path=""):
    """GET /api/models/{repo}/tree/{revision}[/{path}], in pages."""
    repository = visible(server, request, name)
    commit = repository.find(revision)
    inside = f"{path.rstrip('/')}/" if path else ""
    files = {key: entry for key, entry in commit.tree.items() if key.startswith(inside)}
    if path and not files:
        raise HubError(404, f"{path} does not exist on {revision}", "EntryNotFound", **{"X-Repo-Commit": commit.oid})
    infos = [_folder_info(key) for key in _folders(files) if key.startswith(inside)]
    infos += [_path_info(key, entry) for key, entry in files.items()]
    if not request.flag("recursive"):
        infos = [info for info in infos if "/" not in info["path"][len(inside) :]]
    infos = sorted(infos, key=lambda info: info["path"])
    return _page(server, request, infos, lambda info: _expanded(repository, commit, info))


def _page(server, request, items, expanded):
    """One page of the items, with a Link to the next."""
    start, expand = int(request.query.get("cursor", ["0"])[-1]), request.flag("expand")
    size = min(server.page_size, 50) if expand else server.page_size
    page, headers = items[start : start + size], {}
    if start + size < len(items):
        query = {**{key: values[-1] for key, values in request.query.items()}, "cursor": start + size}
        headers["Link"] = f'<{server.url}{request.raw_path}?{urlencode(query)}>; rel="next"'
    return answer([expanded(item) for item in page] if expand else page, **headers)


def paths_info(server, request, name, revision):
    """POST /api/models/{repo}/paths-info/{revision}; paths that do not exist are left out."""
    repository = visible(server, request, name)
    commit = repository.find(revision)
    if "json" in request.headers.get("Content-Type", ""):
        asked = json.loads(request.body)
    else:
        form = parse_qs(request.body.decode())
        asked = {"paths": form.get("paths", []), "expand": form.get("expand", [""])[-1].lower() == "true"}
    folders, infos = _folders(commit.tree), []
    for path in asked["paths"]:
        if path in commit.tree:
            infos.append(_path_info(path, commit.tree[path]))
        elif path.rstrip("/") in folders:
            infos.append(_folder_info(path.rstrip("/")))
    return answer([_expanded(repository, commit, info) for info in infos] if asked.get("expand") else infos)


def commits(server, request, name, revision):
    """GET /api/models/{repo}/commits/{revision}, newest first."""
    repository = visible(server, request, name)
    found = [
        {
            "id": commit.oid,
            "title": commit.title,
            "message": commit.message,
            "authors": [{"user": commit.author}],
            "date": commit.date,
        }
        for commit in repository.history(repository.find(revision))
    ]
    return _page(server, request, found, lambda item: item)


def refs(server, request, name):
    """GET /api/models/{repo}/refs."""
    repository = visible(server, request, name)
    answered = {"branches": [], "converts": [], "tags": []}
    if request.flag("include_prs"):
        answered["pullRequests"] = []
    for branch, oid in repository.branches.items():
        if not branch.startswith("refs/pr/"):
            answered["branches"].append({"name": branch, "ref": f"refs/heads/{branch}", "targetCommit": oid})
        elif "pullRequests" in answered:
            answered["pullRequests"].append(
                {"name": branch.removeprefix("refs/pr/"), "ref": branch, "targetCommit": oid}
            )
    answered["tags"] = [
        {"name": tag, "ref": f"refs/tags/{tag}", "targetCommit": oid} for tag, oid in repository.tags.items()
    ]
    return answer(answered)


def discussions(server, request, name):
    """GET /api/models/{repo}/discussions: the pull requests (there are no other discussions), newest first."""
    repository = visible(server, request, name)
    wanted = {key: request.query.get(key, ["all"])[-1] for key in ("type", "status", "author")}
    found = [
        {
            "num": pull.num,
            "title": pull.title,
            "author": {"name": pull.author, "type": "user"},
            "status": pull.status,
            "isPullRequest": True,
            "createdAt": pull.created,
            "repo": {"name": name, "type": "model"},
        }
        for pull in reversed(repository.pull_requests.values())
        if wanted["type"] in ("all", "pull_request")
        and wanted["status"] in ("all", pull.status)
        and wanted["author"] in ("all", pull.author)
    ]
    size = min(server.page_size, 10)
    start = size * int(request.query.get("p", ["0"])[-1])
    return answer({"discussions": found[start : start + size], "count": len(found), "start": start})
