"""The bundle: a saved head as a folder of ONNX graphs, JSON facts, held-out predictions and a report, without a pickle.

::

    pets.head/
      backbone.onnx     pixels -> features (frozen, or fine-tuned)
      head.onnx         features -> probabilities; standardisation and temperature inside
      head.json         classes, task, fingerprint, preprocessing, split rule, settings, history, metrics, costs, digests
      novelty.h5        features of training images, which new images are compared with
      predictions.h5    held-out predictions per image (used by `compare`), and the digests of fitted images
      report.html
      SHA256SUMS        digests of all of these, for `sha256sum -c`
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from classifiers.evaluation.registry import task_of
from classifiers.evaluation.task import SCORE_COLUMNS, HeadTask, images_of, score_cells
from extractor.graphs.backbone_facts import BackboneFacts, read_facts, require_features
from extractor.graphs.onnx_file import copy
from extractor.pixels.views import Views
from store.cache import FeatureCache
from store.errors import BadDataError, InputMissingError, LockedError, NewerFormatError, PenultError, require_format
from store.faces import html_table
from store.fingerprint import VIEWS, Fingerprint
from store.format import atomic, hdf5, json_text, shard
from store.format.lock import output_lock

from .bundle_folder import NOVELTY, install, put_back, refuse_existing, remove_folder, remove_leftovers
from .digests import SUMS, file_sha256, read_sums, sums_of
from .head_graph import Head, head_function
from .head_json import require_head, require_shape
from .novelty import Novelty
from .predictions import ENCODING_TYPE, PREDICTIONS, Predictions, digests_in, predictions_file, predictions_of

log = logging.getLogger("penult.classifiers")

FORMAT_VERSION = 1
APART = (
    "path",
    "backbone",
    "fingerprint",
    "state",
    "seconds",
)  # fields of a `Bundle` that head.json has otherwise, or not at all


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
            ``peak_memory`` and ``energy`` (see `machine.Spent`; older bundles have neither). Extraction is that of the whole
            cache, and ``extract_energy`` its part; ``init_head`` is what the head took from which a network was fine-tuned.
        conformal: calibration of prediction sets (see `Conformal`), or of the intervals of a regression (see
            `regression.Intervals`), as JSON; None if no row was out of fold.
        rounding: cross-validated accuracy on float and on int8 features, if it needs int8 features (see `int8_check`).
        made_from: digest of features, samples, labels, splits and settings; equal digests mean the same head.
        few_shot: accuracy by number of training images, if requested (see `few_shot`).
        files: SHA-256 of the ONNX files, ``novelty.h5`` and ``predictions.h5``; of the last not in older bundles.
        versions: of the libraries.
        seconds: of the run that made it by stage, with their ``total``; empty if it was loaded.
        state: of ``head.json`` when it was read, see `shard.state_of`; None if it was not read.

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
    seconds: dict[str, float] = field(default_factory=dict, compare=False)
    state: tuple[int, int, int] | None = field(default=None, compare=False)

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
        where = self.metrics and f"on {images_of(self.metrics)} of {self.split['reported_on']!r}"
        score = f", {task.headline(self.metrics)} {where}" if self.metrics else ""
        return f"<Bundle {self.name}: {self.head} head for {len(self.classes)} {task.plural}{score}>"

    def _repr_html_(self) -> str:
        return html_table(repr(self)[1:-1], score_cells((self.metrics or {}).get("scores", {})), SCORE_COLUMNS)

    @classmethod
    def opened(cls, bundle: str | Path | Bundle) -> Bundle:
        """A bundle as it is, or loaded from a path."""
        return bundle if isinstance(bundle, Bundle) else cls.load(bundle)

    def to_json(self) -> dict[str, Any]:
        facts = {key: value for key, value in vars(self).items() if key not in APART}
        return {
            "format": FORMAT_VERSION,
            **facts,
            "backbone": json.loads(self.backbone.to_json()),
            "fingerprint": dict(self.fingerprint.fields),
        }

    @classmethod
    def load(cls, path: str | Path) -> Bundle:
        """Read the facts and check the digests of all files but the report; no network is opened.

        Raises:
            InputMissingError: there is no bundle, or it lacks a file.
            BadDataError: its facts cannot be read or have a newer format, or a file was changed.
            LockedError: another run replaced it meanwhile.
        """
        path = Path(path)
        put_back(path)
        if not (path / "head.json").is_file():
            message = f"{path} is not a bundle (it has no head.json); `penult train` and `penult finetune` make one"
            raise InputMissingError(message)
        try:
            state = shard.state_of(path / "head.json")
            data = (path / "head.json").read_bytes()
            facts = json.loads(data)
            require_format(path, facts.pop("format"), FORMAT_VERSION)
            require_shape(facts)
            facts["metrics"] = _with_scores(facts["metrics"])
            require_head(facts)
            backbone = BackboneFacts.from_json(json.dumps(facts.pop("backbone")))
            fingerprint = Fingerprint(facts.pop("fingerprint"))
            bundle = cls(path=path, backbone=backbone, fingerprint=fingerprint, state=state, **facts)
            bundle.views  # noqa: B018 - whether they can be read
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            if isinstance(error, NewerFormatError):
                raise
            message = f"{path}/head.json does not describe a head: {error}"
            raise BadDataError(message) from error
        bundle._require_complete(hashlib.sha256(data).hexdigest())
        return bundle

    def _require_complete(self, head_json: str) -> None:
        """Refuse a folder that lacks a file or has another one than was saved; ``head_json`` is the digest of what was read."""
        sums, needed = read_sums(self.path), {"backbone.onnx", "head.onnx", *self.files}
        if sums is None and PREDICTIONS in self.files:  # bundles from before have neither
            needed.add(SUMS)
        for name in sorted(needed):
            if not (self.path / name).is_file():
                message = f"{self.path} has no {name}"
                raise self._blamed(InputMissingError(message))
        if sums is not None and {**self.files, "head.json": head_json}.items() - sums.items():
            message = f"{self.path}: head.json or {SUMS} is not the file that was saved (their SHA-256 differ)"
            raise self._blamed(BadDataError(message))
        for name in sorted(needed - {SUMS}):
            self.require_saved(name, file_sha256(self.path / name))

    def require_saved(self, name: str, sha256: str) -> None:
        """Refuse a file that is not the one that was saved with this head.

        Raises:
            BadDataError: it was changed.
            LockedError: another run has replaced the bundle since it was loaded.
        """
        if sha256 != self.files.get(name):
            message = f"{self.path}/{name} is not the file that was saved (its SHA-256 differs)"
            raise self._blamed(BadDataError(message))

    def _blamed(self, error: PenultError) -> PenultError:
        """`LockedError` if another run has replaced this bundle since it was opened; else the error itself."""
        try:
            if shard.state_of(self.path / "head.json") == self.state:
                return error
        except OSError:
            pass
        return LockedError(f"{self.path} was replaced by another run while it was read; run the same command again")

    @contextmanager
    def _predictions(self) -> Iterator[tuple[Mapping[str, Any], Mapping[str, str | int]]]:
        """``predictions.h5``, opened and compared with its digest; in older bundles with the digest inside it."""
        file = self.path / PREDICTIONS
        with hdf5.open_checked(file, ENCODING_TYPE) as opened:
            if PREDICTIONS in self.files:
                self.require_saved(PREDICTIONS, file_sha256(file))
            else:
                hdf5.verify(file, ENCODING_TYPE)
            yield opened

    def predictions(self) -> Predictions:
        """The saved predictions for held-out images.

        Raises:
            BadDataError: nothing was held out, or they are not those of this head.
        """
        if self.metrics is None:
            message = f"{self.path} was trained without held-out images, so it has no predictions to compare"
            raise BadDataError(message)
        with self._predictions() as (datasets, attrs):
            task = task_of_bundle(self)
            return predictions_of(self.path / PREDICTIONS, datasets, str(attrs["split"]), task, self.metrics)

    def novelty(self) -> Novelty | None:
        """The novelty scores of this bundle; None if there were too few training images."""
        if NOVELTY not in self.files:
            return None
        self.require_saved(NOVELTY, file_sha256(self.path / NOVELTY))
        return Novelty.load(self.path / NOVELTY, self.backbone.dim)

    def as_estimator(self) -> Any:
        """The head as a fitted scikit-learn classifier, or regressor, on features ``(n, d)``; fitting it again changes nothing.

        >>> Bundle.load("pets.head").as_estimator().predict(cache.subset("test").X)  # doctest: +SKIP
        array(['cat', 'dog'], dtype='<U3')
        """
        from classifiers.heads.search import SavedClassifier, SavedRegressor

        return (SavedRegressor if task_of_bundle(self).intervals else SavedClassifier)(self)

    def head_function(self) -> Head:
        """``head.onnx`` as a function from features ``(n, d)`` to outputs ``(n, k)``, on the CPU; see `head_graph`.

        Raises:
            BadDataError: the file is not the one that was saved, or uses what a head does not need.
        """
        data = (self.path / "head.onnx").read_bytes()
        self.require_saved("head.onnx", hashlib.sha256(data).hexdigest())
        return head_function(data, self.path / "head.onnx", self.backbone.dim, task_of_bundle(self))

    def fitted(self) -> set[bytes]:
        """Content digests of every image that was fitted or chosen on."""
        with self._predictions() as (datasets, _):
            return set(digests_in(self.path / PREDICTIONS, datasets["fitted"]))


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
        LockedError: another run has replaced the cache, or makes a bundle there.
        OutputError: the folder cannot be written to.
        StorageError: disk full, I/O error.
    """
    from extractor.pipeline.prepare import library_versions

    bundle = replace(bundle, path=bundle.path.absolute())
    refuse_existing(bundle.path, overwrite=overwrite)
    temporary, writing = atomic.temporary(bundle.path), ExitStack()
    try:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        writing.enter_context(output_lock(bundle.path))
        refuse_existing(bundle.path, overwrite=overwrite)
        remove_leftovers(bundle.path)
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
        atomic.commit(temporary / PREDICTIONS, predictions_file(predictions, fitted))
        files = {path.name: file_sha256(path) for path in sorted(temporary.iterdir())}
        complete = replace(bundle, files=files, versions=library_versions(), state=None)
        atomic.commit(temporary / "report.html", page.encode())
        facts = json_text.dumps(complete.to_json(), indent=2, ensure_ascii=False) + "\n"
        atomic.commit(temporary / "head.json", facts.encode())
        atomic.commit(temporary / SUMS, sums_of(temporary))
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


def _with_scores(metrics: dict[str, Any] | None) -> dict[str, Any] | None:
    """Metrics with ``scores``, which older bundles call ``figures``."""
    for each in [metrics, *metrics.get("per_output", [])] if metrics else []:
        if each and "figures" in each:
            each["scores"] = each.pop("figures")
    return metrics


def task_of_bundle(bundle: Bundle) -> HeadTask:
    """A bundle's task, with the names of its outputs."""
    return task_of(bundle.task, bundle.classes, bundle.conformal, bundle.hyperparameters.get("temperature"))
