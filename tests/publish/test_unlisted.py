"""What surgery.json does not list takes no effect, is not erased, and does not pass for verified."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import surgery
from surgery.artifact import read_manifest
from surgery.artifact.fetch import model_folder
from surgery.artifact.manifest import list_files
from surgery.artifact.staging import staged_folder
from surgery.errors import ArtifactError, BaseError, InputError
from surgery.hub import HubBase
from surgery.hub.listing import FileEntry

from .conftest import BASE
from .test_push import REPO
from .test_refusals import scores_of

FROZEN = max((Path(__file__).parent.parent / "frozen").glob("0.*")) / "artifact"
VAE = "vae/diffusion_pytorch_model.safetensors"


@pytest.fixture
def copy(tmp_path):
    return shutil.copytree(FROZEN, tmp_path / "a")


def add_zeros(folder):
    """A second index that swaps the VAE's weights for zeros, and what else a loader would take."""
    one = "diffusion_pytorch_model-00001-of-00001.safetensors"
    zeros = {name: torch.zeros_like(tensor) for name, tensor in load_file(folder / VAE).items()}
    save_file(zeros, folder / "vae" / one, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(zeros, one)}
    (folder / f"{VAE}.index.json").write_text(json.dumps(index))
    added = [f"vae/{one}", f"{VAE}.index.json", "text_encoder/adapter_config.json", "tokenizer/added_tokens.json"]
    (folder / added[2]).write_text('{"base_model_name_or_path": "x", "peft_type": "LORA"}')
    (folder / added[3]).write_text('{"<new>": 0}')
    return added


def failed(report):
    return {check.subject for check in report.checks if check.status == "failed"}


def weights_of(pipeline):
    return {name: tensor for part in (pipeline.vae, pipeline.unet) for name, tensor in part.state_dict().items()}


def test_unlisted_files_take_no_effect_and_are_not_verified(copy, use_hub, hub, monkeypatch):
    before = weights_of(surgery.load(copy, quiet=True))
    assert surgery.verify(copy).verified and model_folder(copy) == copy
    added = add_zeros(copy)
    after = weights_of(surgery.load(copy, verify=True, quiet=True))
    assert all(torch.equal(before[name], after[name]) for name in before)
    report = surgery.verify(copy)
    assert not report.verified and failed(report) == set(added)


def test_a_repository_is_loaded_as_the_same_folder_downloaded_is(hub, artifact):
    surgery.push(artifact, REPO)
    added = add_zeros(artifact)
    hub.commit_as_other(REPO, {path: (artifact / path).read_bytes() for path in added})
    assert failed(surgery.verify(REPO)) == set(added)
    one, other = weights_of(surgery.load(REPO, quiet=True)), weights_of(surgery.load(artifact, quiet=True))
    assert all(torch.equal(one[name], other[name]) for name in one) and any(x.abs().sum() for x in one.values())


def test_notes_pictures_and_hidden_files_do_no_harm(copy):
    for name in ("notes.txt", "vae/README.md", ".gitattributes", "images/x.png", ".git/config.json", "vae/.x.json"):
        (copy / name).parent.mkdir(exist_ok=True)
        (copy / name).write_text("x")
    assert surgery.verify(copy).verified and model_folder(copy) == copy


def test_what_somebody_puts_into_the_cached_view_is_found(hub, copy):
    add_zeros(copy)
    view = model_folder(copy)
    assert view != copy and not (view / f"{VAE}.index.json").exists()
    (view / f"{VAE}.index.json").write_text("{}")
    with pytest.raises(ArtifactError, match="was put there by somebody else"):
        surgery.load(copy, quiet=True)


def replace(folder, files=("new.txt",)):
    with staged_folder(folder, force=True) as made:
        for name in files:
            (made / name).parent.mkdir(parents=True, exist_ok=True)
            (made / name).write_text("new")


def test_a_forced_replacement_keeps_what_is_not_listed(copy, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "far").write_text("far")
    kept = ["notes.txt", "src/main.py", "vae/mine.bin", ".git/HEAD", "images/x.png", "scores.json"]
    for name in kept:
        (copy / name).parent.mkdir(exist_ok=True)
        (copy / name).write_text(name)
    (copy / "empty").mkdir()
    (copy / "link").symlink_to(elsewhere)
    (copy / "dangling").symlink_to("nowhere")
    os.mkfifo(copy / "pipe")
    replace(copy)
    assert [(copy / name).read_text() for name in kept] == kept and (copy / "new.txt").read_text() == "new"
    assert (copy / "empty").is_dir() and (copy / "link").is_symlink() and (copy / "link/far").read_text() == "far"
    assert os.readlink(copy / "dangling") == "nowhere" and (copy / "pipe").is_fifo()
    assert not (copy / VAE).exists() and not (copy / "surgery.json").exists()
    assert not list(tmp_path.glob(".a.*"))


@pytest.mark.parametrize("own", [True, False])
def test_a_forced_replacement_takes_scores_of_what_it_replaces_along_and_no_others(copy, own):
    measured = read_manifest(copy).hash if own else "0" * 64
    (copy / "scores.json").write_text(json.dumps(scores_of(measured)))  # as versions wrote it that did not list it
    replace(copy)
    assert (copy / "scores.json").exists() != own and (copy / "new.txt").exists()


