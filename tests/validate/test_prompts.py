"""Prompts: a file of one's own is read whole or refused with its line, a published set fetched and checked."""

import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest

from surgery.errors import InputError
from surgery.validate.jobs import jobs_of
from surgery.validate.prompts import NAMES, Prompt, PromptSet, open_prompts


@pytest.fixture
def write(tmp_path):
    """write(name, content): the path of a file in the test's folder; text is written as UTF-8."""

    def write(name, content):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def texts(prompts):
    return [prompt.text for prompt in prompts.prompts]


# Files


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.txt", "a cat\n\n  a dög  \r\nthree\tbirds"),
        ("x.txt", b"\xef\xbb\xbfa cat\ra d\xc3\xb6g\rthree\tbirds\r"),
        ("x.csv", "prompt\na cat\na dög\nthree\tbirds\n"),
        ("x.CSV", '\ufeffid,Caption \r\n1,a cat\r\n2,"a dög"\r\n3,three\tbirds\r\n'),
        ("x.tsv", 'text\tid\na cat\t1\n"a dög"\t2\n"three\tbirds"\t3\n'),
        ("x.json", '["a cat", {"prompt": "a dög"}, {"caption": "three\\tbirds"}]'),
        ("x.jsonl", '"a cat"\n\n{"text": "a dög"}\n{"caption": "three\\tbirds", "prompt": "three\\tbirds"}\n'),
    ],
)
def test_each_kind_of_file_gives_its_prompts_in_order(write, name, content):
    prompts = open_prompts(str(write(name, content)))
    assert texts(prompts) == ["a cat", "a dög", "three\tbirds"]
    assert (prompts.name, prompts.source, prompts.revision) == ("x", name, None)


def test_a_file_is_found_from_the_recipes_folder_and_published_by_its_name_alone(write, tmp_path, monkeypatch):
    path = write("mine.txt", "a cat")
    monkeypatch.chdir("/")
    for given in ("mine.txt", "./mine.txt", str(path), path):
        assert open_prompts(given, tmp_path).source == "mine.txt"
    with pytest.raises(InputError, match=r"there is no file mine\.txt"):
        open_prompts("mine.txt")


def test_categories_and_facts_are_kept(write):
    entry = {"tag": "counting", "include": [{"class": "cat", "count": 2}], "prompt": "two cats"}
    (prompt,) = open_prompts(write("x.jsonl", json.dumps(entry))).prompts
    assert prompt == Prompt("two cats", "counting", {"tag": "counting", "include": [{"class": "cat", "count": 2}]})
    both = open_prompts(write("x.json", '[{"text": "a", "category": " b ", "tag": "c", "id": null}]')).prompts
    assert both == (Prompt("a", "b", {"tag": "c", "id": None}),)
    table = open_prompts(write("x.csv", "id,prompt,category\n7,a cat,animals\n8,a car,\n")).prompts
    assert table == (Prompt("a cat", "animals"), Prompt("a car"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.txt", "", "x.txt holds no prompts"),
        ("x.txt", " \n\t\n", "x.txt holds no prompts"),
        ("x.csv", "", "x.csv holds no prompts"),
        ("x.csv", "prompt\n", "x.csv holds no prompts"),
        ("x.json", "", "x.json holds no prompts"),
        ("x.json", "[]", "x.json holds no prompts"),
        ("x.txt", "a\n" + "b" * 10_001, r"x.txt:2: 10,001 characters are too long for a prompt"),
        ("x.txt", "a\nb \xe4".encode("latin-1"), r"x.txt:2: not UTF-8 \(byte 4\); save the file as UTF-8"),
        ("x.csv", "name,kind\na,b\n", "x.csv:2: there is no prompt or caption or text; it has name, kind"),
        ("x.csv", "id,prompt\n1,a cat, sitting\n", "x.csv:2: more fields than the header's 2; put quotes around"),
        ("x.csv", "id,prompt\n1,a\n2\n", "x.csv:3: fewer fields than the header's 2"),
        ("x.csv", "id,prompt\n1,\n", "x.csv:2: the prompt is empty"),
        ("x.csv", 'prompt\n"a" cat\n', "x.csv:2: the table cannot be read"),
        ("x.csv", 'prompt\n"a cat\n', "x.csv:2: the table cannot be read: unexpected end of data"),
        ("x.json", '["a",\n "b"', r"x.json:2: invalid JSON: Expecting ',' delimiter \(column 5\)"),
        ("x.json", '{"prompt": "a"}', "x.json: the JSON must be a list of prompts"),
        ("x.json", '["a", 3]', "x.json entry 2: 3 is no prompt"),
        ("x.json", '[{"prompt": 3}]', "x.json entry 1: a prompt must be text, not 3"),
        ("x.json", '[{"prompt": "a", "tag": 3}]', "x.json entry 1: tag must be text, not 3"),
        ("x.json", "[" * 100_000, "x.json:1: this JSON cannot be read"),
        ("x.json", "[" + "9" * 5000 + "]", "x.json:1: this JSON cannot be read"),
        ("x.json", r'["\ud83d"]', r"x.json:1: .*it holds half a character"),
        ("x.json", r'[{"prompt": "a", "note": "\ud83d"}]', r"x.json:1: .*it holds half a character"),
        ("x.jsonl", '"a"\n{"prompt": "b"\n', "x.jsonl:2: invalid JSON"),
        ("x.jsonl", '"a"\n{}\n', "x.jsonl:2: there is no prompt or caption or text; it is empty"),
        ("x.jsonl", '"a"\n" "\n', "x.jsonl:2: the prompt is empty"),
        ("x.jsonl", '""\n"a"\n', "x.jsonl:1: the prompt is empty"),
        ("x.txt", 'a\n""\n', "x.txt:2: the prompt is empty"),
        ("x.yaml", "- a\n", r"x.yaml has the suffix .yaml; a file of prompts ends in .txt, .csv"),
    ],
)
def test_a_file_that_cannot_be_read_whole_is_refused_with_its_line(write, name, content, message):
    with pytest.raises(InputError, match=message):
        open_prompts(write(name, content))


