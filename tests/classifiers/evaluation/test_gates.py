"""Gates: what a result must reach, on the command line and in jobs of every task; and those jobs end to end."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from classifiers.evaluation.gates import GATES, missed_gates, requested_gates
from classifiers.evaluation.intervals import wilson
from classifiers.evaluation.multi_label import measure as measure_labels
from classifiers.evaluation.regression import measure as measure_numbers
from classifiers.evaluation.single_label import score
from classifiers.jobs.history import read_runs, run_cells
from classifiers.jobs.job_file import read_job
from classifiers.jobs.run import run_job
from store.errors import JobFileError

Penult = Callable[..., tuple[int, str, str]]

JOB = """
data = "list.csv"
cache = "out.cache"
bundle = "out.head"
[backbone]
name = "{backbone}"
[extract]
{extract}
[gate]
{gate}
"""
TASKS = {
    "multi-label": ('task = "multi-label"', "mean average precision", "min_map"),
    "regression": ('task = "regression"\ntargets = ["warmth", "size"]', "R2", "min_r2"),
}


@pytest.fixture
def job(tmp_path: Path, backbone_file: Path) -> Callable[[str, str], Path]:
    """``job(task, gate)`` writes the job file; 40 pictures with two labels, and two numbers, each are there."""
    rng, rows = np.random.default_rng(0), ["path,label,warmth,size"]
    for i in range(40):
        red, bright = i % 2, (i // 2) % 2
        tint = np.array([60 + 130 * red, 60, 60 + 90 * bright]) + rng.integers(0, 40, 3)  # none is a copy of another
        pixels = np.clip(tint + rng.normal(0, 10, (24, 24, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i:02d}.png")
        labels = "|".join(name for name, there in (("red", red), ("bright", bright)) if there)
        rows.append(f"{i:02d}.png,{labels},{pixels[..., 0].mean():.3f},{pixels[..., 2].mean():.3f}")
    (tmp_path / "list.csv").write_text("\n".join(rows) + "\n")

    def write(task: str, gate: str) -> Path:
        path = tmp_path / "nightly.toml"
        path.write_text(JOB.format(backbone=backbone_file, extract=TASKS[task][0], gate=gate))
        return path

    return write


@pytest.mark.parametrize("task", TASKS)
def test_a_job_of_each_task(task: str, job: Callable[[str, str], Path], tmp_path: Path, penult: Penult) -> None:
    _, metric, key = TASKS[task]
    first = run_job(job(task, f"{key} = 0.3"))
    assert (first.exit_code, first.trained, first.extract.computed) == (0, True, 40)
    again = run_job(job(task, f"{key} = 0.3\n{key}_lower = 0.1"))
    assert (again.trained, again.extract.computed, again.extract.inference_calls) == (False, 0, 0), "nothing has changed"
    missed = run_job(job(task, f"{key} = 1.0" if task == "regression" else "min_map_lower = 1.0"))
    assert (missed.exit_code, missed.trained) == (65, False)
    assert missed.gate_missed is not None
    assert missed.gate_missed.startswith(f"gate not met: {metric} ")
    code, said, _ = penult("run", job(task, f"{key} = 0.3"), "--json")
    assert (code, json.loads(said)["evaluation"]["task"]) == (0, task)
    code, said, _ = penult("runs", tmp_path / "nightly.toml", "--json")
    records = json.loads(said)
    assert [record["exit_code"] for record in records] == [0, 0, 65, 0]
    assert records[0]["evaluation"]["metric"] == {"multi-label": "mean_average_precision", "regression": "r2"}[task]
    assert run_cells(read_runs(tmp_path / "nightly.toml")[0])[-3:-1] == (
        records[0]["evaluation"]["metric"].replace("_", " "),
        f"{records[0]['evaluation']['value']:.4f}",
    )
    with pytest.raises(JobFileError, match=rf"gate.min_accuracy is for single-label, .* expected gate.{key}, gate.{key}_"):
        run_job(job(task, "min_accuracy = 0.5"))


def test_a_record_of_old_is_still_shown() -> None:
    old = {"started": "2026", "exit_code": 0, "seconds": 1.0, "evaluation": {"accuracy": 0.9, "accuracy_interval": [0.8, 0.95]}}
    assert run_cells(old)[-3:] == ("accuracy", "0.9000", "0.8000 to 0.9500")
    assert run_cells({**old, "evaluation": None})[-3:] == ("-", "-", "-")


def metrics() -> dict[str, dict[str, Any]]:
    """An evaluation of each task: 12 images without an error, and others."""
    rng = np.random.default_rng(0)
    sure = np.eye(2)[[0, 1] * 6] * 0.8 + 0.1
    labels = rng.random((40, 2)) < 0.5
    numbers = rng.normal(0, 1, (40, 2))
    return {
        "single-label": score(np.array(["a", "b"] * 6), sure, ["a", "b"], "test").to_json(),
        "multi-label": measure_labels(labels, 0.4 * labels + 0.6 * rng.random((40, 2)), ["a", "b"], "test").to_json(),
        "regression": measure_numbers(numbers, numbers + rng.normal(0, 0.3, (40, 2)) * [1, 3], ["x", "y"], "test").to_json(),
    }


def test_a_dozen_lucky_images_do_not_pass_the_bound() -> None:
    found = metrics()["single-label"]
    assert (found["accuracy"], round(found["accuracy_interval"][0], 2)) == (1.0, 0.76)

    def missed(**wanted: float) -> str | None:
        return missed_gates(requested_gates(wanted), found, lambda gate: gate.name)

    assert missed(min_accuracy=0.9, min_balanced_accuracy=0.9, min_accuracy_lower=0.75) is None
    assert missed(min_accuracy_lower=0.9) == (
        "gate not met: accuracy 1.0000 [0.7575, 1.0000] on 12 images of 'test' is below min_accuracy_lower 0.9"
    )
    both = missed(min_accuracy_lower=0.9, min_balanced_accuracy_lower=0.9)
    assert both is not None
    assert "; balanced accuracy 1.0000 [0.7575, 1.0000] on 12 images of 'test' is below min_balanced_accuracy_lower" in both
    undefined = {**found, "scores": {"accuracy": {"value": None, "interval": None}}}
    assert missed_gates(requested_gates({"min_accuracy": 0.0}), undefined, lambda gate: gate.name) is not None
    assert missed(min_accuracy=float("nan")) is not None, "a gate that is not a number is never met"


@pytest.mark.parametrize("gate", GATES, ids=lambda gate: gate.name)
def test_each_gate_at_its_edge(gate: Any) -> None:
    found = metrics()[gate.task]
    scores = (
        [found["scores"][gate.metric]]
        if gate.metric in found["scores"]
        else [each["scores"][gate.metric] for each in found["per_output"]]
    )
    side = 1 if gate.error else 0
    values = [(each["interval"] or wilson(each["value"] * 12, 12))[side] if gate.bound else each["value"] for each in scores]
    edge = max(values) if gate.error else min(values)
    step = 1e-9 if gate.error else -1e-9
    assert gate.missed(found, edge + step, gate.name) is None
    reason = gate.missed(found, edge - step, gate.name)
    assert reason is not None
    assert f"{gate.name} " in reason
    assert gate.what in reason


def test_the_command_line_has_them_too(job: Callable[[str, str], Path], tmp_path: Path, penult: Penult) -> None:
    run_job(job("regression", ""))
    bundle, cache = tmp_path / "out.head", tmp_path / "out.cache"
    assert penult("evaluate", bundle, cache, "--min-r2", "-1", "--max-mae", "200", "--max-mae-upper", "200")[0] == 0
    code, _, err = penult("evaluate", bundle, cache, "--max-mae-upper", "0.0001")
    assert (code, "gate not met: mean absolute error of 'warmth' " in err, "is above --max-mae-upper 0.0001" in err) == (
        65,
        True,
        True,
    )
    code, _, err = penult("evaluate", bundle, tmp_path / "nothing", "--min-map", "0.5")
    assert code == 2, "the wrong gate is named before the data is looked for"
    assert "--min-map is for multi-label, and this is regression; expected --min-r2, --min-r2-lower, --max-mae" in err
    (tmp_path / "job.toml").write_text(JOB.format(backbone="resnet18", extract="", gate="min_acuracy = 0.5"))
    with pytest.raises(JobFileError, match=r"unknown key 'gate\.min_acuracy'; did you mean 'min_accuracy'"):
        read_job(tmp_path / "job.toml")
