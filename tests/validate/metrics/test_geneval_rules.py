"""GenEval's rules: hand-made detections and the verdicts that the reference gives them."""

import pytest

from surgery.errors import InputError
from surgery.validate.metrics.geneval_rules import Detection, check_facts, judge, kept, relations_of
from surgery.validate.prompts import Prompt

# What the published detector calls the classes that GenEval has another name for.


def at(left, top, size=10, score=0.95):
    return Detection((left, top, left + size, top + size), score)


def needs(name, count=1, color=None, position=None):
    clause = {"class": name, "count": count, "color": color, "position": position}
    return {key: value for key, value in clause.items() if value is not None}


def verdict(facts, detected, colors=None):
    """judge of what is kept; colors: {(left, top) of a box: colour}."""
    objects = kept(detected, facts["tag"])
    return judge(facts, objects, lambda found, name: [colors[one.box[:2]] for one in found])


def facts(tag, *include, exclude=()):
    return {"tag": tag, "include": [*include]} | ({"exclude": [*exclude]} if exclude else {})


CAT, DOG = needs("cat"), needs("dog")
TWO_CATS = facts("counting", needs("cat", 2), exclude=[needs("cat", 3)])
RED_CAT = facts("colors", needs("cat", color="red"))
LEFT_DOG = facts("position", CAT, needs("dog", position=["left of", 0]))
RED_AND_BLUE = facts("color_attr", needs("cat", color="red"), needs("dog", color="blue"))


@pytest.mark.parametrize(
    ("asked", "detected", "right"),
    [
        (facts("single_object", CAT), {"cat": [at(0, 0)]}, True),
        (facts("single_object", CAT), {"cat": [at(0, 0), at(20, 0)], "dog": [at(0, 0)]}, True),  # more does not matter
        (facts("single_object", CAT), {"dog": [at(0, 0)]}, False),
        (facts("single_object", CAT), {}, False),
        (facts("single_object", CAT), {"cat": [at(0, 0, score=0.31)]}, True),
        (facts("single_object", CAT), {"cat": [at(0, 0, score=0.3)]}, False),
        (facts("two_object", CAT, DOG), {"cat": [at(0, 0)], "dog": [at(0, 0)]}, True),
        (facts("two_object", CAT, DOG), {"cat": [at(0, 0), at(9, 9)]}, False),
        (TWO_CATS, {"cat": [at(0, 0), at(20, 0)]}, True),
        (TWO_CATS, {"cat": [at(0, 0)]}, False),
        (TWO_CATS, {"cat": [at(0, 0), at(20, 0), at(40, 0)]}, False),
        (TWO_CATS, {"cat": [at(0, 0), at(20, 0), at(40, 0, score=0.9)]}, True),  # the third is doubtful
        (TWO_CATS, {"cat": [at(0, 0), at(20, 0, score=0.9)]}, False),
        (TWO_CATS, {"cat": [at(0, 0), at(1, 0)]}, True),  # overlapping ones are two
        (LEFT_DOG, {"cat": [at(50, 0)], "dog": [at(0, 0)]}, True),
        (LEFT_DOG, {"cat": [at(0, 0)], "dog": [at(50, 0)]}, False),
        (LEFT_DOG, {"cat": [at(50, 0)], "dog": [at(50, 50)]}, False),
        (LEFT_DOG, {"dog": [at(0, 0)]}, False),
        (LEFT_DOG, {"cat": [at(50, 0)]}, False),
        # the most certain of each class is looked at, whatever the order
        (LEFT_DOG, {"cat": [at(50, 0)], "dog": [at(90, 0, score=0.5), at(0, 0, score=0.6)]}, True),
        (LEFT_DOG, {"cat": [at(50, 0)], "dog": [at(90, 0, score=0.7), at(0, 0, score=0.6)]}, False),
    ],
)
def test_objects_counts_and_places_are_judged_as_geneval_does(asked, detected, right):
    found, wrong = verdict(asked, detected)
    assert (found, bool(wrong)) == (right, not right)


@pytest.mark.parametrize(
    ("asked", "detected", "colors", "right"),
    [
        (RED_CAT, {"cat": [at(0, 0)]}, {(0, 0): "red"}, True),
        (RED_CAT, {"cat": [at(0, 0)]}, {(0, 0): "blue"}, False),
        (RED_CAT, {}, {}, False),
        # only the best detection's colour counts
        (RED_CAT, {"cat": [at(0, 0, score=0.9), at(9, 9, score=0.8)]}, {(0, 0): "blue", (9, 9): "red"}, False),
        (RED_CAT, {"cat": [at(0, 0, score=0.7), at(9, 9, score=0.8)]}, {(0, 0): "blue", (9, 9): "red"}, True),
        (RED_AND_BLUE, {"cat": [at(0, 0)], "dog": [at(9, 9)]}, {(0, 0): "red", (9, 9): "blue"}, True),
        (RED_AND_BLUE, {"cat": [at(0, 0)], "dog": [at(9, 9)]}, {(0, 0): "blue", (9, 9): "red"}, False),
        (RED_AND_BLUE, {"cat": [at(0, 0)], "dog": [at(9, 9)]}, {(0, 0): "red", (9, 9): "red"}, False),
        (RED_AND_BLUE, {"cat": [at(0, 0)]}, {(0, 0): "red"}, False),
        (
            facts("colors", needs("cat", 2, "red")),
            {"cat": [at(0, 0), at(9, 9)]},
            {(0, 0): "red", (9, 9): "blue"},
            False,
        ),
    ],
)
def test_colours_are_judged_on_the_most_certain_objects(asked, detected, colors, right):
    assert verdict(asked, detected, colors)[0] is right


