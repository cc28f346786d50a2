"""The HTML report of a bundle: its scores, plots, tables and mistakes on one page."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from classifiers.bundles.bundle import Bundle, task_of_bundle
from classifiers.bundles.held_out import evaluate_bundle
from classifiers.bundles.predictions import Predictions
from classifiers.evaluation.intervals import interval, percent
from classifiers.evaluation.probabilities import untempered
from classifiers.evaluation.task import SCORE_COLUMNS, images_of
from classifiers.heads.registry import Search, rows
from extractor.data.sources import open_source
from extractor.pixels.pixel_drift import PixelDrift
from store.cache import FeatureCache, Subset, is_cache
from store.errors import BadDataError
from store.fingerprint import short
from store.format.json_text import misfit

from . import plots
from .illustrations import Illustrations, files_or_none, illustrate
from .page import LONG, Card, Section, page
from .settings import ReportSettings
from .tables import CLASS_COLUMNS, SHOT_COLUMNS, class_rows, output_table, score_rows, shot_cells, whole_rows

log = logging.getLogger("penult.classifiers")

SMALL = 6  # classes whose confusion matrix leaves room for a plot beside it


def bundle_report(bundle: Bundle, predictions: Predictions | None = None, shown: Illustrations | None = None) -> str:
    """Render the HTML report of a bundle.

    Args:
        bundle: its facts.
        predictions: those its metrics were measured on.
        shown: mistakes and map of the same images.
    """
    metrics, cost, task = bundle.metrics, bundle.cost, task_of_bundle(bundle)
    lead = f"{bundle.head} head on {bundle.backbone.name} ({bundle.backbone.weights}), {len(bundle.classes)} {task.plural}"
    cards: list[Card] = []
    sections: list[Section] = []
    notes: list[str] = []
    training = []
    if len(bundle.history) > 1:  # else nothing was chosen
        search = _search(bundle)
        _require_history(bundle, search)
        text = search.text(bundle.hyperparameters) if search else "Loss on training and validation images by epoch."
        plot = plots.history_svg(bundle.history, bundle.hyperparameters, search)
        training.append(Section("Training", text=text, plot=plot, half=True))
    if metrics is None:
        notes.append("Nothing was held out, so this page cannot say how good the head is.")
        sections += training
    else:
        notes += metrics["notes"]
        if task.exclusive:
            cards = _cards(metrics)
            sections += _classes(bundle, metrics, predictions, shown, training)
        else:
            cards = _output_cards(metrics)
            columns, output_rows = output_table(metrics)
            sections += [*training, Section(f"The {task.plural}", columns=columns, rows=output_rows)]
    cards.append(("images through the backbone", f"{cost['images']}", f"training took {cost['train_seconds']:.1f} s"))
    sections += [
        Section("Split", rows=[(key.replace("_", " "), str(value)) for key, value in bundle.split.items()], half=True),
        *_settings(bundle.hyperparameters),
        Section("Fingerprint", rows=[(key, short(value)) for key, value in bundle.fingerprint.leaves().items()]),
    ]
    return page(bundle.name, lead, sections, cards=cards, notes=notes)


def _classes(
    bundle: Bundle,
    metrics: dict[str, Any],
    predictions: Predictions | None,
    shown: Illustrations | None,
    training: Sequence[Section],
) -> list[Section]:
    """Sections for a task with one label an image."""
    sections = [Section("Confusion matrix", plot=plots.confusion_svg(metrics), half=len(metrics["classes"]) <= SMALL)]
    if predictions:
        sections.append(_reliability(bundle, metrics, predictions))
    text = "Recall: the share of the images of each class that are predicted right."
    sections += [*training, Section("Classes", text=text, plot=plots.recall_svg(metrics), half=True)]
    if bundle.few_shot:
        sections.append(_few_shot(bundle.few_shot))
    if predictions and shown:
        sections += _images(bundle, metrics, predictions, shown)
    return sections + _tables(metrics)


def _output_cards(metrics: dict[str, Any]) -> list[Card]:
    """Cards of the scores over all labels, or all targets."""
    cards = [
        (what.partition(":")[0], value, "" if bounds == "-" else f"95 % interval {bounds}")
        for what, value, bounds in whole_rows(metrics)
    ]
    return [*cards, ("held-out images", str(metrics["n"]), _origin(metrics))]


def _cards(metrics: dict[str, Any]) -> list[Card]:
    """Cards of the main scores, for one label an image."""
    n, scores, sets, novelty = metrics["n"], metrics.get("scores", {}), metrics.get("sets"), metrics.get("novelty")
    f1 = scores.get("f1_macro", {}).get("interval")
    cards = [
        ("accuracy", percent(metrics["accuracy"]), f"95 % interval {interval(metrics['accuracy_interval'])}"),
        ("macro F1", f"{metrics['macro_f1']:.3f}", f"{f1[0]:.3f} to {f1[1]:.3f}" if f1 else "mean over the classes"),
        ("held-out images", str(n), f"{_origin(metrics)}, {n - metrics['correct']} errors"),
    ]
    if sets:
        marginal = sets["marginal"]
        right = f", right on {percent(marginal['decided_right'] / marginal['decided'])}" if marginal["decided"] else ""
        cards.append(("sure of", percent(marginal["decided"] / n), f"one label in the {100 * sets['target']:.0f} % set{right}"))
    if novelty:
        expected = f"{100 * novelty['expected']:.0f} % are expected"
        cards.append(("unlike the training images", percent(novelty["share"]), f"{expected} of the same kind"))
    return cards


def _origin(metrics: dict[str, Any]) -> str:
    """The split and the number of groups of held-out images, in words."""
    return f"{images_of(metrics)}, split {metrics['split']!r}" if metrics.get("groups") else f"split {metrics['split']!r}"


def _reliability(bundle: Bundle, metrics: dict[str, Any], predictions: Predictions) -> Section:
    temperature = bundle.hyperparameters.get("temperature")
    before = None if temperature is None else untempered(predictions.probabilities, temperature)
    plot = plots.reliability_svg(_truth(bundle, predictions), predictions.probabilities, before)
    ece = {name: score["value"] for name, score in metrics.get("scores", {}).items() if name.startswith("ece")}
    text = "Accuracy of the predictions by their confidence; on the dashed line the two are equal."
    if "ece" in ece:
        scaled = "" if temperature is None else f" ({ece['ece_before']:.3f} before temperature scaling, T = {temperature:.2f})"
        text += f" ECE {ece['ece']:.3f}{scaled}; perfect confidence would show about {ece['ece_by_chance']:.3f} here."
    return Section("Reliability", text=text, plot=plot, half=True)


def _few_shot(curve: Sequence[dict[str, Any]]) -> Section:
    text = "Accuracy on the held-out images by training images of each class; intervals are for other images of both."
    rows = [shot_cells(point) for point in curve]
    return Section("With few images", text=text, plot=plots.few_shot_svg(curve), columns=SHOT_COLUMNS, rows=rows, half=True)


def _images(bundle: Bundle, metrics: dict[str, Any], predictions: Predictions, shown: Illustrations) -> list[Section]:
    """Sections with the map of the features and the mistakes."""
    sections = []
    if shown.map is not None:
        truth, guess = _truth(bundle, predictions), predictions.probabilities.argmax(axis=1)
        drawn = len(shown.map.rows)
        which = f"The {drawn} held-out images" if drawn == metrics["n"] else f"{drawn} of the {metrics['n']} held-out images"
        text = f"{which} by their features ({shown.map.method}): images with similar features are close together."
        few = len(bundle.classes) <= len(plots.COLOURS)
        sections.append(Section("Map of the features", text, plots.map_svg(shown.map, truth, guess, bundle.classes), half=few))
    errors = metrics["n"] - metrics["correct"]
    text = f"The most confident of {errors}, the worst first." if errors else f"None in {metrics['n']} images."
    if any(mistake.neighbours for mistake in shown.mistakes):
        text += " Beside each are the training images with the most similar features."
    if shown.mistakes and shown.note:
        text += f" {shown.note}"
    return [*sections, Section("Mistakes", text, mistakes=shown.mistakes)]


def _tables(metrics: dict[str, Any]) -> list[Section]:
    rows = score_rows(metrics.get("scores", {}), metrics["classes"])
    scores = [Section("Scores", columns=SCORE_COLUMNS, rows=rows)] if rows else []
    classes = class_rows(metrics)
    return [*scores, Section("Per class", columns=CLASS_COLUMNS, rows=classes, folded=len(classes) > LONG)]


def _settings(hyperparameters: dict[str, Any]) -> list[Section]:
    """The settings used, and a table of the settings tried."""
    tried = hyperparameters.get("tried")
    if not isinstance(tried, list):  # most heads store the number of trials; their history has all of them
        tried = []
    facts = [(key, json.dumps(value)) for key, value in hyperparameters.items() if not (tried and key == "tried")]
    sections = [Section("Settings", rows=facts, half=True)]
    if tried:
        rows = [[f"{value:.4g}" if isinstance(value, float) else str(value) for value in each.values()] for each in tried]
        columns = [key.replace("_", " ") for key in tried[0]]
        sections.append(Section("Tried", columns=columns, rows=rows))
    return sections


def _truth(bundle: Bundle, predictions: Predictions) -> Any:
    """Class index of each image ``(n,)``."""
    order = {label: i for i, label in enumerate(bundle.classes)}
    return np.array([order[label] for label in predictions.labels.tolist()], dtype=np.intp)


def _search(bundle: Bundle) -> Search | None:
    """The search that the history of a bundle records; None if it records epochs."""
    row = next((row for row in rows() if (row.name, row.task) == (bundle.head, bundle.task)), None)
    return row.search if row and row.search and row.search.setting in bundle.history[0] else None


def _require_history(bundle: Bundle, search: Search | None) -> None:
    """Refuse a history that cannot be drawn.

    Raises:
        BadDataError: names the field.
    """
    numbers, chosen = (float, None), bundle.hyperparameters
    if search:
        accuracy = "accuracy" if any("accuracy" in each for each in bundle.history) else "accuracy?"
        row = {search.setting: float, search.loss: numbers, accuracy: numbers, "tau?": numbers}
        reason = misfit(chosen, {search.setting: (float, [float]), "tau?": float}, "hyperparameters")
    else:
        row, reason = {"epoch": int, "train_loss": numbers, "val_loss": numbers}, ""
    reason = reason or misfit(bundle.history, [row], "history")
    if search and not reason and all(each.get("tau") != chosen.get("tau") for each in bundle.history):
        reason = "the setting in 'hyperparameters' is none of 'history'"
    if reason:
        message = f"{bundle.path}/head.json: {reason}"
        raise BadDataError(message)


def report_again(
    bundle: Bundle,
    data: str | Path | None = None,
    settings: ReportSettings | None = None,
) -> str:
    """Make the report page of a bundle again: for its own held-out images, or evaluated on a cache or a dataset.

    Args:
        bundle: the bundle.
        data: a cache, or a dataset. Without it the page has scores and file names, but neither images nor a map.
        settings: as for `evaluate_bundle`, and whether thumbnails are shown.

    Raises:
        BadDataError: as `evaluate_bundle`.
    """
    settings = settings or ReportSettings()
    if data is None:
        held = bundle.predictions() if bundle.metrics is not None else None
        shown = illustrate(held, bundle.classes) if held and task_of_bundle(bundle).exclusive else None
        return bundle_report(bundle, held, shown)
    root = settings.root
    cache = FeatureCache(data) if is_cache(data) else None  # opened once, so that scores and neighbours use the same features
    evaluation, predictions = evaluate_bundle(bundle, cache or data, split=settings.split, root=root, **settings.runtime())
    if evaluation.pixel_drift:
        note = PixelDrift(**evaluation.pixel_drift).text(bundle.name)
        evaluation = replace(evaluation, notes=[*evaluation.notes, note])
    if not task_of_bundle(bundle).exclusive:
        return bundle_report(replace(bundle, metrics=evaluation.to_json()), predictions)
    fitted: list[Subset] = []
    if cache is not None:
        files = files_or_none(cache.samples, root)
        if predictions.features is not None:
            digests, cache = bundle.fitted(), cache.with_layer(bundle.backbone.layer)
            rows = [row for row in cache.rows() if row.sha256 in digests and row.label is not None]
            fitted = [cache.of_rows(rows, "train")] if rows else []
    else:
        files = open_source(data, root=root).files
    shown = illustrate(
        predictions, bundle.classes, X=predictions.features, fitted=fitted, files=files if settings.thumbnails else None
    )
    own = bundle.metrics is not None and not evaluation.pixel_drift and bundle.predictions().ids == predictions.ids
    return bundle_report(bundle if own else replace(bundle, metrics=evaluation.to_json()), predictions, shown)
