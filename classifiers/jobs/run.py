"""The run of a job: extract, train if anything changed, evaluate, and check the result against its gates."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from classifiers.bundles.bundle import Bundle, task_of_bundle
from classifiers.bundles.bundle_folder import install, refuse_existing, remove_folder, remove_leftovers, reserved
from classifiers.bundles.held_out import evaluate_bundle
from classifiers.bundles.settings import GateSettings
from classifiers.evaluation.gates import missed_gates
from classifiers.evaluation.task import Evaluation, Measured
from classifiers.training.train import made_from, train
from extractor.pipeline.plan import preview
from extractor.pipeline.prepare import library_versions
from extractor.pipeline.run import run_extract
from extractor.pipeline.settings import Options
from extractor.pipeline.summary import Summary
from extractor.run_log import kept_warnings
from extractor.settings import flag_of, key_of
from store.cache import FeatureCache
from store.errors import BadDataError, GateError, InputMissingError, JobFileError, PenultError, UsageError, outcome
from store.format import atomic
from store.format.lock import file_lock
from store.progress.stages import staged

from .history import append_run, runs_file
from .job_file import Job, keys_of, models, read_job

log = logging.getLogger("penult.classifiers")


@dataclass(frozen=True)
class JobResult:
    """The result of a run.

    Attributes:
        extract: the summary of the extraction.
        trained: False if features, samples and settings are those that the bundle was made from.
        evaluation: on the held-out images.
        bundle: path of the head: the job's bundle, or ``<bundle>.rejected`` if a new head missed a gate.
        gate_missed: which gates are not met, in words; None if all are.
    """

    extract: Summary
    trained: bool
    evaluation: Evaluation | Measured
    bundle: Path
    gate_missed: str | None = None

    @property
    def exit_code(self) -> int:
        """0, 3 if inputs failed inside the budget, 65 if a gate is not met."""
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
    """The bundle that training would make again, if it exists and is intact: the one in use, or the rejected one."""
    for place in (job.paths.bundle, _rejected(job)):
        with suppress(InputMissingError, BadDataError):
            bundle = Bundle.load(place)
            if bundle.made_from and bundle.made_from == made_from(_features(job), job.head, job.train):
                return bundle
    return None


def _rejected(job: Job) -> Path:
    """The path of a head that misses a gate."""
    return job.paths.bundle.with_name(f"{job.paths.bundle.name}.rejected")


def _features(job: Job) -> FeatureCache:
    return FeatureCache(job.paths.cache, job.train.layer)


@staged("running the job")
def run_job(path: str | Path, *, quiet: bool = False, record: dict[str, Any] | None = None) -> JobResult:
    """Extract, train if anything changed, evaluate, and check the result against the gates; each run is recorded.

    Args:
        path: the job file.
        quiet: no progress line.
        record: filled in during the run with what `runs_file` records; complete even if this raises.

    A head that misses a gate never replaces one that met it: it is kept beside it as ``<bundle>.rejected``.

    Raises:
        LockedError: this job is running already, or another run makes its bundle.
        PenultError: whatever the steps raise.

    >>> import classifiers
    >>> result = classifiers.run_job("nightly.toml", quiet=True)
    >>> result.trained, result.exit_code
    (True, 0)
    """
    path = Path(path)
    job = read_job(path)
    record = {} if record is None else record
    record |= {"started": datetime.now(UTC).isoformat(timespec="seconds"), "exit_code": 70}
    begin = time.perf_counter()
    with file_lock(path.with_name(f".{path.name}.lock"), what=str(path)):
        try:
            with kept_warnings() as record["warnings"], _in_words_of(path), ExitStack() as stack:
                for place in (job.paths.bundle, _rejected(job)):
                    refuse_existing(place, overwrite=True)
                    place.parent.mkdir(parents=True, exist_ok=True)
                    stack.enter_context(reserved(place, overwrite=True))
                result = _run(job, record, quiet=quiet)
            record["exit_code"] = result.exit_code
            if result.gate_missed:
                record["error"] = result.gate_missed
            return result
        except BaseException as error:
            code, text = outcome(error)
            record |= {**getattr(error, "facts", {}), "exit_code": code, "error": text}
            raise
        finally:
            record |= {"seconds": round(time.perf_counter() - begin, 3), "versions": library_versions()}
            append_run(runs_file(path), record)


@contextmanager
def _in_words_of(path: Path) -> Iterator[None]:
    """Turn errors about settings into errors about the job file, with the names of its keys."""
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
        remove_leftovers(place)
    options = job.extract.part(Options).replace(quiet=quiet)
    summary = run_extract(job.source(), job.extract.network(), job.paths.cache, options)
    record["extract"] = summary.to_json()
    bundle = _made_already(job)
    trained = bundle is None
    staging = atomic.temporary(served)
    try:
        if bundle is None:
            bundle = train(_features(job), staging / served.name, job.head, job.train)
            record["train"] = {"seconds": bundle.seconds}
        else:
            log.info("features, labels and settings are unchanged: %s is kept", bundle.name)
        evaluation, _ = evaluate_bundle(bundle, job.paths.cache, split=job.gate.split)
        missed = missed_gates(job.gates, evaluation.to_json(), lambda gate: key_of(GateSettings, gate.name))
        target = rejected if missed and bundle.path != served else served
        if missed and target == rejected:
            missed += f"; the new head is kept as {target.name}"
        if bundle.path != target:  # a rejected one may meet gates that were changed
            install(bundle.path, target)
    finally:
        remove_folder(staging)
    record["trained"] = trained
    record["evaluation"] = _in_short(evaluation.to_json(), task_of_bundle(bundle).metric)
    return JobResult(summary, trained, evaluation, target, missed)


def _in_short(metrics: dict[str, Any], metric: str) -> dict[str, Any]:
    """The part of an evaluation that the record of a run keeps: above all the main metric, with its interval."""
    names = ("split", "n", "accuracy", "accuracy_interval", "macro_f1")
    score = metrics["scores"][metric]
    kept = {name: value for name, value in metrics.items() if name in names}
    return {**kept, "metric": metric, "value": score["value"], "interval": score["interval"]}
