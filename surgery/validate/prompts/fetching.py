"""One file of a published prompt set, at the set's commit, out of the local cache or from where it is published."""

import errno
from pathlib import Path

from surgery.base import sha256_of
from surgery.base.transport import one_line, retried, transport_error
from surgery.errors import SurgeryError

_GITHUB = "https://raw.githubusercontent.com/{repo}/{revision}/{path}"
_OFFLINE = "no connection was tried (offline mode)"
_NO_ACCESS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EPERM)


def hub_file(repo, path, revision):
    """Where a file of a Hub data set at a commit lies in the Hub cache, after fetching it if it is not there.

    Raises SurgeryError, which says what to do, where it is neither in the cache nor to be had.
    """
    from huggingface_hub import constants, errors, hf_hub_download

    def fetched(**how):
        return Path(hf_hub_download(repo, path, revision=revision, repo_type="dataset", **how))

    def over_the_network():
        try:
            return fetched()
        except errors.LocalEntryNotFoundError as error:
            # The client has found nothing to fall back on: what it could not do first says whether to try again.
            raise (error.__cause__ or error) from None

    try:
        return fetched(local_files_only=True)  # a commit does not change: what is here needs no connection
    except errors.LocalEntryNotFoundError as error:
        if constants.HF_HUB_OFFLINE:
            raise _unreachable(repo, _OFFLINE) from error
    try:
        return retried(over_the_network, retry_connecting=False)
    except errors.GatedRepoError as error:
        raise SurgeryError(
            f"the data set {repo} is gated: accept its terms on its Hub page, then `hf auth login` as that user"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise _gone(repo, f"its commit {revision[:12]} is not there any more") from error
    except errors.RepositoryNotFoundError as error:
        raise _gone(repo, "there is no such data set on the Hub any more, or it has become private") from error
    except (errors.LocalEntryNotFoundError, transport_error()) as error:  # the former is an EntryNotFoundError too
        raise _unreachable(repo, one_line(error)) from error
    except errors.EntryNotFoundError as error:
        raise _gone(repo, f"it has no file {path} at its commit {revision[:12]}") from error
    except (errors.HfHubHTTPError, OSError) as error:
        raise _failed(repo, error, constants.HF_HUB_CACHE) from error


def github_file(repo, path, revision, sha256):
    """Where a file of a GitHub repository at a commit lies in the Hub's folder of assets, after fetching it once.

    Raises SurgeryError where it cannot be had, and where what arrives has another sha256: that is not kept.
    """
    from huggingface_hub import cached_assets_path, constants, errors
    from huggingface_hub.utils import get_session, hf_raise_for_status

    url = _GITHUB.format(repo=repo, revision=revision, path=path)

    def content():
        response = get_session().get(url, follow_redirects=True, timeout=30)  # carries no token
        hf_raise_for_status(response)
        return response.content

    try:
        folder = Path(cached_assets_path("pladis-surgery", "prompts", f"{repo.replace('/', '--')}-{revision[:12]}"))
        target = folder / Path(path).name
        if target.is_file() and sha256_of(target) == sha256:
            return target
        if constants.HF_HUB_OFFLINE:
            raise _unreachable(url, _OFFLINE)
        arriving = target.with_name(f"{target.name}.arriving")
        arriving.write_bytes(retried(content, retry_connecting=False))
        if sha256_of(arriving) != sha256:
            arriving.unlink()
            raise SurgeryError(f"{url} arrived damaged: its sha256 is not {sha256}; run the same command again")
        arriving.replace(target)
        return target
    except transport_error() as error:
        raise _unreachable(url, one_line(error)) from error
    except (errors.HfHubHTTPError, OSError) as error:
        raise _failed(url, error, constants.HF_ASSETS_CACHE) from error


def _unreachable(what, why):
    return SurgeryError(
        f"cannot reach {what}: {why}; and its prompts are not in the local cache. Check the connection (and "
        "HF_HUB_OFFLINE), then run the same command again"
    )


def _gone(repo, why):
    return SurgeryError(
        f"the prompts of the data set {repo} cannot be fetched: {why}; give a file of prompts instead, or another set"
    )


def _failed(what, error, cache):
    if getattr(error, "errno", None) in _NO_ACCESS:
        return SurgeryError(
            f"the prompts of {what} cannot be written to {cache}: {one_line(error)}; make room or give access there, "
            "or set HF_HOME to another disk"
        )
    return SurgeryError(f"fetching the prompts of {what} failed: {one_line(error)}; run the same command again")
