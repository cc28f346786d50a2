"""The verdict of a comparison: whether a head is worth its extra cost, in one sentence, by the rule in docs/compare.md."""

from __future__ import annotations

import math
from dataclasses import dataclass

from classifiers.evaluation.intervals import bounds, points, signed, wilson
from classifiers.evaluation.paired_tests import Change, needed_images
from classifiers.evaluation.units import FEWEST, Units

SIGNIFICANT = 0.05
ALIKE = 1.5  # costs within this factor are about the same
MOST = 10**6  # images; nobody is told to get more
WORTH, NOT_WORTH, UNKNOWN = "worth it", "not worth it", "cannot be told"


@dataclass(frozen=True)
class Verdict:
    """The conclusion from a comparison with the baseline.

    Attributes:
        decision: ``worth it``, ``not worth it`` or ``cannot be told``: the higher cost or, if it costs less, the saving.
        cost_ratio: seconds divided by those of the baseline, extraction included; None if one of them is not known.
        needed: how many held-out images would decide it in four of five cases, if the true difference is the measured one;
            None if it is decided, or too close to call for any number that can be had.
        sentence: the verdict in words.
    """

    decision: str
    cost_ratio: float | None
    needed: int | None
    sentence: str


def judge(
    change: Change, units: Units, *, subject: str, cost_ratio: float | None, worthwhile: float, comparisons: int = 1
) -> Verdict:
    """Weigh a difference of accuracy against its cost.

    A more expensive head is worth it if its gain is at least ``worthwhile`` and is proven: the paired interval and the exact
    test (Holm) exclude zero. It is not if the interval excludes a gain of ``worthwhile``. A cheaper head is judged from the
    other side: the saving is worth it if the gain of the baseline over it is not worth the cost of the baseline. From too few
    groups nothing is concluded.

    Args:
        change: from the baseline.
        units: the held-out images, and which of them belong together.
        subject: what is judged; the sentence begins with it.
        cost_ratio: as in `Verdict`.
        worthwhile: the smallest difference of accuracy that matters, as a share.
        comparisons: for so many heads p is adjusted.
    """
    difference = change.scores["accuracy"]
    value, (low, high) = difference["value"], difference["interval"]
    saving = cost_ratio is not None and cost_ratio <= 1 / ALIKE
    gain, least, most = (-value, -high, -low) if saving else (value, low, high)  # of the one that costs more
    needed, n = None, len(units.of)
    if units.few:
        decision = UNKNOWN
    elif gain >= worthwhile and least > 0 and change.p_adjusted < SIGNIFICANT:
        decision = NOT_WORTH if saving else WORTH
    elif most < worthwhile:
        decision = WORTH if saving else NOT_WORTH
    else:
        decision = UNKNOWN
        needed = _needed(change, n, gain, worthwhile, comparisons)
    price = "" if cost_ratio is None else f" and {_price(cost_ratio)}"
    what = "the saving is " if saving else ""
    if decision == UNKNOWN:
        way = "is" if (gain > worthwhile) != saving else "is not"
        more = f"it is so close to {points(worthwhile)} that {MOST:,} would not be enough"
        if needed:
            more = f"if this is the true difference, about {_rounded(needed)} would show that it {way}"
        more = f"{FEWEST} groups are the least that can show it" if units.few else more
        ending = f"whether {what or 'it is '}worth it cannot be told with {units.phrase}; {more}"
    else:
        ending = f"{what}{decision} on this data"
    sentence = f"{subject} changes accuracy by {signed(value)} points {bounds((low, high))}{price}: {ending}."
    return Verdict(decision, cost_ratio, needed, sentence)


def _needed(change: Change, n: int, gain: float, worthwhile: float, comparisons: int) -> int | None:
    """See `Verdict.needed`. Of what the two disagree on, the middle of the Wilson interval: zero of few is no proof of none."""
    discordant = sum(wilson(change.wins + change.losses, n)) / 2
    needed = needed_images(discordant, gain, worthwhile, comparisons) * change.effect
    return max(math.ceil(needed), n + 1) if needed <= MOST else None


def _price(ratio: float) -> str:
    if 1 / ALIKE < ratio < ALIKE:
        return "costs about the same"
    if ratio < 1:
        return f"costs {_times(1 / ratio)} times less"
    return f"costs {_times(ratio)} times as much"


def _times(ratio: float) -> str:
    return f"{ratio:,.0f}" if ratio >= 9.95 else f"{ratio:.1f}"


def _rounded(count: int) -> str:
    """A number rounded up to two significant digits."""
    unit = 10 ** max(len(str(count)) - 2, 0)
    return f"{math.ceil(count / unit) * unit:,}"
