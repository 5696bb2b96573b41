"""A Space beside a published model: the page of `surgery studio` on it, in one commit of its own.

It carries this package as it runs here, without the tiny pipeline's weights, so that it needs no release of it.
"""

import io
import json
import os
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib import metadata, resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.artifact.manifest import json_text
from surgery.errors import PublishError
from surgery.hub.bounded import parse_json
from surgery.hub.client import hub_api, is_transient, one_line, status_of

from .content import RepositoryFile, check_secrets, item_of
from .push_plan import PushStep, SpacePlan
from .target import Target, is_front_matter_alone, is_there, read_file, read_target

if TYPE_CHECKING:
    from .account import Options

SDK_VERSION = "6.31.0"  # of Gradio, which the Hub installs; what constraints.txt names
PYTHON_VERSION = "3.12"  # which ZeroGPU has, and this package takes
RECORD = "surgery-space.json"  # what this tool put there
_PACKAGE = "pladis_surgery.zip"
_THERE = (".gitattributes",)  # the Hub's own
_BEGUN = (1980, 1, 1, 0, 0, 0)  # the time of every file in the archive: the same package has the same bytes
_LEFT_OUT = (".safetensors", ".pyc", ".so")

_APP = '''\
"""The page of `surgery studio` on {model}."""

import sys
import tempfile
import zipfile
from pathlib import Path

with zipfile.ZipFile(Path(__file__).with_name("{package}")) as archive:
    archive.extractall(folder := tempfile.mkdtemp())
sys.path.insert(0, folder)
try:
    from spaces import GPU  # ZeroGPU's, before torch
except ImportError:
    GPU = None

from surgery.studio.serving import run_space

run_space("{model}", "{revision}", GPU)
'''
_README = """\
---
{front}---

The page of `surgery studio`, by pladis-surgery, on [{model}](https://huggingface.co/{model}): its base beside the
patched model for the same prompts and seeds, with every hyperparameter on a slider, guidance, and maps of where the
image attends to each word. It was made by `surgery push --space`, which also brings it up to date.
"""


@dataclass(frozen=True)
class PushedSpace:
    """What became of a Space."""

    repo: str
    url: str
    commit: str | None
    made: bool  # False where it held all of it already


def plan_space(options: "Options", private: bool, revision: str | None) -> tuple[SpacePlan, Target, dict]:
    """(SpacePlan, the Target as it stands, {path: RepositoryFile}) of the Space that options name.

    private: whether the model is. revision: the model's commit, None where that is still to be made. Raises
    PublishError for a Space that this tool did not make, or in which its files were changed.
    """
    repo = options.space_name
    target = read_target(repo, "main", repo_type="space")
    if target.exists and private and not target.private:
        raise PublishError(
            f"the Space {repo} is public, and {options.repo} is private; make the Space private on its settings page "
            "first, or name another"
        )
    items = _files(options.repo, revision or "0" * 40)
    if not options.overwrite:
        _refuse_foreign(target, items)
    steps = [
        PushStep(path, "keep" if revision and is_there(item, target.files) else "send", item.size)
        for path, item in items.items()
    ]
    is_private = target.private if target.exists else private
    notes = []
    if private:
        notes.append(
            f"{options.repo} is private: give the Space a token that reads it, as the secret HF_TOKEN in its settings"
        )
    plan = SpacePlan(repo, target.head, options.repo, revision, is_private, tuple(steps), tuple(notes))
    return plan, target, items


def push_space(options: "Options", private: bool, revision: str) -> PushedSpace:
    """Make the Space, or bring it up to date; raises PublishError as `plan_space`, and where the Hub refuses."""
    from huggingface_hub import CommitOperationAdd

    api = hub_api()
    plan, target, items = plan_space(options, private, revision)
    url = f"{api.endpoint}/spaces/{plan.repo}"
    if not plan.changes:
        return PushedSpace(plan.repo, url, plan.head, made=False)
    try:
        if plan.head is None:
            api.create_repo(plan.repo, repo_type="space", space_sdk="gradio", private=private or None)
            target = read_target(plan.repo, "main", repo_type="space")
        added = [CommitOperationAdd(step.path, items[step.path].data or b"") for step in plan.changes]
        commit = api.create_commit(
            plan.repo,
            added,
            repo_type="space",
            commit_message=f"The page of surgery studio on {options.repo} ({revision[:12]})",
            parent_commit=target.head,
        )
    except PublishError:
        raise
    except Exception as error:
        if not is_transient(error) and status_of(error) is None:
            raise
        raise PublishError(
            f"{options.repo} is published at commit {revision[:12]}, but its Space {plan.repo} could not be: "
            f"{one_line(error)}; run the same command again, which does the Space alone"
        ) from error
    return PushedSpace(plan.repo, url, commit.oid, made=True)


