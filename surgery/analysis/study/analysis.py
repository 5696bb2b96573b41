"""What the votes of a blind study amount to: preference rates, how sure they are, and a verdict in plain words.

Votes are not independent of each other: those on one item share its images, those of one rater share a taste. So
raters and items are both drawn again, each with replacement and each apart from the other, and a vote counts as often
as its rater times its item came up: the pigeonhole bootstrap (Owen, "The pigeonhole bootstrap", Annals of Applied
Statistics 1, 2007). GAG (Table 4) gives bootstrap intervals of its preference rates, too.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import numpy
from numpy.typing import NDArray

from surgery.errors import InputError

from .key import Key
from .votes import QUESTIONS, Vote

FEW_RATERS = 5
_TITLES = {"quality": "image quality", "alignment": "prompt alignment"}
_PLACES = {2: ("left", "right"), 3: ("left", "middle", "right")}
_SAME = "no difference"


@dataclass(frozen=True)
class Estimate:
    """A share between 0 and 1, and its 95% interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Contest:
    """Two sides against each other, in the votes for either of them on items that show both.

    preference: the share of `side` among these votes, None where there is none. won: the share of items that most of
    these votes on them won for `side`, of those that one of both won, with its exact binomial interval; None where
    neither won any. sign_test: two-sided p-value over these items. verdict: "SIDE preferred" where the interval of
    `preference` lies on one side of 0.5 and sign_test is below 0.05, else "no difference that these votes can show".
    The interval alone would not do: where few votes all agree, it has no width.
    """

    side: str
    other: str
    preference: Estimate | None
    won: Estimate | None
    sign_test: float
    verdict: str


@dataclass(frozen=True)
class QuestionResult:
    """The votes on one question. Shares are of its votes, all with one weight; of pairs, of those that show the side.

    places: the share of each place among the votes for an image; with the sides left to chance they are even where
    raters do not favour a place.
    """

    question: str
    votes: int
    raters: int
    items: int
    shares: dict[str, Estimate]
    no_difference: Estimate
    places: dict[str, Estimate]
    contests: tuple[Contest, ...]
    median_ms: float

    def contest(self, side: str, other: str) -> Contest:
        """The Contest of a side with one that stands before it in the key."""
        return next(each for each in self.contests if (each.side, each.other) == (side, other))


@dataclass(frozen=True)
class StudyResult:
    """All questions, over all models and of each. items: those voted on, of items_in_study.

    resampled: what the intervals are over.
    """

    study: str
    sides: tuple[str, ...]
    models: dict[str, str]
    votes: int
    raters: int
    items: int
    items_in_study: int
    draws: int
    seed: int
    resampled: str  # "raters and items", "items", "raters", or "nothing" for one rater and one item
    questions: tuple[QuestionResult, ...]
    by_model: dict[str, tuple[QuestionResult, ...]]  # empty where there is one model
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The result as plain data."""
        return {"schema_version": 2, **asdict(self)}


def analyse(votes: Iterable[Vote], key: Key, draws: int = 10000, seed: int = 0) -> StudyResult:
    """The StudyResult of the Votes that read_votes gave, the sides told by the key.

    A rater is a session. With one rater the intervals are over items alone, with one item over raters alone. The same
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
        raise InputError(f"the key has no item {strange[0]}; give the key of the study that was voted on")
    raters, items = ({getattr(vote, name) for vote in votes} for name in ("session", "item"))
    of_models = {model: [vote for vote in votes if key.items[vote.item].model == model] for model in key.models}
    questions = _questions(votes, key, draws, seed)
    several = [name for name, group in (("raters", raters), ("items", items)) if len(group) > 1]
    return StudyResult(
        study=key.study,
        sides=tuple(key.sides),
        models=key.models,
        votes=len(votes),
        raters=len(raters),
        items=len(items),
        items_in_study=len(key.items),
        draws=draws,
        seed=seed,
        resampled=" and ".join(several) or "nothing",
        questions=questions,
        by_model={model: _questions(own, key, draws, seed) for model, own in of_models.items() if own}
        if len(key.models) > 1
        else {},
        notes=tuple(_notes(votes, raters, questions)),
    )


