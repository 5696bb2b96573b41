"""Videos: drawn from their seeds, written and read back, and what `surgery generate` makes of them."""

import io
import json
import tempfile

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from surgery.errors import InputError, RecipeError
from surgery.models.videos import draws_videos, frame_rate, number_of_frames
from surgery.recipe.plan import make_plan
from surgery.runtime.draw import draw, generate
from surgery.runtime.sheet import evenly, film_strip, moving_picture
from surgery.runtime.video import Video, frames_of, lossless_file, video_file

from ..conftest import SHAPES, load_shapes
from ..nn.backbones.video import hunyuan_video, ltx, mochi, wan
from .videos import SAMPLING, video_artifact  # noqa: F401  a fixture

RANDOM = np.random.default_rng(0)


def noise(count, size=(24, 16), fps=8):
    """A Video of random pixels."""
    width, height = size
    pixels = RANDOM.integers(0, 256, (count, height, width, 3), dtype=np.uint8)
    return Video([Image.fromarray(frame) for frame in pixels], fps)


def stacked(frames):
    return np.stack([np.asarray(frame.convert("RGB"), int) for frame in frames])


@pytest.mark.parametrize("build", [ltx, wan, mochi, hunyuan_video])
def test_a_video_comes_from_its_seed_whatever_it_is_drawn_with(build):
    pipeline, arguments = build()
    sampling = {name: arguments[name] for name in ("height", "width", "num_frames", "max_sequence_length")}
    sampling |= {"steps": 2, "guidance_scale": arguments.get("guidance_scale", 3.0)}
    (alone,) = draw(pipeline, [("a cat", 5)], sampling)
    other, again = draw(pipeline, [("a dog", 1), ("a cat", 5)], sampling)
    assert len(alone.frames) == arguments["num_frames"] and alone.size == (arguments["width"], arguments["height"])
    assert np.abs(stacked(alone.frames) - stacked(again.frames)).max() <= 2
    assert np.abs(stacked(alone.frames) - stacked(other.frames)).max() > 20


def test_frames_are_shown_at_the_rate_of_the_recipe_else_of_the_model():
    assert draws_videos("LTXPipeline") and not draws_videos("StableDiffusionPipeline") and not draws_videos(None)
    rates = [frame_rate(name, {}) for name in ("LTXPipeline", "WanPipeline")]
    assert rates == [25, 16] and frame_rate("LTXPipeline", {"fps": 8}) == 8
    assert number_of_frames("LTXPipeline", {}) == 161 and number_of_frames("FluxPipeline", {}) is None
    pipeline, given = ltx()[0], []
    call = pipeline.transformer.forward
    pipeline.transformer.forward = lambda *parts, **named: (
        given.append(named["rope_interpolation_scale"]) or call(*parts, **named)
    )
    (video,) = draw(pipeline, [("a cat", 0)], SAMPLING)
    assert video.fps == 4 and given[0][0] == pipeline.vae_temporal_compression_ratio / 4  # LTX is told its rate


def test_settings_of_videos_are_refused_where_images_are_drawn(tmp_path):
    for setting in ({"num_frames": 9}, {"fps": 4}):
        with pytest.raises(InputError, match="draws images, not videos; leave"):
            draw(load_shapes(), [("a star", 0)], {"steps": 2, **setting})
    recipe = {
        "schema": 1,
        "name": "x",
        "base": {"pipeline": str(SHAPES)},
        "operations": [{"replace": "cross-attention", "with": {"operator": "pladis"}}],
        "sampling": {"num_frames": 9, "fps": 4},
    }
    (tmp_path / "x.yaml").write_text(json.dumps(recipe))
    with pytest.raises(RecipeError, match=r"sampling\.num_frames: StableDiffusionPipeline draws images.*leave it out"):
        make_plan(tmp_path / "x.yaml")


@pytest.mark.parametrize("order", [[0, 1, 2], [0, 0, 1, 1], [0, 0, 0], [0]])
def test_no_pixel_and_no_frame_is_lost_in_the_file_that_is_kept(order):
    different = noise(3, fps=24).frames
    video = Video([different[place] for place in order], 24)
    text = PngInfo()
    text.add_itxt("surgery", "told")
    file = lossless_file(video, text)
    with Image.open(io.BytesIO(file)) as image:
        assert image.info["surgery"] == "told"
        assert (stacked(frames_of(image, len(order), 24)) == stacked(video.frames)).all()


def test_a_file_that_lacks_frames_is_not_taken_for_whole():
    file = io.BytesIO(lossless_file(noise(3), PngInfo()))
    with Image.open(file) as image, pytest.raises(ValueError, match="3 frames of 4"):
        frames_of(image, 4, 8)


