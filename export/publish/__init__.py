"""Publishing on the Hugging Face Hub: what goes there, who may send it, and the one commit that does."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from .account import Options
from .commit import Pushed, check_before_applying, prepare, publish
from .push_plan import PushPlan

__all__ = ["Options", "PushPlan", "Pushed", "check_before_applying", "prepare", "publish", "push"]


def push(
    folder: str | Path,
    repo: str,
    *,
    dry_run: bool = False,
    announce: Callable[[PushPlan], object] | None = None,
    **options: Any,
) -> Pushed | PushPlan:
    """Publish an artifact folder as OWNER/NAME in one commit; returns a Pushed, or with dry_run the PushPlan.

    options: private, create_pr, revision, tag, weights ("copy" or "thin"), overwrite, allow_regression, no_handler,
        space: see Options.
    announce: called with the PushPlan before anything is sent. Raises InputError, ArtifactError, PublishError,
    BaseError.
    """
    return publish(prepare(folder, Options(repo, **options)), dry_run=dry_run, announce=announce)
