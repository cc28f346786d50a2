"""What a result must reach: the one list behind ``penult evaluate --min-...`` and the ``[gate]`` of a job.

A gate on a score alone is passed by a handful of lucky images; one on the bound of its 95 % interval is not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from store.errors import UsageError
from store.tasks import ONE_LABEL, MultiLabelTask, RegressionTask


@dataclass(frozen=True)
class Gate:
    """One condition.

    Attributes:
        name: the key of a job, and with dashes the flag.
        task: whose metric it is.
        metric: as in an evaluation's ``scores``, or where it has none of this name, in those of each of its outputs.
        what: the metric, for people.
        most: the largest value that makes sense; None for any.
        least: the smallest; None for any.
        error: of what is better the smaller it is: it must not be above the gate.
        bound: whether the far end of the score's 95 % interval counts, instead of the score.
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
        """One sentence."""
        end = f"{'upper' if self.error else 'lower'} end of the 95 % interval of " if self.bound else ""
        return f"{self.task}: the {'largest' if self.error else 'smallest'} {end}{self.what}."

    def missed(self, metrics: Mapping[str, Any], wanted: float, spelled: str) -> str | None:
        """Why an evaluation, as JSON, does not pass, in words; None where it does.

        A score that is undefined does not pass. A share that resampling shows no spread of, such as one without an error, has
        the Wilson interval of as many images.
        """
        from .intervals import wilson

        if self.metric in metrics["scores"]:
            found = [(self.what, metrics["scores"][self.metric])]
        else:
            found = [(f"{self.what} of {each['name']!r}", each["scores"][self.metric]) for each in metrics["per_output"]]
        for what, score in found:
            value, interval = score["value"], score["interval"]
            if interval is None and value is not None and (self.least, self.most) == (0, 1):
                interval = wilson(value * metrics["n"], metrics["n"])
            counts = value if not self.bound else interval and interval[1 if self.error else 0]
            if counts is not None and (counts <= wanted if self.error else counts >= wanted):
                continue
            shown = "undefined" if value is None else f"{value:.4f}"
            shown += f" [{interval[0]:.4f}, {interval[1]:.4f}]" if interval else ""
            where = f"on {metrics['n']} images of {metrics['split']!r}"
            return f"{what} {shown} {where} is {'above' if self.error else 'below'} {spelled} {wanted}"
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


def wanted_gates(given: Mapping[str, Any]) -> dict[Gate, float]:
    """The gates that are asked for, by their names in a mapping that may hold more."""
    return {gate: float(given[gate.name]) for gate in GATES if given.get(gate.name) is not None}


def require_gates(wanted: Mapping[Gate, float], task: str, spell: Callable[[Gate], str]) -> None:
    """Refuse a gate on a metric that a task does not have.

    Args:
        wanted: as `wanted_gates` gives them.
        task: of the samples.
        spell: how the gate was asked for.

    Raises:
        UsageError: names it, and the gates that there are.
    """
    for gate in wanted:
        if gate.task != task:
            there = ", ".join(spell(each) for each in GATES if each.task == task)
            message = f"{spell(gate)} is for {gate.task}, and this is {task}; there is {there}"
            raise UsageError(message)


def missed_gates(wanted: Mapping[Gate, float], metrics: Mapping[str, Any], spell: Callable[[Gate], str]) -> str | None:
    """Which gates an evaluation, as JSON, does not pass, in words; None where it passes all."""
    reasons = [reason for gate, value in wanted.items() if (reason := gate.missed(metrics, value, spell(gate)))]
    return f"gate not met: {'; '.join(reasons)}" if reasons else None
