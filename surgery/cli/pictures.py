"""What the verbs that draw have in common: the PNG that they are to write, and the sampling settings they are given."""

import json
import os
from pathlib import Path

from surgery.errors import InputError
from surgery.hub.bounded import parse_yaml
from surgery.recipe.schema import sampling_problems


def png_path(text):
    """The path of the PNG to write; InputError for what is none."""
    out = Path(text)
    if out.suffix.lower() != ".png":
        raise InputError(f"--out must name a .png file, not {out}")
    if out.is_dir():
        raise InputError(f"--out {out} is a folder; name a .png file in it")
    return out


def given_sampling(arguments):
    """{setting: value} of the sampling settings on the command line; InputError for values out of range."""
    names = ("steps", "guidance_scale", "height", "width")
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    if problems := sampling_problems(given):
        raise InputError("\n  ".join(problems))
    return given


def given_guidance(text):
    """{"guidance": mapping} of --guidance, {} without it; InputError for what is no method or setting of one."""
    if text is None:
        return {}
    import yaml

    from surgery.recipe.guidance import guidance_of

    try:
        return {"guidance": guidance_of(parse_yaml(text)).model_dump()}
    except (ValueError, yaml.YAMLError) as error:
        raise InputError(f"--guidance {text[:100]}: {' '.join(str(error).split())[:300]}") from error


def save_png(image, out, record):
    """Write a PNG that carries how it was drawn, so that a model card can show it with its prompts and its artifact."""
    from PIL.PngImagePlugin import PngInfo

    text = PngInfo()
    text.add_itxt("surgery", json.dumps(record, ensure_ascii=False))
    partial = out.with_name(f".{out.name}.partial")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        image.save(partial, format="PNG", pnginfo=text)
        os.replace(partial, out)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise InputError(f"cannot write {out}: {error.strerror or error}") from error
