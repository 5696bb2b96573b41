"""The judge's probabilities against the model's own generation, and each metric's arithmetic against its paper's."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from surgery.errors import InputError
from surgery.validate.metrics import metric_class, questions
from surgery.validate.metrics.judge import Judge, judge_of
from surgery.validate.prompts import Prompt

from .tiny_clip import pictures
from .tiny_qwen import SPECIAL, TEMPLATE, write_judge

YES = ("Yes", " Yes", "yes", " yes")
GENEVAL2 = Prompt(
    "two cats", "3 atoms", {"vqa_list": [["How many cats are in the image?", "two"], ["Any cats?", "Yes"]]}
)
DPG = Prompt(
    "a red cat on a mat",
    facts={
        "questions": [
            {"id": 1, "question": "Is there a cat?", "after": []},
            {"id": 2, "question": "Is the cat red?", "after": [1]},
            {"id": 3, "question": "Is the red bright?", "after": [2]},
            {"id": 4, "question": "Is there a mat?", "after": []},
        ]
    },
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of a tiny judge."""
    path = tmp_path_factory.mktemp("judge")
    write_judge(path)
    return path


@pytest.fixture
def answering(monkeypatch):
    """answering({text: probabilities}): the judge that metrics get says these, and tells what it was asked."""

    def use(answers):
        asked = []

        def probabilities(image, text, *groups):
            asked.append((text, groups))
            return answers[text]

        monkeypatch.setattr(questions, "judge_of", lambda *args: SimpleNamespace(probabilities=probabilities))
        return asked

    return use


def metric(name, files=None):
    return metric_class(name)(files or {"judge": "there"}, "cpu")


