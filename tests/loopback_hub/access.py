"""Tokens, and who may see, download from and write to a repository."""

from .errors import HubError, answer

WRITE_TOKEN = "hf_" + "w" * 34
DEFAULT_TOKENS = {WRITE_TOKEN: {"name": "me", "role": "write", "orgs": []}}


def identify(server, request):
    """The token's record, or None for somebody anonymous; an unknown token is refused."""
    header = request.headers.get("Authorization")
    if header is None:
        return None
    server.authorizations.add(header)
    token = server.tokens.get(header.removeprefix("Bearer "))
    if token is None:
        message = "Invalid credentials in Authorization header"
        raise HubError(401, message, body={"error": "Invalid username or password."})
    return token


def whoami(server, request):
    """GET /api/whoami-v2."""
    token = request.identity
    if token is None:
        raise HubError(401, "Invalid username or password.")
    access = {"displayName": "test", "role": token["role"], "createdAt": "2025-01-01T00:00:00.000Z"}
    if "fineGrained" in token:
        access["fineGrained"] = token["fineGrained"]
    orgs = [
        {"type": "org", "id": f"id-{org['name']}", "fullname": org["name"], "isEnterprise": False, **org}
        for org in token.get("orgs", [])
    ]
    user = {"type": "user", "id": f"id-{token['name']}", "name": token["name"], "fullname": token["name"].title()}
    return answer({**user, "orgs": orgs, "auth": {"type": "access_token", "accessToken": access}})


def _role(token, owner):
    """The role of the token's user in the namespace: admin in one's own, None where one does not belong."""
    if token is None:
        return None
    if token["name"] == owner:
        return "admin"
    return next((org.get("roleInOrg") for org in token.get("orgs", []) if org["name"] == owner), None)


def _granted(token, owner, name, *permissions):
    """Whether a fine-grained token has one of the permissions for the namespace or the repository."""
    detail = token.get("fineGrained") or {}
    return any(
        scope.get("entity", {}).get("name") in (owner, name) and {*permissions} & {*scope.get("permissions", [])}
        for scope in detail.get("scoped", [])
    )


def may_write(token, owner, name=None, creator=None):
    """Whether the token may create (`name` without a creator) or change the repository."""
    if token is None or token["role"] == "read":
        return False
    if token["role"] == "fineGrained" and not _granted(token, owner, name, "repo.write"):
        return False
    role = _role(token, owner)
    return role in ("admin", "write") or (role == "contributor" and creator in (None, token["name"]))


def may_see(token, repository):
    """Whether the repository exists for the token."""
    if not repository.private:
        return True
    if _role(token, repository.owner) is None:
        return False
    permissions = ("repo.content.read", "repo.write")
    return token["role"] != "fineGrained" or _granted(token, repository.owner, repository.name, *permissions)


def visible(server, request, name, listing=True):
    """The repository, if it exists for who asks; `listing` lets the gated ones through, but for server.gated."""
    token = request.identity
    repository = server.repositories.get(name)
    if name in server.gated:
        require_terms(server, token, name)
    if repository is None or not may_see(token, repository):
        if token is None:
            raise HubError(401, "Repository not found", "RepoNotFound", {"error": "Invalid username or password."})
        raise HubError(404, "Repository not found", "RepoNotFound")
    repository.refresh()
    if repository.gated and not listing and _role(token, repository.owner) is None:
        require_terms(server, token, name)
    return repository


def require_terms(server, token, name):
    """Refuse who did not accept the terms of a gated repository."""
    if token is not None and (name, token["name"]) in server.access:
        return
    message = f"Access to model {name} is restricted. You must have access to it and be authenticated to access it."
    if token is None and name not in server.gated:
        raise HubError(401, message + " Please log in.", "GatedRepo")
    raise HubError(403, message, "GatedRepo")


def writable(server, request, name, pull_request=False):
    """The repository, if who asks may change it; for a pull request any known user may."""
    if request.identity is None:
        raise HubError(401, "Repository not found", "RepoNotFound", {"error": "Invalid username or password."})
    repository = visible(server, request, name)
    if not pull_request and not may_write(request.identity, repository.owner, name, repository.creator):
        raise HubError(403, "Forbidden: pass `create_pr=1` as a query parameter to create a Pull Request")
    return repository


def writable_revision(server, request, name, revision, pull_request=False):
    """As `writable`; the author of a pull request may add to it."""
    repository = server.repositories.get(name)
    if repository is not None and revision.startswith("refs/pr/") and request.identity:
        found = repository.pull_requests.get(int(revision.removeprefix("refs/pr/") or 0))
        pull_request = pull_request or (found is not None and found.author == request.identity["name"])
    return writable(server, request, name, pull_request)


def auth_check(server, request, name, write=None):
    """GET /api/models/{repo}/auth-check and auth-check/write."""
    visible(server, request, name, listing=False)
    if write:
        writable(server, request, name)
    return answer({})
