"""Artifacts: weightless, whole or not at all."""

import errno
import json
import os
import shutil
import signal
import time

import pytest

import surgery
from surgery.artifact.manifest import unlisted_files, write_json
from surgery.errors import InputError, SurgeryError

from ..conftest import SHAPES

UNET = "unet/diffusion_pytorch_model.safetensors"


def test_weights_are_the_bases_own_files_and_the_rest_is_small(shapes_artifact):
    own = 0
    for path in shapes_artifact.rglob("*"):
        if path.suffix == ".safetensors" and "00002" not in path.name:
            assert path.samefile(SHAPES / path.relative_to(shapes_artifact))
        elif path.is_file():
            assert path.stat().st_nlink == 1  # an edit of the artifact's text must not reach the base
            own += path.stat().st_size
    assert own < 420_000


def test_the_manifest_accounts_for_every_file(shapes_artifact):
    manifest = json.loads((shapes_artifact / "surgery.json").read_text())
    there = {path.relative_to(shapes_artifact).as_posix() for path in shapes_artifact.rglob("*") if path.is_file()}
    assert set(manifest["files"]) == there - {"surgery.json"}
    assert manifest["files"][UNET]["origin"]["kind"] == "base"
    assert manifest["operations"][0]["alpha"] == 1.5 and len(manifest["operations"][0]["layers"]) == 7
    assert {"torch", "diffusers", "pladis-surgery", "python"} <= set(manifest["versions"])
    assert str(SHAPES.parent) not in json.dumps(manifest)  # no path of this machine


def test_the_same_recipe_gives_the_same_hash_and_another_scale_another(recipe, tmp_path):
    hashes = [surgery.apply(recipe, tmp_path / name).manifest.hash for name in ("a", "b")]
    other = surgery.apply(recipe, tmp_path / "c", overrides=["operations.0.with.scale=1.1"])
    assert hashes[0] == hashes[1] != other.manifest.hash
    assert "scale: 1.1" in (tmp_path / "c/recipe.yaml").read_text()


def test_where_links_do_not_work_files_are_copied(recipe, tmp_path, monkeypatch):
    def no_link(*_):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", no_link)
    artifact = surgery.apply(recipe, tmp_path / "out")
    assert artifact.linked_bytes == 0 and artifact.copied_bytes > 13e6
    assert not (artifact.folder / UNET).samefile(SHAPES / UNET)
    surgery.load(artifact.folder, verify=True, quiet=True)


def test_an_existing_folder_is_refused_without_force_and_a_strangers_folder_always(recipe, tmp_path):
    out = surgery.apply(recipe, tmp_path / "out").folder
    with pytest.raises(InputError, match="exists already; --force replaces it"):
        surgery.apply(recipe, out)
    surgery.apply(recipe, out, force=True)
    stranger = tmp_path / "photos"
    stranger.mkdir()
    (stranger / "cat.png").write_text("mine")
    with pytest.raises(InputError, match="is no surgery artifact, so it is never replaced"):
        surgery.apply(recipe, stranger, force=True)
    assert (stranger / "cat.png").read_text() == "mine"


def test_through_a_link_the_linked_folder_is_replaced(recipe, tmp_path):
    surgery.apply(recipe, tmp_path / "real")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    surgery.apply(recipe, tmp_path / "link", force=True, overrides=["name=new"])
    assert (tmp_path / "link").is_symlink()
    assert surgery.artifact.read_manifest(tmp_path / "real").name == "new"
    assert not list(tmp_path.glob(".*"))


