"""Static int8 quantisation of a backbone, calibrated on images; the candidate with features nearest to float is kept.

Weights are int8 with a scale per channel, activations uint8 with a scale per tensor (x86 runs only this
entirely in integers), as pairs of QuantizeLinear and DequantizeLinear that ONNX Runtime fuses into integer kernels.
"""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from extractor.graphs.backbone_facts import BackboneFacts
from extractor.graphs.parity import cosines
from extractor.runtime.session import Embedder
from store.errors import BadDataError

from .quantiser import Features, Network, Pixels, Stop
from .ranges import METHODS, Observed, ranges

log = logging.getLogger("penult.extractor")

FLOAT_LAYERS = (2, 4, 8)  # numbers of layers at the input that are tried in float; errors there spread to all that follow
FIRST = 16  # images that all methods are compared on
SECOND = 32  # images that the best two are compared on with layers in float, which decide more than the method does
HARDEST = 16  # images that layers in float are tried on
BOUND = 0.99  # cosine of every row to float32, see docs/int8.md
PAYS = 0.9  # layers in float must bring the worst error, or the mean one, down to this share
ENOUGH = 0.997  # cosine that is good enough: new images may do worse than the judged ones, but layers in float cost time


@dataclass(frozen=True)
class Quantised:
    """The int8 candidate that was chosen.

    Attributes:
        facts: of the new file, calibration included.
        exact, rounded: float and int8 features of the judging and then the calibrating images, of every feature set ``(n, d)``.
        rates: images in a core-second by the float and by the int8 network.
    """

    facts: BackboneFacts
    exact: Features
    rounded: Features
    rates: tuple[float, float]


def quantise(
    source: Path, out: Path, facts: BackboneFacts, calibrate: Pixels, judge: Pixels, checkpoint: Stop = lambda: None
) -> Quantised:
    """Quantise a float backbone to int8, after trying calibration methods and layers kept in float.

    Methods are compared by the mean cosine between float and int8 features, which varies least from one set of images to the
    next. Then the last layer, unless it is averaged over places, and more and more layers at the input stay in float if that
    helps, until every judged image is above `ENOUGH`.

    Args:
        source: the float ONNX file.
        out: the new one.
        facts: of the float file.
        calibrate: images that give the ranges, ``(n, h, w, 3)``.
        judge: other images.
        checkpoint: called between steps; may raise, to end the work.

    Raises:
        BadDataError: a judged row has a cosine below `BOUND`; names the cosines. Or the network cannot be quantised.
        StorageError: the file cannot be written.
    """
    checkpoint()
    with tempfile.TemporaryDirectory(prefix="penult-", ignore_cleanup_errors=True) as folder, _no_root_messages():
        network = Network(source, facts, Path(folder))
        exact, exact_rate = _timed(Embedder(source, facts.preprocess, outputs=facts.outputs), judge, checkpoint)
        observed, others = network.observe(calibrate, checkpoint)
        search = _Search(network, observed, exact, judge, checkpoint)
        best = search.best()
        if best.scores["min"] < BOUND:
            raise _refusal(facts, best.scores, search.tried)
        facts = replace(facts, precision="int8", calibration=_record(search, best, calibrate))
        network.write(best.model, out, facts)
        more, rate = _timed(best.embedder, calibrate, checkpoint)
        _say_speed(facts, exact_rate, rate)
        exact = [np.concatenate(pair) for pair in zip(exact, others, strict=True)]
        rounded = [np.concatenate(pair) for pair in zip(best.rounded, more, strict=True)]
        return Quantised(facts, exact, rounded, (exact_rate, rate))


def _timed(embedder: Embedder, pixels: Pixels, checkpoint: Stop) -> tuple[Features, float]:
    """`embed`, and the images in a core-second: other processes on the machine count less there than in seconds."""
    embedder.embed(pixels[: embedder.batch_size])  # the first call is slower
    begin = time.process_time()
    features = embed(embedder, pixels, checkpoint)
    return features, len(pixels) / max(time.process_time() - begin, 1e-9)


