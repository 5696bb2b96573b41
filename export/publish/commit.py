"""An artifact becomes a repository on the Hub: one commit, on top of what was looked at, or none.

Every step is planned from what the Hub lists at that moment, so that after a lost answer, a broken connection or a
killed process the next try, or the next run, finds what has arrived and does the rest.
"""

import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.compat import refused_copy, set_sha256
from surgery.errors import PublishError
from surgery.hub.base import is_local
from surgery.hub.bounded import read_bytes
from surgery.hub.client import hub_api, is_transient, one_line, retried, status_of

from .account import Options, check_account
from .card import regression_text
from .content import Content, Draft, item_of, make_content, read_draft
from .eval_results import evaluation_files
from .licences import Licensing, check_licenses
from .push_plan import PushPlan, make_push_plan
from .space import PushedSpace, plan_space, push_space
from .target import find_proposal, find_sources, read_target

if TYPE_CHECKING:
    from surgery.recipe.plan import Planned

_WAITS = (2.0, 5.0)  # seconds before the second and the third try
_LICENSE_TEXTS = re.compile(r"^(LICENSE|LICENCE|NOTICE|USE_POLICY)[^/]*$")


@dataclass(frozen=True)
class Publication:
    """What is to be published, found fit for it: nothing was sent yet."""

    options: Options
    user: str | None
    draft: Draft
    sources: dict
    licensing: Licensing
    content: Content


@dataclass(frozen=True)
class Pushed:
    """What a push came to."""

    repo: str
    url: str
    commit: str | None
    made: bool  # False where the repository held all of it already
    pull_request: str | None
    tag: str | None
    plan: PushPlan
    space: PushedSpace | None = None


def prepare(folder: str | Path, options: Options, checked: "tuple[str | None, dict] | None" = None) -> Publication:
    """The Publication of an artifact folder: its files, its licence and this machine's login checked.

    checked: what check_before_applying returned a moment ago, which need not be asked again.
    Raises what read_draft, check_regressions, check_guidance, check_account, find_sources, check_licenses and
    make_content do; nothing is sent.
    """
    draft = read_draft(folder)
    check_regressions(draft.scores, draft.purpose, folder, options.allow_regression)
    check_guidance(draft.manifest.sampling.get("guidance"))
    user, known = checked or (_check_accounts(options), {})
    sources = find_sources(draft.manifest.files.values(), known)
    base = draft.manifest.base
    licensing = check_licenses(sources.values(), draft.publish.license, base, options.weights)
    texts = _license_texts(sources.get((base["pipeline"], base.get("revision")))) if options.weights == "copy" else []
    also = [*texts, *evaluation_files(draft.scores, options.repo)]
    content = make_content(draft, options.repo, options.weights, licensing, also, not options.no_handler)
    return Publication(options, user, draft, sources, licensing, content)


def _check_accounts(options):
    """The user, who may write to the repository, and to the Space's where that is another's."""
    user = check_account(options.repo, options.create_pr)
    if options.space is not None and options.space_name.split("/")[0] != options.repo.split("/")[0]:
        check_account(options.space_name)
    return user


def check_guidance(guidance: Mapping[str, Any] | None) -> None:
    """Raise PublishError where a plan's or manifest's guidance takes another checkpoint from this machine."""
    weak = (guidance or {}).get("weak")
    if weak and is_local(weak["pipeline"]):
        raise PublishError(
            f"its guidance takes the weak model from the folder {weak['pipeline']}, which nobody else has: publish "
            "that too, name its repository as guidance.weak.pipeline in the recipe, and apply that again"
        )


def check_regressions(scores: Any, purpose: Sequence[str], folder: str | Path, allowed: bool = False) -> None:
    """Raise PublishError where scores are significantly below the base's on what the surgery is for.

    That is where the 95% interval of the paired difference lies entirely on the worse side of zero. scores: a Scores
    or None. purpose: the metrics that the recipe names; where it names none, or none of those was measured, all with a
    value for each side count.
    """
    worse = scores.regressions(purpose) if scores else []
    if worse and not allowed:
        raise PublishError(
            f"{folder} is significantly worse than its untouched base on {regression_text(worse)}. Nothing was "
            "published: look at the report of `surgery validate` and try other settings (`surgery sweep`), or publish "
            "it all the same with --allow-regression; its card then begins with this"
        )


