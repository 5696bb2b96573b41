"""Whether the login on this machine may write to a repository: asked before anything is sent."""

import re
from dataclasses import dataclass
from typing import Literal

from surgery.compat import transport_error
from surgery.errors import InputError, PublishError
from surgery.hub.client import hub_api, one_line, retried, status_of

# What git-check-ref-format refuses, and a leading dash, which no command line would take back.
_NOT_A_REF = re.compile(r"^$|^@$|^[-/]|[/.]$|\.lock(/|$)|(^|/)\.|\.\.|//|@\{|[\x00-\x20\x7f~^:?*\[\\]")


@dataclass(frozen=True)
class Options:
    """Where to, and how; InputError for what contradicts itself.

    weights: "copy" puts the base's weight files into the repository, by reference where the Hub can; "thin" names them.
    """

    repo: str  # OWNER/NAME
    private: bool = False
    create_pr: bool = False
    revision: str | None = None  # the branch; main unless given
    tag: str | None = None
    weights: Literal["copy", "thin"] = "copy"
    overwrite: bool = False  # replace files that somebody else wrote
    allow_regression: bool = False  # publish what scores significantly worse than its base
    no_handler: bool = False  # without handler.py and requirements.txt for Hugging Face Inference Endpoints
    space: str | None = None  # a Space with its page, OWNER/NAME or "" for the model's own name; None for none

    def __post_init__(self) -> None:
        check_repository_name(self.repo)
        if self.space is not None:
            check_repository_name(self.space_name)
            if self.create_pr:
                raise InputError("--space shows what is published, which --create-pr only proposes; leave one out")
        if self.weights not in ("copy", "thin"):
            raise InputError(f"--weights must be copy or thin, not {self.weights!r}")
        if self.create_pr and self.revision not in (None, "main"):
            raise InputError("--create-pr proposes a change of main; leave --revision out")
        if self.create_pr and self.tag:
            raise InputError("--create-pr makes no commit on main that a tag could name; tag it once it is merged")
        if self.create_pr and self.private:
            raise InputError("--create-pr goes to a repository that is there already; leave --private out")
        for name, value in (("--revision", self.revision), ("--tag", self.tag)):
            if value is not None and _NOT_A_REF.search(value):
                raise InputError(f"{name} {value!r} is no name that git takes")
        if self.revision is not None and len(self.revision) == 40 and set(self.revision) <= set("0123456789abcdef"):
            raise InputError(f"--revision {self.revision} is a commit; name a branch")

    @property
    def space_name(self) -> str:
        """OWNER/NAME of the Space."""
        return self.space or self.repo

    @property
    def branch(self) -> str:
        """The branch that is committed to."""
        return self.revision or "main"


_LOGIN = "`hf auth login` with a token of role write (https://huggingface.co/settings/tokens)"
_WRITERS = ("admin", "write", "contributor")


def check_repository_name(repo: str) -> None:
    """Raise InputError unless `repo` is OWNER/NAME as the Hub takes it."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise InputError(f"{repo!r} cannot be a repository on the Hub: {one_line(error)}") from error
    if repo.count("/") != 1:
        raise InputError(f"{repo!r} names no owner; write OWNER/NAME, the owner being you or an organisation of yours")


def check_account(repo: str, create_pr: bool = False) -> str | None:
    """The name of the user whose login this is, after checking that it may write to OWNER/NAME.

    Raises PublishError where nobody is logged in, the token is refused, reads only, or is not for this owner. A server
    that does not tell what a token may do is believed to refuse it later, when it is asked to write.
    """
    from huggingface_hub import get_token
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    if get_token() is None:
        raise PublishError(f"nobody is logged in to the Hub on this machine: {_LOGIN}")
    try:
        who = retried(lambda: hub_api().whoami())
    except OfflineModeIsEnabled as error:
        raise PublishError("HF_HUB_OFFLINE is set, so nothing can be published; unset it") from error
    except HfHubHTTPError as error:
        if status_of(error) == 401:
            raise PublishError(f"the Hub does not know this machine's token, or it has expired: {_LOGIN}") from error
        if status_of(error) == 404:
            return None
        raise PublishError(f"the Hub did not say whose token this is: {one_line(error)}; run it again later") from error
    except ValueError as error:  # characters that no header takes; the error would show them
        raise PublishError(f"this machine's token is malformed: {_LOGIN}") from error
    except (OSError, transport_error()) as error:
        raise PublishError(
            f"the Hub cannot be reached: {one_line(error)}; check the connection, run it again"
        ) from error
    if not create_pr:  # anybody may propose a change
        _check_owner(repo, who)
    _check_role(repo, who, create_pr)
    return who.get("name")


def _check_owner(repo, who):
    owner = repo.split("/")[0]
    if owner.lower() == str(who.get("name")).lower():
        return
    organisations = {str(o.get("name")).lower(): o for o in who.get("orgs") or []}
    if owner.lower() not in organisations:
        known = ", ".join([str(who.get("name")), *(str(o.get("name")) for o in who.get("orgs") or [])])
        raise PublishError(f"this login may not write to {owner}'s repositories; it may to those of: {known}")
    role = organisations[owner.lower()].get("roleInOrg")
    if role is not None and role not in _WRITERS:
        raise PublishError(f"{who.get('name')} has the role {role!r} in {owner}, which may not write; ask its admins")


def _check_role(repo, who, create_pr):
    token = (who.get("auth") or {}).get("accessToken") or {}
    role = token.get("role")
    if role == "read":
        raise PublishError(f"this machine's token may read only: {_LOGIN}")
    if role != "fineGrained" or not isinstance(token.get("fineGrained"), dict):
        return
    rights = token["fineGrained"]
    owner = repo.split("/")[0].lower()
    allowed = set(rights.get("global") or [])
    for scope in rights.get("scoped") or []:
        if str((scope.get("entity") or {}).get("name")).lower() in (owner, repo.lower()):
            allowed.update(scope.get("permissions") or [])
    wanted = {"repo.write", "repo.content.write"} | ({"discussion.write"} if create_pr else set())
    if not allowed & wanted:
        raise PublishError(
            f"this machine's fine-grained token may not write to {repo}: give it that right on "
            f"https://huggingface.co/settings/tokens, or {_LOGIN}"
        )