def _record(search: _Search, best: _Candidate, calibrate: Pixels) -> dict[str, Any]:
    """What the facts say of a calibration; its digest is over all that decides the features."""
    import onnxruntime

    network = search.network
    tensors = dict.fromkeys(name for node in network.model.graph.node for name in (*node.input, *node.output))
    decided = {  # by their places in the graph: what they are called depends on the exporter
        "method": best.scores["method"],
        "float_layers": [network.weighted.index(name) for name in best.scores["float_layers"]],
        "ranges": [[float(edge) for edge in best.ranges[name]] for name in tensors if name in best.ranges],
        "operators": network.operators,
    }
    return {
        "sha256": hashlib.sha256(json.dumps(decided, sort_keys=True).encode()).hexdigest(),
        **{key: best.scores[key] for key in ("method", "float_layers", "min", "p1", "mean")},
        "images": len(calibrate),
        "pixels_sha256": hashlib.sha256(calibrate.tobytes()).hexdigest(),
        "judged": len(search.judge),
        "tried": search.tried,
        "onnxruntime": onnxruntime.__version__,
    }


@dataclass
class _Candidate:
    """An int8 network and how near its features are to float.

    Attributes:
        model: ``onnx.ModelProto``.
        embedder: runs it.
        ranges: of its tensors.
        scores: ``method``, ``float_layers``, ``judged`` (how many images) and the `summary` of their cosines.
        rounded: its features of the images that it was judged on.
    """

    model: Any
    embedder: Embedder
    ranges: Mapping[str, tuple[Any, Any]]
    scores: dict[str, Any]
    rounded: Features


class _Search:
    """The search for the candidate whose features are nearest to float.

    All methods are compared on the `FIRST` images, and the best one is judged on all. Layers in float are tried on the
    `HARDEST` of these. If some help, the best two methods are compared once more, with them, on the `SECOND` images, and the
    better one is judged on all.
    """

    def __init__(self, network: Network, observed: Observed, exact: Features, judge: Pixels, checkpoint: Stop) -> None:
        self.network, self.judge, self.tried = network, judge, list[dict[str, Any]]()
        self._observed, self._exact, self._checkpoint = observed, exact, checkpoint

    def best(self) -> _Candidate:
        """The candidate to use, judged on all images."""
        rows = np.arange(len(self.judge))
        compared = [self._attempt(method, ranges(self._observed, method), (), rows[:FIRST]) for method in METHODS]
        *_, second, first = sorted(compared, key=_by_mean)
        plain = self._judge_more(first)
        best = self._with_floats(plain)
        if best is plain:
            return plain
        best = self._judge_more(replace(best, rounded=[each[:0] for each in best.rounded]), SECOND)
        other = self._attempt(second.scores["method"], second.ranges, best.scores["float_layers"], rows[:SECOND])
        return self._judge_more(max(best, other, key=_by_mean))

    def _with_floats(self, plain: _Candidate) -> _Candidate:
        """The candidate with as many layers in float as help; the same one if none do."""
        cosine = self._cosines(plain.rounded)
        hardest = np.argsort(cosine)[:HARDEST]
        errors, weighted, best = _errors(summary(cosine[hardest])), self.network.weighted, plain
        last, tail = self.network.last, list[str]()
        for floats in [*([last] if last else []), *(weighted[:n] for n in FLOAT_LAYERS if 2 * n < len(weighted))]:
            if best.scores["min"] >= ENOUGH:
                break
            candidate = self._attempt(plain.scores["method"], plain.ranges, [*floats, *tail], hardest)
            smaller = _errors(candidate.scores)
            if (smaller < PAYS * errors).any():
                best, errors = candidate, smaller
                tail = last if floats is last else tail
        return best

    def _attempt(
        self, method: str, chosen: Mapping[str, tuple[Any, Any]], floats: Sequence[str], rows: NDArray[np.intp]
    ) -> _Candidate:
        self._checkpoint()
        model = self.network.quantised(chosen, floats)
        embedder = self.network.open(model)
        rounded = embed(embedder, self.judge[rows], self._checkpoint)
        candidate = _Candidate(model, embedder, chosen, {"method": method, "float_layers": list(floats)}, rounded)
        self._note(candidate, rows)
        return candidate

    def _judge_more(self, candidate: _Candidate, count: int | None = None) -> _Candidate:
        """Judge a candidate on more images than the first ones, of which it has features."""
        done = len(candidate.rounded[0])
        more = self.judge[done:count]
        if not len(more):
            return candidate
        rounded = embed(candidate.embedder, more, self._checkpoint)
        rounded = [np.concatenate(pair) for pair in zip(candidate.rounded, rounded, strict=True)]
        judged = replace(candidate, rounded=rounded, scores=dict(candidate.scores))
        self._note(judged, np.arange(len(rounded[0])))
        return judged

    def _cosines(self, rounded: Features, rows: NDArray[np.intp] | None = None) -> NDArray[np.float64]:
        return cosines([each if rows is None else each[rows] for each in self._exact], rounded)

    def _note(self, candidate: _Candidate, rows: NDArray[np.intp]) -> None:
        candidate.scores |= {"judged": len(rows), **summary(self._cosines(candidate.rounded, rows))}
        self.tried.append(candidate.scores)
        log.debug("int8 by %(method)s, %(float_layers)s in float: cosine %(min).5f to float, mean %(mean).5f", candidate.scores)


