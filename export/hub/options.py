"""How something is to be published: what `surgery push` and `surgery apply --push` are told."""

import re
from dataclasses import dataclass

from surgery.errors import InputError

from .account import check_repository_name

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
    weights: str = "copy"
    overwrite: bool = False  # replace files that somebody else wrote
    allow_regression: bool = False  # publish what scores significantly worse than its base

    def __post_init__(self):
        check_repository_name(self.repo)
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
    def branch(self):
        """The branch that is committed to."""
        return self.revision or "main"