def test_two_writers_of_one_folder_leave_one_whole_artifact(recipe, tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    def write(number):
        try:
            return surgery.apply(recipe, tmp_path / "out", overrides=[f"operations.0.with.scale={number}.5"])
        except SurgeryError as error:
            return error

    with ThreadPoolExecutor(3) as pool:
        done = list(pool.map(write, range(3)))
    assert sum(not isinstance(one, SurgeryError) for one in done) == 1, done
    surgery.load(tmp_path / "out", verify=True, quiet=True)
    assert not list(tmp_path.glob(".out*"))


def test_what_a_killed_replacement_left_is_cleared_away(recipe, tmp_path):
    surgery.apply(recipe, tmp_path / "out")
    left = tmp_path / ".out.4194305-0123abcd.replaced"  # beyond the largest process id
    left.mkdir()
    (left / "file").write_text("old")
    surgery.apply(recipe, tmp_path / "out", force=True)
    assert not left.exists() and (tmp_path / "out" / "surgery.json").is_file()


def test_a_file_that_cannot_be_written_is_an_error_and_leaves_nothing(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="Read-only"):
        write_json(tmp_path / "x.json", {})
    assert not list(tmp_path.iterdir())


def test_only_what_loading_reads_must_be_listed(shapes_artifact):
    manifest = surgery.artifact.read_manifest(shapes_artifact)
    harmless = ["images/x.json", "engines/x.json", "unet/.hidden.json", "unet/notes.md", "LICENSE.json"]
    assert unlisted_files(manifest, [*manifest.files, *harmless]) == []
    loaded = ["adapter_config.json", "unet/x.safetensors", "x/images/x.json"]
    assert unlisted_files(manifest, [*manifest.files, *loaded]) == loaded


def test_a_full_disk_is_a_clear_error_and_leaves_nothing(recipe, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "link", full)
    monkeypatch.setattr(shutil, "copyfile", full)
    before = set(tmp_path.iterdir())
    with pytest.raises(SurgeryError, match="is full: it ran full while writing.* Nothing was left there"):
        surgery.apply(recipe, tmp_path / "out")
    assert set(tmp_path.iterdir()) == before


def test_too_little_space_is_found_before_anything_is_written(recipe, tmp_path, monkeypatch):
    nearly_full = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: nearly_full)
    monkeypatch.setattr(os, "mkdir", lambda *_: pytest.fail("something was written"))
    with pytest.raises(SurgeryError, match="1.0 MB are needed, 0.0 MB are free"):
        surgery.apply(recipe, tmp_path / "out")


@pytest.mark.parametrize("where", ["_write_denoiser", "_hash_files", "_manifest"])
def test_a_kill_in_the_middle_leaves_no_artifact_and_the_next_run_cleans_up(recipe, tmp_path, processes, where):
    code = (
        "import os, signal, surgery, surgery.artifact.write as write\n"
        f"write.{where} = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"surgery.apply({str(recipe)!r}, {str(tmp_path / 'out')!r}, force=True)\n"
    )
    assert processes.start(python=code).wait() == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    assert len(list(tmp_path.glob(".out.*.partial"))) == 1
    surgery.load(surgery.apply(recipe, tmp_path / "out").folder, quiet=True)
    assert not list(tmp_path.glob(".out.*"))


def test_a_kill_while_an_artifact_is_replaced_keeps_the_old_or_the_new_one(recipe, tmp_path, processes):
    old = surgery.apply(recipe, tmp_path / "out").manifest.hash
    code = (
        "import os, signal, surgery\n"
        "rename = os.rename\n"
        "def killed(source, target):\n"
        "    rename(source, target)\n"
        "    if str(target).endswith('.replaced'):\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "os.rename = killed\n"
        f"surgery.apply({str(recipe)!r}, {str(tmp_path / 'out')!r}, force=True, overrides=['name=new'])\n"
    )
    assert processes.start(python=code).wait() == -signal.SIGKILL
    with pytest.raises(InputError, match="exists already"):  # the next run puts the old one back first
        surgery.apply(recipe, tmp_path / "out")
    assert surgery.artifact.read_manifest(tmp_path / "out").hash == old
    assert not list(tmp_path.glob(".out.*"))


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_cleans_up_after_itself(recipe, tmp_path, processes, stop):
    code = (
        "import signal, time, surgery.artifact.write as write\n"
        # A shell that starts the tests in the background lets their children ignore SIGINT.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "write._hash_files = lambda *a, **k: (print('now', flush=True), time.sleep(60))\n"
        "from surgery.cli import main\n"
        f"raise SystemExit(main(['apply', {str(recipe)!r}, '--out', {str(tmp_path / 'out')!r}]))\n"
    )
    process = processes.start(python=code)
    while process.poll() is None and process.out() != "now\n":
        time.sleep(0.01)
    process.send_signal(stop)
    assert process.wait(30) == (130 if stop == signal.SIGINT else 128 + signal.SIGTERM)
    assert "Traceback" not in process.errors()
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_a_kill_at_any_time_never_leaves_half_an_artifact(recipe, tmp_path, processes):
    process = processes.start(["apply", recipe, "--out", tmp_path / "out"])
    while process.poll() is None and not list(tmp_path.glob(".out.*.partial/unet")):
        time.sleep(0.001)
    process.kill()
    process.wait()
    if (tmp_path / "out").exists():
        surgery.load(tmp_path / "out", verify=True, quiet=True)
    surgery.load(surgery.apply(recipe, tmp_path / "out", force=True).folder, verify=True, quiet=True)
