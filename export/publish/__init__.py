"""Publishing on the Hugging Face Hub: what goes there, who may send it, and the one commit that does."""

from .account import Options
from .commit import Pushed, check_before_applying, prepare, publish
from .push_plan import PushPlan

__all__ = ["Options", "PushPlan", "Pushed", "check_before_applying", "prepare", "publish", "push"]


def push(folder, repo, *, dry_run=False, announce=None, **options):
    """Publish an artifact folder as OWNER/NAME in one commit; returns a Pushed, or with dry_run the PushPlan.

    options: private, create_pr, revision, tag, weights ("copy" or "thin"), overwrite, allow_regression: see Options.
    announce: called with the PushPlan before anything is sent. Raises InputError, ArtifactError, PublishError,
    BaseError.
    """
    return publish(prepare(folder, Options(repo, **options)), dry_run=dry_run, announce=announce)
