"""What a scheduler calls: one TOML file that says extract, train, evaluate, and when the result is good enough."""

from __future__ import annotations

import difflib
import logging
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from extractor.backbones import Backbone
from extractor.pipeline import Options, Summary, run_extract
from extractor.sources import open_source
from store.cache import FeatureCache
from store.errors import GateError, InputMissingError, JobFileError

from .bundle import refuse_existing
from .evaluate import Evaluation
from .heldout import evaluate_bundle
from .train import make_head, train_head

log = logging.getLogger("penult.classifiers")


class _Section(BaseModel):
    # strict: "8" is not 8; extra keys are errors, because a misspelt one would silently keep the default
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class BackboneSection(_Section):
    name: str
    weights: str | None = None
    preset: str | None = None
    resize: int | None = Field(None, gt=0)
    crop: int | None = Field(None, gt=0)


class ExtractSection(_Section):
    device: str = "auto"
    batch_size: int | None = Field(None, gt=0)
    workers: int | None = Field(None, gt=0)
    storage: str = Field("auto", pattern="^(auto|float32)$")
    val_fraction: float = Field(0.2, ge=0, lt=1)
    test_fraction: float = Field(0.2, ge=0, lt=1)
    seed: int = 0
    group_by: str | None = None
    root: str | None = None
    follow_symlinks: bool = False
    on_error: str = Field("skip", pattern="^(skip|fail)$")
    max_failures: str = "1%"
    retry_failed: bool = False
    verify_content: bool = False


class TrainSection(_Section):
    head: str = Field("logistic", pattern="^(logistic|mlp)$")
    C: float | None = Field(None, gt=0)
    hidden: list[int] | None = None
    dropout: float | None = Field(None, ge=0, lt=1)
    weight_decay: float | None = Field(None, ge=0)
    seed: int | None = None


class GateSection(_Section):
    min_accuracy: float = Field(0.0, ge=0, le=1)
    split: str | None = None


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
    """What a run did and found."""

    extract: Summary
    evaluation: Evaluation
    bundle: Path

    def to_json(self) -> dict[str, Any]:
        return {"extract": self.extract.to_json(), "evaluation": self.evaluation.to_json(), "bundle": str(self.bundle)}


def read_job(path: Path) -> Job:
    """Parse and validate a job file.

    Raises:
        InputMissingError: it cannot be read.
        JobFileError: it is not TOML, or a key is unknown, missing, twice there or of the wrong type; names it.
    """
    try:
        text = path.read_text("utf-8")
    except OSError as error:
        message = f"cannot read {path}: {error.strerror}"
        raise InputMissingError(message) from error
    try:
        return Job.model_validate(tomllib.loads(text))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        message = f"{path} is not TOML: {error}"
        raise JobFileError(message) from error
    except ValidationError as error:
        message = f"{path}: " + "; ".join(_explain(problem) for problem in error.errors())
        raise JobFileError(message) from error


def _explain(problem: Any) -> str:
    *parents, key = (str(part) for part in problem["loc"])
    name = ".".join([*parents, key])
    if problem["type"] == "extra_forbidden":
        model: Any = Job
        for parent in parents:
            model = model.model_fields[parent].annotation
        near = difflib.get_close_matches(key, model.model_fields, n=1, cutoff=0.5)
        return f"unknown key {name!r}" + (
            f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(model.model_fields)}"
        )
    if problem["type"] == "missing":
        return f"the key {name!r} is missing"
    return f"{name!r}: {problem['msg'][0].lower()}{problem['msg'][1:]} (found {problem['input']!r})"


def run_job(path: Path, *, quiet: bool = False) -> JobResult:
    """Extract, train, evaluate and hold the result against the gate.

    Raises:
        GateError: the accuracy is below the gate; everything was written all the same.
        PenultError: whatever the steps raise.
    """
    job = read_job(path)
    here = path.absolute().parent
    bundle = here / job.bundle
    refuse_existing(bundle, overwrite=True)
    settings = job.extract.model_dump()
    root = settings.pop("root")
    source = open_source(
        here / job.data,
        root=here / root if root else None,
        group_by=settings.pop("group_by"),
        follow_symlinks=settings.pop("follow_symlinks"),
    )
    options = Options(fail_fast=settings.pop("on_error") == "fail", quiet=quiet, **settings)
    chosen = job.backbone.model_dump()
    for key in ("name", "weights"):  # a file lies where the job file says, a name is a name
        if chosen[key] and (here / chosen[key]).is_file():
            chosen[key] = str(here / chosen[key])
    summary = run_extract(source, Backbone(**chosen), here / job.cache, options)
    wanted = job.train.model_dump()
    trained = train_head(FeatureCache(here / job.cache), bundle, make_head(wanted.pop("head"), **wanted), overwrite=True)
    evaluation, _ = evaluate_bundle(trained, here / job.cache, split=job.gate.split)
    if evaluation.accuracy < job.gate.min_accuracy:
        low, high = evaluation.accuracy_interval
        message = (
            f"gate not met: accuracy {evaluation.accuracy:.4f} [{low:.4f}, {high:.4f}] on {evaluation.n} images of "
            f"{evaluation.split!r} is below min_accuracy {job.gate.min_accuracy}"
        )
        raise GateError(message)
    return JobResult(summary, evaluation, bundle)
