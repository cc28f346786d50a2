"""The bundle: a saved head as a folder of ONNX graphs, JSON facts, held-out predictions and a report, without a pickle.

::

    pets.head/
      backbone.onnx     pixels -> features (frozen, or fine-tuned)
      head.onnx         features -> probabilities; standardisation and temperature inside
      head.json         classes, task, fingerprint, preprocessing, split rule, settings, history, metrics, costs, digests
      novelty.h5        features of training images, which new images are compared with
      predictions.h5    held-out predictions per image (used by `compare`), and the digests of fitted images
      report.html
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from classifiers.evaluation.registry import task_of
from classifiers.evaluation.scores import require_finite
from classifiers.evaluation.task import SCORE_COLUMNS, HeadTask, score_cells
from extractor.graphs.backbone_facts import BackboneFacts, read_facts, require_features
from extractor.graphs.cpu_session import cpu_session
from extractor.graphs.onnx_file import copy
from extractor.pixels.views import Views
from store.cache import FeatureCache
from store.errors import BadDataError, InputMissingError, NewerFormatError, PenultError, require_format
from store.faces import html_table
from store.fingerprint import VIEWS, Fingerprint
from store.format import atomic, hdf5, json_text
from store.format.lock import folder_lock

from .bundle_folder import NOVELTY, install, put_back, refuse_existing, remove_folder, remove_leftovers
from .head_json import require_head, require_predictions, require_shape
from .novelty import Novelty

log = logging.getLogger("penult.classifiers")

FORMAT_VERSION = 1
PREDICTIONS = "penult-predictions"
BLOCK = 1024  # rows in one call of a head, because a knn head compares each with every training image
ALLOWED_DOMAINS = {"", "ai.onnx", "ai.onnx.ml"}


@dataclass(frozen=True)
class Predictions:
    """Predictions for held-out images.

    Attributes:
        sha256: content digest of each image, 32 bytes.
        paths: relative path of each.
        labels: the truth: labels ``(n,)``, or for other tasks `SampleTable.truth` ``(n, k)``.
        probabilities: ``(n, k)`` float32, in the order of the bundle's classes; for a regression, the numbers.
        split: the split they were held out as.
        novelty: novelty scores ``(n,)``, see `Novelty`; not saved, and None if the bundle has none.
        features: of the images ``(n, d)``; not saved, and None if they are not from a cache.
    """

    sha256: Sequence[bytes]
    paths: Sequence[bytes]
    labels: NDArray[Any]
    probabilities: NDArray[np.float32]
    split: str = ""
    novelty: NDArray[np.float32] | None = None
    features: NDArray[np.floating[Any]] | None = None

    @property
    def ids(self) -> str:
        """SHA-256 over the sorted (content, label) pairs: equal ids mean the same images with the same labels."""
        pairs = sorted(zip(self.sha256, map(str, self.labels.tolist()), strict=True))
        return hashlib.sha256(b"".join(digest + label.encode() + b"\0" for digest, label in pairs)).hexdigest()


@dataclass(frozen=True, repr=False)
class Bundle:
    """A saved head: the facts of its folder, with methods to load its parts.

    Attributes:
        path: its folder.
        kind: ``frozen`` or ``fine-tuned``.
        head: one of `registry.rows`, or ``fine-tuned``.
        task: ``single-label``, ``multi-label`` or ``regression``.
        classes: labels in the order of the outputs; for a regression, the names of its targets.
        backbone: facts of ``backbone.onnx``.
        fingerprint: of the features it needs; with ``views`` if its outputs are averaged over these.
        split: how the samples were split: ``fit``, ``chosen_on``, ``reported_on``, ``rule``.
        hyperparameters, history: the settings in use, and each setting tried.
        metrics: the held-out evaluation as JSON; None if nothing was held out.
        cost: ``train_seconds``, ``extract_seconds``, ``images`` (passed through the backbone), and of both together
            ``peak_memory`` and ``energy`` (see `machine.Spent`; older bundles have neither).
        conformal: calibration of prediction sets (see `Conformal`), or of the intervals of a regression (see
            `regression.Intervals`), as JSON; None if no row was out of fold.
        rounding: cross-validated accuracy on float and on int8 features, if it needs int8 features (see `int8_check`).
        made_from: digest of features, samples, labels, splits and settings; equal digests mean the same head.
        few_shot: accuracy by number of training images, if requested (see `few_shot`).
        files: SHA-256 of the ONNX files, and of ``novelty.h5``.
        versions: of the libraries.

    >>> from classifiers import Bundle
    >>> bundle = Bundle.load("pets.head")
    >>> bundle
    <Bundle pets.head: logistic head for 2 classes, accuracy 1.0000 [0.6097, 1.0000] on 6 images of 'test'>
    >>> bundle.split["reported_on"], bundle.backbone.dim
    ('test', 16)
    """

    path: Path
    kind: str
    head: str
    classes: list[str]
    backbone: BackboneFacts
    fingerprint: Fingerprint
    split: dict[str, Any]
    hyperparameters: dict[str, Any]
    history: list[dict[str, Any]]
    metrics: dict[str, Any] | None
    cost: dict[str, Any]
    task: str = "single-label"
    made_from: str = ""
    conformal: dict[str, Any] | None = None
    rounding: dict[str, Any] | None = None
    few_shot: list[dict[str, Any]] | None = None
    files: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def views(self) -> Views | None:
        """The views over which its outputs for an image are averaged; None if it uses the image as it is."""
        drawn = self.fingerprint.fields.get(VIEWS)
        return Views.from_facts(drawn) if drawn else None

    @property
    def storage(self) -> str:
        """How features are rounded before they are passed to the head."""
        return str(self.fingerprint.fields.get("storage", "float32"))

    def __repr__(self) -> str:
        task = task_of_bundle(self)
        where = self.metrics and f"on {self.metrics['n']} images of {self.split['reported_on']!r}"
        score = f", {task.headline(self.metrics)} {where}" if self.metrics else ""
        return f"<Bundle {self.name}: {self.head} head for {len(self.classes)} {task.plural}{score}>"

    def _repr_html_(self) -> str:
        return html_table(repr(self)[1:-1], score_cells((self.metrics or {}).get("scores", {})), SCORE_COLUMNS)

    @classmethod
    def opened(cls, bundle: str | Path | Bundle) -> Bundle:
        """A bundle as it is, or loaded from a path."""
        return bundle if isinstance(bundle, Bundle) else cls.load(bundle)

    def to_json(self) -> dict[str, Any]:
        facts = {key: value for key, value in vars(self).items() if key not in ("path", "backbone", "fingerprint")}
        return {
            "format": FORMAT_VERSION,
            **facts,
            "backbone": json.loads(self.backbone.to_json()),
            "fingerprint": dict(self.fingerprint.fields),
        }

    @classmethod
    def load(cls, path: str | Path) -> Bundle:
        """Read the facts and check the digests of the ONNX files; no network is opened.

        Raises:
            InputMissingError: there is no bundle.
            BadDataError: its facts cannot be read or have a newer format, or a file was changed.
        """
        path = Path(path)
        put_back(path)
        if not (path / "head.json").is_file():
            message = f"{path} is not a bundle (it has no head.json); `penult train` and `penult finetune` make one"
            raise InputMissingError(message)
        try:
            facts = json.loads((path / "head.json").read_text("utf-8"))
            require_format(path, facts.pop("format"), FORMAT_VERSION)
            require_shape(facts)
            facts["metrics"] = _with_scores(facts["metrics"])
            require_head(facts)
            backbone = BackboneFacts.from_json(json.dumps(facts.pop("backbone")))
            bundle = cls(path=path, backbone=backbone, fingerprint=Fingerprint(facts.pop("fingerprint")), **facts)
            bundle.views  # noqa: B018 - whether they can be read
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            if isinstance(error, NewerFormatError):
                raise
            message = f"{path}/head.json does not describe a head: {error}"
            raise BadDataError(message) from error
        for name in sorted({"backbone.onnx", "head.onnx", *bundle.files}):
            if not (path / name).is_file():
                message = f"{path} has no {name}"
                raise InputMissingError(message)
            bundle.require_saved(name, _digest(path / name))
        return bundle

    def require_saved(self, name: str, sha256: str) -> None:
        """Refuse a file that is not the one that was saved with this head.

        Raises:
            BadDataError: it was changed, or replaced since the bundle was loaded.
        """
        if sha256 != self.files.get(name):
            message = f"{self.path}/{name} is not the file that was saved (its SHA-256 differs)"
            raise BadDataError(message)

    def predictions(self) -> Predictions:
        """The saved predictions for held-out images.

        Raises:
            BadDataError: nothing was held out.
        """
        if self.metrics is None:
            message = f"{self.path} was trained without held-out images, so it has no predictions to compare"
            raise BadDataError(message)
        with hdf5.open_checked(self.path / "predictions.h5", PREDICTIONS) as (datasets, attrs):
            require_finite(datasets["probabilities"][()], f"{self.path}/predictions.h5")
            raw = _digests(self.path, datasets["sha256"])
            if "truth" in datasets:
                labels: NDArray[Any] = datasets["truth"][()]
            else:
                names = [value.decode() for value in hdf5.unpack_strings(datasets, "label-names")]
                places = datasets["label"][()]
                if (places < 0).any():  # which NumPy would count from the end
                    message = f"{int((places < 0).sum())} images have no label"
                    raise ValueError(message)
                labels = np.array(names, dtype=str)[places]
            predictions = Predictions(
                sha256=raw,
                paths=hdf5.unpack_strings(datasets, "path"),
                labels=labels,
                probabilities=datasets["probabilities"][()],
                split=str(attrs["split"]),
            )
            require_predictions(predictions, task_of_bundle(self), self.metrics["n"], self.path / "predictions.h5")
            return predictions

    def novelty(self) -> Novelty | None:
        """The novelty scores of this bundle; None if there were too few training images."""
        if NOVELTY not in self.files:
            return None
        self.require_saved(NOVELTY, _digest(self.path / NOVELTY))
        return Novelty.load(self.path / NOVELTY, self.backbone.dim)

    def as_estimator(self) -> Any:
        """The head as a fitted scikit-learn classifier, or regressor, on features ``(n, d)``; fitting it again changes nothing.

        >>> Bundle.load("pets.head").as_estimator().predict(cache.subset("test").X)  # doctest: +SKIP
        array(['cat', 'dog'], dtype='<U3')
        """
        from classifiers.heads.search import SavedClassifier, SavedRegressor

        return (SavedRegressor if task_of_bundle(self).intervals else SavedClassifier)(self)

    def head_function(self) -> Callable[[NDArray[np.float32]], NDArray[np.float32]]:
        """``head.onnx`` as a function from features ``(n, d)`` to probabilities ``(n, k)``, on the CPU.

        Raises:
            BadDataError: the file is not the one that was saved, or uses what a head does not need.
        """
        data = (self.path / "head.onnx").read_bytes()
        self.require_saved("head.onnx", hashlib.sha256(data).hexdigest())
        return head_function(data, self.path / "head.onnx", self.backbone.dim, len(self.classes))

    def fitted(self) -> set[bytes]:
        """Content digests of every image that was fitted or chosen on."""
        with hdf5.open_checked(self.path / "predictions.h5", PREDICTIONS) as (datasets, _):
            return set(_digests(self.path, datasets["fitted"]))


def save_bundle(
    bundle: Bundle,
    *,
    backbone: Path | FeatureCache,
    head: bytes,
    predictions: Predictions | None,
    fitted: Sequence[bytes],
    novelty: bytes | None = None,
    page: str,
    overwrite: bool = False,
) -> Bundle:
    """Write a bundle in one step: it is complete or it is not there.

    Args:
        bundle: the facts; ``files`` and ``versions`` are filled in here.
        backbone: the ONNX file, or the cache that has it. Its copy must give the features of the bundle's fingerprint, and
            from a cache it must be the same file that made them.
        head: ONNX bytes.
        predictions: on held-out images; None if there were none.
        fitted: content digests of everything that was fitted or chosen on.
        novelty: content of ``novelty.h5``, if there is one.
        page: content of ``report.html``, see `bundle_page.bundle_report`.
        overwrite: replace an existing bundle.

    Raises:
        OutputExistsError: the path exists; also with ``overwrite`` if it is not a bundle.
        BadDataError: the backbone is not the one that made the features.
        LockedError: another run has replaced the cache.
        OutputError: the folder cannot be written to.
        StorageError: disk full, I/O error.
    """
    from extractor.pipeline.prepare import library_versions

    bundle = replace(bundle, path=bundle.path.absolute())
    refuse_existing(bundle.path, overwrite=overwrite)
    remove_leftovers(bundle.path)
    temporary, writing = atomic.temporary(bundle.path), ExitStack()
    try:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        writing.enter_context(folder_lock(temporary.parent))
        temporary.mkdir()
        network = temporary / "backbone.onnx"
        if isinstance(backbone, FeatureCache):
            backbone.copy_backbone(network)
        else:
            copy(backbone, network)
        require_features(read_facts(network), bundle.fingerprint, mine="its backbone", theirs=bundle.name)
        atomic.commit(temporary / "head.onnx", head)
        if novelty is not None:
            atomic.commit(temporary / NOVELTY, novelty)
        files = {path.name: _digest(path) for path in sorted(temporary.iterdir())}
        complete = replace(bundle, files=files, versions=library_versions())
        atomic.commit(temporary / "predictions.h5", _predictions_file(predictions, fitted))
        atomic.commit(temporary / "report.html", page.encode())
        facts = json_text.dumps(complete.to_json(), indent=2, ensure_ascii=False) + "\n"
        atomic.commit(temporary / "head.json", facts.encode())
        install(temporary, bundle.path)
    except OSError as error:
        if isinstance(error, PenultError):
            raise
        message = f"cannot write {bundle.path}: {error.strerror}"
        raise atomic.write_error(error)(message) from error
    finally:
        remove_folder(temporary)
        writing.close()
    return complete


def _predictions_file(predictions: Predictions | None, fitted: Sequence[bytes]) -> bytes:
    empty = Predictions([], [], np.array([], dtype=str), np.zeros((0, 0), np.float32))
    held = predictions or empty
    truth: dict[str, NDArray[Any]]
    if held.labels.ndim == 2:
        truth, label_names = {"truth": held.labels.astype(np.uint8 if held.labels.dtype == bool else np.float64)}, {}
    else:
        names, labels = np.unique(held.labels, return_inverse=True)
        truth = {"label": labels.astype(np.int32)}
        label_names = hdf5.pack_strings("label-names", [str(name).encode() for name in names])
    unique = sorted(set(fitted))
    datasets: dict[str, NDArray[Any]] = {
        "sha256": np.frombuffer(b"".join(held.sha256), np.uint8).reshape(-1, 32),
        **truth,
        "probabilities": held.probabilities.astype(np.float32),
        "fitted": np.frombuffer(b"".join(unique), np.uint8).reshape(-1, 32),
        **hdf5.pack_strings("path", held.paths),
        **label_names,
    }
    return hdf5.build(PREDICTIONS, datasets, {"rows": len(held.paths), "split": held.split})[0]


def _with_scores(metrics: dict[str, Any] | None) -> dict[str, Any] | None:
    """Metrics with ``scores``, which older bundles call ``figures``."""
    for each in [metrics, *metrics.get("per_output", [])] if metrics else []:
        if each and "figures" in each:
            each["scores"] = each.pop("figures")
    return metrics


def _digests(path: Path, dataset: Any) -> list[bytes]:
    """The digests in a dataset of ``predictions.h5``."""
    if dataset.shape[1:] != (32,) or dataset.dtype != np.uint8:
        message = f"{path}/predictions.h5: digests of shape {dataset.shape} and type {dataset.dtype}; expected 32 bytes each"
        raise BadDataError(message)
    raw = dataset[()].tobytes()
    return [raw[i : i + 32] for i in range(0, len(raw), 32)]


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def head_function(data: bytes, path: Path, dim: int, outputs: int) -> Callable[[NDArray[np.float32]], NDArray[np.float32]]:
    """The ONNX file of a head as a function from features to probabilities, on the CPU, after checking what it uses.

    Args:
        data: content of the file.
        path: of the file, for messages.
        dim: length of a feature vector.
        outputs: how many numbers it must give for each.

    Raises:
        BadDataError: it is not ONNX, uses non-standard operators or data from other files, or has other inputs or outputs.
    """
    import onnx

    try:
        model = onnx.load_model_from_string(data)
    except Exception as error:  # protobuf's DecodeError is not public
        message = f"{path} is not an ONNX file"
        raise BadDataError(message) from error
    domains = {opset.domain for opset in model.opset_import} - ALLOWED_DOMAINS
    external = [tensor.name for tensor in model.graph.initializer if tensor.data_location == onnx.TensorProto.EXTERNAL]
    if domains or external:
        foreign = ", ".join(sorted(domains)) or "data from other files"
        message = f"{path} uses {foreign}; a head may use only standard operators and its own data"
        raise BadDataError(message)
    session = cpu_session(data, threads=min(os.cpu_count() or 1, 4))
    inputs = [(each.name, list(each.shape)[1:]) for each in session.get_inputs()]
    if inputs != [("features", [dim])]:
        message = f"{path} takes {inputs}; expected features of width {dim}"
        raise BadDataError(message)

    def probabilities(features: NDArray[np.float32]) -> NDArray[np.float32]:
        parts = np.split(features.astype(np.float32), range(BLOCK, len(features), BLOCK))
        numbers = np.concatenate([session.run(None, {"features": part})[0] for part in parts])
        if numbers.shape != (len(features), outputs):
            message = f"{path} gives outputs of shape {numbers.shape[1:]}; its head.json has names for {outputs}"
            raise BadDataError(message)
        return numbers

    return probabilities


def task_of_bundle(bundle: Bundle) -> HeadTask:
    """A bundle's task, with the names of its outputs."""
    return task_of(bundle.task, bundle.classes, bundle.conformal, bundle.hyperparameters.get("temperature"))