def _refuse_foreign(target, items):
    """Raise PublishError where a Space has what this tool did not put there, or what was changed since."""
    if not target.exists:
        return
    ours = _recorded(target)
    foreign = [
        path
        for path in target.files
        if path not in _THERE and path != RECORD and not _is_ours(target, path, ours, items.get(path))
    ]
    if foreign:
        raise PublishError(
            f"the Space {target.repo} holds {', '.join(foreign[:3])}{' ...' if len(foreign) > 3 else ''} that this "
            "tool did not put there, or that was changed since; name another Space, or replace them with --overwrite"
        )


def _is_ours(target, path, ours, item):
    if item is not None and is_there(item, target.files):
        return True
    if path == "README.md" and not ours:  # as the Hub's own form makes it
        return is_front_matter_alone(read_file(target, path))
    if path not in ours:
        return False
    entry = target.files[path]
    known = ours[path]
    return known == (entry.sha256 or item_of(path, read_file(target, path)).sha256)


def _recorded(target) -> dict[str, str]:
    """{path: sha256} of what this tool put into a Space."""
    if RECORD not in target.files:
        return {}
    try:
        files = parse_json(read_file(target, RECORD))["files"]
        return {str(path): str(sha256) for path, sha256 in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}


def _files(model, revision) -> dict[str, RepositoryFile]:
    texts = {
        "README.md": _README.format(model=model, front=_front(model)),
        "app.py": _APP.format(model=model, revision=revision, package=_PACKAGE),
        "requirements.txt": "\n".join([*requirements(), ""]),
    }
    made = [item_of(path, text.encode()) for path, text in texts.items()]
    made.append(item_of(_PACKAGE, package()))
    files = {item.path: item.sha256 for item in made}
    record = {"schema_version": 1, "model": model, "revision": revision, "files": files}
    made.append(item_of(RECORD, json_text(record).encode()))
    check_secrets(made)
    return {item.path: item for item in sorted(made, key=lambda item: item.path)}


def _front(model):
    front: dict[str, Any] = {
        "title": model.rpartition("/")[2],
        "sdk": "gradio",
        "sdk_version": SDK_VERSION,
        "python_version": PYTHON_VERSION,
        "app_file": "app.py",
        "license": "apache-2.0",
        "models": [model],
        "tags": ["pladis-surgery"],
    }
    return "".join(f"{key}: {json.dumps(value)}\n" for key, value in front.items())  # which YAML reads too


def requirements() -> list[str]:
    """What the package needs to run a page, but for Gradio, which the Hub installs: lines of a requirements.txt."""
    from packaging.requirements import Requirement

    found = [Requirement(text) for text in metadata.requires("pladis-surgery") or ()]
    own = [one for one in found if one.marker is None]
    maps = [one for one in found if one.name == "matplotlib"][:1]  # of an extra
    return sorted(f"{one.name}{one.specifier}" for one in [*own, *maps])


@cache
def package() -> bytes:
    """A zip of this package as it is here, with its metadata: what `import surgery` needs in a folder on sys.path.

    Read once in a process: a push plans its Space before the model's commit and again after it.
    """
    version = metadata.version("pladis-surgery")
    about = str(metadata.distribution("pladis-surgery").read_text("METADATA"))
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, path in sorted(_sources(Path(str(resources.files("surgery"))))):
            archive.writestr(zipfile.ZipInfo(f"surgery/{name}", _BEGUN), path.read_bytes(), zipfile.ZIP_DEFLATED)
        about_name = f"pladis_surgery-{version}.dist-info/METADATA"
        archive.writestr(zipfile.ZipInfo(about_name, _BEGUN), about, zipfile.ZIP_DEFLATED)
    return file.getvalue()


def _sources(root) -> Iterator[tuple[str, Path]]:
    for folder, folders, names in os.walk(root, followlinks=True):  # export and recipes are links in a checkout
        folders[:] = [name for name in folders if not name.startswith((".", "__"))]
        for name in names:
            path = Path(folder, name)
            if path.suffix not in _LEFT_OUT and not name.startswith("."):
                yield path.relative_to(root).as_posix(), path
