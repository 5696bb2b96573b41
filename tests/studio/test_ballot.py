"""Votes on the page are votes of `surgery study`: blind, kept one by one, read by it."""

import json

import numpy as np
import pytest
from PIL import Image

from surgery.analysis.study import analyse, read_key, read_votes
from surgery.errors import InputError
from surgery.studio.answers import Answers
from surgery.studio.ballot import Ballot, new_session

from .conftest import PROMPT, QUICK

IMAGES = {side: Image.new("RGB", (8, 8), colour) for side, colour in (("base", "red"), ("patched", "blue"))}


def side_of(pair, place):
    """Whose image stands at a place."""
    return "base" if np.asarray(pair.images[place])[0, 0, 0] else "patched"


@pytest.fixture
def ballot(tmp_path):
    made = Ballot(tmp_path / "votes")
    yield made
    made.close()


def vote_for(ballot, side, count, session=None, model="tiny: pladis"):
    """Votes for a side, whichever place it stands at; the session."""
    session = session or new_session()
    for number in range(count):
        pair = ballot.pair(PROMPT, number, IMAGES, model, "hash")
        places = dict(zip((side_of(pair, 0), side_of(pair, 1)), ("left", "right"), strict=True))
        ballot.vote(pair, session, "Ada", {"quality": places[side], "alignment": "no difference"})
    return session


def test_the_analysis_of_the_study_reads_them(ballot, run):
    vote_for(ballot, "patched", 7)
    vote_for(ballot, "base", 1, model="tiny: gag")
    key = read_key(ballot.key_path)
    result = analyse(read_votes(sorted(ballot.folder.glob("votes-*.json")), key), key)
    quality, alignment = result.questions
    assert (quality.votes, result.raters, result.items) == (8, 2, 8)
    assert quality.shares["patched"].value == 7 / 8 and alignment.no_difference.value == 1.0
    assert set(result.by_model) == {"tiny: pladis", "tiny: gag"}
    assert ballot.result().questions == result.questions
    files = sorted(ballot.folder.glob("votes-*.json"))
    out = ["--out", ballot.folder / "study.html", "--votes", *files]
    told = run("study", ballot.folder, *out, "--json", check=0).stdout
    assert json.loads(told)["votes"] == result.votes
    shown = {image for item in key.items.values() for image in item.shown}
    assert {path.stem for path in (ballot.folder / "images").iterdir()} == shown


def test_the_order_is_left_to_chance_and_the_ids_say_nothing(ballot):
    pairs = [ballot.pair(PROMPT, seed, IMAGES, "tiny", "") for seed in range(40)]
    assert 5 < sum(side_of(pair, 0) == "base" for pair in pairs) < 35
    assert len({image for pair in pairs for image in pair.shown}) == 80


def test_a_vote_is_whole_and_counts_once(ballot):
    pair, session = ballot.pair(PROMPT, 0, IMAGES, "tiny", ""), new_session()
    with pytest.raises(InputError, match="alignment: answer left, right or no difference, not None"):
        ballot.vote(pair, session, "", {"quality": "left", "alignment": None})
    assert not list(ballot.folder.glob("votes-*.json"))
    with pytest.raises(InputError, match="at most 40 characters"):
        ballot.vote(pair, session, "x" * 41, {"quality": "left", "alignment": "left"})
    path = ballot.vote(pair, session, "", {"quality": "left", "alignment": "right"})
    with pytest.raises(InputError, match="voted on already"):
        ballot.vote(pair, session, "", {"quality": "right", "alignment": "right"})
    [file] = ballot.folder.glob("votes-*.json")
    assert file == path and len(json.loads(path.read_text())["votes"]) == 2


def test_a_folder_is_gone_on_with_by_one_studio_at_a_time(tmp_path):
    first = Ballot(tmp_path)
    vote_for(first, "base", 2)
    with pytest.raises(InputError, match="another studio writes its votes"):
        Ballot(tmp_path)
    first.close()
    second = Ballot(tmp_path)
    vote_for(second, "base", 1)
    assert second.result().votes == 6 or len(second.key.items) == 3
    second.close()
    (tmp_path / "study-key.json").write_text("{")
    with pytest.raises(InputError, match="study-key.json"):
        Ballot(tmp_path)


def test_pairs_on_the_page_are_of_the_screens_settings(session, opened, tmp_path):
    ballot = Ballot(tmp_path)
    answers = Answers(session, ballot)
    *_, shown = answers.next_pair("page", "two green stars\na red circle", QUICK)
    assert "two green stars" in shown["asked"] and [place for _, place in shown["shown"]] == ["left", "right"]
    given = {"quality": "left", "alignment": "left"}
    *_, after = answers.vote("page", "", given, "two green stars\na red circle", QUICK)
    assert "a red circle" in after["asked"] and after["quality"] is None
    [model] = ballot.key.models
    assert "pladis (alpha 1.5, scale 1, temperature 1) on all" in model and ballot.key.models[model] == opened.hash
    assert len(list(ballot.folder.glob("votes-*.json"))) == 1
    *_, wrong = answers.vote("page", "", {}, "", QUICK)
    assert "quality: answer left" in wrong["status"] and "shown" not in wrong
    *_, early = answers.vote("another page", "", given, "", QUICK)
    assert "ask for a pair first" in early["status"]
    assert "prompt alignment" in answers.result()["result"]
    ballot.close()
