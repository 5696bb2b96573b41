"""A model of videos validated: what is kept, resumed, scored frame by frame, shown and handed to other tools."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from surgery.artifact import read_manifest
from surgery.errors import InputError, SurgeryError
from surgery.runtime.worker import ImageRequest, Worker, WorkerConfig
from surgery.validate import Drawing, validate
from surgery.validate.frames import SCORED, compared, scored
from surgery.validate.jobs import Side, draw_sides, environment, jobs_of, sides_of
from surgery.validate.prompts import open_prompts
from surgery.validate.report.pictures import LabelledPair, pairs_sheet
from surgery.validate.store import ImageStore, read_drawn, read_image
from surgery.validate.video_folders import write_video_folders

from ..runtime.videos import video_artifact  # noqa: F401  a fixture

PROMPTS = ["a cat", "a cat on it"]


@pytest.fixture(scope="module")
def drawn(video_artifact, tmp_path_factory):  # noqa: F811
    """(the work folder, the PairedImages) of two prompts, drawn two at once."""
    manifest = read_manifest(video_artifact)
    config = WorkerConfig(str(video_artifact), None, manifest.hash, manifest.sampling, device="cpu", threads=1)
    work = tmp_path_factory.mktemp("work")
    base, patched = sides_of(manifest, video_artifact, environment("cpu", None))
    images = draw_sides(work, (base, patched), jobs_of(open_prompts(PROMPTS, work)), config, Drawing(batch=2))
    return work, images.paired(base, patched)


def frames(path):
    return np.stack([np.asarray(frame, float) for frame in read_drawn(path).frames])


def test_a_video_is_kept_as_the_worker_drew_it(drawn, video_artifact):  # noqa: F811
    manifest = read_manifest(video_artifact)
    worker = Worker(WorkerConfig(str(video_artifact), None, manifest.hash, manifest.sampling, device="cpu", threads=1))
    assert worker.batch_size() == 1
    _, images = drawn
    for pair in images.pairs:
        (video,) = worker.draw([ImageRequest(pair.job.prompt.text, pair.job.seed)])
        kept = read_drawn(pair.patched)
        assert kept.fps == video.fps == 4 and len(kept.frames) == 9
        assert np.abs(frames(pair.patched) - np.stack([np.asarray(f, float) for f in video.frames])).max() <= 2
        assert (np.asarray(read_image(pair.patched)) == frames(pair.patched)[0]).all()
        assert (frames(pair.base) != frames(pair.patched)).any()


def test_fidelity_is_the_mean_over_all_frames_and_a_run_goes_on_from_what_is_there(
    drawn,
    video_artifact,  # noqa: F811
    tmp_path,
    monkeypatch,
):
    work, images = drawn
    monkeypatch.setattr("surgery.validate.jobs.worker_pool", None)  # nothing is left to draw
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    given = {"prompts": tmp_path / "prompts.txt", "metrics": ["psnr"], "drawing": Drawing(device="cpu")}
    done = validate(video_artifact, out=work, **given)
    by_frame = []
    for pair in images.pairs:
        errors = ((frames(pair.base) / 255 - frames(pair.patched) / 255) ** 2).mean((1, 2, 3))
        by_frame.append(np.mean(np.minimum(100, 10 * np.log10(1 / errors))))
    assert done.scores.metrics[0].patched == pytest.approx(np.mean(by_frame), abs=1e-5)
    assert f"{SCORED} evenly spaced frames" in done.scores.drawing["frames"] and done.scores.sampling["fps"] == 4
    for name in ("fid", "kid"):
        with pytest.raises(InputError, match=f"{name} compares images, and this model draws videos.*FVD"):
            validate(video_artifact, out=work, **{**given, "metrics": [name]})


class Brightness:
    """A metric of images: the mean of the pixels, and the mean difference."""

    def score(self, images, prompts):
        values = [np.asarray(image, float).mean() + len(text) for image, text in zip(images, prompts, strict=True)]
        return np.array(values)

    def compare(self, patched, base):
        pairs = zip(patched, base, strict=True)
        return np.array([np.abs(np.asarray(one, float) - np.asarray(other)).mean() for one, other in pairs])


def test_a_score_is_the_mean_over_eight_evenly_spaced_frames_and_an_images_its_own(drawn, tmp_path):
    _, images = drawn
    files = [pair.patched for pair in images.pairs]
    wanted = [frames(file)[[0, 1, 2, 3, 5, 6, 7, 8]].mean((1, 2, 3)).mean() + 3 for file in files]
    assert scored(Brightness(), files, ["abc", "def"]) == pytest.approx(wanted)
    wanted = [np.abs(frames(pair.patched) - frames(pair.base)).mean() for pair in images.pairs]
    assert compared(Brightness(), files, [pair.base for pair in images.pairs]) == pytest.approx(wanted)
    for level in (10, 200):
        Image.new("RGB", (8, 8), (level, level, level)).save(tmp_path / f"{level}.png")
    stills = [tmp_path / "10.png", tmp_path / "200.png"]
    assert scored(Brightness(), stills, ["a", "bc"]).tolist() == [11, 202]
    assert compared(Brightness(), stills, stills[::-1]).tolist() == [190, 190]


def test_the_report_shows_strips_of_frames_base_beside_patched(drawn):
    pair = drawn[1].pairs[0]
    sheet = np.asarray(Image.open(io.BytesIO(pairs_sheet([LabelledPair(pair, "")], side=32))), float)
    found = []
    for path in (pair.base, pair.patched):
        strip = np.concatenate(frames(path)[[0, 3, 5, 8]])
        found += [x for x in range(sheet.shape[1] - 31) if np.array_equal(sheet[76 : 76 + 128, x : x + 32], strip)]
    assert len(found) == 2 and found[0] < found[1]


def test_other_tools_find_a_folder_for_each_side(drawn, tmp_path):
    reader = pytest.importorskip("imageio_ffmpeg").read_frames
    pair = drawn[1].pairs[0]
    long = "a cat/dog " + "x" * 300
    sides = {"base": [pair.base] * 3, "patched": [pair.patched] * 3}
    folder = write_video_folders(["a cat", "a cat", long], sides, tmp_path / "videos")
    names = json.loads((folder / "prompts.json").read_text())["prompts"]
    assert list(names.values()) == ["a cat", "a cat", long] and list(names)[:2] == ["a cat-0.mp4", "a cat-1.mp4"]
    for side in ("base", "patched"):
        assert {path.name for path in (folder / side).iterdir()} == set(names)
        told = next(reader(str(folder / side / "a cat-0.mp4")))
        assert told["size"] == (32, 32) and told["fps"] == 4


def test_videos_are_for_models_that_draw_them(artifact, tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    with pytest.raises(InputError, match="draws images"):
        validate(
            artifact, prompts=tmp_path / "prompts.txt", metrics=["ssim"], videos=tmp_path / "v", out=tmp_path / "w"
        )


def test_a_file_that_lost_frames_is_removed_and_drawn_anew(drawn, tmp_path):
    job = drawn[1].pairs[0].job
    store = ImageStore(tmp_path, Side("base", None, {}))
    whole = drawn[1].pairs[0].base.read_bytes()
    store.add([job], [whole[: len(whole) // 2]], 1)
    with pytest.raises(SurgeryError, match="damaged.*draws it anew"):
        read_drawn(store.existing()[job.key])
    assert not store.existing()