def _questions(votes: Sequence[Vote], key: Key, draws: int, seed: int) -> tuple[QuestionResult, ...]:
    return tuple(
        _question(question, answers, key, draws, numpy.random.default_rng([seed, number]))
        for number, question in enumerate(QUESTIONS)
        if (answers := [vote for vote in votes if vote.question == question])
    )


def _question(question, votes, key, draws, rng):
    raters = {session: row for row, session in enumerate(sorted({vote.session for vote in votes}))}
    items = {item: column for column, item in enumerate(sorted({vote.item for vote in votes}))}
    sides = [side for side in key.sides if any(side in key.items[item].images for item in items)]
    places = _PLACES[max(len(vote.shown) for vote in votes)]
    names = [*sides, _SAME, *(f"at {place}" for place in places)]
    counts = {name: numpy.zeros((len(raters), len(items))) for name in names}
    for vote in votes:
        cell = raters[vote.session], items[vote.item]
        counts[_SAME if vote.chosen is None else key.items[vote.item].side_of(vote.chosen)][cell] += 1
        if vote.chosen is not None:
            counts[f"at {_PLACES[len(vote.shown)][vote.shown.index(vote.chosen)]}"][cell] += 1
    rater_counts, item_counts = (_drawn_again(rng, draws, len(group)) for group in (raters, items))
    # Per draw, the votes of each kind, a vote counted as often as its rater times its item was drawn: (draws,)
    shown = {side: numpy.array([side in key.items[item].images for item in items], numpy.float64) for side in key.sides}

    def share(name: str, among: Sequence[str], shows: Sequence[str] = ()) -> Estimate | None:
        """The share of one kind of vote among several, on the items that show these sides; None without votes."""
        on = numpy.prod([shown[side] for side in shows], axis=0) if shows else 1.0
        cells = {kind: counts[kind] * on for kind in among}
        drawn = {kind: ((rater_counts @ each) * item_counts).sum(axis=1) for kind, each in cells.items()}
        return _estimate(name, among, cells, drawn)

    every = (*sides, _SAME)
    no_difference = share(_SAME, every)
    assert no_difference  # there are votes
    return QuestionResult(
        question=question,
        votes=len(votes),
        raters=len(raters),
        items=len(items),
        shares={side: found for side in sides if (found := share(side, every, (side,)))},
        no_difference=no_difference,
        places={place: found for place in places if (found := share(f"at {place}", [f"at {each}" for each in places]))},
        contests=tuple(
            _contest(side, other, share(side, (side, other), (side, other)), counts, shown[side] * shown[other])
            for other, side in combinations(sides, 2)
            if (shown[side] * shown[other]).any()
        ),
        median_ms=float(numpy.median([vote.ms for vote in votes])),
    )


def _contest(side, other, preference, counts: Mapping[str, NDArray[numpy.float64]], on) -> Contest:
    """on: 1 for each item that shows both sides, else 0."""
    leads = ((counts[side] - counts[other]) * on).sum(axis=0)
    won, sign_test = _sign_test(leads)
    verdict = "no difference that these votes can show"
    if preference is not None and sign_test < 0.05 and (preference.low > 0.5 or preference.high < 0.5):
        verdict = f"{side if preference.low > 0.5 else other} preferred"
    return Contest(side, other, preference, won, sign_test, verdict)


def _drawn_again(rng, draws, count):
    """How often each of `count` is drawn in `count` draws with replacement: float64 (draws, count)."""
    return rng.multinomial(count, numpy.full(count, 1 / count), size=draws).astype(numpy.float64)


def _estimate(name, among, counts, drawn):
    """The share of one kind of vote among several, or None where there are no votes of these kinds."""
    total = sum(counts[kind].sum() for kind in among)
    if not total:
        return None
    totals = numpy.sum([drawn[kind] for kind in among], axis=0)
    # Where raters stopped half-way, a draw may pair raters with pairs that they did not see, and has no share at all.
    shares = drawn[name][totals > 0] / totals[totals > 0]
    value = float(counts[name].sum() / total)
    low, high = numpy.quantile(shares, [0.025, 0.975]) if shares.size else (value, value)
    return Estimate(value, float(low), float(high))


