"""Which function answers which path. Groups of a path are unquoted one by one, so refs%2Fpr%2F1 is one revision."""

import re
from urllib.parse import unquote

from . import access, commits, files, lfs, listing, manage
from .errors import HubError

_NAMES = {
    "{name}": r"(?P<name>[^/]+/[^/]+)",
    "{revision}": r"(?P<revision>refs/pr/\d+|[^/]+)",
    "{path}": r"(?P<path>.+)",
    "{oid}": r"(?P<oid>[0-9a-f]{64})",
}
_TABLE = [
    ("GET", "/api/whoami-v2", access.whoami),
    ("POST", "/api/repos/create", manage.create_repository),
    ("DELETE", "/api/repos/delete", manage.delete_repository),
    ("POST", "/api/validate-yaml", manage.validate_yaml),
    ("GET", "/api/models/{name}", listing.model_info),
    ("GET", "/api/models/{name}/revision/{revision}", listing.model_info),
    ("GET", "/api/models/{name}/tree/{revision}(/{path})?", listing.tree),
    ("GET", "/api/models/{name}/commits/{revision}", listing.commits),
    ("GET", "/api/models/{name}/refs", listing.refs),
    ("POST", "/api/models/{name}/paths-info/{revision}", listing.paths_info),
    ("GET", "/api/models/{name}/discussions", listing.discussions),
    ("GET", "/api/models/{name}/auth-check(/(?P<write>write))?", access.auth_check),
    ("POST", "/api/models/{name}/branch/(?P<branch>.+)", manage.create_branch),
    ("DELETE", "/api/models/{name}/branch/(?P<branch>.+)", manage.delete_branch),
    ("POST", "/api/models/{name}/tag/{revision}", manage.create_tag),
    ("DELETE", "/api/models/{name}/tag/(?P<tag>.+)", manage.delete_tag),
    ("POST", "/api/models/{name}/preupload/{revision}", commits.preupload),
    ("POST", "/api/models/{name}/commit/{revision}", commits.commit),
    ("POST", "/api/models/{name}/lfs-files/duplicate", lfs.duplicate),
    ("GET", "/api/models/{name}/xet-(?P<kind>read|write)-token/{revision}", lfs.xet_token),
    ("POST", r"/(?P<name>[^/]+/[^/]+)\.git/info/lfs/objects/batch", lfs.batch),
    ("POST", "/lfs/{name}/verify", lfs.verify),
    ("PUT", "/lfs/{name}/{oid}", lfs.put),
    ("PUT", "/lfs/{name}/{oid}/(?P<part>[0-9]+)", lfs.put_part),
    ("POST", "/lfs/{name}/{oid}/complete", lfs.complete),
    ("GET", "/{name}/resolve/{revision}/{path}", files.resolve),
    ("GET", "/(?P<name>datasets/[^/]+/[^/]+)/resolve/{revision}/{path}", files.resolve),  # data sets: downloads alone
    ("GET", "/cdn/{name}/{oid}/{path}", files.content_network),
]


def _compiled(pattern):
    """The regular expression of a pattern of the table."""
    for name, expression in _NAMES.items():
        pattern = pattern.replace(name, expression)
    return re.compile(pattern)


_SPACE = re.compile(r"(/api|/lfs|/cdn|)/spaces/")
_AS_MODEL = {"/api": "/api/models"}
_ROUTES = [(method, _compiled(pattern), handler) for method, pattern, handler in _TABLE]


def dispatch(server, request):
    """Answer the request; HEAD is answered as GET is, and the body is left out when it is sent."""
    method = "GET" if request.method == "HEAD" else request.method
    space = _SPACE.match(request.raw_path)  # a Space is the repository spaces/OWNER/NAME, with a model's routes
    path = f"{_AS_MODEL.get(space[1], space[1])}/{request.raw_path[space.end() :]}" if space else request.raw_path
    for expected, pattern, handler in _ROUTES:
        if method == expected and (match := pattern.fullmatch(path)):
            groups = {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
            groups |= {"name": f"spaces/{groups['name']}"} if space else {}
            return handler(server, request, **groups)
    raise HubError(404, f"Sorry, we can't find the page you are looking for: {method} {request.path}")
