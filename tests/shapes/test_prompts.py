"""The shapes prompts: the same everywhere, balanced, and in words that the pipeline knows."""

import json
from collections import Counter, defaultdict

import pytest

from surgery.recipes.shapes.scenes import SHIPPED_HELD_OUT
from surgery.recipes.shapes.scenes.judging import problem_with
from surgery.validate.prompts import open_prompts
from surgery.validate.prompts.shapes import CATEGORIES, HALVES, is_held_out, shapes_prompts

from ..conftest import SHAPES


def by_category(prompts):
    texts = defaultdict(list)
    for prompt in prompts:
        texts[prompt.category].append(prompt.text)
    return texts


def test_the_default_set_is_200_of_each_category_and_its_hash_does_not_change():
    prompts = shapes_prompts()
    assert prompts.name == "shapes"
    assert {category: len(texts) for category, texts in by_category(prompts.prompts).items()} == dict.fromkeys(
        CATEGORIES, 200
    )
    # Published scores name this hash: a change here makes them scores of another set.
    assert prompts.sha256 == "4439f7e14074c3de09dcf1a9a36b48fb5f98f86d1e3f374b22f06f8bb47c1b2e"


def test_another_seed_gives_another_set():
    assert shapes_prompts(50, seed=1) == shapes_prompts(50, seed=1) != shapes_prompts(50, seed=2)


def test_no_text_is_repeated_before_all_of_its_category_were_used():
    distinct = {"single": 5, "two_objects": 20, "counting": 135, "colours": 40}
    for category, texts in by_category(shapes_prompts().prompts).items():
        times = Counter(texts)
        assert len(times) == distinct.get(category, 200)
        assert max(times.values()) - min(times.values()) <= 1


def test_texts_of_two_categories_differ():
    categories = defaultdict(set)
    for prompt in shapes_prompts().prompts:
        categories[prompt.text].add(prompt.category)
    assert all(len(names) == 1 for names in categories.values())


def test_facts_are_plain_json_and_say_what_the_text_says():
    prompts = shapes_prompts().prompts
    assert all(json.loads(json.dumps(prompt.facts)) == prompt.facts for prompt in prompts)
    assert not any(problem_with(prompt.facts) for prompt in prompts)
    facts = {prompt.text: prompt.facts for prompt in shapes_prompts(5000).prompts}
    assert facts["a star"] == {"objects": [[None, "star"]], "relation": None}
    assert facts["an orange cross"] == {"objects": [["orange", "cross"]], "relation": None}
    assert facts["two green stars"] == {"objects": [["green", "star"]] * 2, "relation": None}
    assert facts["a circle and a star"] == {"objects": [[None, "circle"], [None, "star"]], "relation": None}
    assert facts["a red circle to the left of a blue square"] == {
        "objects": [["red", "circle"], ["blue", "square"]],
        "relation": "left",
    }
    assert facts["a red circle and a blue square"]["objects"] == [["red", "circle"], ["blue", "square"]]


def test_relations_and_numbers_are_asked_for_about_equally_often():
    prompts = shapes_prompts().prompts
    relations = Counter(prompt.facts["relation"] for prompt in prompts if prompt.category == "position")
    numbers = Counter(len(prompt.facts["objects"]) for prompt in prompts if prompt.category == "counting")
    assert len(relations) == 4 and min(relations.values()) >= 40
    assert numbers.keys() == {2, 3, 4} and min(numbers.values()) >= 60


def test_a_part_of_the_set_has_every_category_alike():
    part = shapes_prompts().spread(60)
    assert {category: len(texts) for category, texts in by_category(part.prompts).items()} == dict.fromkeys(
        CATEGORIES, 10
    )


def test_the_halves_share_no_text_and_do_not_change():
    first, second = (open_prompts(name) for name in HALVES)
    assert not {prompt.text for prompt in first.prompts} & {prompt.text for prompt in second.prompts}
    assert (first.name, second.name) == HALVES
    # Published scores name these hashes: a change here makes them scores of another set.
    assert first.sha256 == "14071f104247a67210749a1ebe4fe9799c7cea5aece733bcc7e87e40b3ba3e75"
    assert second.sha256 == "6c74387a68d9e3e9f6c9364617f4dce5bfe29f90c78b1f6f772042eeaceb2e3f"


@pytest.mark.parametrize("name", HALVES)
def test_a_half_has_200_prompts_of_a_category_two_in_five_of_what_can_be_held_out_being_so(name):
    prompts = open_prompts(name).prompts
    texts = {category: len(found) for category, found in by_category(prompts).items()}
    split = ("counting", "colours", "position", "colour_attribution")
    whole = {category: 200 for category in CATEGORIES if category not in split}
    assert texts == whole | dict.fromkeys(split, 120) | {f"{category}, held out": 80 for category in split}
    for prompt in prompts:
        assert bool(is_held_out(prompt.facts)) == prompt.category.endswith(", held out"), prompt
        assert not problem_with(prompt.facts)


def test_what_is_held_out_of_a_prompt():
    pairs, relations = SHIPPED_HELD_OUT.pairs, SHIPPED_HELD_OUT.relations
    assert ("red", "circle") in pairs and ("red", "square") not in pairs and ("blue", "star") not in pairs
    assert ("circle", "above", "triangle") in relations and ("square", "left", "star") not in relations

    def said(*kinds, relation=None):
        return is_held_out({"objects": [list(kind) for kind in kinds], "relation": relation})

    assert said((None, "circle")) is None and said((None, "circle"), (None, "star")) is None
    assert said(("red", "circle")) is True and said(("red", "square")) is False
    assert said(("red", "square"), ("red", "circle")) is True
    assert said((None, "circle"), (None, "triangle"), relation="above") is True
    assert said((None, "triangle"), (None, "circle"), relation="below") is True  # the same said the other way round
    assert said((None, "triangle"), (None, "circle"), relation="above") is False
    assert said((None, "square"), (None, "star"), relation="left") is False
    assert said(("red", "circle"), ("blue", "star"), relation="left") is True


def test_every_word_is_one_token_of_the_pipeline_and_every_prompt_fits():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(SHAPES / "tokenizer")
    texts = sorted({prompt.text for prompt in shapes_prompts().prompts})
    for word in {word for text in texts for word in text.split()}:
        assert f"{word}</w>" in tokenizer.get_vocab(), word
    assert max(len(tokenizer(text).input_ids) for text in texts) <= tokenizer.model_max_length