def _sign_test(leads):
    """(share of the `leads` above 0 with its exact interval or None, two-sided p-value against even odds)."""
    try:
        from scipy.stats import binomtest
    except ImportError as error:
        raise InputError("the sign test needs scipy: pip install 'pladis-surgery[validate]'") from error
    above, below = int((leads > 0).sum()), int((leads < 0).sum())
    if not above + below:
        return None, 1.0
    test = binomtest(above, above + below)
    interval = test.proportion_ci()
    return Estimate(above / (above + below), float(interval.low), float(interval.high)), float(test.pvalue)


def _notes(votes: Sequence[Vote], raters: set[str], questions: Sequence[QuestionResult]) -> Iterator[str]:
    """What a reader of the figures should know about them."""
    if len(raters) == 1:
        yield "one rater: the intervals say how the figures vary from item to item, not from person to person"
    elif len(raters) < FEW_RATERS:
        yield f"{len(raters)} raters: the intervals say little about what other people would prefer"
    if missing := [question for question in QUESTIONS if question not in {each.question for each in questions}]:
        yield f"nobody answered the question on {_TITLES[missing[0]]}"
    signed = {(vote.session, vote.rater.casefold()) for vote in votes if vote.rater}
    for name, count in sorted(Counter(name for _, name in signed).items()):
        if count > 1:
            yield f"{count} sessions are signed {name!r}: if that is one person, leave out all but one"
    for result in questions:
        title, even = _TITLES[result.question], 1 / max(1, len(result.places))
        for place, share in result.places.items():
            if share.low > even:
                yield f"{title}: raters favoured the {place} image, which blurs a preference and makes none"
        for each in result.contests:
            if each.preference and each.preference.low == each.preference.high:
                yield (
                    f"{title}: all votes for {each.other} or {each.side} agree, so that the interval has no width; "
                    "that is not certainty"
                )


def render(result: StudyResult) -> str:
    """The StudyResult as a table in plain text, without a newline at its end."""
    seen = f"{result.items} of {result.items_in_study} items" if result.items < result.items_in_study else ""
    where = ", ".join(f"{model} ({origin[:12]})" if model else origin[:12] for model, origin in result.models.items())
    lines = [
        f"blind study {result.study} of {where}: {_number(result.votes, 'vote')} by "
        f"{_number(result.raters, 'rater')} on {seen or _number(result.items, 'item')}",
        "",
    ]
    groups = {**result.by_model, "all": result.questions} if result.by_model else {"": result.questions}
    rows: list[tuple[str, ...]] = [("", "votes", *result.sides, _SAME)]
    for model, questions in groups.items():
        for each in questions:
            shares = [each.shares.get(side) for side in result.sides]
            name = f"{model}, {_TITLES[each.question]}" if model else _TITLES[each.question]
            rows.append((name, str(each.votes), *map(_percent, [*shares, each.no_difference])))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.append("")
    for model, questions in groups.items():
        for each in questions:
            name = f"{model}, {_TITLES[each.question]}" if model else _TITLES[each.question]
            for contest in each.contests:
                lines.append(
                    f"{name}, {contest.other} or {contest.side}: {contest.verdict} ({_percent(contest.preference)} of "
                    f"the votes for {contest.side}, {_percent(contest.won)} of the items; p = {contest.sign_test:.2g})"
                )
    for each in result.questions:
        places = ", ".join(f"{place} {_percent(share)}" for place, share in each.places.items()) or "-"
        lines.append(f"{_TITLES[each.question]}: chosen {places}; median {each.median_ms / 1000:.1f} s")
    drawn = f"{result.draws} bootstrap draws over {result.resampled}; of items exact binomial"
    lines += ["", f"In brackets: 95% intervals, {drawn}.", *(f"Note: {note}." for note in result.notes)]
    return "\n".join(lines)


def _percent(estimate: Estimate | None) -> str:
    if estimate is None:
        return "-"
    return f"{estimate.value:.1%} [{100 * estimate.low:.1f}, {100 * estimate.high:.1f}]"


def _number(count, noun):
    return f"1 {noun}" if count == 1 else f"{count} {noun}s"
