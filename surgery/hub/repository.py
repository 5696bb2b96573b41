"""A base on the Hugging Face Hub: its listing at one commit, read through the cache."""

import errno
import hashlib
import os
from contextlib import contextmanager
from pathlib import Path

from surgery.errors import BaseError, BaseNotFoundError

from .client import bar_up_to, one_line, retried, transport_error
from .listing import FileEntry, entries_of, license_of
from .local import git_blob_id, read_json_file


class HubBase:
    """A model repository at a commit. `files` has the sizes and hashes of the Hub's own listing.

    Without a connection, the last snapshot in the local cache stands in for the listing (then sizes are the cache's,
    and `listed` is False).
    """

    kind = "hub"

    def __init__(self, repo, revision=None, local_files_only=False):
        self.repo, self.name, self.revision = repo, repo, revision
        self.license = self.license_link = None
        self.private = self.gated = self.listed = False
        from huggingface_hub import constants

        if local_files_only or constants.HF_HUB_OFFLINE:
            self._list_cache("no connection was tried (offline mode)")
        else:
            self._list_repository()

    def _list_repository(self):
        from huggingface_hub import HfApi, errors

        def list_files():
            return HfApi().model_info(self.repo, revision=self.revision, files_metadata=True)

        try:
            info = retried(list_files, retry_connecting=False)
        except errors.GatedRepoError as error:
            raise self._gated() from error
        except errors.RevisionNotFoundError as error:
            raise BaseNotFoundError(
                f"{self.repo} has no revision {self.revision!r}; leave the revision out for its main branch"
            ) from error
        except errors.RepositoryNotFoundError as error:
            raise BaseNotFoundError(
                f"there is no model repository {self.repo} on the Hub, or it is private and you may not see it "
                "(`hf auth login`). A local folder is written ./folder"
            ) from error
        except errors.HFValidationError as error:
            raise BaseNotFoundError(f"{self.repo!r} cannot be a Hub repository: {one_line(error)}") from error
        except errors.HfHubHTTPError as error:
            raise BaseError(f"the Hub refused the listing of {self.repo}: {one_line(error)}; try again") from error
        except (OSError, transport_error()) as error:
            self._list_cache(one_line(error))
            return
        except (KeyError, TypeError, ValueError) as error:
            raise BaseError(
                f"the Hub's listing of {self.repo} cannot be understood ({type(error).__name__}: {one_line(error)}); "
                "run it again, and if this stays, update huggingface_hub"
            ) from error
        card = info.card_data.to_dict() if info.card_data else {}
        self.commit, self.listed = info.sha, True
        self.private, self.gated = bool(info.private), bool(info.gated)
        self.license, self.license_link = license_of(card)
        self.files = entries_of(info.siblings)

    def _list_cache(self, why):
        from huggingface_hub import errors, snapshot_download

        try:
            folder = Path(snapshot_download(self.repo, revision=self.revision, local_files_only=True))
        except (errors.LocalEntryNotFoundError, errors.HFValidationError, OSError) as error:
            raise BaseError(
                f"cannot reach the Hub for {self.repo}: {why}; and it is not in the local cache. Check the connection "
                "(and HF_HUB_OFFLINE), then run the same command again"
            ) from error
        self.commit, self.files = folder.name, {}
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                blob = os.path.basename(os.path.realpath(path))  # LFS blobs are cached under their sha256
                entry = FileEntry(path.stat().st_size, blob if len(blob) == 64 else None)
                self.files[path.relative_to(folder).as_posix()] = entry

    def path(self, name):
        """Where the file lies in the local cache, after fetching it if it is not there."""
        from huggingface_hub import hf_hub_download

        self._check_name(name)
        bar = bar_up_to(self.files[name].size)
        with self._explained(name):
            if name == "model_index.json" and self.revision != self.commit:
                # By the branch's name too: that records in the cache which commit it is, for a later run offline.
                retried(lambda: hf_hub_download(self.repo, name, revision=self.revision, tqdm_class=bar))
            path = Path(retried(lambda: hf_hub_download(self.repo, name, revision=self.commit, tqdm_class=bar)))
        self._check_content(name, path)
        return path

    def _check_content(self, name, path):
        """Raise BaseError, and forget the file, if a small file is not what its name in the cache says.

        The cache names what is not in large file storage by its git blob id; a download is not checked against it.
        """
        entry, blob = self.files[name], Path(os.path.realpath(path))
        if entry.sha256 is not None or entry.blob is None or blob.name != entry.blob or len(entry.blob) != 40:
            return
        data = blob.read_bytes()
        if entry.blob not in (git_blob_id(data), hashlib.sha1(data).hexdigest()):
            blob.unlink(missing_ok=True)
            path.unlink(missing_ok=True)
            raise BaseError(f"{name} of {self.repo} arrived damaged and was taken out of the cache; run it again")

    def header(self, name):
        """{tensor name: (dtype by safetensors' name, shape)} of a weight file, by range requests for its header."""
        from huggingface_hub import HfApi

        self._check_name(name)
        with self._explained(name):
            found = retried(lambda: HfApi().parse_safetensors_file_metadata(self.repo, name, revision=self.commit))
        return {tensor: (entry.dtype, tuple(entry.shape)) for tensor, entry in found.tensors.items()}

    def read_json(self, name):
        """The content of a JSON file of the repository."""
        return read_json_file(self.path(name))

    def _check_name(self, name):
        if name not in self.files:
            raise BaseNotFoundError(f"{self.repo}@{self.commit[:12]} has no file {name}")

    @contextmanager
    def _explained(self, name):
        from huggingface_hub import constants, errors

        try:
            yield
        except errors.GatedRepoError as error:
            raise self._gated() from error
        except errors.SafetensorsParsingError as error:
            raise BaseError(f"{name} of {self.repo} is no safetensors file: {one_line(error)}") from error
        except (errors.HfHubHTTPError, OSError, transport_error()) as error:
            if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EPERM):
                raise BaseError(
                    f"{name} of {self.repo} cannot be written to the Hub cache, {constants.HF_HUB_CACHE}: "
                    f"{one_line(error)}; make room or give access there, or set HF_HOME to another disk"
                ) from error
            raise BaseError(
                f"fetching {name} of {self.repo} failed: {one_line(error)}; run the same command again, what has "
                "arrived is kept"
            ) from error

    def _gated(self):
        return BaseError(f"{self.repo} is gated: accept its terms on its Hub page, then `hf auth login` as that user")


def native_resolution(denoiser_config, vae_config):
    """The side, in pixels, of the square images that a pipeline draws unasked; None where its configs do not tell."""
    sample_size, blocks = denoiser_config.get("sample_size"), vae_config.get("block_out_channels")
    if not isinstance(sample_size, int) or not blocks:
        return None
    return sample_size * 2 ** (len(blocks) - 1)  # the VAE halves the side between every two of its blocks
