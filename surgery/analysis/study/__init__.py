"""The blind study: a page that people vote on, the key that says which image was which, and what the votes amount to.

    study = write_study(pairs, "study.html", "study-key.json", artifact_hash=manifest.hash, title="Which is better?")
    key = read_key("study-key.json")
    result = analyse(read_votes(["votes-1.json", "votes-2.json"], key), key)
    print(render(result))

The protocol is that of PLADIS (Appendix D): base and patched images of the same prompt and seed side by side, in an
order that chance decides, and two questions on each pair, its quality and its alignment with the prompt; GAG (Table 4)
asks the same of three methods at once. Unlike theirs, a rater may answer that there is no difference. The page goes to
the raters, the key stays with whoever runs the study, and the raters send their files of votes back.
"""

from .analysis import Estimate, QuestionResult, StudyResult, analyse, render
from .key import Key, read_key
from .page import Pair, Study, write_study
from .votes import Vote, read_votes

__all__ = [
    "Estimate",
    "Key",
    "Pair",
    "QuestionResult",
    "Study",
    "StudyResult",
    "Vote",
    "analyse",
    "read_key",
    "read_votes",
    "render",
    "write_study",
]