def test_a_probability_is_that_of_generating_the_answers_first_token(folder):
    """Against transformers' own generate, on inputs put together here from the template."""
    from transformers import AutoTokenizer, Qwen3VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    (image,) = pictures([(70, 100)])
    text = "Are there any cats? <|image_pad|> Answer in one word."
    found = Judge(folder).probabilities(image, text, YES, ("No", "two"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    seen = Qwen2VLImageProcessorPil.from_pretrained(folder)([image], return_tensors="pt")
    count = int(seen["image_grid_thw"].prod()) // 4
    assert count == (int(seen["image_grid_thw"][0, 1]) // 2) * (int(seen["image_grid_thw"][0, 2]) // 2) > 4
    before = "<|im_start|>user\n<|vision_start|>"
    asked = text.replace("<|image_pad|>", "")
    written = f"{before}{'<|image_pad|>' * count}<|vision_end|>{asked}<|im_end|>\n<|im_start|>assistant\n"
    assert "<|vision_start|>" in TEMPLATE and "<|im_end|>" in SPECIAL
    ids = tokenizer(written, return_tensors="pt")["input_ids"]
    first = len(tokenizer(before)["input_ids"])
    kinds = torch.zeros_like(ids)
    kinds[:, first : first + count] = 1
    model = Qwen3VLForConditionalGeneration.from_pretrained(folder).eval()
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        mm_token_type_ids=kinds,
        **seen,
        max_new_tokens=1,
        do_sample=False,
        output_scores=True,
        return_dict_in_generate=True,
    )
    likely = out.scores[0][0].double().softmax(-1)
    expected = [sum(float(likely[tokenizer.encode(one)[0]]) for one in group) for group in (YES, ("No", "two"))]
    assert found == pytest.approx(expected, rel=1e-5) and 0 < found[0] < 1


def test_the_judge_is_loaded_once_and_asked_once_for_all_metrics(folder):
    judge_of.cache_clear()
    images = pictures([(64, 64), (80, 64)])
    metrics = [metric(name, {"judge": folder}) for name in ("soft_tifa_gm", "soft_tifa_am", "vqa_score", "dpg_bench")]
    assert judge_of.cache_info().misses == 1
    judge, calls = judge_of(str(folder), "cpu"), []
    judge._model.register_forward_hook(lambda *args: calls.append(None))
    geometric, arithmetic = (one.score(images, [GENEVAL2] * 2) for one in metrics[:2])
    assert len(calls) == 4 and (geometric < arithmetic).all() and (geometric > 0).all()
    again = metrics[1].score(images[::-1], [GENEVAL2] * 2)
    assert len(calls) == 4 and again.tolist() == arithmetic[::-1].tolist()
    assert metrics[2].score(images, [GENEVAL2, DPG]).shape == (2,) and metrics[3].score(images[:1], [DPG]).shape == (1,)


def test_soft_tifa_is_the_mean_of_the_right_answers_probabilities_geometric_or_arithmetic(answering):
    texts = [f"{question} Answer in one word." for question, _ in GENEVAL2.facts["vqa_list"]]
    asked = answering({texts[0]: (0.25,), texts[1]: (0.81,)})
    image = pictures([(64, 64)])
    assert metric("soft_tifa_gm").score(image, [GENEVAL2]) == pytest.approx([100 * math.sqrt(0.25 * 0.81)])
    assert metric("soft_tifa_am").score(image, [GENEVAL2]) == pytest.approx([100 * (0.25 + 0.81) / 2])
    assert [text for text, _ in asked] == texts * 2
    assert set(asked[0][1][0]) == {"two", "Two", " two", " Two", "2", " 2"} and set(asked[1][1][0]) == set(YES)
    answering({texts[0]: (0.0,), texts[1]: (0.81,)})
    assert metric("soft_tifa_gm").score(image, [GENEVAL2]) == [0.0]


def test_vqa_score_asks_whether_the_image_shows_the_prompt(answering):
    asked = answering({'Does this image show "a {cat}"? Answer the question with Yes or No.': (0.75,)})
    assert metric("vqa_score").score(pictures([(64, 64)]), [Prompt("a {cat}")]) == [75.0]
    assert set(asked[0][1][0]) == set(YES)


@pytest.mark.parametrize(
    ("yes", "share"), [((1, 1, 1, 1), 4), ((0, 1, 1, 1), 1), ((1, 0, 1, 1), 2), ((1, 1, 0, 0), 2), ((0, 0, 0, 0), 0)]
)
def test_dpg_bench_counts_no_question_behind_one_that_was_answered_no(answering, yes, share):
    """A no falls through: question 3 depends on 2, which depends on 1."""
    asked = {
        f"{one['question']} Answer in one word.": (0.4, 0.3) if said else (0.3, 0.4)
        for one, said in zip(DPG.facts["questions"], yes, strict=True)
    }
    answering(asked)
    assert metric("dpg_bench").score(pictures([(64, 64)]), [DPG]) == pytest.approx([100 * share / 4])


@pytest.mark.parametrize(("name", "other"), [("soft_tifa_gm", DPG), ("soft_tifa_am", DPG), ("dpg_bench", GENEVAL2)])
def test_prompts_without_the_questions_are_refused_with_the_set_that_has_them(name, other):
    wanted = "dpg-bench" if name == "dpg_bench" else "geneval2"
    for prompt in (other, Prompt("a cat"), Prompt("a cat", facts={"vqa_list": [["a"]], "questions": [{"id": 1}]})):
        with pytest.raises(InputError, match=f"give `prompts: {wanted}`"):
            metric_class(name).check_prompts([prompt])


@pytest.mark.parametrize(
    "file", ["config.json", "chat_template.json", "tokenizer_config.json", "preprocessor_config.json"]
)
def test_a_judge_that_lacks_a_file_says_which(folder, tmp_path, file):
    import shutil

    copy = shutil.copytree(folder, tmp_path / "judge")
    (copy / file).unlink()
    with pytest.raises(InputError, match=file):
        Judge(copy)
    (copy / file).write_text("{")
    with pytest.raises(InputError, match="fetch"):
        Judge(copy)


def test_scores_are_of_as_many_images_as_prompts(answering):
    answering({})
    with pytest.raises(ValueError, match="1 images, but 2 prompts"):
        metric("vqa_score").score(pictures([(64, 64)]), [Prompt("a"), Prompt("b")])
    assert metric("vqa_score").score([], []).dtype == np.float64
