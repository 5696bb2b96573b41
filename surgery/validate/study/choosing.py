"""The pairs of a validation that a study shows: drawn at random, not the ones that look best."""

import csv
import io
import random
from pathlib import Path

from surgery.artifact.scores import SCORES
from surgery.bounded import read_json, read_text
from surgery.errors import InputError

from .page import Pair


def choose_pairs(folder, count, seed=0):
    """(Pairs, artifact hash) of a validation folder: `count` of its pairs, at most one of each prompt.

    Raises InputError where the folder holds no validation, its files are damaged, or it has no pair.
    """
    folder = Path(folder)
    table, scores = folder / "pairs.csv", folder / SCORES
    if count < 1:
        raise InputError(f"--pairs must be at least 1, not {count}")
    if not table.is_file() or not scores.is_file():
        raise InputError(f"{folder} holds no finished validation (pairs.csv, {SCORES}); run `surgery validate` first")
    try:
        rows = list(csv.DictReader(io.StringIO(read_text(table), newline="")))
        pairs = [Pair(row["prompt"], int(row["seed"]), folder / row["base"], folder / row["patched"]) for row in rows]
        artifact_hash = read_json(scores)["artifact_hash"]
    except (OSError, KeyError, TypeError, ValueError, csv.Error) as error:
        raise InputError(f"{table} or {scores} is damaged ({error}); run `surgery validate` again") from error
    chance = random.Random(seed)
    chance.shuffle(pairs)
    return list({pair.prompt: pair for pair in pairs}.values())[:count], artifact_hash
