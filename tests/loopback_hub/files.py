"""Downloads: a file's headers, the ranges of its bytes, and for large files the way over another host."""

import re
from urllib.parse import quote

from .access import visible
from .errors import HubError, Response


def resolve(server, request, name, revision, path):
    """GET and HEAD /{repo}/resolve/{revision}/{path}."""
    repository = visible(server, request, name, listing=False)
    commit = repository.find(revision)
    headers = {"X-Repo-Commit": commit.oid, "Accept-Ranges": "bytes"}
    entry = commit.tree.get(path)
    if entry is None:
        raise HubError(404, "Entry not found", "EntryNotFound", **headers)
    if request.method == "GET" and server.faults.get(path, 0) > 0:
        server.faults[path] -= 1
        raise HubError(500, "Internal Error - we are working on it")
    etag = f'"{entry.sha256 if entry.is_lfs else entry.oid}"'
    headers["ETag"] = etag
    headers["Content-Disposition"] = f'inline; filename="{path.split("/")[-1]}";'
    if entry.is_lfs:
        headers |= {"X-Linked-Etag": etag, "X-Linked-Size": entry.size}
        if server.xet_downloads and entry.xet_hash:
            route = f"{server.url}/api/models/{name}/xet-read-token/{commit.oid}"
            headers |= {"X-Xet-Hash": entry.xet_hash, "Link": f'<{route}>; rel="xet-auth"'}
        if server.redirects:
            location = f"{server.other_host}/cdn/{name}/{entry.sha256}/{quote(path)}"
            return Response(302, b"Found. Redirecting", {**headers, "Location": location})
    return _send(server, request, path, entry, headers)


def content_network(server, request, name, oid, path):
    """GET and HEAD /cdn/{repo}/{sha256}/{path}: where `server.redirects` sends for large files, open to all."""
    repository = server.repositories.get(name)
    entry = repository and repository.find_object(oid)
    if entry is None:
        raise HubError(403, "Access denied")
    return _send(server, request, path, entry, {"ETag": f'"{oid}"', "Accept-Ranges": "bytes"})


def _send(server, request, path, entry, headers):
    """The bytes of an entry, or the range of them that was asked for."""
    if not entry.has_bytes and request.method == "GET":
        raise HubError(404, "Entry not found", "EntryNotFound", **headers)
    start, end, status = 0, entry.size, 200
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", request.headers.get("Range", "").replace(" ", ""))
    if match and any(match.groups()):
        first, last = match.groups()
        start = int(first) if first else max(0, entry.size - int(last))
        end = min(entry.size, int(last) + 1) if first and last else entry.size
        if start >= end:
            raise HubError(416, "Range Not Satisfiable", **{"Content-Range": f"bytes */{entry.size}"})
        status, headers = 206, {**headers, "Content-Range": f"bytes {start}-{end - 1}/{entry.size}"}
    headers["Content-Type"] = "application/octet-stream" if entry.is_lfs else "text/plain; charset=utf-8"
    chunks = entry.chunks(start, end - start) if entry.has_bytes else iter(())
    if path in server.corrupted and end == entry.size:
        chunks = _last_bit_changed(chunks, end - start)
    return Response(status, headers=headers, chunks=chunks, length=end - start)


def _last_bit_changed(chunks, length):
    """The chunks of a file that was damaged: its last byte differs in one bit."""
    for chunk in chunks:
        length -= len(chunk)
        yield chunk if length else chunk[:-1] + bytes([chunk[-1] ^ 1])
