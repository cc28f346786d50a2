"""A job file: one TOML file that says what to extract and train, and when the result is good enough."""

from __future__ import annotations

import json
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from classifiers.bundles.settings import GateSettings
from classifiers.evaluation.gates import Gate
from classifiers.training.settings import TrainSettings, train_settings
from extractor.data.sources import Source
from extractor.pipeline.settings import ExtractSettings
from extractor.settings import Place, ResultPath, Settings, groups, key_of, setting
from store.errors import InputMissingError, JobFileError, UsageError, did_you_mean

RETIRED = {"extract.tf32": 'now precision = "tf32"'}


class Paths(Settings):
    """The paths of a job: its data and its results."""

    data: str = setting(..., "The dataset, as for `penult extract` (docs/data.md).")
    cache: ResultPath = setting(..., "The cache; made, or brought up to date.")
    bundle: ResultPath = setting(..., "The head; replaced by a new one that meets the gates.")


@dataclass(frozen=True)
class Job:
    """A job file, read and checked.

    Attributes:
        folder: the folder it is in; its paths are relative to it.
        paths: its keys without a section.
        extract: its sections ``[backbone]`` and ``[extract]``.
        train: its section ``[train]``.
        head: the unfitted head of ``train``.
        gate: its section ``[gate]``.
        gates: the gates of ``gate``, with their bounds.
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
    """The settings model of each section of a job file; keys outside a section belong to ""."""
    return {"": Paths, "backbone": ExtractSettings, "extract": ExtractSettings, "train": train_settings(), "gate": GateSettings}


def keys_of(section: str) -> dict[str, str]:
    """The names of the settings in a section of a job file, by key."""
    model = models()[section]
    names = [name for group, own in groups(model, "job") if group.section == section for name in own]
    return {key_of(model, name).removeprefix(f"{section}."): name for name in names}


def read_job(path: Path) -> Job:
    """Parse and validate a job file.

    Raises:
        InputMissingError: it cannot be read.
        JobFileError: it is not TOML, or a key is unknown, missing, repeated or of the wrong type; names it.
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
    values_of: dict[type[Settings], dict[str, Any]] = {model: {} for model in models().values()}
    sections = {name: document.pop(name) for name in list(models()) if name in document}
    for section, values in {"": document, **sections}.items():
        if not isinstance(values, dict):
            problems.append(f"{section} is {json.dumps(values, default=str)}; expected a section of keys, such as [train]")
            continue
        keys = keys_of(section)
        for key, value in values.items():
            if key in keys:
                values_of[models()[section]][keys[key]] = value
            else:
                problems.append(_unknown(section, key))
    read: dict[type[Settings], Any] = {}
    for model, values in values_of.items():
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
            return Job(folder, paths, extract, train, train.make(extract.task), gate, gate.gates(extract.task))
    except (UsageError, JobFileError) as error:
        message = f"{path}: {error}"
        raise JobFileError(message) from error


def _require_together(paths: Paths, extract: ExtractSettings, train: TrainSettings) -> None:
    """Refuse sections that do not fit each other.

    Raises:
        JobFileError: names the keys.
    """
    problems = {
        "train.average_views without views: set extract.views too": train.average_views and extract.views == 1,
        f"train.layer {train.layer!r} is none of backbone.layers": train.layer not in (None, *extract.layers),
        "cache and bundle are the same path": paths.cache.absolute() == paths.bundle.absolute(),
    }
    if message := "; ".join(problem for problem, applies in problems.items() if applies):
        raise JobFileError(message)


def _unknown(section: str, key: str) -> str:
    name = f"{section}.{key}" if section else key
    if name in RETIRED:
        return f"{name} is {RETIRED[name]}"
    known = [*keys_of(section), *([] if section else [other for other in models() if other])]
    elsewhere = [f"[{other}]" for other in models() if other not in ("", section) and key in keys_of(other)]
    near = did_you_mean(key, known)
    if key in keys_of(section).values():  # the name in Python
        near = f"; it is {next(each for each, field in keys_of(section).items() if field == key)!r} here"
    belongs = f"; there is one in {' and '.join(elsewhere)}" if elsewhere else ""
    listed = f"; known are {', '.join(known)}"
    return f"unknown key {name!r}{near + belongs or listed}"