def test_a_folder_a_missing_and_an_unreadable_file_are_told_apart(write, tmp_path):
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(InputError, match="is a folder; give a file of prompts"):
        open_prompts("folder.txt", tmp_path)
    with pytest.raises(InputError, match=r"there is no file .*nothing\.txt"):
        open_prompts("nothing.txt", tmp_path)
    with pytest.raises(InputError, match=r"some/name has no suffix; a file of prompts ends in"):
        open_prompts("some/name", tmp_path)
    (tmp_path / "loop.txt").symlink_to("loop.txt")
    with pytest.raises(InputError, match=r"loop\.txt cannot be read: Too many levels"):
        open_prompts("loop.txt", tmp_path)


# Names, lists, limits


def test_empty_prompts_are_a_set_of_their_own(write):
    three = (Prompt(""),) * 3
    assert open_prompts("empty", limit=3) == PromptSet("empty", three)
    assert open_prompts(["", "", ""]).prompts == three
    assert open_prompts(write("x.txt", '""\n""\n\n""\n')).prompts == three
    assert open_prompts(write("x.json", '["", "", ""]')).prompts == three
    assert len({job.seed for job in jobs_of(open_prompts("empty", limit=3), 2)}) == 6
    with pytest.raises(InputError, match="needs to know how many images: give --limit"):
        open_prompts("empty")
    with pytest.raises(InputError, match=r"prompts\[0\]: the prompt is empty"):
        open_prompts(["", "a cat"])


def test_a_list_of_prompts_is_a_set_of_its_own():
    prompts = open_prompts(["a cat ", "a dog"])
    assert prompts == PromptSet("recipe", (Prompt("a cat"), Prompt("a dog")))
    with pytest.raises(InputError, match=r"prompts\[1\]: the prompt is empty"):
        open_prompts(["a cat", " "])
    with pytest.raises(InputError, match=r"prompts\[0\]: a prompt must be text, not 3"):
        open_prompts([3])
    with pytest.raises(InputError, match="the list of prompts is empty"):
        open_prompts([])
    with pytest.raises(InputError, match="must be a set's name, a file or a list of prompts, not 3"):
        open_prompts(3)


def test_an_unknown_set_names_the_nearest_and_all_others():
    with pytest.raises(InputError) as caught:
        open_prompts("drawbnch")
    message = str(caught.value)
    assert "did you mean drawbench?" in message and "needs its suffix: .txt" in message
    assert all(name in message for name in NAMES) and "shapes" in NAMES


def test_a_limit_spreads_over_the_set_and_must_be_one_at_least():
    prompts = [str(number) for number in range(10)]
    assert texts(open_prompts(prompts, limit=4)) == ["0", "2", "5", "7"]
    assert texts(open_prompts(prompts, limit=99)) == prompts
    for limit in (0, -1, 1.5, "3"):
        with pytest.raises(InputError, match="limit must be 1 prompt at least"):
            open_prompts(prompts, limit=limit)


def test_the_shapes_prompts_ship_with_the_package(monkeypatch):
    made = PromptSet("shapes", (Prompt("a red circle"), Prompt("two stars")))
    module = SimpleNamespace(shapes_prompts=lambda: made, half_of_the_prompts=lambda name: replace(made, name=name))
    monkeypatch.setitem(sys.modules, "surgery.validate.prompts.shapes", module)
    assert open_prompts("shapes") is made
    assert open_prompts("shapes", limit=1).prompts == made.prompts[:1]
    assert open_prompts("shapes-test") == replace(made, name="shapes-test")
