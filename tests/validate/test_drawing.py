"""Paired images: drawn from one loaded pipeline, each once, whatever is killed, full or done by how many."""

import errno
import hashlib
import io
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from surgery.errors import ArtifactError, InputError, SurgeryError
from surgery.runtime.worker import ImageRequest, Worker, WorkerConfig
from surgery.validate.jobs import Drawing, Job, Side, draw_sides, jobs_of
from surgery.validate.prompts import Prompt, PromptSet
from surgery.validate.store import ImageStore, locked

from ..nn.backbones.flux import flux
from .conftest import PROMPTS

SET = PromptSet("six", tuple(map(Prompt, PROMPTS)))
JOBS = jobs_of(SET)


def hashes(images):
    return {
        (side, key): hashlib.sha256(path.read_bytes()).hexdigest()
        for side in images
        for key, path in images[side].items()
    }


@pytest.fixture(scope="module")
def drawn(tmp_path_factory, sides, config):
    """(folder, images) of all jobs, two at once."""
    folder = tmp_path_factory.mktemp("drawn")
    return folder, draw_sides(folder, sides, JOBS, config, Drawing(batch=2)).paths


def test_the_sides_are_the_base_and_the_patched_pipeline(drawn, sides):
    from surgery.models.patching import patch
    from surgery.runtime.draw import draw

    from ..conftest import load_shapes

    _, images = drawn
    pipeline, pairs = load_shapes(), [(job.prompt.text, job.seed) for job in JOBS[:2]]
    sampling = {"steps": 2, "guidance_scale": 4.0, "height": 64, "width": 64}
    for side, made in (("base", draw(pipeline, pairs, sampling)), ("patched", None)):
        made = made or draw(patch(pipeline, scale=2.0), pairs, sampling)
        for job, image in zip(JOBS, made, strict=False):
            kept = np.asarray(Image.open(images[side][job.key]).convert("RGB"), int)
            assert np.abs(kept - np.asarray(image, int)).max() <= 1, (side, job)
    assert len(set(hashes(images).values())) == 2 * len(JOBS)  # no two are the same


def test_the_base_is_the_same_after_any_number_of_patched_images(config, sides):
    base, patched = sides
    worker = Worker(config)
    requests = [ImageRequest("a red circle", 1)]
    first, other, again = (worker.draw_files(side.operations, requests) for side in (base, patched, base))
    assert first == again != other
    assert worker.draw_files(patched.operations, requests) == other


def test_what_is_there_is_not_drawn_again(drawn, sides, config):
    folder, images = drawn
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.png")}
    told = []
    again = draw_sides(folder, sides, JOBS, config, Drawing(batch=4), announce=lambda *figures: told.append(figures))
    assert (again.paths, again.batch_sizes) == (images, (2,)) and not told
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.png")} == before


def test_more_images_of_each_prompt_are_added_to_those_that_are_there(drawn, sides, config, tmp_path):
    import shutil

    folder = tmp_path / "more"
    shutil.copytree(drawn[0], folder)
    told = []
    jobs = jobs_of(SET, 2)
    found = draw_sides(folder, sides, jobs, config, Drawing(batch=6), announce=lambda *figures: told.append(figures))
    images = found.paths
    assert told == [(12, 12, 6)] and len(images["base"]) == 12 and found.batch_sizes == (2, 6)
    assert {key: value for key, value in hashes(images).items() if key[1] in {job.key for job in JOBS}} == hashes(
        drawn[1]
    )


KILLED = """
import os, sys, time
from pathlib import Path
from tests.validate.test_drawing import JOBS
from surgery.validate import store
from surgery.validate.jobs import Drawing, draw_sides
from surgery.runtime.worker import WorkerConfig
from surgery.validate.jobs import sides_of, environment
from surgery.artifact import read_manifest
artifact, folder = map(Path, sys.argv[1:])
manifest = read_manifest(artifact)
config = WorkerConfig(str(artifact), None, manifest.hash, manifest.sampling, device="cpu", threads=1)
with store.locked(folder):
    draw_sides(folder, sides_of(manifest, artifact, environment("cpu", None)), JOBS, config, Drawing(batch=2))
"""


def test_a_killed_run_goes_on_and_ends_with_the_very_same_images(drawn, sides, config, artifact, tmp_path, processes):
    folder = tmp_path / "killed"
    process = processes.start([artifact, folder], python=KILLED, cwd=Path(__file__).parents[2])
    try:
        deadline = time.time() + 120
        while not list(folder.glob("images/*/batch-*")) and time.time() < deadline and process.poll() is None:
            time.sleep(0.01)
    finally:
        process.kill()
        process.wait()
    left = {path: path.stat().st_mtime_ns for path in folder.rglob("batch-*/*.png")}
    assert left and len(left) % 2 == 0  # whole batches
    with locked(folder):
        found = draw_sides(folder, sides, JOBS, config)  # the batch that it was begun with
    assert found.batch_sizes == (2,)
    assert hashes(found.paths) == hashes(drawn[1])
    assert left == {path: path.stat().st_mtime_ns for path in left}
    assert not list(folder.rglob("*.partial"))


def test_a_second_process_is_kept_out(tmp_path):
    with (
        locked(tmp_path / "work"),
        pytest.raises(InputError, match="another process is at work"),
        locked(tmp_path / "work"),
    ):
        pass
    with locked(tmp_path / "work"):
        pass


