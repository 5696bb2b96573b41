"""Prompt sets that have a name: fetched once, from the Hub or the web, at a fixed revision."""

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from surgery.compat import transport_error
from surgery.errors import SurgeryError, disk_problem
from surgery.hub import sha256_of
from surgery.hub.client import hub_api, one_line, retried

from .files import PromptSet, checked_text, prompt_of, rows

_GITHUB = "https://raw.githubusercontent.com/{repo}/{revision}/{path}"
_OFFLINE = "no connection was tried (offline mode)"


def hub_file(repo: str, path: str, revision: str) -> Path:
    """Where a file of a Hub data set at a commit lies in the Hub cache, after fetching it if it is not there.

    Raises SurgeryError, which says what to do, where it is neither in the cache nor to be had.
    """
    from huggingface_hub import constants, errors

    def fetched(**how):
        return Path(hub_api().hf_hub_download(repo, path, revision=revision, repo_type="dataset", **how))

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


def github_file(repo: str, path: str, revision: str, digest: str) -> Path:
    """Where a file of a GitHub repository at a commit lies in the Hub's folder of assets, after fetching it once.

    digest: its sha256, or git's own sha1 of the file. Raises SurgeryError where it cannot be had, and where what
    arrives has another: that is not kept.
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
        if target.is_file() and _is(target, digest):
            return target
        if constants.HF_HUB_OFFLINE:
            raise _unreachable(url, _OFFLINE)
        arriving = target.with_name(f"{target.name}.arriving")
        arriving.write_bytes(retried(content, retry_connecting=False))
        if not _is(arriving, digest):
            arriving.unlink()
            kind = "sha256" if len(digest) == _SHA256 else "git hash"
            raise SurgeryError(f"{url} arrived damaged: its {kind} is not {digest}; run the same command again")
        arriving.replace(target)
        return target
    except transport_error() as error:
        raise _unreachable(url, one_line(error)) from error
    except (errors.HfHubHTTPError, OSError) as error:
        raise _failed(url, error, constants.HF_ASSETS_CACHE) from error


_SHA256 = 64  # digits; of a git hash 40


def _is(path, digest):
    """Whether a file has a sha256, or the name that git gives its content."""
    if len(digest) == _SHA256:
        return sha256_of(path) == digest
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest() == digest


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
    if disk_problem(error):
        return SurgeryError(
            f"the prompts of {what} cannot be written to {cache}: {one_line(error)}; make room or give access there, "
            "or set HF_HOME to another disk"
        )
    return SurgeryError(f"fetching the prompts of {what} failed: {one_line(error)}; run the same command again")


@dataclass(frozen=True)
class SetFile:
    """A file of a set. sha256: of the file, "" where none is known. category: of all its prompts, "" for the column's.

    Every file on GitHub has a sha256, or in its place git's hash of 40 digits.
    """

    path: str
    sha256: str = ""
    category: str = ""


@dataclass(frozen=True)
class PublishedSet:
    """A set of prompts as it is published.

    count: prompts in its files; per_file: how many of each file's, evenly spaced, are the set (all if None).
    prompts_sha256: of all prompts in their order, each a line (a line break in one is a space), "" where none is known.
    with_facts: whether what else a row holds is kept, for a metric that judges by it. host: "hub" or "github". gather:
    makes the rows of prompts of those in a file, where a prompt has several.
    """

    name: str
    repo: str
    revision: str
    files: tuple[SetFile, ...]
    column: str
    count: int
    source: str
    category_column: str = ""
    per_file: int | None = None
    prompts_sha256: str = ""
    with_facts: bool = False
    host: str = "hub"
    gather: Callable[[Iterator[tuple[str, Any]]], Iterator[tuple[str, Any]]] | None = None

    @property
    def size(self) -> int:
        """How many prompts the set gives."""
        return self.count if self.per_file is None else self.per_file * len(self.files)

    @property
    def address(self) -> str:
        """What a PromptSet names as its source: the Hub data set, or the repository's address."""
        return self.repo if self.host == "hub" else f"https://github.com/{self.repo}"


def _with_questions(found):
    """One row for each of DPG-Bench's prompts, of those of its questions, which stand together."""
    prompts = {}
    for where, row in found:
        try:
            number, parents = int(row["proposition_id"]), [int(one) for one in row["dependency"].split(",")]
            item, question = row["item_id"], checked_text(row["question_natural_language"], where)
        except (KeyError, ValueError) as error:
            raise SurgeryError(f"{where} is no question of DPG-Bench ({error})") from error
        _, whole = prompts.setdefault(item, (where, {"text": row["text"], "questions": []}))
        # 0 stands for no question.
        whole["questions"].append({"id": number, "question": question, "after": [one for one in parents if one]})
    yield from prompts.values()


def _by_atoms(found):
    """GenEval 2's rows, the count of atoms as text, which is what prompts are grouped by."""
    for where, row in found:
        yield where, {**row, "atom_count": f"{row.get('atom_count')} atoms"}


_HPD = PublishedSet(
    name="hpd-full",
    repo="zhwang/HPDv2",
    revision="b9517430f34b1080d4f741118d2a440155a165cd",
    files=(
        SetFile("benchmark/anime.json", "6b38a479cc6f899866e9b7a8bf91f096b4afc6883b95275a61891327182b14ae", "anime"),
        SetFile(
            "benchmark/concept-art.json",
            "530d057deafcb82c581e9d1be2ffcb98828fe99f0b54257414d2ab8a5cf2b83e",
            "concept-art",
        ),
        SetFile(
            "benchmark/paintings.json",
            "6570d39467e08b24b64e5b8a4177b0f61c525631121dc5a91fe2ab956eab4d5f",
            "paintings",
        ),
        SetFile("benchmark/photo.json", "92a3c9a0f743f66eb87bd112cdda830d6bdb4c073c86021d53b74001fcb18052", "photo"),
    ),
    column="prompt",  # the files are lists of strings
    count=3200,
    source="Wu et al. 2023, arXiv 2306.09341: 800 prompts in each of four styles",
)

