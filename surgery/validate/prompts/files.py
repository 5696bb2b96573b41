"""A prompt, a set of prompts, and sets from files of one's own: a prompt per line, a table, or JSON.

.txt          a prompt per line; blank lines are skipped; "" is an empty prompt
.csv .tsv     a header, a column prompt, caption or text, and maybe one category; other columns are passed over
.json .jsonl  strings, or objects with a key prompt, caption or text and maybe category or tag; every further key
              is a fact about the prompt, and so is tag

A file of empty prompts alone, "" in .txt, .json and .jsonl, draws images without text; among others one is refused.
"""

import csv
import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from surgery.errors import InputError
from surgery.hub.bounded import parse_json, read_bytes

SUFFIXES = (".txt", ".csv", ".tsv", ".json", ".jsonl")
COLUMNS = ("prompt", "caption", "text")  # the first that is there is the prompt
CATEGORIES = ("category", "tag")
LONGEST = 10_000  # characters: what is longer is no prompt, but a file that was taken for one


@dataclass(frozen=True)
class Prompt:
    """What an image is asked to show.

    category: what per-category scores are grouped by, "" for none. facts: what a metric needs to judge an image of it
    (GenEval's `include`, the objects of a shapes prompt), plain JSON data.
    """

    text: str
    category: str = ""
    facts: dict = field(default_factory=dict)