def check_before_applying(planned: "Planned", options: Options) -> tuple[str | None, dict]:
    """Raise what would keep the artifact of a Planned from being published, before it is made; else for `prepare`."""
    check_guidance(planned.plan.guidance)
    user = _check_accounts(options)
    plan = planned.plan
    sources = find_sources(plan.files)
    stated = planned.recipe_file.recipe.publish.license
    check_licenses(sources.values(), stated, plan.base, options.weights)
    return user, sources


def publish(
    publication: Publication, *, dry_run: bool = False, announce: Callable[[PushPlan], object] | None = None
) -> Pushed | PushPlan:
    """Publish, and return what came of it as Pushed; with dry_run only the PushPlan.

    announce: called with each PushPlan before it is carried out: a second one comes where the Hub would not copy
    after all. Raises PublishError where it cannot be done: nothing is half-written then, and the same command again
    goes on from where it was.
    """
    options, content = publication.options, publication.content
    refused, waits, first = {}, list(_WAITS), None
    announced = None
    while True:
        target = read_target(options.repo, options.branch, with_refs=bool(options.tag or options.revision))
        _check_nobody_else_came(first, target)
        proposal = None
        if options.create_pr and target.exists:
            proposal = find_proposal(options.repo, publication.user, content)
        plan = make_push_plan(content, publication.sources, publication.licensing, options, target, refused, proposal)
        if first and plan.changes and target.head != first.head and first.exists:
            raise _conflict(target)
        first = first or target
        if options.space is not None:
            is_settled = target.head if not plan.changes else None
            plan = replace(plan, space=plan_space(options, plan.private, is_settled)[0])
        if announce and plan != announced and (dry_run or announced is None or plan.changes):
            announce(plan)
        announced = plan
        if dry_run:
            return plan
        try:
            pushed = _carry_out(plan, publication, target)
        except _CopyRefused as error:
            named = {step.source.partition("@")[0] for step in plan.steps if step.action == "copy"}
            # A repository that was renamed answers under its new name.
            for source in [error.source] if error.source in named else named:
                refused[source] = error.why
        except _AppearedMeanwhile:
            continue  # what is there now is looked at like any other repository
        except Exception as error:
            if isinstance(error, PublishError):
                raise
            if not is_transient(error) or not waits:
                raise _explained(error, plan) from error
            print(f"surgery: {one_line(error)}; looking at what has arrived, then trying again", file=sys.stderr)
            time.sleep(waits.pop(0))
        else:
            if options.space is None or pushed.commit is None:
                return pushed
            with _bars_on_terminals_only():
                return replace(pushed, space=push_space(options, plan.private, pushed.commit))


def _carry_out(plan, publication, target):
    api = hub_api()
    with _bars_on_terminals_only():
        if plan.create_repository:
            api.create_repo(plan.repo, private=plan.private or None, exist_ok=True)
            target = read_target(plan.repo, "main")
            if set(target.files) - {".gitattributes"} or (plan.private and not target.private):
                raise _AppearedMeanwhile
        if plan.create_branch:
            api.create_branch(plan.repo, branch=plan.branch, revision=target.head, exist_ok=True)
        commit, pull_request = target.head, None
        if plan.changes:
            info = _commit(api, plan, publication, target)
            commit, pull_request = info.oid, info.pr_url
        if plan.tag and not plan.tag_there:
            _tag(api, plan, commit)
    if plan.proposal is not None:
        pull_request = f"{api.endpoint}/{plan.repo}/discussions/{plan.proposal}"
    return Pushed(
        repo=plan.repo,
        url=f"{api.endpoint}/{plan.repo}",
        commit=commit,
        made=bool(plan.changes),
        pull_request=pull_request,
        tag=plan.tag,
        plan=plan,
    )