_SETS = (
    PublishedSet(
        name="drawbench",
        repo="sayakpaul/drawbench",
        revision="ad794cba698c253ffdb6d18eff3fc87b004c1135",
        files=(SetFile("DrawBench Prompts - Sheet1.csv"),),
        column="prompts",
        category_column="category",
        count=200,
        source="Saharia et al. 2022, arXiv 2205.11487",
        prompts_sha256="266321db2953aea2de25f6e2655a746edf9e219308b582129465300415788170",
    ),
    replace(_HPD, name="hpd", per_file=100),
    _HPD,
    PublishedSet(
        # yuvalkirstain/pickapic_v1, where the prompts were first published, was taken down in April 2025.
        name="pick-a-pic",
        repo="Jialuo21/pickapic-test",
        revision="c45a875adf0fe5f2896e46bbef2124f4953dcaa6",
        files=(SetFile("test.jsonl"),),
        column="prompt",
        count=500,
        source="Kirstain et al. 2023, arXiv 2305.01569",
        prompts_sha256="72783e109cc4139635087e5341b6126449f9dae851186fe40c4f0f1a685d1708",
    ),
    PublishedSet(
        name="coco",
        repo="rohitgandikota/erasing",
        revision="25613d27892326e0c7770f7f3555bea4be150089",
        files=(SetFile("data/coco_30k.csv", "42c57b188c8f1f8a77cddfa11cde89e83fcbdd4dcd4fc6c840fb4e046d395383"),),
        column="prompt",
        count=30_000,
        source="Lin et al. 2014, arXiv 1405.0312: one caption for each of 30,000 images",
        host="github",
    ),
    PublishedSet(
        name="geneval",
        repo="djghosh13/geneval",
        revision="af4902f24d3ca90ebbb446dd9891a59e0f82725f",
        files=(
            SetFile(
                "prompts/evaluation_metadata.jsonl",
                "5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13",
            ),
        ),
        column="prompt",
        category_column="tag",
        count=553,
        source="Ghosh et al. 2023, arXiv 2310.11513",
        with_facts=True,
        host="github",
    ),
    PublishedSet(
        name="geneval2",
        repo="facebookresearch/GenEval2",
        revision="a6e82d2289e8d418f27f0adee77908b07060eea3",
        files=(SetFile("geneval2_data.jsonl", "09233adbc9f877fba205f1a20efa4a8640e7e62a91dfd55893562bed8a928e43"),),
        column="prompt",
        category_column="atom_count",
        count=800,
        source="Kamath et al. 2025, arXiv 2512.16853; CC BY-NC 4.0",
        with_facts=True,
        host="github",
        gather=_by_atoms,
    ),
    PublishedSet(
        name="dpg-bench",
        repo="TencentQQGYLab/ELLA",
        revision="3c228f1dc6c4d3cad0a47493816151a419f14db3",
        files=(SetFile("dpg_bench/dpg_bench.csv", "98457fc9901943f51ff9a30367250fc292533bed"),),
        column="text",
        count=1065,
        source="Hu et al. 2024, arXiv 2403.05135",
        with_facts=True,
        host="github",
        gather=_with_questions,
    ),
)
SETS = {published.name: published for published in _SETS}


def published_prompts(name: str) -> PromptSet:
    """The PromptSet of one of SETS, fetched at its commit if it is not in the local cache, and checked.

    Raises SurgeryError where it cannot be fetched, and where it is not what was published: another number of prompts,
    another sha256.
    """
    published = SETS[name]
    prompts, count, digest = [], 0, hashlib.sha256()
    categories = (published.category_column,) if published.category_column else ()
    paths = [_fetched(published, file) for file in published.files]
    for file, path in zip(published.files, paths, strict=True):
        of_file = []
        for where, row in (published.gather or iter)(rows(path)):
            prompt = prompt_of(row, where, (published.column,), categories, published.with_facts)
            of_file.append(replace(prompt, category=file.category or prompt.category))
            text = row if isinstance(row, str) else row[published.column]
            digest.update((text.replace("\n", " ") + "\n").encode())
        count += len(of_file)
        prompts += PromptSet(name, tuple(of_file)).spread(published.per_file).prompts
    if count != published.count:
        raise _changed(published, paths, f"holds {count:,} prompts instead of {published.count:,}")
    if published.prompts_sha256 not in ("", digest.hexdigest()):
        raise _changed(published, paths, "holds other prompts than those that were published")
    return PromptSet(name, tuple(prompts), published.address, published.revision)


def _fetched(published, file):
    """Where a file of a set lies; it has the file's sha256."""
    if published.host == "github":
        return github_file(published.repo, file.path, published.revision, file.sha256)
    path = hub_file(published.repo, file.path, published.revision)
    if file.sha256 not in ("", sha256_of(path)):
        raise _changed(published, [path], f"arrived damaged ({file.path})")
    return path


def _changed(published, paths, why):
    """The error of a set that is not what was published, whose files are taken out of the cache."""
    for path in paths:
        Path(os.path.realpath(path)).unlink(missing_ok=True)
        path.unlink(missing_ok=True)
    return SurgeryError(
        f"the prompt set {published.name} ({published.address} at {published.revision[:12]}) {why}, and was taken out "
        "of the cache; run the same command again, and if this stays, give a file of prompts instead"
    )