@dataclass(frozen=True)
class PromptSet:
    """Prompts under a name. source: Hub data set or file name; revision: the data set's commit."""

    name: str
    prompts: tuple[Prompt, ...]
    source: str | None = None
    revision: str | None = None

    @property
    def sha256(self) -> str:
        """Of the prompts themselves: text, category and facts, in their order."""
        content = json.dumps([asdict(prompt) for prompt in self.prompts], sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(content.encode("utf-8")).hexdigest()

    def spread(self, count: int | None) -> "PromptSet":
        """The set with `count` of its prompts, evenly spaced in each category; itself if None."""
        total = len(self.prompts)
        if count is None or count >= total:
            return self
        # Where categories take turns, every n-th prompt of the whole could be of one category alone.
        categories = list(dict.fromkeys(prompt.category for prompt in self.prompts))
        sorted_places = sorted(range(total), key=lambda place: categories.index(self.prompts[place].category))
        chosen = sorted(sorted_places[number * total // count] for number in range(count))
        return replace(self, prompts=tuple(self.prompts[place] for place in chosen))


def read_prompts(path: Path | str) -> PromptSet:
    """The PromptSet of a file, which is named as the file's stem, with the file's name (never its folder) as source.

    Raises InputError for a path that is no such file, a file that is not UTF-8, holds no prompts, lacks the column or
    is damaged, with the line, and for a prompt that is empty or of more than 10,000 characters.
    """
    path = Path(path)
    # A table's further columns are text that no metric judges by; JSON's further keys may be.
    with_facts = path.suffix.lower() in (".json", ".jsonl")
    found = [(where, prompt_of(row, where, with_facts=with_facts)) for where, row in rows(path)]
    prompts = tuple(prompt for _, prompt in found)
    if any(prompt.text for prompt in prompts):
        for where, prompt in found:
            checked_text(prompt.text, where)
    if not prompts:
        raise InputError(f"{path} holds no prompts; write one per line into a .txt file")
    return PromptSet(path.stem, prompts, source=path.name)


def rows(path: Path | str) -> Iterator[tuple[str, Any]]:
    """Yield (where, row) for what a file holds, in its order: `where` is file:line, a row is a string or a dict.

    The keys of a table's rows are its header's, in lower case. Raises InputError as `read_prompts` does.
    """
    path = Path(path)
    readers = {".txt": _lines, ".csv": _table, ".tsv": _table, ".json": _json, ".jsonl": _json_lines}
    reader = readers.get(path.suffix.lower())
    if path.is_dir():
        raise InputError(f"{path} is a folder; give a file of prompts ({', '.join(SUFFIXES)})")
    if reader is None:
        kind = f"the suffix {path.suffix}" if path.suffix else "no suffix"
        raise InputError(f"{path} has {kind}; a file of prompts ends in {', '.join(SUFFIXES)}")
    return reader(path, _text(path))


def prompt_of(
    row: Any,
    where: str,
    columns: Sequence[str] = COLUMNS,
    categories: Sequence[str] = CATEGORIES,
    with_facts: bool = True,
) -> Prompt:
    """The Prompt of a row, without the spaces around its text; InputError, which begins with `where`, if it has none.

    columns, categories: the keys that may hold the text and the category, the first that is there being taken.
    with_facts: whether what else the row holds becomes the prompt's facts.
    """
    if isinstance(row, str):
        return Prompt(row and checked_text(row, where))
    if not isinstance(row, dict):
        raise InputError(f"{where}: {json.dumps(row)[:60]} is no prompt; write a string, or an object with a prompt")
    column = next((key for key in columns if key in row), None)
    if column is None:
        has = f"it has {', '.join(map(str, row))}" if row else "it is empty"
        raise InputError(f"{where}: there is no {' or '.join(columns)}; {has}")
    category_key = next((key for key in categories if key in row), None)
    category = "" if category_key is None or row[category_key] is None else row[category_key]
    if not isinstance(category, str):
        raise InputError(f"{where}: {category_key} must be text, not {category!r}")
    facts = {key: value for key, value in row.items() if key not in (column, "category")} if with_facts else {}
    try:
        json.dumps([category, facts], ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise _no_unicode(where, error) from error
    return Prompt(checked_text(row[column], where), category.strip(), facts)


def checked_text(text: Any, where: str) -> str:
    """A prompt's text without the spaces around it; InputError, which begins with `where`, if it can be none."""
    if not isinstance(text, str):
        raise InputError(f"{where}: a prompt must be text, not {text!r}")
    if not text.strip():
        raise InputError(f"{where}: the prompt is empty; write one, or take the entry out")
    if len(text) > LONGEST:
        raise InputError(f"{where}: {len(text):,} characters are too long for a prompt (at most {LONGEST:,})")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise _no_unicode(where, error) from error
    return text.strip()


def _text(path):
    """The file's text, with or without a byte order mark, its lines ended by \\n."""
    try:
        data = read_bytes(path)
    except FileNotFoundError as error:
        raise InputError(
            f"there is no file {path}; check its name, which is relative to the recipe's folder"
        ) from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise InputError(f"{path}:{line}: not UTF-8 (byte {error.start}); save the file as UTF-8") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _lines(path, text):
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield f"{path}:{number}", "" if line.strip() == '""' else line


def _table(path, text):
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        header = reader.fieldnames = [name.strip().lower() for name in reader.fieldnames or []]
        for row in reader:
            where = f"{path}:{reader.line_num}"
            if None in row:
                raise InputError(f"{where}: more fields than the header's {len(header)}; put quotes around the prompt")
            if None in row.values():
                raise InputError(f"{where}: fewer fields than the header's {len(header)} ({', '.join(header)})")
            yield where, row
    except csv.Error as error:
        # The line after the last good row, where the bad one begins.
        raise InputError(f"{path}:{reader.line_num + 1}: the table cannot be read: {error}") from error


def _json(path, text):
    if not text.strip():
        return
    entries = _parsed(text, path, 1)
    if not isinstance(entries, list):
        raise InputError(f"{path}: the JSON must be a list of prompts; for an object per line name the file .jsonl")
    for number, entry in enumerate(entries, 1):
        yield f"{path} entry {number}", entry


def _json_lines(path, text):
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield f"{path}:{number}", _parsed(line, path, number)


def _parsed(text, path, first_line):
    """The JSON value of a text that begins at a line of the file."""
    try:
        return parse_json(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise InputError(f"{path}:{line}: invalid JSON: {error.msg} (column {error.colno})") from error
    except ValueError as error:  # a number of thousands of digits, thousands of brackets
        raise InputError(f"{path}:{first_line}: this JSON cannot be read: {error}") from error


def _no_unicode(where, error):
    return InputError(f"{where}: half a character (a lone surrogate, {error.object[error.start]!r}); write it whole")