def _commit(api, plan, publication, target):
    from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete

    manifest, items = publication.content.manifest, publication.content.items
    operations = []
    for step in plan.changes:
        if step.action == "delete":
            operations.append(CommitOperationDelete(step.path))
            continue
        item = items[step.path]
        if step.action == "copy":
            origin = item.origin
            operations.append(
                CommitOperationCopy(
                    origin.path,
                    step.path,
                    src_revision=origin.revision,
                    src_repo_id=origin.source,
                    src_repo_type="model",
                )
            )
            continue
        added = CommitOperationAdd(step.path, item.data if item.data is not None else str(item.local))
        set_sha256(added, item.sha256)
        operations.append(added)
    try:
        return api.create_commit(
            plan.repo,
            operations,
            commit_message=f"Publish {manifest.name} ({manifest.hash[:12]})",
            commit_description=f"Artifact {manifest.hash}, published by pladis-surgery.",
            revision=None if plan.create_pr else plan.branch,
            create_pr=plan.create_pr,
            parent_commit=target.head,
        )
    except Exception as error:
        raise _as_refusal_to_copy(error) or error from error


def _tag(api, plan, commit):
    try:
        retried(lambda: api.create_tag(plan.repo, tag=plan.tag, revision=commit, exist_ok=True))
    except Exception as error:
        then = "run the same command again" if is_transient(error) else "run the same command with another --tag"
        raise PublishError(
            f"{plan.repo} is published at commit {commit[:12]}, but the tag {plan.tag} could not be set: "
            f"{one_line(error)}; {then}, which sets the tag alone"
        ) from error


class _AppearedMeanwhile(Exception):
    """The repository that was to be made is somebody else's already."""


class _CopyRefused(Exception):
    """The Hub would not copy weights from a repository."""

    def __init__(self, source, why):
        super().__init__(why)
        self.source, self.why = source, why


def _as_refusal_to_copy(error):
    """A _CopyRefused if this error says that weights cannot be copied between two repositories, else None."""
    if is_transient(error) or (refused := refused_copy(error)) is None:
        return None
    source, said = refused
    return _CopyRefused(source, f"the Hub would not copy from {source}: {one_line(said)[:160]}")


def _check_nobody_else_came(first, target):
    if first is not None and first.exists and not target.exists:
        raise PublishError(f"{first.repo} is gone since this began; somebody removed or renamed it")


def _conflict(target):
    try:
        last = hub_api().list_repo_commits(target.repo, revision=target.branch)[0]
        what = f" ({last.title!r} by {', '.join(last.authors) or 'somebody'})"
    except Exception:  # what was committed is a nicety of this message; the conflict stands without it
        what = ""
    return PublishError(
        f"somebody else committed to {target.repo} meanwhile: commit {target.head[:12]}{what}. Nothing of this push is "
        f"in the repository; look at {hub_api().endpoint}/{target.repo}/commits/{target.branch}, then run the same "
        "command again, which goes on top of it"
    )


def _explained(error, plan):
    status = status_of(error)
    again = "nothing is half-written; run the same command again, what has arrived is not sent again"
    if status in (409, 412):
        target = read_target(plan.repo, plan.branch)
        return (
            _conflict(target)
            if target.head != plan.head and target.exists
            else PublishError(f"the Hub refused to change {plan.repo}: {one_line(error)}; {again}")
        )
    if status in (401, 403):
        doing = "create" if plan.create_repository else "write to"
        return PublishError(
            f"the Hub does not let this login {doing} {plan.repo}: {one_line(error)}. `hf auth whoami` shows whose "
            "token it is; it needs the role write"
        )
    if status == 400:
        return PublishError(
            f"the Hub does not take this commit for {plan.repo}: {one_line(error)}; nothing was changed"
        )
    return PublishError(f"publishing {plan.repo} failed: {one_line(error)}; {again}")


def _license_texts(source):
    """The base's own licence texts, as RepositoryFiles, since many licences ask that they go along with a copy."""
    if source is None or source.base is None:
        return []
    names = [name for name in source.base.files if _LICENSE_TEXTS.match(name)]
    return [item_of(name, read_bytes(source.base.path(name))) for name in names]


@contextmanager
def _bars_on_terminals_only():
    """huggingface_hub's own bars, unless standard error is no terminal."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if sys.stderr.isatty() or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