@pytest.mark.parametrize("new", ["notes.txt", "notes.txt/x"])
def test_a_forced_replacement_never_writes_over_a_users_file(copy, new):
    (copy / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"notes\.txt is no file of the artifact's"):
        replace(copy, [new])
    assert (copy / "notes.txt").read_text() == "mine" and read_manifest(copy)


@pytest.mark.parametrize("text", ['{"my": "config"}', "", "[]", '{"schema_version": 1}', '{"schema_version": 99}'])
def test_only_a_folder_with_a_valid_manifest_is_replaced(tmp_path, text):
    (tmp_path / "work/src").mkdir(parents=True)
    (tmp_path / "work/surgery.json").write_text(text)
    (tmp_path / "work/src/main.py").write_text("precious")
    with pytest.raises(InputError, match="is no surgery artifact, so it is never replaced"):
        replace(tmp_path / "work")
    assert (tmp_path / "work/src/main.py").read_text() == "precious"


def test_engines_have_a_digest_that_verify_checks(copy):
    (copy / "engines/key").mkdir(parents=True)
    (copy / "engines/key/whole-0.pt2").write_bytes(b"native code")
    list_files(read_manifest(copy), copy, ["engines/key/whole-0.pt2"])
    manifest = read_manifest(copy)
    checks = {(check.what, check.status): check for check in surgery.verify(copy).checks}
    assert manifest.engines_digest()[:12] in checks["engines", "ok"].detail and surgery.verify(copy).verified
    assert manifest.hash == read_manifest(FROZEN).hash  # which does not cover them, as the check says
    (copy / "engines/key/other.pt2").write_bytes(b"by hand")
    assert surgery.verify(copy).verified  # it is not run
    (copy / "engines/key/whole-0.pt2").write_bytes(b"native c0de")
    assert failed(surgery.verify(copy)) == {"engines/key/whole-0.pt2"}


def test_a_download_ends_where_more_comes_than_is_listed(hub):
    base = HubBase(BASE)
    listed = base.files["unet/config.json"]
    base.files["unet/config.json"] = FileEntry(10, blob=listed.blob)
    with pytest.raises(BaseError, match="more than the 10 bytes that are listed arrive"):
        base.path("unet/config.json")
    base.files["unet/config.json"] = listed
    assert base.path("unet/config.json").stat().st_size == listed.size


MARKUP = "<script>alert(1)</script> [x](javascript:1) ![y](z) **b** `c` | d\n# e"


def test_no_field_is_markup_on_the_card_or_on_a_page(copy):
    from markdown_it import MarkdownIt

    from surgery.artifact.scores import Scores
    from surgery.export.publish.card import model_card
    from surgery.export.publish.content import Picture
    from surgery.recipe.schema import Publish
    from surgery.validate.report.page import validation_page

    manifest = read_manifest(copy)
    files = dict(manifest.files)
    for path, file in files.items():
        if file.weights:
            origin = dataclasses.replace(file.origin, source=MARKUP, path=MARKUP)
            files[path] = file.model_copy(update={"origin": origin})
    base = {**dict.fromkeys(manifest.base, MARKUP), "license": "mit"}
    changed = {"summary": MARKUP, "base": base, "versions": {MARKUP: MARKUP}, "files": files}
    changed |= {"skipped": {MARKUP: MARKUP}, "sampling": {"negative_prompt": MARKUP}}
    manifest = manifest.model_copy(update=changed)
    scores = scores_of(MARKUP, hardware=MARKUP, versions={MARKUP: MARKUP}, seeds=MARKUP, sampling={MARKUP: MARKUP})
    scores |= {"date": MARKUP, "prompts": [{"name": MARKUP, "count": 6, "sha256": MARKUP, "source": MARKUP}]}
    scores["metrics"][0] |= {"title": MARKUP, "checkpoint": MARKUP, "source": MARKUP}
    scores = Scores.model_validate(scores)
    picture = Picture("images/x.png", [MARKUP], [MARKUP], [MARKUP], {MARKUP: MARKUP})
    card = model_card(manifest, Publish(), scores=scores, purpose=[MARKUP], pictures=[picture])
    text = card.split("---\n", 2)[2]
    tokens = MarkdownIt().enable(["table", "strikethrough"]).parse(text)
    inline = [part for token in tokens for part in token.children or []]
    html = [token.content for token in [*tokens, *inline] if token.type.startswith("html")]
    assert not any("script" in part for part in html)
    assert [part.attrs["src"] for part in inline if part.type == "image"] == ["images/x.png"]
    links = [part.attrs["href"] for part in inline if part.type == "link_open"]
    assert links and all(link.startswith("https://huggingface.co/") for link in links)
    headings = [tokens[at + 1].content for at, token in enumerate(tokens) if token.type == "heading_open"]
    assert "e" not in headings and len(headings) == len(set(headings))
    page = validation_page(manifest, scores, {}, None)
    assert "<script" not in page