def embed(embedder: Embedder, pixels: Pixels, checkpoint: Stop = lambda: None) -> Features:
    """Features of ``(n, h, w, 3)`` pixels, of every feature set."""
    size = embedder.batch_size
    rows = []
    for future in [embedder.submit(pixels[begin : begin + size]) for begin in range(0, len(pixels), size)]:
        checkpoint()
        rows.append(future.result())
    return [np.concatenate(column) for column in zip(*rows, strict=True)]


def summary(cosine: NDArray[np.float64]) -> dict[str, float]:
    """Least, first percentile and mean of the cosines, as JSON."""
    values = {"min": cosine.min(), "p1": np.percentile(cosine, 1), "mean": cosine.mean()}
    return {name: round(float(value), 6) for name, value in values.items()}


def _refusal(facts: BackboneFacts, best: Mapping[str, Any], tried: Sequence[Mapping[str, Any]]) -> BadDataError:
    message = (
        f"int8 is too coarse for {facts.name}: the cosine between int8 and float features is {best['min']:.4f} at worst and "
        f"{best['mean']:.4f} on average, and at least {BOUND} is required of every image. Use --precision fp32"
    )
    error = BadDataError(message)
    for each in tried:
        error.add_note(
            f"{each['method']}, {len(each['float_layers'])} layer(s) in float: min {each['min']:.4f}, "
            f"first percentile {each['p1']:.4f}, mean {each['mean']:.4f}"
        )
    return error


def _say_speed(facts: BackboneFacts, exact: float, rounded: float) -> None:
    log.info("int8 computes %.0f images in a core-second here, float %.0f (backbone alone)", rounded, exact)
    if rounded < exact:
        log.warning("int8 is slower than float for %s on this machine: --precision fp32 is the better choice", facts.name)


def _errors(scores: Mapping[str, Any]) -> NDArray[np.float64]:
    """The worst and the mean error of cosines."""
    return np.array([1 - scores["min"], 1 - scores["mean"]])


def _by_mean(candidate: _Candidate) -> float:
    return float(candidate.scores["mean"])


@contextmanager
def _no_root_messages() -> Iterator[None]:
    """Keep ONNX Runtime's quantiser from installing a handler on the root logger, which would print everything twice."""
    root, handler = logging.getLogger(), logging.NullHandler()
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
