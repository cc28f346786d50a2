"""What a scheduler calls: one TOML file that says extract, train, evaluate, and when the result is good enough."""

from __future__ import annotations

import json
import logging
import os
import re
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from extractor.pipeline import preview, run_extract
from extractor.prepare import library_versions
from extractor.settings.declaration import Place, Settings, flag_of, groups, key_of, setting
from extractor.settings.groups import ExtractSettings, Options, ResultPath
from extractor.sources import Source
from extractor.summary import Summary
from store import atomic, json_text
from store.cache import FeatureCache
from store.errors import BadDataError, GateError, InputMissingError, JobFileError, PenultError, UsageError, did_you_mean
from store.lock import file_lock, folder_lock

from .bundle import Bundle, install, refuse_existing, remove_folder, remove_leftovers, task_of_bundle
from .gates import Gate, missed_gates
from .heldout import evaluate_bundle
from .settings import GateSettings, TrainSettings, train_settings
from .task import Evaluation, Measured
from .train import made_from, train_head

log = logging.getLogger("penult.classifiers")

RETIRED = {"extract.tf32": 'written precision = "tf32" now'}


class Paths(Settings):
    """Where a job's data are, and where its results go."""

    data: str = setting(..., "What `penult extract` takes (docs/data.md).")
    cache: ResultPath = setting(..., "The cache; made, or brought up to date.")
    bundle: ResultPath = setting(..., "The head; replaced by a new one that meets the gates.")


@dataclass(frozen=True)
class Job:
    """A job file, read and checked.

    Attributes:
        folder: where it lies; its paths are relative to that.
        paths: its keys without a section.
        extract: its sections ``[backbone]`` and ``[extract]``.
        train: its section ``[train]``.
        head: of ``train``, not yet fitted.
        gate: its section ``[gate]``.
        gates: of ``gate``.
    """

    folder: Path
    paths: Paths
    extract: ExtractSettings
    train: TrainSettings
    head: Any
    gate: GateSettings
    gates: dict[Gate, float]

    def source(self) -> Source:
        return self.extract.source(self.paths.data, self.folder)


def models() -> dict[str, type[Settings]]:
    """The settings of each section of a job file; those without one are called ""."""
    return {"": Paths, "backbone": ExtractSettings, "extract": ExtractSettings, "train": train_settings(), "gate": GateSettings}


def keys_of(section: str) -> dict[str, str]:
    """The names of the settings that a section of a job file has, by their keys."""
    model = models()[section]
    names = [name for group, own in groups(model, "job") if group.section == section for name in own]
    return {key_of(model, name).removeprefix(f"{section}."): name for name in names}


@dataclass(frozen=True)
class JobResult:
    """What a run did and found.

    Attributes:
        extract: the summary of the extraction.
        trained: False where features, samples and settings are those that the bundle was made from.
        evaluation: on the held-out images.
        bundle: where the head is: the job's bundle, or ``<bundle>.rejected`` where a new head missed the gate.
        gate_missed: why the gate is not met, in words; None where it is.
    """

    extract: Summary
    trained: bool
    evaluation: Evaluation | Measured
    bundle: Path
    gate_missed: str | None = None

    @property
    def exit_code(self) -> int:
        """0, 3 where inputs failed inside the budget, 65 where the gate is not met."""
        if self.gate_missed:
            return GateError.exit_code
        return 3 if self.extract.failed else 0

    def to_json(self) -> dict[str, Any]:
        return {
            "extract": self.extract.to_json(),
            "trained": self.trained,
            "evaluation": self.evaluation.to_json(),
            "bundle": str(self.bundle),
            "gate_missed": self.gate_missed,
        }


