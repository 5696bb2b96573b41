"""What the votes of a blind study amount to: preference rates, how sure they are, and a verdict in plain words.

Votes are not independent of each other: those on one pair share its images, those of one rater share a taste. So
raters and pairs are both drawn again, each with replacement and each apart from the other, and a vote counts as often
as its rater times its pair came up: the pigeonhole bootstrap (Owen, "The pigeonhole bootstrap", Annals of Applied
Statistics 1, 2007). GAG (Table 4) gives bootstrap intervals of its preference rates, too.
"""

from collections import Counter
from dataclasses import asdict, dataclass

import numpy

from surgery.errors import InputError

from .votes import QUESTIONS

FEW_RATERS = 5
_TITLES = {"quality": "image quality", "alignment": "prompt alignment"}


@dataclass(frozen=True)
class Estimate:
    """A share of votes between 0 and 1, and its 95% bootstrap interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class QuestionResult:
    """The votes on one question. Shares are of its votes, all with one weight.

    preference: the share of "patched" among the votes for either image, None where there is none. left: the share of
    the left image among these; with the sides left to chance it is 0.5 where raters do not favour a side.
    sign_test: two-sided p-value over pairs, each of which counts once, for the image that most of its votes are for.
    verdict: "patched preferred" or "base preferred" where the interval of `preference` lies on one side of 0.5 and
    sign_test is below 0.05, else "no difference that these votes can show". The interval alone would not do: where few
    votes all agree, it has no width.
    """

    question: str
    votes: int
    raters: int
    pairs: int
    patched: Estimate
    base: Estimate
    no_difference: Estimate
    preference: Estimate | None
    left: Estimate | None
    sign_test: float
    median_ms: float
    verdict: str


@dataclass(frozen=True)
class StudyResult:
    """All questions. pairs: those voted on, of pairs_in_study. resampled: what the intervals are over."""

    study: str
    artifact_hash: str
    votes: int
    raters: int
    pairs: int
    pairs_in_study: int
    draws: int
    seed: int
    resampled: str  # "raters and pairs", "pairs", "raters", or "nothing" for one rater and one pair
    questions: tuple[QuestionResult, ...]
    notes: tuple[str, ...]

    def to_json(self):
        """The result as plain data."""
        return {"schema_version": 1, **asdict(self)}


def analyse(votes, key, draws=10000, seed=0):
    """The StudyResult of the Votes that read_votes gave, the sides told by the key.

    A rater is a session. With one rater the intervals are over pairs alone, with one pair over raters alone. The same
    votes give the same figures, in whatever order their files came. Raises InputError without votes, without draws, and
    for votes that are not of this key.
    """
    votes = list(votes)
    if not votes:
        raise InputError("there are no votes to analyse")
    if draws < 1:
        raise InputError(f"the bootstrap needs at least one draw, not {draws}")
    strange = [vote.item for vote in votes if vote.item not in key.items]
    if strange:
        raise InputError(f"the key has no pair {strange[0]}; give the key of the study that was voted on")
    raters, pairs = ({getattr(vote, name) for vote in votes} for name in ("session", "item"))
    questions = []
    for number, question in enumerate(QUESTIONS):
        answers = [vote for vote in votes if vote.question == question]
        if answers:
            questions.append(_question(question, answers, key, draws, numpy.random.default_rng([seed, number])))
    several = [name for name, group in (("raters", raters), ("pairs", pairs)) if len(group) > 1]
    return StudyResult(
        study=key.study,
        artifact_hash=key.artifact_hash,
        votes=len(votes),
        raters=len(raters),
        pairs=len(pairs),
        pairs_in_study=len(key.items),
        draws=draws,
        seed=seed,
        resampled=" and ".join(several) or "nothing",
        questions=tuple(questions),
        notes=tuple(_notes(votes, raters, questions)),
    )


def _question(question, votes, key, draws, rng):
    raters = {session: row for row, session in enumerate(sorted({vote.session for vote in votes}))}
    pairs = {item: column for column, item in enumerate(sorted({vote.item for vote in votes}))}
    counts = {name: numpy.zeros((len(raters), len(pairs))) for name in ("patched", "base", "same", "left", "right")}
    for vote in votes:
        cell = raters[vote.session], pairs[vote.item]
        counts[_chosen(vote, key)][cell] += 1
        if vote.choice != "same":
            counts[vote.choice][cell] += 1
    rater_counts, pair_counts = (_drawn_again(rng, draws, len(group)) for group in (raters, pairs))
    # Per draw, the votes of each kind, a vote counted as often as its rater times its pair was drawn: (draws,)
    drawn = {name: ((rater_counts @ cells) * pair_counts).sum(axis=1) for name, cells in counts.items()}
    every = ("patched", "base", "same")
    preference = _estimate("patched", ("patched", "base"), counts, drawn)
    sign_test = _sign_test((counts["patched"] - counts["base"]).sum(axis=0))
    return QuestionResult(
        question=question,
        votes=len(votes),
        raters=len(raters),
        pairs=len(pairs),
        patched=_estimate("patched", every, counts, drawn),
        base=_estimate("base", every, counts, drawn),
        no_difference=_estimate("same", every, counts, drawn),
        preference=preference,
        left=_estimate("left", ("left", "right"), counts, drawn),
        sign_test=sign_test,
        median_ms=float(numpy.median([vote.ms for vote in votes])),
        verdict=_verdict(preference, sign_test),
    )


def _chosen(vote, key):
    """ "patched", "base" or "same": whose image a vote is for."""
    if vote.choice == "same":
        return "same"
    image = vote.left if vote.choice == "left" else vote.right
    return "patched" if image == key.items[vote.item].patched else "base"


def _drawn_again(rng, draws, count):
    """How often each of `count` is drawn in `count` draws with replacement: float64 (draws, count)."""
    return rng.multinomial(count, numpy.full(count, 1 / count), size=draws).astype(numpy.float64)


def _estimate(name, among, counts, drawn):
    """The share of one kind of vote among several, or None where there are no votes of these kinds."""
    total = sum(counts[kind].sum() for kind in among)
    if not total:
        return None
    totals = sum(drawn[kind] for kind in among)
    # Where raters stopped half-way, a draw may pair raters with pairs that they did not see, and has no share at all.
    shares = drawn[name][totals > 0] / totals[totals > 0]
    value = float(counts[name].sum() / total)
    low, high = numpy.quantile(shares, [0.025, 0.975]) if shares.size else (value, value)
    return Estimate(value, float(low), float(high))


def _sign_test(leads):
    """Two-sided p-value of the exact sign test of the signs of `leads` against even odds; zeros do not count."""
    try:
        from scipy.stats import binomtest
    except ImportError as error:
        raise InputError("the sign test needs scipy: pip install 'pladis-surgery[validate]'") from error
    above, below = int((leads > 0).sum()), int((leads < 0).sum())
    return float(binomtest(above, above + below).pvalue) if above + below else 1.0


def _verdict(preference, sign_test):
    if preference is not None and sign_test < 0.05:
        if preference.low > 0.5:
            return "patched preferred"
        if preference.high < 0.5:
            return "base preferred"
    return "no difference that these votes can show"


def _notes(votes, raters, questions):
    """What a reader of the figures should know about them."""
    if len(raters) == 1:
        yield "one rater: the intervals say how the figures vary from pair to pair, not from person to person"
    elif len(raters) < FEW_RATERS:
        yield f"{len(raters)} raters: the intervals say little about what other people would prefer"
    if missing := [question for question in QUESTIONS if question not in {each.question for each in questions}]:
        yield f"nobody answered the question on {_TITLES[missing[0]]}"
    signed = {(vote.session, vote.rater.casefold()) for vote in votes if vote.rater}
    for name, count in sorted(Counter(name for _, name in signed).items()):
        if count > 1:
            yield f"{count} sessions are signed {name!r}: if that is one person, leave out all but one"
    for result in questions:
        title = _TITLES[result.question]
        if result.left and not result.left.low <= 0.5 <= result.left.high:
            side = "left" if result.left.value > 0.5 else "right"
            yield f"{title}: raters favoured the {side} image; with sides left to chance this blurs a preference only"
        if result.preference and result.preference.low == result.preference.high:
            yield f"{title}: all votes for either image agree, so that its interval has no width; that is not certainty"


def render(result):
    """The StudyResult as a table in plain text, without a newline at its end."""
    seen = f"{result.pairs} of {result.pairs_in_study} pairs" if result.pairs < result.pairs_in_study else ""
    lines = [
        f"blind study {result.study} of artifact {result.artifact_hash[:12]}: {_number(result.votes, 'vote')} by "
        f"{_number(result.raters, 'rater')} on {seen or _number(result.pairs, 'pair')}",
        "",
    ]
    rows = [("", "votes", "patched", "base", "no difference", "patched among decided")]
    for each in result.questions:
        shares = (each.patched, each.base, each.no_difference, each.preference)
        rows.append((_TITLES[each.question], str(each.votes), *map(_percent, shares)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.append("")
    for each in result.questions:
        lines.append(
            f"{_TITLES[each.question]}: {each.verdict} (sign test over pairs p = {each.sign_test:.2g}; "
            f"left image chosen {_percent(each.left)}; median {each.median_ms / 1000:.1f} s)"
        )
    drawn = f"{result.draws} bootstrap draws over {result.resampled}"
    lines += ["", f"In brackets: 95% intervals, {drawn}.", *(f"Note: {note}." for note in result.notes)]
    return "\n".join(lines)


def _percent(estimate):
    if estimate is None:
        return "-"
    return f"{estimate.value:.1%} [{100 * estimate.low:.1f}, {100 * estimate.high:.1f}]"


def _number(count, noun):
    return f"1 {noun}" if count == 1 else f"{count} {noun}s"
