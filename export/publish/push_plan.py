"""What a push will do, file by file and byte by byte, before it does anything."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

from surgery.compat import transport_error
from surgery.errors import PublishError
from surgery.hub.client import hub_api, one_line, retried

from .account import Options
from .endpoint import why_no_handler
from .target import foreign_files, is_there, published_manifest, stale_files

if TYPE_CHECKING:
    from .content import Content
    from .licences import Licensing
    from .target import Target


@dataclass(frozen=True)
class PushStep:
    """What happens to one file: "copy" (on the Hub, by reference), "send", "keep" (it is there) or "delete"."""

    path: str
    action: str
    size: int
    source: str = ""  # of a copy: OWNER/NAME@commit/path
    why: str = ""  # of weights that are sent: why they cannot be copied


@dataclass(frozen=True)
class SpacePlan:
    """What happens to the Space of a model, after the model's own commit."""

    repo: str
    head: str | None  # the commit that it goes on top of; None where the Space is new
    model: str
    revision: str | None  # the model's commit that its page loads; None where that is still to be made
    private: bool
    steps: tuple[PushStep, ...]
    notes: tuple[str, ...] = ()

    @property
    def changes(self) -> list[PushStep]:
        """The steps that need a commit."""
        return [step for step in self.steps if step.action != "keep"]


@dataclass(frozen=True)
class PushPlan:
    """Everything that a push will do. `to_json()` prints it."""

    repo: str
    branch: str
    head: str | None  # the commit that it goes on top of; None where the repository is new
    hash: str  # the artifact's
    weights: str  # "copy" or "thin"
    license: str
    create_repository: bool
    create_branch: bool
    private: bool
    create_pr: bool
    proposal: int | None  # the open pull request that holds all of it already
    tag: str | None
    tag_there: bool
    steps: tuple[PushStep, ...]
    notes: tuple[str, ...] = field(default=())
    space: SpacePlan | None = None

    @property
    def changes(self) -> list[PushStep]:
        """The steps that need a commit."""
        return [step for step in self.steps if step.action != "keep"] if self.proposal is None else []

    @property
    def totals(self) -> dict[str, int]:
        """Bytes by what happens to them."""
        return {
            f"{name}_bytes": sum(step.size for step in self.steps if step.action == action)
            for name, action in (("sent", "send"), ("copied", "copy"), ("kept", "keep"))
        }

    def to_json(self) -> dict:
        """The plan as plain data with its totals."""
        return {"schema_version": 1, **asdict(self), **self.totals, "commit_needed": bool(self.changes)}


def make_push_plan(
    content: "Content",
    sources: Mapping,
    licensing: "Licensing",
    options: Options,
    target: "Target",
    refused: Mapping[str, str] | None = None,
    proposal: int | None = None,
) -> PushPlan:
    """The PushPlan for a Content and a Target as it stands.

    sources: as find_sources gives them. refused: {source name: why} the Hub would not copy from. proposal: as
    find_proposal gives it. Raises PublishError where files that somebody else wrote would be lost, a tag stands
    elsewhere, weights are not what their source lists, or weights that are not here cannot be copied.
    """
    if target.exists and options.private and not target.private:
        raise PublishError(f"{options.repo} is there already and is public; make it private on its settings page first")
    if options.create_pr and not target.exists:
        raise PublishError(f"{options.repo} does not exist, so there is nothing to propose a change of")
    published = None
    if target.exists and proposal is None:
        reviewed = options.overwrite or options.create_pr  # somebody else decides on a pull request
        published = _readable_manifest(target) if reviewed else published_manifest(target)
        foreign = [] if reviewed else foreign_files(target, content, published)
        if foreign:
            raise PublishError(
                f"{options.repo} holds {_listed(foreign)} that this tool did not put there, or that was changed since: "
                f"see {target.repo} at commit {target.head[:12]}, keep what you need, then --overwrite replaces it"  # pyright: ignore[reportOptionalSubscript]
            )
    steps = tuple(_steps(content, sources, target, refused or {}, published))
    plan = PushPlan(
        repo=options.repo,
        branch=options.branch,
        head=target.head,
        hash=content.manifest.hash,
        weights=content.manifest.weights,
        license=licensing.id,
        create_repository=not target.exists,
        create_branch=not target.branch_exists and options.branch != "main",
        private=target.private if target.exists else options.private,
        create_pr=options.create_pr,
        proposal=proposal,
        tag=options.tag,
        tag_there=options.tag in target.tags,
        steps=steps,
        notes=(*licensing.notes, *_notes(content, sources, target, options)),
    )
    if plan.tag_there and (plan.changes or target.tags[options.tag] != target.head):  # pyright: ignore[reportArgumentType]
        raise PublishError(
            f"{options.repo} has a tag {options.tag} already, at commit {target.tags[options.tag][:12]}, which is not "  # pyright: ignore[reportArgumentType]
            "what is published now; choose another --tag"
        )
    return plan


