"""`.eval_results/*.yaml`: scores as the Hub reads them, for the model's page and the leaderboard of its data set.

The form is the Hub's (huggingface.co/docs/hub/eval-results): a list of entries, each with a data set on the Hub and a
task of it, a value, a date, a source and notes. So only prompts that came from a data set on the Hub are told there.
"""

import re
from typing import TYPE_CHECKING

import yaml

from surgery.artifact import scores as recorded

from .content import EVAL_RESULTS, RepositoryFile, item_of

if TYPE_CHECKING:
    from surgery.artifact.scores import Scores

_COMMIT = re.compile(r"[0-9a-f]{40}")


def evaluation_files(scores: "Scores | None", repo: str) -> list[RepositoryFile]:
    """[RepositoryFile] of the scores of one data set's prompts, none without scores or for prompts from elsewhere."""
    if scores is None or len(scores.prompts) != 1:
        return []
    (prompts,) = scores.prompts
    if not (prompts.source and prompts.source.count("/") == 1 and _COMMIT.fullmatch(prompts.revision or "")):
        return []
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

    entries = [
        EvalResultEntry(
            dataset_id=prompts.source,
            task_id=metric.name,
            value=metric.patched,
            dataset_revision=prompts.revision,
            date=scores.date[:10],
            source_url=f"https://huggingface.co/{repo}/blob/main/{recorded.SCORES}",
            source_name=recorded.SCORES,
            notes=_notes(metric, scores, prompts),
        )
        for metric in scores.metrics
        if metric.kind != "fidelity"
    ]
    if not entries:
        return []
    text = yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False, allow_unicode=True, width=1000)
    name = re.sub(r"[^A-Za-z0-9._-]", "-", prompts.name)
    return [item_of(f"{EVAL_RESULTS}{name}.yaml", text.encode("utf-8"))]


def _notes(metric, scores, prompts):
    low, high = metric.interval
    better = "higher" if metric.higher_is_better else "lower"
    return (
        f"{metric.title or metric.name}, {better} is better; {prompts.count} prompts, {metric.n} images of "
        f"{scores.images_per_prompt} a prompt; untouched base {metric.base:.6g}, difference {metric.difference:+.4g} "
        f"(95% {low:+.4g} to {high:+.4g})" + (f"; {metric.checkpoint}" if metric.checkpoint else "")
    )