def read_job(path: Path) -> Job:
    """Parse and validate a job file.

    Raises:
        InputMissingError: it cannot be read.
        JobFileError: it is not TOML, or a key is unknown, missing, twice there or of the wrong type; names it.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        message = f"cannot read {path}: {error.strerror}"
        raise InputMissingError(message) from error
    try:
        document = tomllib.loads(data.decode("utf-8-sig"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        message = f"{path} is not TOML: {error}"
        raise JobFileError(message) from error
    folder = path.absolute().parent
    place = Place(key_of, JobFileError, folder)
    problems: list[str] = []
    given: dict[type[Settings], dict[str, Any]] = {model: {} for model in models().values()}
    sections = {name: document.pop(name) for name in list(models()) if name in document}
    for section, values in {"": document, **sections}.items():
        if not isinstance(values, dict):
            problems.append(f"{section} is {json.dumps(values, default=str)}; expected a section of keys, such as [train]")
            continue
        keys = keys_of(section)
        for key, value in values.items():
            if key in keys:
                given[models()[section]][keys[key]] = value
            else:
                problems.append(_unknown(section, key))
    read: dict[type[Settings], Any] = {}
    for model, values in given.items():
        try:
            read[model] = model.read(values, place)
        except JobFileError as error:
            problems.append(str(error))
    if problems:
        message = f"{path}: {'; '.join(problems)}"
        raise JobFileError(message)
    paths, extract, train, gate = read.values()
    try:
        with place.here():
            _require_together(paths, extract, train)
            return Job(folder, paths, extract, train, train.make(extract.task), gate, gate.wanted(extract.task))
    except (UsageError, JobFileError) as error:
        message = f"{path}: {error}"
        raise JobFileError(message) from error


def _require_together(paths: Paths, extract: ExtractSettings, train: TrainSettings) -> None:
    """Refuse sections that do not fit each other.

    Raises:
        JobFileError: names the keys.
    """
    problems = {
        "train.average_views without views: ask for extract.views too": train.average_views and extract.views == 1,
        f"train.layer {train.layer!r} is none of backbone.layers": train.layer not in (None, *extract.layers),
        "cache and bundle are one place": paths.cache.absolute() == paths.bundle.absolute(),
    }
    if message := "; ".join(problem for problem, found in problems.items() if found):
        raise JobFileError(message)


def _unknown(section: str, key: str) -> str:
    name = f"{section}.{key}" if section else key
    if name in RETIRED:
        return f"{name} is {RETIRED[name]}"
    known = [*keys_of(section), *([] if section else [other for other in models() if other])]
    elsewhere = [f"[{other}]" for other in models() if other not in ("", section) and key in keys_of(other)]
    near = did_you_mean(key, known)
    if key in keys_of(section).values():  # as it is called in Python
        near = f"; it is {next(each for each, field in keys_of(section).items() if field == key)!r} here"
    belongs = f"; there is one in {' and '.join(elsewhere)}" if elsewhere else ""
    listed = f"; known are {', '.join(known)}"
    return f"unknown key {name!r}{near + belongs or listed}"


def preview_job(path: Path) -> dict[str, Any]:
    """What `run_job` would do, as JSON; nothing is written.

    Raises:
        JobFileError: the job file is wrong.
        InputMissingError: the data is not there.
    """
    job = read_job(path)
    refuse_existing(job.paths.bundle, overwrite=True)
    with _in_words_of(path):
        extract = preview(job.source(), job.extract.network(), job.paths.cache, job.extract)
    unchanged = not extract["to_read"] and _made_already(job) is not None
    return {"extract": extract, "train": "unchanged" if unchanged else "yes, if features, labels or settings changed"}


def _made_already(job: Job) -> Bundle | None:
    """The bundle that training would give again, if it is there and sound: the one that is served, or the rejected one."""
    for place in (job.paths.bundle, _rejected(job)):
        with suppress(InputMissingError, BadDataError):
            bundle = Bundle.load(place)
            if bundle.made_from and bundle.made_from == made_from(_features(job), job.head, job.train):
                return bundle
    return None


def _rejected(job: Job) -> Path:
    """Where a head that misses the gate is kept."""
    return job.paths.bundle.with_name(f"{job.paths.bundle.name}.rejected")


def _features(job: Job) -> FeatureCache:
    return FeatureCache(job.paths.cache, job.train.layer)


def run_job(path: Path, *, quiet: bool = False, record: dict[str, Any] | None = None) -> JobResult:
    """Extract, train if anything changed, evaluate, and hold the result against the gate; one record per run is kept.

    Args:
        path: the job file.
        quiet: no progress line.
        record: filled in as the run goes on, with what also goes into `runs_file`; complete even where this raises.

    A head that misses the gate never takes the place of one that met it: it is kept beside it as ``<bundle>.rejected``.

    Raises:
        LockedError: this job is running already.
        PenultError: whatever the steps raise.
    """
    job = read_job(path)
    record = {} if record is None else record
    record |= {"started": datetime.now(UTC).isoformat(timespec="seconds"), "exit_code": 70}
    begin = time.perf_counter()
    with file_lock(path.with_name(f".{path.name}.lock"), what=str(path)):
        try:
            with _in_words_of(path):
                result = _run(job, record, quiet=quiet)
            record["exit_code"] = result.exit_code
            if result.gate_missed:
                record["error"] = result.gate_missed
            return result
        except PenultError as error:
            record |= {**error.facts, "exit_code": error.exit_code, "error": str(error)}
            raise
        finally:
            record |= {"seconds": round(time.perf_counter() - begin, 3), "versions": library_versions()}
            _append(runs_file(path), record)


@contextmanager
def _in_words_of(path: Path) -> Iterator[None]:
    """What is wrong with a setting is wrong with the job file, and named as it stands there."""
    try:
        yield
    except PenultError as error:
        text = str(error)
        for section in models():
            for key, name in keys_of(section).items():
                text = re.sub(rf"{re.escape(flag_of(models()[section], name))}(?![\w-])", f"{section}.{key}".lstrip("."), text)
        if isinstance(error, UsageError):
            message = f"{path}: {text}"
            raise JobFileError(message) from error
        error.args = (text, *error.args[1:])
        raise


def _run(job: Job, record: dict[str, Any], *, quiet: bool) -> JobResult:
    served, rejected = job.paths.bundle, _rejected(job)
    for place in (served, rejected):
        refuse_existing(place, overwrite=True)
        remove_leftovers(place)
    options = job.extract.part(Options).replace(quiet=quiet)
    summary = run_extract(job.source(), job.extract.network(), job.paths.cache, options)
    record["extract"] = summary.to_json()
    bundle = _made_already(job)
    trained = bundle is None
    staging = atomic.temporary(served)
    with folder_lock(served.parent):
        try:
            if bundle is None:
                bundle = train_head(_features(job), staging / served.name, job.head, job.train)
            else:
                log.info("features, labels and settings are unchanged: %s is kept", bundle.name)
            evaluation, _ = evaluate_bundle(bundle, job.paths.cache, split=job.gate.split)
            missed = missed_gates(job.gates, evaluation.to_json(), lambda gate: key_of(GateSettings, gate.name))
            target = rejected if missed and bundle.path != served else served
            if missed and target == rejected:
                missed += f"; the new head is kept as {target.name}"
            if bundle.path != target:  # a rejected one may have got a gate that it meets
                install(bundle.path, target)
        finally:
            remove_folder(staging)
    record["trained"] = trained
    record["evaluation"] = _in_short(evaluation.to_json(), task_of_bundle(bundle).figure)
    return JobResult(summary, trained, evaluation, target, missed)


def _in_short(metrics: dict[str, Any], figure: str) -> dict[str, Any]:
    """What the record of a run keeps of an evaluation: above all the figure that says most, with its interval."""
    names = ("split", "n", "accuracy", "accuracy_interval", "macro_f1")
    found = metrics["figures"][figure]
    kept = {name: value for name, value in metrics.items() if name in names}
    return {**kept, "figure": figure, "value": found["value"], "interval": found["interval"]}


def runs_file(job: Path) -> Path:
    """Where the records of a job's runs are kept: one JSON object per line, beside the job file."""
    return job.with_name(f"{job.stem}.runs.jsonl")