@pytest.mark.parametrize("form", ["webp", "gif"])
def test_an_animation_lasts_as_long_as_its_frames(form):
    with Image.open(io.BytesIO(video_file(noise(5, fps=10), form))) as image:
        durations = []
        for number in range(image.n_frames):
            image.seek(number)
            image.load()
            durations.append(image.info["duration"])
    assert image.format == form.upper() and durations == [100] * 5
    with pytest.raises(InputError, match="mp4, webp, gif"):
        video_file(noise(2), "avi")


def test_an_mp4_has_the_frames_their_rate_and_their_size():
    reader = pytest.importorskip("imageio_ffmpeg").read_frames
    grey = Video([Image.new("RGB", (49, 30), (level, level, level)) for level in (20, 90, 160, 230)], 5)

    def read(path):
        frames = reader(str(path))
        told = next(frames)
        width, height = told["size"]
        return told, [np.frombuffer(frame, np.uint8).reshape(height, width, 3) for frame in frames]

    with tempfile.NamedTemporaryFile(suffix=".mp4") as file:
        file.write(video_file(grey, "mp4"))
        file.flush()
        told, frames = read(file.name)
    assert told["size"] == (50, 30) and told["fps"] == 5 and told["codec"] == "h264" and len(frames) == 4
    for level, frame in zip((20, 90, 160, 230), frames, strict=True):
        assert abs(float(frame[:, :40].mean()) - level) < 6


def test_without_ffmpeg_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr("surgery.runtime.video.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"imageio and imageio_ffmpeg: pip install 'pladis-surgery\[video\]'"):
        video_file(noise(2), "mp4")


def test_a_strip_shows_frames_from_first_to_last():
    assert evenly(9, 4) == [0, 3, 5, 8] and evenly(3, 4) == [0, 1, 2] and evenly(9, 1) == [0]
    video = noise(9)
    strip = film_strip(video.frames, 4)
    assert strip.size == (24, 64)
    assert (np.asarray(strip.crop((0, 48, 24, 64))) == np.asarray(video.frames[8])).all()


def test_a_moving_picture_has_each_video_in_its_place_at_every_frame():
    base, patched = noise(3, (160, 160)), noise(3, (160, 160))
    columns = {"base": {("a", 0): base}, "patched": {("a", 0): patched}}
    sheet = moving_picture(columns, ["a"], [0])
    assert len(sheet.frames) == 3 and sheet.fps == 8
    for number, frame in enumerate(sheet.frames):
        (left,), (right,) = (places(np.asarray(frame), np.asarray(of.frames[number])) for of in (base, patched))
        assert left[0] == right[0] and left[1] + 160 <= right[1]


def places(whole, part):
    """[(top, left)] of where a picture holds another."""
    height, width, _ = part.shape
    starts = np.argwhere((whole == part[0, 0]).all(-1)[: 1 - height, : 1 - width])
    return [(y, x) for y, x in starts if (whole[y : y + height, x : x + width] == part).all()]


def test_what_is_done_is_kept_at_once():
    kept = []
    drawn = generate(ltx()[0], ["a cat", "a dog"], [0], SAMPLING, keep=lambda *of: kept.append(of))
    assert [(prompt, seed) for prompt, seed, _ in kept] == list(drawn) and kept[0][2] is drawn["a cat", 0]


def test_generate_writes_each_video_and_all_of_them_side_by_side(run, video_artifact, tmp_path):  # noqa: F811
    options = ["--images", "1", "--num-frames", "5", "--json"]
    done = run("generate", video_artifact, "a cat", *options, "--out", tmp_path / "all.webp", check=0)
    made = json.loads(done.stdout)
    assert (
        made["columns"] == ["base", "patched"] and made["sampling"]["num_frames"] == 5 and made["sampling"]["fps"] == 4
    )
    singles = {}
    for side in ("base", "patched"):
        with Image.open(tmp_path / "all" / f"{side}-0-0.webp") as image:
            assert image.n_frames == 5 and image.size == (32, 32)
            singles[side] = image.convert("RGB").tobytes()
    assert singles["base"] != singles["patched"]
    with Image.open(tmp_path / "all.webp") as image:
        assert image.n_frames == 5 and image.width > 2 * 160
    assert json.loads((tmp_path / "all.json").read_text())["artifact"]
    refused = run("generate", video_artifact, "a cat", "--out", tmp_path / "x.png")
    assert refused.returncode == 2 and ".mp4 or .webp or .gif" in refused.stderr
    refused = run("generate", SHAPES, "a star", "--out", tmp_path / "x.mp4")
    assert refused.returncode == 2 and "must name a .png file" in refused.stderr
