"""Gates: limits that the scores of an evaluation must meet, for ``penult evaluate --min-...`` and a job's section ``[gate]``.

A handful of lucky images can pass a gate on a score, but not one on the bound of its 95 % interval.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from store.errors import UsageError
from store.tasks import ONE_LABEL, MultiLabelTask, RegressionTask


@dataclass(frozen=True)
class Gate:
    """One limit for one score.

    Attributes:
        name: the key in a job; with dashes, the flag.
        task: the task that has the metric.
        metric: key in an evaluation's ``scores``, or, if it is not there, in the scores of each output.
        what: the metric, as shown to users.
        least: the smallest limit that makes sense; None for any.
        most: the largest; None for any.
        error: whether smaller is better, so that the score must not be above the limit.
        bound: whether the worse end of the score's 95 % interval is compared, instead of the score.
    """

    name: str
    task: str
    metric: str
    what: str
    least: float | None = 0
    most: float | None = 1
    error: bool = False
    bound: bool = False

    @property
    def help(self) -> str:
        """The help text of its flag, one sentence."""
        end = f"{'upper' if self.error else 'lower'} end of the 95 % interval of " if self.bound else ""
        return f"{self.task}: the {'largest' if self.error else 'smallest'} {end}{self.what}."

    def missed(self, metrics: Mapping[str, Any], limit: float, spelled: str) -> str | None:
        """Why an evaluation, as JSON, does not pass; None if it passes.

        An undefined score does not pass. If resampling shows no spread, as for a share without errors, the Wilson interval of
        that many images is used.
        """
        from .intervals import modified_wilson
        from .task import images_of

        if self.metric in metrics["scores"]:
            scores = [(self.what, metrics["scores"][self.metric])]
        else:
            scores = [(f"{self.what} of {each['name']!r}", each["scores"][self.metric]) for each in metrics["per_output"]]
        for what, score in scores:
            value, interval = score["value"], score["interval"]
            if interval is None and value is not None and (self.least, self.most) == (0, 1):
                n = metrics.get("groups") or metrics["n"]
                interval = modified_wilson(value * n, n)
            compared = value if not self.bound else interval and interval[1 if self.error else 0]
            if compared is not None and (compared <= limit if self.error else compared >= limit):
                continue
            shown = "undefined" if value is None else f"{value:.4f}"
            shown += f" [{interval[0]:.4f}, {interval[1]:.4f}]" if interval else ""
            where = f"on {images_of(metrics)} of {metrics['split']!r}"
            return f"{what} {shown} {where} is {'above' if self.error else 'below'} {spelled} {limit}"
        return None


def _with_bound(name: str, task: str, metric: str, what: str, **limits: Any) -> tuple[Gate, Gate]:
    end = "upper" if limits.get("error") else "lower"
    return Gate(name, task, metric, what, **limits), Gate(f"{name}_{end}", task, metric, what, **limits, bound=True)


GATES = (
    *_with_bound("min_accuracy", ONE_LABEL.name, "accuracy", "accuracy"),
    *_with_bound("min_balanced_accuracy", ONE_LABEL.name, "balanced_accuracy", "balanced accuracy"),
    *_with_bound("min_map", MultiLabelTask.name, "mean_average_precision", "mean average precision"),
    *_with_bound("min_r2", RegressionTask.name, "r2", "R2", least=None),
    *_with_bound("max_mae", RegressionTask.name, "mae", "mean absolute error", most=None, error=True),
)


def requested_gates(settings: Mapping[str, Any]) -> dict[Gate, float]:
    """The gates that are set, with their limits, in a mapping by name that may hold more."""
    return {gate: float(settings[gate.name]) for gate in GATES if settings.get(gate.name) is not None}


def require_gates(limits: Mapping[Gate, float], task: str, spell: Callable[[Gate], str]) -> None:
    """Refuse a gate on a metric that a task does not have.

    Args:
        limits: what `requested_gates` returns.
        task: of the samples.
        spell: returns the flag or the key of a gate.

    Raises:
        UsageError: names the gate, and those that the task has.
    """
    for gate in limits:
        if gate.task != task:
            available = ", ".join(spell(each) for each in GATES if each.task == task)
            message = f"{spell(gate)} is for {gate.task}, and this is {task}; expected {available}"
            raise UsageError(message)


def missed_gates(limits: Mapping[Gate, float], metrics: Mapping[str, Any], spell: Callable[[Gate], str]) -> str | None:
    """Which gates an evaluation, as JSON, does not pass, and why; None if it passes all."""
    reasons = [reason for gate, value in limits.items() if (reason := gate.missed(metrics, value, spell(gate)))]
    return f"gate not met: {'; '.join(reasons)}" if reasons else None
