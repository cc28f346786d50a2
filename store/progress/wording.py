"""How far a stage is, in words and as JSON."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Standing:
    """How far a stage is at one moment.

    Attributes:
        stage: what is done, such as ``extracting``.
        done: steps so far, those of earlier runs included.
        total: of all steps; None if that is not known.
        unit: what a step is, such as ``images``.
        seconds: since the stage began.
        rate: steps a second of the recent past; None if it cannot be told yet.
        left: seconds until the end at this rate; None if that cannot be told.
        within: the parts of larger stages that it belongs to, such as ``2 of 4: resnet50``.

    >>> print(Standing("extracting", 12000, 30000, "images", 86, 140.2, 128.4, ("2 of 4: resnet50",)).text)
    2 of 4: resnet50: extracting: 12,000 of 30,000 images, 140 a second, 2 min left
    >>> print(Standing("fitting the logistic head", 0, None, "", 90).text)
    still fitting the logistic head, 1 min 30 s
    """

    stage: str
    done: int
    total: int | None
    unit: str
    seconds: float
    rate: float | None = None
    left: float | None = None
    within: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """One line for people."""
        where = "".join(f"{each}: " for each in self.within)
        if self.total is None and not self.done:
            return f"{where}still {self.stage}, {span(self.seconds)}"
        counted = f"{where}{self.stage}: {self.done:,}{'' if self.total is None else f' of {self.total:,}'} {self.unit}"
        if self.rate is None or self.done == self.total:
            return f"{counted}, {span(self.seconds)}"
        left = "" if self.left is None else f", {about(self.left)} left"
        return f"{counted}, {rate_text(self.rate)}{left}"

    @property
    def facts(self) -> dict[str, Any]:
        """As JSON, for ``--log-json`` and ``--metrics``."""
        return {
            "event": "progress",
            "stage": self.stage,
            "within": list(self.within),
            "done": self.done,
            "total": self.total,
            "unit": self.unit,
            "seconds": round(self.seconds, 1),
            "rate": None if self.rate is None else float(f"{self.rate:.4g}"),
            "left": None if self.left is None else round(self.left),
        }


def span(seconds: float) -> str:
    """A time that has passed: ``45 s``, ``1 min 30 s``, ``2 h 5 min``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes_over = divmod(minutes, 60)
    parts = [(hours, "h"), (minutes_over, "min")] if hours else [(minutes, "min"), (rest, "s")]
    return " ".join(f"{count} {unit}" for count, unit in parts if count) or "0 s"


def about(seconds: float) -> str:
    """A time to come, no more exact than it is known: ``45 s``, ``12 min``, ``3 h 20 min``."""
    if seconds < 90:
        return f"{max(round(seconds), 1)} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60 // 10 * 10} min"


def rate_text(each_second: float) -> str:
    """Steps a second, a minute or an hour: ``1,234 a second``, ``30 a minute``."""
    rates = (each_second, "a second"), (60 * each_second, "a minute"), (3600 * each_second, "an hour")
    rate, unit = next(((rate, unit) for rate, unit in rates if rate >= 1), rates[-1])
    return f"{rate:,.0f} {unit}" if rate >= 10 else f"{rate:.1f} {unit}"
