"""GenEval's rules: from the objects that were detected in an image to whether the image is what was asked for.

Ghosh et al. 2023 (arXiv 2310.11513); repository djghosh13/geneval, evaluation/evaluate_images.py, with the options that
it has by default. At those (`max_overlap` 1) it drops no detection for overlapping another, so nothing does here.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from surgery.errors import InputError

from ..prompts import Prompt

# COCO's 80 classes in their order, by the names that GenEval's prompts have for them (evaluation/object_names.txt).
CLASSES = (
    *("person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light"),
    *("fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow"),
    *("elephant", "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee"),
    *("skis", "snowboard", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard"),
    *("tennis racket", "bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple"),
    *("sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch"),
    *("potted plant", "bed", "dining table", "toilet", "tv", "laptop", "computer mouse", "tv remote"),
    *("computer keyboard", "cell phone", "microwave", "oven", "toaster", "sink", "refrigerator", "book", "clock"),
    *("vase", "scissors", "teddy bear", "hair drier", "toothbrush"),
)
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")

SCORE_ABOVE = 0.3  # a detection with this score or less is none
COUNTING_SCORE_ABOVE = 0.9  # for prompts that count, where a doubtful object would be one too many
MOST_OBJECTS = 16  # of a class
POSITION_THRESHOLD = 0.1  # of the two objects' summed widths or heights


@dataclass(frozen=True, eq=False)
class Detection:
    """An object of a class in an image. box: (left, top, right, bottom) in pixels; mask: bool (height, width)."""

    box: tuple[float, float, float, float]
    score: float
    mask: np.ndarray | None = None


def kept(detected: Mapping[str, Sequence[Detection]], tag: str) -> dict[str, list[Detection]]:
    """The detections that count: {class: [Detection, best first]} without the doubtful, 16 of a class at most.

    detected: {class: [Detection]} as the detector gives them; tag: the prompt's, since "counting" is stricter.
    """
    above = COUNTING_SCORE_ABOVE if tag == "counting" else SCORE_ABOVE
    objects = {}
    for name, found in detected.items():
        best = sorted((one for one in found if one.score > above), key=lambda one: one.score, reverse=True)
        if best:
            objects[name] = best[:MOST_OBJECTS]
    return objects


def judge(
    facts: Mapping[str, Any],
    objects: Mapping[str, Sequence[Detection]],
    colors_of: Callable[[Sequence[Detection], str], list[str]],
) -> tuple[bool, list[str]]:
    """(whether an image is right, [what is wrong with it]) for a prompt's facts and the objects that are `kept`.

    Every clause of `include` must hold: as many objects of its class as it counts, the best of them in its colour and
    in its place. No clause of `exclude` may. colors_of(detections, class name) -> a colour of COLORS for each.
    """
    wrong, groups = [], []
    for clause in facts["include"]:
        name, count = clause["class"], clause["count"]
        found = objects.get(name, [])[:count]
        reason = None
        if len(found) < count:
            reason = f"expected {name}>={count}, found {len(found)}"
        if reason is None and "color" in clause:
            colors = colors_of(found, name)
            if colors.count(clause["color"]) < count:
                reason = f"expected {clause['color']} {name}>={count}, found {', '.join(colors)}"
        if reason is None and clause.get("position"):
            relation, target = clause["position"]
            reason = _misplaced(found, name, relation, target, groups)
        # What is not itself right is no landmark for a later clause.
        groups.append(found if reason is None else None)
        if reason is not None:
            wrong.append(reason)
    for clause in facts.get("exclude", []):
        name, count = clause["class"], clause["count"]
        if len(objects.get(name, [])) >= count:
            wrong.append(f"expected {name}<{count}, found {len(objects[name])}")
    return not wrong, wrong


def _misplaced(found, name, relation, target, groups):
    """What is wrong with the place of the objects `found`, which every object of the group `target` must agree with."""
    if groups[target] is None:
        return f"no target for {name} to be {relation}"
    for one in found:
        for other in groups[target]:
            relations = relations_of(one.box, other.box)
            if relation not in relations:
                there = f"{' and '.join(sorted(relations))} target" if relations else "no clear direction"
                return f"expected {name} {relation} target, found {there}"
    return None


def relations_of(box: Sequence[float], other: Sequence[float]) -> set[str]:
    """How one box (left, top, right, bottom) lies to another: a set of none, one or two of RELATIONS.

    The offset between their centres is first made shorter, in x and in y, by a tenth of their summed widths or
    heights: boxes that are that near are neither left nor right. It counts where it is then more than half as long as
    the offset as a whole, so that something far below and a little to the left is below alone.
    """
    corners = np.array([box, other], dtype=np.float64).reshape(2, 2, 2)  # box, corner, xy
    centres, sizes = corners.mean(axis=1), np.abs(corners[:, 1] - corners[:, 0])
    offset = centres[0] - centres[1]
    shortened = np.maximum(np.abs(offset) - POSITION_THRESHOLD * sizes.sum(axis=0), 0) * np.sign(offset)
    if np.all(np.abs(shortened) < 1e-3):
        return set()
    right, down = shortened / np.linalg.norm(offset)
    found = {"left of": right < -0.5, "right of": right > 0.5, "above": down < -0.5, "below": down > 0.5}
    return {relation for relation, holds in found.items() if holds}


def check_facts(prompt: Prompt) -> None:
    """Raise InputError unless a `Prompt` has the facts that GenEval judges by, as its own prompts do."""
    problem = _problem(prompt.facts)
    if problem:
        raise InputError(
            f"GenEval judges its own prompts only, and {prompt.text[:80]!r} {problem}; give `prompts: geneval`, or "
            "leave the metric geneval out"
        )


def _problem(facts):
    """What the facts lack, or None."""
    if not isinstance(facts.get("tag"), str) or not isinstance(facts.get("include"), list) or not facts["include"]:
        return "does not say what must be in its image (`tag` and `include`)"
    exclude = facts.get("exclude", [])
    if not isinstance(exclude, list):
        return "has an `exclude` that is no list"
    for number, clause in enumerate(facts["include"]):
        problem = _clause_problem(clause) or _position_problem(clause.get("position"), number)
        if problem:
            return problem
    return next(filter(None, map(_clause_problem, exclude)), None)


def _clause_problem(clause):
    if not isinstance(clause, dict):
        return f"has a clause that is no object: {clause!r}"
    if clause.get("class") not in CLASSES:
        return f"names a class that the detector does not know: {clause.get('class')!r}"
    count = clause.get("count")
    if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count <= MOST_OBJECTS:
        return f"has the count {count!r}, not a number from 1 to {MOST_OBJECTS}"
    if "color" in clause and clause["color"] not in COLORS:
        return f"has the colour {clause['color']!r}, not one of {', '.join(COLORS)}"
    return None


def _position_problem(position, number):
    """position: [relation, index of an earlier clause], or None; number: the index of the clause that has it."""
    if position is None:
        return None
    if not isinstance(position, list | tuple) or len(position) != 2 or position[0] not in RELATIONS:
        return f"has the position {position!r}, not [relation, clause] with one of {', '.join(RELATIONS)}"
    if not isinstance(position[1], int) or isinstance(position[1], bool) or not 0 <= position[1] < number:
        return f"has a position to the clause {position[1]!r}, which is none before its own"
    return None
