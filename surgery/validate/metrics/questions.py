"""Metrics that ask a judge about an image: Soft-TIFA of GenEval 2, VQAScore, and DPG-Bench's questions."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from surgery.errors import InputError

from ..prompts import Prompt
from .info import Device, Files, Images, Info
from .judge import QWEN3_VL, judge_of

_YES, _NO = (tuple(form for word in (w, w.lower()) for form in (word, f" {word}")) for w in ("Yes", "No"))
_WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {word: str(number) for number, word in enumerate(_WORDS, 1)}


class _Asking:
    """A metric whose `_of` gives one image's value. files: {"judge": folder}."""

    info: Info

    def __init__(self, files: Files, device: Device = "cpu") -> None:
        """InputError names what is missing in the judge's folder or does not fit."""
        self._judge = judge_of(str(files["judge"]), str(device))

    @staticmethod
    def check_prompts(prompts: Iterable[Prompt]) -> None:
        """Any prompt can be judged unless a metric says otherwise."""

    def score(self, images: Images, prompts: Sequence[Prompt]) -> np.ndarray:
        """float64 array (n,) of figures between 0 and 100 for n RGB PIL images and their `Prompt`s."""
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} images, but {len(prompts)} prompts")
        self.check_prompts(prompts)
        return np.array([100 * self._of(*pair) for pair in zip(images, prompts, strict=True)], dtype=np.float64)

    def _of(self, image: Any, prompt: Prompt) -> float:
        raise TypeError(f"{type(self).__name__} asks nothing")


def _info(name: str, title: str, source: str) -> Info:
    return Info(
        name=name,
        title=title,
        kind="score",
        higher_is_better=True,
        source=f"{source}; judged by {QWEN3_VL.repo}",
        checkpoints={"judge": QWEN3_VL},
    )


class VqaScore(_Asking):
    """100 P(yes) to whether the image shows the prompt, as GenEval 2's code asks it.

    Lin et al. 2024 ask CLIP-FlanT5 ("Does this figure show ...? Please answer yes or no."): figures of another judge
    cannot be compared.
    """

    info = _info("vqa_score", "VQAScore", "Lin et al. 2024, arXiv 2404.01291; as in facebookresearch/GenEval2")

    def _of(self, image, prompt):
        text = f'Does this image show "{prompt.text}"? Answer the question with Yes or No.'
        return self._judge.probabilities(image, text, _YES)[0]


class _SoftTifa(_Asking):
    @staticmethod
    def check_prompts(prompts: Iterable[Prompt]) -> None:
        """Raise InputError unless all `Prompt`s have GenEval 2's questions and answers."""
        for prompt in prompts:
            asked = prompt.facts.get("vqa_list")
            right = isinstance(asked, list) and asked and all(_is_question(one) for one in asked)
            if not right:
                raise InputError(
                    f"Soft-TIFA asks the questions of GenEval 2, and {prompt.text[:80]!r} has none (vqa_list); give "
                    "`prompts: geneval2`, or leave the metric out"
                )

    def _answers(self, image, prompt):
        """P of each question's right answer."""
        return [
            self._judge.probabilities(image, f"{question} Answer in one word.", _forms(question, answer))[0]
            for question, answer in prompt.facts["vqa_list"]
        ]


class SoftTifaGm(_SoftTifa):
    """GenEval 2's figure for whole prompts: 100 times the geometric mean of the right answers' probabilities."""

    info = _info("soft_tifa_gm", "Soft-TIFA GM", "GenEval 2, Kamath et al. 2025, arXiv 2512.16853")

    def _of(self, image, prompt):
        answers = np.array(self._answers(image, prompt))
        return float(np.exp(np.log(answers).mean())) if answers.all() else 0.0


class SoftTifaAm(_SoftTifa):
    """GenEval 2's figure for single facts: 100 times the arithmetic mean of the right answers' probabilities."""

    info = _info("soft_tifa_am", "Soft-TIFA AM", "GenEval 2, Kamath et al. 2025, arXiv 2512.16853")

    def _of(self, image, prompt):
        return float(np.mean(self._answers(image, prompt)))


class DpgBench(_Asking):
    """DPG-Bench: 100 times the share of questions answered yes, none of which counts where one before it was not.

    Hu et al. 2024 (ELLA), dpg_bench/compute_dpg_bench.py, whose judge is mPLUG-large: figures of another judge cannot
    be compared. Yes is where it is more probable than no. Their code passes over the table's first question, upon which
    others of its prompt depend; here it is asked.
    """

    info = _info("dpg_bench", "DPG-Bench", "Hu et al. 2024, arXiv 2403.05135; repository TencentQQGYLab/ELLA")

    @staticmethod
    def check_prompts(prompts: Iterable[Prompt]) -> None:
        """Raise InputError unless all `Prompt`s have DPG-Bench's questions."""
        for prompt in prompts:
            asked = prompt.facts.get("questions")
            if not (isinstance(asked, list) and asked and all(_is_dependent(one) for one in asked)):
                raise InputError(
                    f"dpg_bench asks the questions of DPG-Bench, and {prompt.text[:80]!r} has none (questions); give "
                    "`prompts: dpg-bench`, or leave the metric out"
                )

    def _of(self, image, prompt):
        counts = {}
        for one in prompt.facts["questions"]:
            yes, no = self._judge.probabilities(image, f"{one['question']} Answer in one word.", _YES, _NO)
            counts[one["id"]] = float(yes > no)
        for one in prompt.facts["questions"]:
            if any(counts.get(before) == 0 for before in one["after"]):
                counts[one["id"]] = 0.0
        return sum(counts.values()) / len(counts)


def _forms(question, answer):
    """How a right answer may be written, as GenEval 2's code has it."""
    if not question.startswith("How many"):
        return _YES
    number = _NUMBERS.get(answer, "other")
    return (answer, answer.capitalize(), f" {answer}", f" {answer.capitalize()}", number, f" {number}")


def _is_question(one):
    return isinstance(one, (list, tuple)) and len(one) == 2 and all(isinstance(text, str) for text in one)


def _is_dependent(one):
    return isinstance(one, dict) and isinstance(one.get("question"), str) and {"id", "after"} <= set(one)