def test_what_is_wrong_is_told_and_a_wrong_object_is_no_landmark():
    asked = facts("position", needs("cat", color="red"), needs("dog", position=["left of", 0]), exclude=[needs("car")])
    detected = {"cat": [at(50, 0)], "dog": [at(0, 0)], "car": [at(0, 0), at(9, 9)]}
    right, wrong = verdict(asked, detected, {(50, 0): "blue"})
    assert not right
    assert wrong == [
        "expected red cat>=1, found blue",
        "no target for dog to be left of",
        "expected car<1, found 2",
    ]
    assert verdict(asked, {**detected, "car": []}, {(50, 0): "red"}) == (True, [])
    assert verdict(LEFT_DOG, {"cat": [at(0, 0)], "dog": [at(40, 40)]})[1] == [
        "expected dog left of target, found below and right of target"
    ]
    assert verdict(LEFT_DOG, {"cat": [at(0, 0)], "dog": [at(0, 0)]})[1] == [
        "expected dog left of target, found no clear direction"
    ]


@pytest.mark.parametrize(
    ("box", "relations"),
    [
        ((0, 100, 10, 110), {"left of"}),
        ((200, 100, 210, 110), {"right of"}),
        ((100, 0, 110, 10), {"above"}),
        ((100, 200, 110, 210), {"below"}),
        ((0, 0, 10, 10), {"left of", "above"}),
        ((200, 200, 210, 210), {"right of", "below"}),
        ((0, 52, 10, 62), {"left of"}),  # 48 of 111 up is not half
        ((0, 30, 10, 40), {"left of", "above"}),
        ((100, 100, 110, 110), set()),
        ((102, 100, 112, 110), set()),  # a tenth of 10 + 10 is 2
        ((102.5, 100, 112.5, 110), set()),  # 0.5 left of an offset of 2.5
        ((105, 100, 115, 110), {"right of"}),
        ((55, 100, 255, 110), {"right of"}),  # a wide box: its centre is 50 away, and 21 of it do not count
        ((43, 100, 243, 110), set()),  # 38 away, of which 17 remain: not half
        ((-33, 100, 167, 110), set()),
        ((100, 43, 110, 243), set()),
        ((100, -33, 110, 167), set()),
    ],
)
def test_a_box_lies_to_another_by_centre_and_size(box, relations):
    assert relations_of(box, (100, 100, 110, 110)) == relations


def test_detections_are_thresholded_ordered_and_limited():
    cats = [at(number, 0, score=0.301 + number / 1000) for number in range(20)]
    objects = kept({"cat": cats, "dog": [at(0, 0, score=0.2)]}, "single_object")
    assert list(objects) == ["cat"] and [one.box[0] for one in objects["cat"]] == list(range(19, 3, -1))
    assert kept({"cat": cats}, "counting") == {}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "does not say what must be in its image"),
        ({"tag": "colors", "include": []}, "does not say what must be in its image"),
        ({"include": [CAT]}, "does not say what must be in its image"),
        (facts("colors", "cat"), "has a clause that is no object: 'cat'"),
        (facts("colors", needs("unicorn")), "names a class that the detector does not know: 'unicorn'"),
        (facts("colors", needs("cat", 0)), "has the count 0, not a number from 1 to 16"),
        (facts("colors", needs("cat", True)), "has the count True"),
        (facts("colors", needs("cat", 17)), "has the count 17"),
        (facts("colors", needs("cat", color="teal")), "has the colour 'teal', not one of red, orange"),
        (facts("position", CAT, needs("dog", position=["near", 0])), r"has the position \['near', 0\]"),
        (facts("position", CAT, needs("dog", position="left of")), "has the position 'left of'"),
        (
            facts("position", CAT, needs("dog", position=["above", 1])),
            "has a position to the clause 1, which is none before its own",
        ),
        (
            facts("position", needs("dog", position=["above", 0])),
            "has a position to the clause 0, which is none before its own",
        ),
        (facts("counting", CAT, exclude=["cat"]), "has a clause that is no object: 'cat'"),
        ({**facts("counting", CAT), "exclude": "cat"}, "has an `exclude` that is no list"),
    ],
)
def test_a_prompt_without_genevals_facts_is_refused(given, message):
    with pytest.raises(
        InputError, match=f"GenEval judges its own prompts only, and 'a cat' {message}.*prompts: geneval"
    ):
        check_facts(Prompt("a cat", "", given))


# The models
