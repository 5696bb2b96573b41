"""A drawn video: its frames, and the files that hold it - without loss to score, as mp4, WebP or GIF to show."""

import io
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.PngImagePlugin import PngInfo

FORMATS = ("mp4", "webp", "gif")
MEDIA_TYPES = {"mp4": "video/mp4", "webp": "image/webp", "gif": "image/gif"}
_QUALITY = 9  # of imageio's 0 to 10; diffusers' own 5 blurs what is to be compared


@dataclass(eq=False)
class Video:
    """PIL frames of one size, shown `fps` a second. info: as a PIL image's."""

    frames: "Sequence[Image]"
    fps: float
    info: dict[str, Any] = field(default_factory=dict)

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels."""
        return self.frames[0].size

    def within(self, width: int) -> "Video":
        """The Video at most `width` pixels wide."""
        if self.size[0] <= width:
            return self
        size = width, max(1, round(self.size[1] * width / self.size[0]))
        return Video([frame.resize(size) for frame in self.frames], self.fps, self.info)


def require_mp4() -> None:
    """Raise InputError where what writes mp4 files is not installed."""
    absent = [name for name in ("imageio", "imageio_ffmpeg") if find_spec(name) is None]
    if absent:
        raise InputError(
            f"writing mp4 needs {' and '.join(absent)}: pip install 'pladis-surgery[video]'; WebP and GIF need neither"
        )


def video_file(video: Video, form: str) -> bytes:
    """The bytes of a file in one of FORMATS, which a player repeats without end; mp4 is H.264, by imageio's ffmpeg.

    Raises InputError for another format, and where mp4 cannot be written here.
    """
    if form == "mp4":
        return _mp4(video)
    if form not in FORMATS:
        raise InputError(f"a video is written as {', '.join(FORMATS)}, not {form}")
    settings = {"quality": 90, "method": 2} if form == "webp" else {}
    return _animation(video, form.upper(), **settings)


def lossless_file(video: Video, text: "PngInfo") -> bytes:
    """The bytes of an animated PNG, in which no pixel is changed; `text` goes into it. `frames_of` reads it."""
    return _animation(video, "PNG", pnginfo=text)


def _animation(video, form, **settings):
    file = io.BytesIO()
    first, *others = (frame.convert("RGB") for frame in video.frames)
    duration = 1000 / video.fps
    first.save(file, format=form, save_all=True, append_images=others, duration=duration, loop=0, **settings)
    return file.getvalue()


def frames_of(image: "Image", count: int, fps: float) -> "list[Image]":
    """The `count` RGB frames of an opened file that `lossless_file` wrote.

    Pillow writes frames that are alike once, to be shown the longer: they are given back as often as they were. Raises
    ValueError where there are not as many.
    """
    written = getattr(image, "n_frames", 1)
    frames = []
    for number in range(written):
        image.seek(number)
        times = round(image.info["duration"] * fps / 1000) if written > 1 else count
        frames += [image.convert("RGB")] * times
    if len(frames) != count:
        raise ValueError(f"it holds {len(frames)} frames of {count}")
    return frames


def _mp4(video):
    require_mp4()
    from diffusers.utils import export_to_video

    frames = [_even(frame.convert("RGB")) for frame in video.frames]
    with tempfile.TemporaryDirectory(prefix="surgery-video-") as folder:
        path = os.path.join(folder, "video.mp4")
        # a macro block of 16 pixels would have other sizes stretched
        export_to_video(frames, path, fps=video.fps, quality=_QUALITY, macro_block_size=2)  # pyright: ignore[reportArgumentType]
        return Path(path).read_bytes()


def _even(frame):
    """The frame, with a black row or column more where H.264's halved colours ask for an even side."""
    width, height = (side + side % 2 for side in frame.size)
    return frame if (width, height) == frame.size else frame.crop((0, 0, width, height))
