"""Large files: asked for in a batch, sent whole or in parts, verified; copied between repositories; Xet tokens."""

import os
import time
from dataclasses import replace
from math import ceil
from pathlib import Path

from .access import visible, writable, writable_revision
from .entries import CHUNK, Entry
from .errors import HubError, Response, answer
from .xet import folder_of

LFS_JSON = {"Content-Type": "application/vnd.git-lfs+json"}


def batch(server, request, name):
    """POST /{repo}.git/info/lfs/objects/batch: where to send what the repository does not have."""
    asked = request.json()
    revision = (asked.get("ref") or {}).get("name")
    # without a revision the client is about to open a pull request, for which reading is enough
    repository = writable_revision(server, request, name, revision or "main", pull_request=revision is None)
    parts = server.multipart_size if "multipart" in asked.get("transfers", []) else None
    objects, transfer = [], "basic"
    for wanted in asked["objects"]:
        oid, size = wanted["oid"], wanted["size"]
        if repository.find_object(oid, size) is not None:
            objects.append({"oid": oid, "size": size})
            continue
        href, header = f"{server.url}/lfs/{name}/{oid}", {}
        upload = {"href": href}
        if parts and size > parts:
            transfer = "multipart"
            header = {"chunk_size": str(parts)}
            header |= {f"{number:05}": f"{href}/{number}" for number in range(1, ceil(size / parts) + 1)}
            upload = {"href": f"{href}/complete", "header": header}
        verify = {"href": f"{server.url}/lfs/{name}/verify", "header": {}}
        objects.append(
            {"oid": oid, "size": size, "authenticated": True, "actions": {"upload": upload, "verify": verify}}
        )
    return answer({"transfer": transfer, "objects": objects}, **LFS_JSON)


def _store(server, name, upload_path, oid, size):
    """Keep an uploaded file as an object of the repository."""
    repository = server.repositories.get(name)
    if repository is None:
        raise HubError(404, "Repository not found", "RepoNotFound")
    location = Path(server.folder, "objects", name, oid)
    location.parent.mkdir(parents=True, exist_ok=True)
    os.replace(upload_path, location)
    repository.objects[oid] = Entry(size, True, location=location, sha=oid, xet=repository.xet)


def put(server, request, name, oid):
    """PUT /lfs/{repo}/{oid}: the whole file. As for a signed URL of the storage, no token is asked for."""
    if request.upload.sha256 != oid:
        raise HubError(400, f"the sha256 of what was sent is {request.upload.sha256}, not {oid}")
    _store(server, name, request.upload.path, oid, request.upload.size)
    return Response(200, headers={"ETag": f'"{oid[:32]}"'})


def put_part(server, request, name, oid, part):
    """PUT /lfs/{repo}/{oid}/{part}: one of the parts."""
    location = Path(server.folder, "parts", name, oid, str(int(part)))
    location.parent.mkdir(parents=True, exist_ok=True)
    os.replace(request.upload.path, location)
    return Response(200, headers={"ETag": f'"{request.upload.sha256[:32]}"'})


def complete(server, request, name, oid):
    """POST /lfs/{repo}/{oid}/complete: the parts become the file."""
    from .wire import Upload

    folder = Path(server.folder, "parts", name, oid)
    numbers = [part["partNumber"] for part in request.json()["parts"]]
    missing = [number for number in numbers if not (folder / str(number)).is_file()]
    if missing or not numbers:
        raise HubError(400, f"parts {missing} were not uploaded")

    def chunks():
        """The bytes of all parts, in order."""
        for number in numbers:
            with open(folder / str(number), "rb") as file:
                while chunk := file.read(CHUNK):
                    yield chunk

    whole = Upload(server.folder, chunks())
    try:
        if whole.sha256 != oid:
            raise HubError(400, f"the sha256 of the parts is {whole.sha256}, not {oid}")
        _store(server, name, whole.path, oid, whole.size)
    finally:
        whole.discard()
    for number in numbers:
        (folder / str(number)).unlink()
    return answer({"success": True}, **LFS_JSON)


def verify(server, request, name):
    """POST /lfs/{repo}/verify: whether an object arrived with the size that the client means."""
    asked = request.json()
    repository = writable(server, request, name, pull_request=True)
    entry = repository.objects.get(asked["oid"])
    if entry is None or entry.size != asked["size"]:
        raise HubError(404, "the object was not uploaded")
    return answer({"success": True}, **LFS_JSON)


def duplicate(server, request, name):
    """POST /api/models/{source}/lfs-files/duplicate: another repository gets to know large files of this one."""
    source, asked = visible(server, request, name, listing=False), request.json()
    target = writable(server, request, asked["target"]["name"])
    if source.private and source.name != target.name:
        raise HubError(403, "cannot copy from a private repository")
    if source.region != target.region:
        raise HubError(400, f"cannot copy across storage regions: {source.region} to {target.region}")
    failed, copied = [], []
    for file in asked["files"]:
        entry = source.find_object(file["sha256"])
        if entry is None or not entry.xet or file.get("xetHash") != entry.xet_hash:
            failed.append({"sha256": file["sha256"], "error": f"{file.get('filename')} is not in {name}"})
        else:
            copied.append((file["sha256"], entry))
    for oid, entry in copied:
        target.objects[oid] = replace(entry, sha=oid, xet=target.xet)
    return answer({"success": [{"sha256": oid} for oid, _ in copied], "failed": failed})


def xet_token(server, request, name, kind, revision):
    """GET /api/models/{repo}/xet-{read,write}-token/{revision}: the storage is a folder of the server."""
    if kind == "write":
        pull_request = request.flag("create_pr") or revision == "None"
        repository = writable_revision(server, request, name, revision, pull_request)
        repository.asked_xet = True
    else:
        repository = visible(server, request, name, listing=False)
    expires = int(time.time()) + 3600
    token = {"casUrl": f"local://{folder_of(server, repository.region)}", "exp": expires, "accessToken": f"xet-{kind}"}
    headers = {
        "X-Xet-Cas-Url": token["casUrl"],
        "X-Xet-Access-Token": token["accessToken"],
        "X-Xet-Token-Expiration": expires,
    }
    return answer(token, **headers)
