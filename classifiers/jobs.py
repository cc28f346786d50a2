"""What a scheduler calls: one TOML file that says extract, train, evaluate, and when the result is good enough."""

from __future__ import annotations

import json
import logging
import os
import time
import tomllib
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ByteSize, ConfigDict, Field, PositiveInt, ValidationError, create_model, field_validator

from extractor.augment import Augmentation
from extractor.backbones import Backbone
from extractor.options import Options, Summary
from extractor.pipeline import preview, run_extract
from extractor.prepare import library_versions
from extractor.session import MAX_BATCH, MAX_WORKERS
from extractor.sources import Source, open_source
from extractor.views import MAX_VIEWS
from store import atomic, json_text
from store.cache import FeatureCache
from store.errors import BadDataError, GateError, InputMissingError, JobFileError, PenultError, UsageError, did_you_mean
from store.lock import file_lock, folder_lock

from .bundle import Bundle, install, refuse_existing, remove_folder, remove_leftovers, task_of_bundle
from .gates import GATES, Gate, missed_gates, require_gates, wanted_gates
from .heldout import evaluate_bundle
from .task import Evaluation, Measured
from .train import made_from, make_head, train_head

log = logging.getLogger("penult.classifiers")


class _Section(BaseModel):
    # strict: "8" is not 8; extra keys are errors, because a misspelt one would silently keep the default
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class BackboneSection(_Section):
    name: str
    weights: str | None = None
    preset: str | None = None
    resize: int | None = Field(None, gt=0)
    crop: int | None = Field(None, gt=0)
    layers: list[str] = []
    pooling: str | None = Field(None, pattern="^(average|max|token)$")
    mean: list[float] | None = None
    std: list[float] | None = None
    input_range: float | None = None
    interpolation: str | None = None
    channels: str | None = Field(None, pattern="^(rgb|bgr)$")
    squash: bool | None = None
    layout: str | None = Field(None, pattern="^(nchw|nhwc)$")
    pixel_path: Literal["pillow", "pillow-crop", "pillow-draft"] | None = None

    @field_validator("mean", "std", mode="before")
    @classmethod
    def _one_for_all(cls, value: Any) -> Any:
        return [value] if isinstance(value, int | float) and not isinstance(value, bool) else value


class ExtractSection(_Section):
    device: str = "auto"
    batch_size: int | None = Field(None, ge=1, le=MAX_BATCH)
    workers: int | None = Field(None, ge=1, le=MAX_WORKERS)
    precision: Literal["fp32", "fp16", "int8"] = "fp32"
    tf32: bool = False
    storage: Literal["auto", "float32"] = "auto"
    val_fraction: float = Field(0.2, ge=0, lt=1)
    test_fraction: float = Field(0.2, ge=0, lt=1)
    seed: int = 0
    views: int = Field(1, ge=1, le=MAX_VIEWS)
    augment: Literal["standard", "trivialaugment", "randaugment", "autoaugment", "augmix"] = "standard"
    group_by: str | None = None
    root: str | None = None
    follow_symlinks: bool = False
    task: Literal["single-label", "multi-label", "regression"] = "single-label"
    targets: list[str] = []
    on_error: Literal["skip", "fail"] = "skip"
    max_failures: str = Field("1%", pattern=r"^\d+(\.\d+)?%$|^\d+$")
    retry_failed: bool = False
    verify_content: bool = False

    @field_validator("max_failures", mode="before")
    @classmethod
    def _count(cls, value: Any) -> Any:
        return str(value) if isinstance(value, int | float) else value


class TrainSection(_Section):
    head: Literal["logistic", "mlp", "ridge", "knn", "centroid"] | None = None
    C: float | None = Field(None, gt=0)
    alpha: float | None = Field(None, gt=0)
    k: int | None = Field(None, ge=1)
    class_weight: Literal["balanced"] | None = None
    select: Literal["log-loss", "accuracy"] | None = None
    l1_ratio: float | None = Field(None, ge=0, le=1)
    hidden: list[PositiveInt] | None = None
    dropout: float | None = Field(None, ge=0, lt=1)
    weight_decay: float | None = Field(None, ge=0)
    lr: float | None = Field(None, gt=0)
    schedule: Literal["constant", "cosine"] | None = None
    seed: int | None = Field(None, ge=0, lt=2**32)
    leaks: Literal["warn", "refuse", "allow"] = "warn"
    thumbnails: bool = True
    max_memory: ByteSize | None = None
    average_views: bool = False


class _Gate(_Section):
    split: str | None = None


GATE_FIELDS: dict[str, Any] = {gate.name: (float | None, Field(None, ge=gate.least, le=gate.most)) for gate in GATES}
GateSection = create_model("GateSection", __base__=_Gate, **GATE_FIELDS)


class Job(_Section):
    """A job file. Paths are relative to the folder it lies in."""

    data: str
    cache: str
    bundle: str
    backbone: BackboneSection
    extract: ExtractSection = ExtractSection()
    train: TrainSection = TrainSection()
    gate: GateSection = GateSection()


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
        return Job.model_validate(tomllib.loads(data.decode()))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        message = f"{path} is not TOML: {error}"
        raise JobFileError(message) from error
    except ValidationError as error:
        message = f"{path}: " + "; ".join(_explain(problem) for problem in error.errors())
        raise JobFileError(message) from error


EXPECTED = {  # what pydantic complains about, in our words
    "string_type": "text in quotes",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "list_type": "a list in brackets",
    "model_type": "a section of keys, such as [train]",
    "literal_error": "{expected}",
    "greater_than": "more than {gt}",
    "greater_than_equal": "{ge} or more",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
    "string_pattern_mismatch": 'a number such as 10, or a share such as "1%"',
    "byte_size": 'a size such as "4GB"',
    "byte_size_unit": 'a size such as "4GB"',
}


