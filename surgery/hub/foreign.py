"""What other libraries raise over the files they are given, as one error in a line that names the file.

safetensors, torch and transformers have errors of their own, tokenizers raises bare Exceptions, and what a damaged
config sets off may be anything; none of it tells a user which file to replace.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from surgery.errors import ArtifactError, SurgeryError

from .bounded import files_below, parse_json, read_json, read_text

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

_MOST = {"layers": 1000, "blocks": 1000, "depth": 1000, "timesteps": 100_000}  # where a key has that word
_LARGEST_JSON = 1 << 27  # tokenizer.json of a large vocabulary has 33 MB


@contextmanager
def reading(what: str, folder: str | Path | None = None, kind: type[SurgeryError] = ArtifactError) -> Iterator[None]:
    """Within this block every Exception that is not this package's becomes `kind`.

    what: the beginning of its text, as "x cannot be loaded". folder: the files that are being read; the first of them
    that is damaged in itself is named.
    """
    try:
        yield
    except SurgeryError:
        raise
    except Exception as error:  # bare ones are what tokenizers and onnxruntime raise
        damage = damage_in(folder)
        raise kind(f"{what}: {f'{damage}; build or fetch it again' if damage else first_line(error)}") from error


def first_line(error: Exception) -> str:
    """The first line of an error's text, at most 300 characters, or its class where it says nothing."""
    lines = str(error).strip().splitlines()
    text = lines[0][:300] if lines else type(error).__name__
    return f"{type(error).__name__} {text}" if isinstance(error, (KeyError, IndexError)) else text


def damage_in(folder: str | Path | None) -> str | None:
    """ "x.safetensors: why it cannot be read" for the first damaged file of a folder; None where each can be."""
    if not folder:
        return None
    for path in _files(folder):
        if problem := damage_of(Path(folder, path)):
            return f"{Path(folder, path)}: {problem}"
    return None


def _files(folder):
    try:
        return files_below(folder)
    except (OSError, ValueError):
        return ()


def damage_of(path: Path) -> str | None:
    """Why a weight file or a JSON file cannot be read, one line; None where it can be, or is another kind of file."""
    from safetensors import safe_open

    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="numpy"):
                return None
        if path.suffix == ".json":
            parse_json(read_text(path, _LARGEST_JSON))
        if path.suffix in (".bin", ".pt", ".pth", ".ckpt"):
            import torch

            torch.load(path, map_location="meta", weights_only=True)
    except Exception as error:  # changed bytes may set off anything within a pickle
        return first_line(error)
    return None


def check_sizes(folder: str | Path) -> None:
    """Raise ArtifactError where a model's or scheduler's config asks for more of something than any has."""
    for path in sorted([*Path(folder).glob("*/config.json"), *Path(folder).glob("*/scheduler_config.json")]):
        try:
            problem = size_problem(read_json(path))
        except (OSError, ValueError) as error:
            problem = f"it cannot be read as JSON: {error}"
        if problem:
            raise ArtifactError(f"{path}: {problem}; build or fetch it again")


def size_problem(config: Mapping) -> str | None:
    """Which entry of a config would have a model built without end, in words; None where none would."""
    for key, value in config.items():
        for one in value if isinstance(value, list) else [value]:
            most = next((most for word, most in _MOST.items() if word in key), None if type(one) is float else 1 << 40)
            if isinstance(one, dict) and (problem := size_problem(one)):
                return problem
            if most and type(one) in (int, float) and abs(one) > most:  # pyright: ignore[reportArgumentType]
                return f"{key} is {str(one)[:40]}, more than {most}"
    return None


def check_lengths(pipeline: "DiffusionPipeline", folder: str | Path) -> None:
    """Raise ArtifactError where a tokenizer would pad prompts beyond what its text encoder has positions for.

    CLIP's pipelines pad to the tokenizer's own length, whatever it says.
    """
    for name, encoder in pipeline.components.items():
        tokenizer = pipeline.components.get(name.replace("text_encoder", "tokenizer"))
        config = getattr(encoder, "config", None)
        if not name.startswith("text_encoder") or not str(getattr(config, "model_type", "")).startswith("clip"):
            continue
        longest = getattr(config, "text_config", config).max_position_embeddings  # pyright: ignore[reportOptionalMemberAccess]
        length = getattr(tokenizer, "model_max_length", longest)
        if not (isinstance(length, (int, float)) and 0 < length <= longest):
            path = Path(folder, name.replace("text_encoder", "tokenizer"), "tokenizer_config.json")
            raise ArtifactError(
                f"{path}: model_max_length is {str(length)[:40]}, and {name} has positions for {longest}; "
                "build or fetch it again"
            )
