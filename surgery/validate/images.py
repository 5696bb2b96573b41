"""Drawn images as they are read back for scoring."""

from pathlib import Path

from surgery.bounded import open_image
from surgery.errors import SurgeryError


def read_image(path):
    """The PIL image (RGB) of a drawn PNG; a damaged one is removed, and SurgeryError says so."""
    try:
        with open_image(path) as image:
            return image.convert("RGB")
    except (OSError, ValueError) as error:
        if getattr(error, "errno", None) is not None:  # the system's, not Pillow's: the file may be well
            raise SurgeryError(f"{path} cannot be read: {error.strerror}; run the same command again") from error
        Path(path).unlink(missing_ok=True)
        raise SurgeryError(
            f"{path} is damaged ({error}) and was removed; run the same command again, which draws it anew"
        ) from error


def is_flagged(path):
    """Whether a safety checker blackened the image when it was drawn."""
    try:
        with open_image(path) as image:
            return '"flagged": true' in image.info.get("surgery", "")
    except (OSError, ValueError):
        return False  # read_image says what is wrong with it
