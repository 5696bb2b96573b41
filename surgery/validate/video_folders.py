"""The drawn videos as mp4 files in a folder for each side, as other projects' tools read them.

VBench (Vchitect/VBench, prompts/README.md) looks for "{prompt}-{index}.mp4", the index counting the videos of a prompt
from 0; what measures FVD takes two folders of videos.
"""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from surgery.artifact.manifest import replace_file, write_json
from surgery.console import progress_bar
from surgery.errors import SurgeryError
from surgery.runtime.video import Video, video_file

from .store import read_drawn

_LONGEST = 255  # bytes of a file's name
_TAIL = 32  # bytes for "-{index}.mp4", and for what a file is called while it is written


def write_video_folders(prompts: Sequence[str], sides: Mapping[str, Sequence[Path]], folder: Path | str) -> Path:
    """Write the mp4 files of {side: a drawn video of each prompt} into a folder for each side; the folder's path.

    prompts.json beside them has {file name: prompt}. A prompt that can be no file name has its name cut short, with a
    hash at its end. Raises InputError where mp4 cannot be written here, SurgeryError where the disk cannot be.
    """
    folder, seen, names = Path(folder), Counter(), {}
    try:
        with progress_bar("writing mp4", len(sides) * len(prompts), "videos") as advance:
            for at, text in enumerate(prompts):
                name = f"{_file_name(text)}-{seen[text]}.mp4"
                seen[text] += 1
                names[name] = text
                for side, paths in sides.items():
                    video = read_drawn(paths[at])
                    assert isinstance(video, Video), "a pipeline of videos drew an image"
                    (folder / side).mkdir(parents=True, exist_ok=True)
                    replace_file(folder / side / name, video_file(video, "mp4"))
                    advance(1)
        write_json(folder / "prompts.json", {"schema_version": 1, "prompts": names})
    except OSError as error:
        raise SurgeryError(
            f"cannot write {error.filename or folder}: {error.strerror or error}; what was drawn is kept, run it again"
        ) from error
    return folder


def _file_name(prompt):
    """The prompt itself where it can be a file's name."""
    name = prompt.replace("/", "_").replace("\0", "_")
    if name == prompt and len(name.encode()) <= _LONGEST - _TAIL:
        return name
    short = name.encode()[: _LONGEST - _TAIL - 9].decode(errors="ignore")
    return f"{short}-{hashlib.sha256(prompt.encode()).hexdigest()[:8]}"