def _steps(content, sources, target, refused, published):
    pending = {path: item for path, item in content.items.items() if not is_there(item, target.files)}
    in_xet = _copyable(pending.values(), sources, refused)
    for path, item in content.items.items():
        if path not in pending:
            yield PushStep(path, "keep", item.size)
            continue
        if item.origin is None:
            yield PushStep(path, "send", item.size)
            continue
        why = _why_not_copied(item, sources, refused, in_xet)
        if why and not item.weights and item.local is not None:  # small, and mostly outside large file storage
            yield PushStep(path, "send", item.size)
            continue
        if not why:
            origin = item.origin
            yield PushStep(path, "copy", item.size, f"{origin.source}@{origin.revision}/{origin.path}")
        elif item.local is None:
            raise PublishError(
                f"{path} cannot be copied on the Hub ({why}), and it is not on this machine: apply the recipe without "
                "--remote, which fetches it, and push that; or publish no weights with --weights thin"
            )
        else:
            yield PushStep(path, "send", item.size, why=why)
    for path in stale_files(target, content, published):
        yield PushStep(path, "delete", target.files[path].size)


def _why_not_copied(item, sources, refused, in_xet):
    """Why a weight file has to be sent, or ""; PublishError where its source lists other bytes."""
    origin = item.origin
    if origin.kind == "fused":
        return "it has a LoRA fused in, so it is nobody's file but yours"
    if origin.kind == "converted":
        return f"it was converted from {origin.path}"
    source = sources[origin.source, origin.revision]
    if source.base is None:
        return source.reason
    entry = source.base.files.get(origin.path)
    if entry is None or (entry.sha256 is not None and entry.sha256 != item.sha256):
        raise PublishError(
            f"{item.path} is said to be {origin.source}@{origin.revision[:12]}/{origin.path}, but the Hub lists "
            f"{'no such file' if entry is None else 'another sha256'} there; apply the recipe again"
        )
    if source.base.private:
        return f"{origin.source} is private, and the Hub copies from public repositories"
    if origin.source in refused:
        return refused[origin.source]
    if (origin.source, origin.revision, origin.path) not in in_xet:
        return f"{origin.source} keeps it in a storage that the Hub cannot copy from"
    return ""


def _copyable(items, sources, refused):
    """{(repository, commit, path)} of files that the Hub keeps in Xet storage, from which alone it copies."""
    from huggingface_hub.errors import HfHubHTTPError

    wanted = {}
    for item in items:
        origin = item.origin
        if origin is None or origin.kind not in ("base", "component"):
            continue
        source = sources[origin.source, origin.revision]
        entry = source.base.files.get(origin.path) if source.base else None
        if entry and entry.sha256 and not source.base.private and origin.source not in refused:
            wanted.setdefault((origin.source, origin.revision), []).append(origin.path)
    found = set()
    for (repo, revision), paths in wanted.items():
        try:
            listed = retried(lambda r=repo, c=revision, p=paths: hub_api().get_paths_info(r, p, revision=c))
        except (HfHubHTTPError, OSError, transport_error()) as error:
            raise PublishError(
                f"the Hub did not list the weights of {repo}: {one_line(error)}; run it again"
            ) from error
        found |= {(repo, revision, file.path) for file in listed if getattr(file, "xet_hash", None)}
    return found


def _readable_manifest(target):
    try:
        return published_manifest(target)
    except PublishError:
        return None


def _notes(content, sources, target, options):
    """What whoever publishes it should know before it happens."""
    why = None if options.no_handler else why_no_handler(content.manifest)
    if why:
        yield f"no handler.py, so none for Hugging Face Inference Endpoints: {why}"
    if options.weights == "thin" or (target.private if target.exists else options.private):
        return
    for source in sources.values():
        if source.base is not None and source.base.private:
            yield f"{source.name} is private and {options.repo} is public: its weights will be open to everybody"
        elif source.base is not None and source.base.gated:
            yield (
                f"{source.name} is gated and {options.repo} will not be: whoever finds it gets the weights without "
                "accepting the terms; --weights thin leaves the gate in place"
            )


def _listed(paths):
    return ", ".join(paths[:3]) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")
