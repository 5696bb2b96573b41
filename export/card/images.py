"""The pictures of an artifact's `images/` folder, each with what was written into it when it was drawn."""

from dataclasses import dataclass
from pathlib import Path

from surgery.bounded import open_image, parse_json
from surgery.errors import ArtifactError

IMAGES_FOLDER = "images"
KEY = "surgery"  # the PNG text chunk


@dataclass(frozen=True)
class Picture:
    """A PNG that `surgery generate` drew of this artifact: rows of prompts, columns of seeds, base beside patched."""

    path: str  # images/x.png
    prompts: list
    seeds: list
    columns: list
    sampling: dict


def read_pictures(folder, artifact_hash):
    """The Pictures of an artifact folder, by name; ArtifactError for one that was not drawn of this very artifact."""
    pictures = []
    for path in sorted(Path(folder, IMAGES_FOLDER).glob("*")) if Path(folder, IMAGES_FOLDER).is_dir() else []:
        record = _record(path)
        if record.get("artifact") != artifact_hash:
            whose = f"of another artifact ({str(record['artifact'])[:12]})" if record.get("artifact") else "elsewhere"
            raise ArtifactError(
                f"{path} was drawn {whose}, so it may not stand on this artifact's card: take it away, or draw it with "
                f"`surgery generate {folder} PROMPT --out {path}`"
            )
        kinds = {"prompts": list, "seeds": list, "columns": list, "sampling": dict}
        wrong = [key for key, kind in kinds.items() if not isinstance(record.get(key), kind)]
        if wrong:
            raise ArtifactError(f"{path} does not say its {wrong[0]}; draw it again with `surgery generate`")
        pictures.append(Picture(f"{IMAGES_FOLDER}/{path.name}", *(record[key] for key in kinds)))
    return pictures


def _record(path):
    try:
        with open_image(path) as image:
            record = parse_json(image.info.get(KEY, "{}"))
        return record if isinstance(record, dict) else {}
    except (OSError, ValueError):
        return {}