def test_a_full_disk_keeps_all_finished_batches(sides, config, tmp_path, monkeypatch):
    written = []
    real = Path.write_bytes

    def write(path, data):
        if path.suffix == ".png":
            written.append(path)
            if len(written) > 5:
                raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return real(path, data)

    monkeypatch.setattr(Path, "write_bytes", write)
    with pytest.raises(SurgeryError, match=r"is full\. What was drawn so far is kept: free some space"):
        draw_sides(tmp_path, sides, JOBS, config, Drawing(batch=2))
    assert len(list(tmp_path.rglob("*.png"))) == 4 and not list(tmp_path.rglob("*.partial"))


def test_out_of_memory_says_which_batch_to_try(sides, config, tmp_path, monkeypatch):
    def fail(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("surgery.runtime.draw.draw", fail)
    with pytest.raises(SurgeryError, match=r"drawing 6 images at once ran out of memory.*--batch 3"):
        draw_sides(tmp_path, sides, JOBS, config, Drawing(batch=6))


def test_an_artifact_that_changed_meanwhile_is_not_drawn(sides, config, tmp_path):
    other = WorkerConfig(config.model, None, "0" * 64, config.sampling, device="cpu")
    with pytest.raises(ArtifactError, match="not 000000000000"):
        draw_sides(tmp_path, sides, JOBS, other, Drawing(batch=2))


def test_a_schedule_is_carried_out_in_a_batch(config, sides):
    _, patched = sides
    never = [{**operation, "schedule": {"steps": [2, None]}} for operation in patched.operations]
    always = [{**operation, "schedule": {"steps": [0, None]}} for operation in patched.operations]
    worker = Worker(config)
    requests = [ImageRequest("a red circle", 1), ImageRequest("a star", 2)]
    plain, on, off = (worker.draw_files(operations, requests) for operations in (patched.operations, always, never))
    assert on == plain != off
    # Dense attention by the operator's code and by torch's own may differ in a pixel's last step.
    assert (
        np.abs(_pixels(off) - _pixels(worker.draw_files(None, requests))).max()
        <= 1
        < np.abs(_pixels(off) - _pixels(on)).max()
    )


def test_the_batch_is_chosen_by_the_size_of_the_images(config):
    worker = Worker(config)
    assert worker.batch_size() == 16
    assert Worker(replace(config, sampling={"height": 512, "width": 512})).batch_size() == 1


def test_the_batch_of_a_model_that_names_no_size_is_chosen_too():
    worker = Worker(WorkerConfig("a FLUX", None, None, {}))
    pipeline = worker.__dict__["pipeline"] = flux()[0]  # whose transformer's config has no sample_size
    assert worker.batch_size() == max(1, 16 // pipeline.vae_scale_factor**2)  # 128 latents wide, by its pipeline
    worker.config = replace(worker.config, sampling={"height": 256, "width": 128})
    assert worker.batch_size() == 8


def test_seeds_depend_on_prompt_and_number_alone():
    again = jobs_of(PromptSet("other", tuple(map(Prompt, reversed(PROMPTS)))))
    assert {job.key for job in again} == {job.key for job in JOBS}
    twice = jobs_of(PromptSet("twice", (Prompt("a star"), Prompt("a star"))), 2)
    assert len({job.key for job in twice}) == 4
    assert not {job.key for job in jobs_of(SET, seed=1)} & {job.key for job in JOBS}
    assert all(0 <= job.seed < 2**32 for job in jobs_of(SET, 50))


def test_sides_are_kept_apart_by_all_that_an_image_depends_on(sides):
    base, patched = sides
    keys = {base.key, patched.key}
    for change in ({"sampling": {"steps": 3}}, {"dtype": "float16"}, {"device": "cuda"}, {"base": "0"}):
        keys.add(Side("patched", patched.operations, {**patched.identity, **change}).key)
    keys.add(Side("patched", [{**patched.operations[0], "scale": 1.0}], patched.identity).key)
    assert len(keys) == 7


def test_sides_of_one_name_are_not_mixed_up_and_one_side_under_two_names_is_found(sides, config, tmp_path):
    base, patched = sides
    other = Side("patched", [{**patched.operations[0], "scale": 0.5}], patched.identity)
    draw_sides(tmp_path, [base, patched, other], JOBS[:2], config, Drawing(batch=2))
    keys = {
        store.side.key: hashes({"x": store.existing()}) for store in (ImageStore(tmp_path, s) for s in (patched, other))
    }
    assert keys[patched.key] != keys[other.key] and all(len(found) == 2 for found in keys.values())
    renamed = Side("another-name", patched.operations, patched.identity)
    assert ImageStore(tmp_path, renamed).existing() == ImageStore(tmp_path, patched).existing()


def test_what_is_in_a_batch_folder(tmp_path, sides):
    store = ImageStore(tmp_path, sides[0])
    jobs = [Job(Prompt("a"), 1), Job(Prompt("b"), 2)]
    store.add(jobs, [b"one", b"two"], 2)
    assert {key: path.read_bytes() for key, path in store.existing().items()} == {
        jobs[0].key: b"one",
        jobs[1].key: b"two",
    }
    assert (store.folder / "side.json").is_file() and store.batch_sizes() == {2}


def _pixels(files):
    return np.stack([np.asarray(Image.open(io.BytesIO(file))) for file in files]).astype(int)
