"""The blind study: a page that people vote on, the key that says whose each image is, and what the votes amount to.

    sources = read_sources(["out/sdxl-pladis", "out/sdxl-gag"])
    exhibits = choose_exhibits(sources, 50)
    models = {source.model: source.origin for source in sources}
    study = write_study(exhibits, "study.html", "study-key.json", models=models, title="Which is best?")
    key = read_key("study-key.json")
    result = analyse(read_votes(["votes-1.json", "votes-2.json"], key), key)
    print(render(result))

The protocol is that of PLADIS (Appendix D): base and patched images of the same prompt and seed side by side, in an
order that chance decides, and two questions on each, quality and alignment with the prompt; GAG (Table 4) asks the same
of three methods at once. Unlike theirs, a rater may answer that there is no difference. The page goes to the raters,
the key stays with whoever runs the study, and the raters send their files of votes back.
"""

from .analysis import Contest, Estimate, QuestionResult, StudyResult, analyse, render
from .key import Key, read_key
from .page import Study, write_study
from .sources import Exhibit, Source, choose_exhibits, read_sources
from .votes import Vote, read_votes

__all__ = [
    "Contest",
    "Estimate",
    "Exhibit",
    "Key",
    "QuestionResult",
    "Source",
    "Study",
    "StudyResult",
    "Vote",
    "analyse",
    "choose_exhibits",
    "read_key",
    "read_sources",
    "read_votes",
    "render",
    "write_study",
]