def _explain(problem: Any) -> str:
    *parents, key = (str(part) for part in problem["loc"])
    name = ".".join([*parents, key])
    if problem["type"] == "extra_forbidden":
        model: Any = Job
        for parent in parents:
            model = model.model_fields[parent].annotation
        return f"unknown key {name!r}" + did_you_mean(key, model.model_fields, f"known are {', '.join(model.model_fields)}")
    if problem["type"] == "missing":
        return f"the key {name!r} is missing"
    expected = EXPECTED.get(problem["type"], problem["msg"]).format(**problem.get("ctx", {}))
    return f"{name!r} is {json.dumps(problem['input'], default=str)}; expected {expected}"


@dataclass(frozen=True)
class _Plan:
    """A job with its paths resolved and its settings made."""

    source: Source
    backbone: Backbone
    options: Options
    cache: Path
    bundle: Path
    head: Any
    training: dict[str, Any]
    gates: dict[Gate, float]


def _resolve(job: Job, here: Path, *, quiet: bool) -> _Plan:
    settings = job.extract.model_dump()
    root = settings.pop("root")
    source = open_source(
        job.data,
        base=here,
        root=here / root if root else None,
        group_by=settings.pop("group_by"),
        follow_symlinks=settings.pop("follow_symlinks"),
        task=(task := settings.pop("task")),
        targets=settings.pop("targets"),
    )
    fail_fast, augmentation = settings.pop("on_error") == "fail", Augmentation.named(settings.pop("augment"))
    options = Options(fail_fast=fail_fast, augmentation=augmentation, quiet=quiet, **settings)
    chosen = job.backbone.model_dump()
    for key in ("name", "weights"):  # a file lies where the job file says, a name is a name
        if chosen[key] and (here / chosen[key]).is_file():
            chosen[key] = str(here / chosen[key])
    wanted = job.train.model_dump()
    training = {name: wanted.pop(name) for name in ("leaks", "max_memory", "average_views")}
    training["pictures"] = wanted.pop("thumbnails")
    try:
        head = make_head(wanted.pop("head"), task, **wanted)
        options.budget(0)
        if options.drawn is None and training["average_views"]:
            message = "average_views without views: ask for extract.views too"
            raise UsageError(message)
    except UsageError as error:
        message = f"[train] or [extract]: {error}"
        raise JobFileError(message) from error
    gates = wanted_gates(job.gate.model_dump())
    try:
        require_gates(gates, task, _key)
    except UsageError as error:
        message = f"[gate]: {error}"
        raise JobFileError(message) from error
    backbone = Backbone.from_facts(chosen)
    return _Plan(source, backbone, options, here / job.cache, here / job.bundle, head, training, gates)


def preview_job(path: Path) -> dict[str, Any]:
    """What `run_job` would do, as JSON; nothing is written.

    Raises:
        JobFileError: the job file is wrong.
        InputMissingError: the data is not there.
    """
    plan = _resolve(read_job(path), path.absolute().parent, quiet=True)
    refuse_existing(plan.bundle, overwrite=True)
    extract = preview(plan.source, plan.cache, plan.options)
    unchanged = not extract["to_read"] and _made_already(plan) is not None
    return {"extract": extract, "train": "unchanged" if unchanged else "yes, if features, labels or settings changed"}


def _made_already(plan: _Plan) -> Bundle | None:
    """The bundle that training would give again, if it is there and sound."""
    try:
        bundle = Bundle.load(plan.bundle)
    except (InputMissingError, BadDataError):
        return None
    return bundle if bundle.made_from and bundle.made_from == _origin(plan) else None


def _origin(plan: _Plan) -> str:
    training = {name: plan.training[name] for name in ("pictures", "average_views")}
    return made_from(FeatureCache(plan.cache), plan.head, **training, val=None, test=None, split_seed=0)


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
            result = _run(job, path, record, quiet=quiet)
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


def _run(job: Job, path: Path, record: dict[str, Any], *, quiet: bool) -> JobResult:
    plan = _resolve(job, path.absolute().parent, quiet=quiet)
    rejected = plan.bundle.with_name(f"{plan.bundle.name}.rejected")
    for place in (plan.bundle, rejected):
        refuse_existing(place, overwrite=True)
        remove_leftovers(place)
    summary = run_extract(plan.source, plan.backbone, plan.cache, plan.options)
    record["extract"] = summary.to_json()
    bundle = _made_already(plan)
    trained = bundle is None
    staging = atomic.temporary(plan.bundle)
    with folder_lock(plan.bundle.parent):
        try:
            if bundle is None:
                staged = staging / plan.bundle.name
                bundle = train_head(FeatureCache(plan.cache), staged, plan.head, **plan.training)
            else:
                log.info("features, labels and settings are unchanged: %s is kept", bundle.name)
            evaluation, _ = evaluate_bundle(bundle, plan.cache, split=job.gate.split)
            missed = missed_gates(plan.gates, evaluation.to_json(), _key)
            target = plan.bundle
            if trained and missed:
                target = rejected
                missed += f"; the new head is kept as {target.name}"
            if trained:
                install(bundle.path, target)
        finally:
            remove_folder(staging)
    record["trained"] = trained
    record["evaluation"] = _in_short(evaluation.to_json(), task_of_bundle(bundle).figure)
    return JobResult(summary, trained, evaluation, target, missed)


def _key(gate: Gate) -> str:
    return gate.name


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
