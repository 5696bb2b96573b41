"""The shapes prompts: the same everywhere, balanced, and in words that the pipeline knows."""

import json
from collections import Counter, defaultdict

from surgery.validate.shapes import shapes_prompts
from surgery.validate.shapes.judging import problem_with
from surgery.validate.shapes.prompts import CATEGORIES

from ...conftest import SHAPES


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


def test_every_word_is_one_token_of_the_pipeline_and_every_prompt_fits():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(SHAPES / "tokenizer")
    texts = sorted({prompt.text for prompt in shapes_prompts().prompts})
    for word in {word for text in texts for word in text.split()}:
        assert f"{word}</w>" in tokenizer.get_vocab(), word
    assert max(len(tokenizer(text).input_ids) for text in texts) <= tokenizer.model_max_length