def _append(path: Path, record: dict[str, Any]) -> None:
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json_text.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:  # the run itself is done; its record must not turn that around
        log.warning("cannot write %s: %s", path, error.strerror)


def read_runs(job: Path) -> list[dict[str, Any]]:
    """The records of a job's runs, the oldest first; a line cut by a crash is left out.

    Raises:
        InputMissingError: it never ran.
    """
    path = runs_file(job)
    try:
        lines = path.read_text("utf-8").splitlines()
    except OSError as error:
        message = f"no runs of {job} are recorded ({path}: {error.strerror})"
        raise InputMissingError(message) from error
    records = []
    for line in lines:
        with suppress(ValueError):
            records.append(json.loads(line))
    return records


RUN_COLUMNS = ("started", "exit", "seconds", "inputs", "failed", "computed", "trained", "figure", "value", "95 % interval")


def run_cells(record: dict[str, Any]) -> tuple[str, ...]:
    """One record as text, in the order of `RUN_COLUMNS`; what a run did not get to is a dash."""
    extract = record.get("extract", {})
    return (
        record["started"],
        str(record["exit_code"]),
        f"{record['seconds']:.1f}",
        *(str(extract.get(name, "-")) for name in ("inputs", "failed", "computed")),
        {True: "yes", False: "unchanged"}.get(record.get("trained", ""), "-"),
        *_figure_cells(record.get("evaluation")),
    )


def _figure_cells(evaluation: dict[str, Any] | None) -> tuple[str, str, str]:
    if not evaluation:
        return "-", "-", "-"
    figure = evaluation.get("figure", "accuracy")  # all that there was in records of old
    value = evaluation.get("value", evaluation.get("accuracy"))
    bounds = evaluation.get("interval", evaluation.get("accuracy_interval"))
    shown = f"{bounds[0]:.4f} to {bounds[1]:.4f}" if bounds else "-"
    return figure.replace("_", " "), "-" if value is None else f"{value:.4f}", shown
