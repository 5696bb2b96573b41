"""Repositories, branches and tags are made and removed; a card's metadata is validated."""

from .access import may_see, may_write, writable
from .card import problems
from .errors import HubError, Response, answer


def _target(request):
    """The OWNER/NAME that a request to create or delete names; the owner may be left out."""
    asked, token = request.json(), request.identity
    if token is None:
        raise HubError(401, "Invalid username or password.")
    name = asked.get("name") or ""
    if "/" not in name:
        name = f"{asked.get('organization') or token['name']}/{name}"
    return asked, name


def create_repository(server, request):
    """POST /api/repos/create."""
    asked, name = _target(request)
    owner = name.split("/")[0]
    if asked.get("type") not in (None, "model", "space"):
        raise HubError(400, "only models and Spaces exist on this server")
    is_space = asked.get("type") == "space"
    if is_space and not asked.get("sdk"):
        raise HubError(400, '"sdk" is required')
    name = f"spaces/{name}" if is_space else name
    existing = server.repositories.get(name)
    if not may_write(request.identity, owner, name) or (existing and not may_see(request.identity, existing)):
        raise HubError(403, f'You don\'t have the rights to create a model under the namespace "{owner}"')
    if existing is not None:
        url = f"{server.url}/{name}"
        raise HubError(
            409,
            "You already created this model repo",
            body={"error": "You already created this model repo", "url": url},
        )
    private = bool(asked.get("private")) or asked.get("visibility") == "private"
    repository = server.create(name, private=private, region=asked.get("region") or server.region)
    repository.creator = request.identity["name"]
    plain = name.removeprefix("spaces/")
    return answer({"url": f"{server.url}/{name}", "name": plain, "id": plain, "type": asked.get("type") or "model"})


def delete_repository(server, request):
    """DELETE /api/repos/delete."""
    _, name = _target(request)
    writable(server, request, name)
    del server.repositories[name]
    return Response(200, b"OK", {"Content-Type": "text/plain"})


def create_branch(server, request, name, branch):
    """POST /api/models/{repo}/branch/{branch}."""
    repository = writable(server, request, name)
    commit = repository.find(request.json().get("startingPoint") or "main")
    if branch in repository.branches:
        raise HubError(409, f"Reference already exists: refs/heads/{branch}")
    repository.branches[branch] = commit.oid
    return answer({})


def delete_branch(server, request, name, branch):
    """DELETE /api/models/{repo}/branch/{branch}; main stays."""
    repository = writable(server, request, name)
    if branch == "main":
        raise HubError(403, "Cannot delete the main branch")
    if repository.branches.pop(branch, None) is None:
        raise HubError(404, f"Invalid rev id: {branch}", "RevisionNotFound")
    return answer({})


def create_tag(server, request, name, revision):
    """POST /api/models/{repo}/tag/{revision}."""
    repository = writable(server, request, name)
    commit, tag = repository.find(revision), request.json()["tag"]
    if tag in repository.tags:
        raise HubError(409, f"Tag reference exists already: refs/tags/{tag}")
    repository.tags[tag] = commit.oid
    return answer({})


def delete_tag(server, request, name, tag):
    """DELETE /api/models/{repo}/tag/{tag}."""
    repository = writable(server, request, name)
    if repository.tags.pop(tag, None) is None:
        raise HubError(404, f"Invalid rev id: {tag}", "RevisionNotFound")
    return answer({})


def validate_yaml(_, request):
    """POST /api/validate-yaml; a README without metadata is a warning."""
    content = request.json().get("content") or ""
    errors = [{"message": message} for message in problems(content)]
    warnings = [] if content.startswith("---") else [{"message": "empty or missing yaml metadata in repo card"}]
    return answer({"errors": errors, "warnings": warnings}, 400 if errors else 200)
