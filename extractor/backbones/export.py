"""Export of torch networks to ONNX without the classification layer, checked against torch before use.

It runs in a child process: torch and torchvision cost a gigabyte and seconds that the extracting process does not need. What
was exported is kept (`prepared`), and without torch copied from there the next time.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from extractor.graphs import backbone_facts, onnx_file
from extractor.graphs.backbone_facts import BackboneFacts, Layer
from extractor.graphs.classification_layer import Graph
from extractor.graphs.graph import cut
from extractor.graphs.parity import check_parity
from extractor.graphs.pooling import pooled, pooling_nodes, pooling_of, prefix_warning
from extractor.graphs.torch_exporters import EXPORTERS, LOGITS, OPSET, Exporter, layer_output
from extractor.machine import versions_of
from extractor.signals import StopFlag
from store.cache import PENULTIMATE
from store.environment import end_with_parent, python
from store.errors import BadDataError, InterruptedRunError, PenultError, UsageError, answer_of, raise_answered
from store.fingerprint import file_digest
from store.format.output import require_free

from . import prepared
from .custom_onnx import import_onnx, is_own, say_warnings
from .layers import observe, prefix_of, require_layers, tapped
from .networks import Loaded, import_without_compiler, load
from .registry import Backbone, check_request, choose_name

log = logging.getLogger("penult.extractor")

EXPORTER = 1  # version of the files that are written here: raised when a request gives another file, so that kept ones go
DECIDING = ("torch", "torchvision", "onnx", "onnxscript", "onnxruntime", "onnxruntime-gpu")  # libraries that decide the file
POLL_SECONDS = 0.2
PATIENCE = 25  # polls that a child has to clean up


def export(backbone: str | Backbone, path: str | Path, stop: StopFlag | None = None) -> BackboneFacts:
    """Export a backbone to an ONNX file of features, in a child process that compares it with torch.

    Args:
        backbone: a torchvision network or a custom ONNX file, by name or as a `Backbone`.
        path: the ONNX file; an existing one is replaced when the new one is complete.
        stop: ends the export when it is set.

    Returns:
        The facts that the file records.

    Raises:
        OutputError: there is no such folder.
        InterruptedRunError: a signal came, to this process or to the child.
        PenultError: whatever `load`, `to_onnx` and `import_onnx` raise, from the child.

    >>> import extractor
    >>> facts = extractor.export("tiny.onnx", "copy.onnx")  # a name such as "resnet50" takes some seconds the first time
    >>> facts.dim, facts.layer
    (16, 'last')
    """
    return obtain(Backbone(backbone) if isinstance(backbone, str) else backbone, Path(path), stop)[0]


def obtain(backbone: Backbone, path: Path, stop: StopFlag | None = None) -> tuple[BackboneFacts, str]:
    """`export`, and where the file is from: ``exported`` or ``imported`` now, or from the ``store`` of prepared backbones."""
    if backbone.is_file:
        own = is_own(Path(backbone.name))  # then it is only copied
        return import_onnx(backbone, path) if own else in_child(backbone, path, stop), "imported"
    check_request(backbone)
    require_free(path, overwrite=True)
    request = request_of(backbone)
    taken = prepared.take(request, path)
    if taken:
        feature_sets = ", ".join(f"{layer.dim} of {layer.layer}" for layer in taken.facts.layers)
        log.info("using %s (%s) as prepared before; features: %s", taken.facts.name, taken.facts.weights, feature_sets)
        say_warnings(taken.facts)
        return taken.facts, "store"
    facts = in_child(backbone, path, stop)
    if (request["weights_sha256"] or "") in facts.source:  # else the file of the weights was replaced meanwhile
        prepared.keep(request, path, facts)
    return facts, "exported"


def request_of(backbone: Backbone) -> dict[str, Any]:
    """Everything that decides the export of a torchvision network, as JSON, without importing torch.

    Raises:
        UsageError: no such network or weights.
        InputMissingError: the file of its weights cannot be read.
    """
    name, file = backbone.name, backbone.weights_file
    preset = backbone.preset and choose_name(name, backbone.preset, "--preset")
    if backbone.seed is not None:
        weights = f"random:{backbone.seed}"
        preset = preset or choose_name(name, None, "--preset")
    elif file is not None:
        weights = file.name  # the facts have it
    else:
        weights, preset = choose_name(name, backbone.weights or preset, "--weights"), None
    return {
        "name": name,
        "weights": weights,
        "weights_sha256": file_digest(file) if file else None,
        "preset": preset,
        "layers": list(backbone.layers) or [PENULTIMATE],
        **{each: getattr(backbone, each) for each in ("pooling", "resize", "crop", "pixel_path")},
        "exporter": [EXPORTER, OPSET],
        "libraries": versions_of(DECIDING),
    }


def in_child(backbone: Backbone, path: Path, stop: StopFlag | None = None) -> BackboneFacts:
    """Export or import a backbone in a child process; arguments and errors as of `export`."""
    require_free(path, overwrite=True)
    request = json.dumps({"backbone": backbone.facts(), "path": str(path.absolute()), "parent": os.getpid()})
    status, out, err = _run_child(python("from extractor.backbones.export import _child; _child()"), request, stop)
    if stop:
        onnx_file.remove_unfinished(path)
        raise InterruptedRunError(stop.signum)
    for number in (signal.SIGTERM, signal.SIGINT):  # a scheduler, or a terminal, signals the whole group of processes
        if status in (-number, 128 + number):
            onnx_file.remove_unfinished(path)
            raise InterruptedRunError(number)
    try:
        answer = json.loads(out.splitlines()[-1])
    except (IndexError, ValueError):
        message = f"the export of {backbone.name} died (exit {status})"
        error = PenultError(message)
        error.add_note(err[-4000:])
        raise error from None
    for level, text in answer.get("messages", []):
        log.log(level, "%s", text)
    raise_answered(answer)
    return BackboneFacts.from_json(answer["facts"])


def _run_child(command: list[str], request: str, stop: StopFlag | None) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of a child that is ended when ``stop`` is set: an export may take minutes."""
    pipe = subprocess.PIPE
    # Otherwise torch's threads spin while they wait for the next operator, which doubles the core-seconds of an export.
    policy = {"OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE")}
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=os.environ | policy) as process:
        unsent: str | None = request
        polls = 0
        try:
            while True:
                try:
                    out, err = process.communicate(unsent, timeout=POLL_SECONDS)
                    return process.returncode, out, err
                except subprocess.TimeoutExpired:
                    unsent = None  # it is under way
                    if stop:
                        polls += 1
                        process.terminate() if polls < PATIENCE else process.kill()
        except BaseException:  # the context then waits for it
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(PATIENCE * POLL_SECONDS)
            process.kill()
            raise


def _child() -> None:
    request = json.load(sys.stdin)
    end_with_parent(request["parent"])
    # Exporters print; the answer must be the only thing on stdout.
    answer_to, sys.stdout = sys.stdout, sys.stderr
    signal.signal(signal.SIGTERM, _leave)  # so that a download under way removes its partial file
    messages: list[tuple[int, str]] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append((record.levelno, record.getMessage()))  # type: ignore[method-assign]
    logging.getLogger("penult").addHandler(handler)
    logging.getLogger("penult").setLevel(logging.DEBUG)  # the parent shows what it was asked for
    try:
        backbone, path = Backbone.from_facts(request["backbone"]), Path(request["path"])
        if backbone.is_file:
            facts = import_onnx(backbone, path)
        else:
            import_without_compiler()
            loaded = load(backbone)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # what torch does next may swallow exceptions
            facts = to_onnx(loaded, backbone.name, path, layers=backbone.layers, pooling=backbone.pooling)
        answer = {"facts": facts.to_json()}
    except PenultError as error:
        answer = answer_of(error)
    print(json.dumps({**answer, "messages": messages}), file=answer_to)


def _leave(signum: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + signum)


def to_onnx(
    loaded: Loaded,
    name: str,
    path: Path,
    *,
    layers: Sequence[str] = (),
    pooling: str | None = None,
    exporters: Sequence[Exporter] = EXPORTERS,
) -> BackboneFacts:
    """Export a loaded network up to the requested layers.

    The penultimate layer is located twice: in the exported graph, which is cut there (`Graph.penultimate`), and in torch, by a
    hook on the last Linear or Conv2d that runs. Both must agree on three images at once and on one of them alone, as must
    every other layer.

    Args:
        loaded: the network.
        name: of the architecture.
        path: the ONNX file; beyond `onnx_file.MAX_INLINE` its weights go into a second one, see `onnx_file.save`.
        layers: module names, or ``penultimate``, which is the default.
        pooling: one of `POOLINGS`, for layers that are not vectors; the average if it is None.
        exporters: tried in turn, until the file of one is right.

    Raises:
        UsageError: no such layer, or it has no class token.
        BadDataError: torch and ONNX Runtime differ by more than `parity.PARITY`; a layer cannot be pooled.
        StorageError: the file cannot be written.
    """
    import torch

    layers = list(layers) or [PENULTIMATE]
    require_layers(loaded.network, layers, pooling)
    side = loaded.preprocess.crop
    pixels = _unlike_images(side)
    try:
        last, values = observe(loaded.network, layers, pixels)
    except (AssertionError, RuntimeError) as error:  # a transformer has a parameter for every position in its image
        message = f"{name} with these weights does not take {side} x {side} pixels: {str(error).strip().splitlines()[0]}"
        raise UsageError(message) from error
    shapes = {layer: tuple(tensor.shape) for layer, tensor in values.items()}
    kinds: dict[str, tuple[str, int]] = {}
    warnings = []
    for layer in layers:
        if layer not in shapes:
            message = (
                f"--layer {layer}: it does not run, or gives no tensor; `penult backbones NAME --layers` lists those that do"
            )
            raise UsageError(message)
        before = prefix_of(loaded.network, shapes[layer])
        kinds[layer] = pooling_of(shapes[layer], layer, pooling or "average", before)
        warnings += [prefix_warning(layer, before, shapes[layer][1])] if before and not pooling else []
    poolings = {layer: kind for layer, (kind, _) in kinds.items()}
    with torch.inference_mode():
        expected = [np.asarray(pooled(values[layer], kind, layer)) for layer, kind in poolings.items()]
    del values
    outputs = backbone_facts.name_outputs(len(layers))
    feature_sets = [
        Layer(f"input of {last}" if layer == PENULTIMATE else layer, kind, dim, output)
        for (layer, (kind, dim)), output in zip(kinds.items(), outputs, strict=True)
    ]
    facts = BackboneFacts(
        name,
        loaded.weights_name,
        loaded.weights_digest,
        tuple(feature_sets),
        loaded.preprocess,
        source=loaded.source,
        reading={"warnings": warnings} if warnings else {},
    )
    say_warnings(facts)
    network = tapped(loaded.network, poolings, last, shapes)

    def write(exporter: Exporter, new: Path) -> None:
        model = exporter(network, side, len(layers))
        _finish(model, facts, layers, shapes)
        onnx_file.save(model, new)
        del model
        _check(new, pixels.numpy(), expected, name)

    *others, last_resort = exporters
    with onnx_file.replacing(path) as new:
        for exporter in others:
            try:
                write(exporter, new)
                return facts
            except BadDataError as error:
                log.debug("%s: %s", name, error)
        write(last_resort, new)
    return facts


def _unlike_images(side: int) -> Any:
    """Three images ``(3, 3, side, side)``, normalised: coarse, middling and fine noise, differing in brightness and contrast.

    They are as unlike as photos are, so that axes that changed places and rows that mix show.
    """
    import torch

    generator = torch.Generator().manual_seed(0)
    rows = []
    for cells, brightness, contrast in ((3, -0.5, 1.0), (side // 8 + 1, 0.3, 0.5), (side, 0.0, 1.0)):
        noise = torch.randn(1, 3, cells, cells, generator=generator)
        rows.append(brightness + contrast * torch.nn.functional.interpolate(noise, side, mode="bilinear"))
    return torch.cat(rows)


def _finish(model: Any, facts: BackboneFacts, layers: Sequence[str], shapes: Mapping[str, Sequence[int]]) -> None:
    """Cut what an exporter made at the layers, and write the facts into it."""
    from onnx import helper

    ends = []
    for i, (layer, features) in enumerate(zip(layers, facts.layers, strict=True)):
        nodes = [helper.make_node("Identity", [layer_output(i)], [features.output])]
        if layer == PENULTIMATE:
            nodes = pooling_nodes(Graph(model).penultimate(LOGITS), shapes[layer], features.pooling, features.output, OPSET)
        ends.append((nodes, features.output, features.dim))
    cut(model, ends)
    backbone_facts.write_facts(model, facts)


def _check(file: Path, pixels: NDArray[np.float32], expected: Sequence[NDArray[np.float32]], name: str) -> None:
    """Compare a file with torch on all images at once and on the last one alone: no batch size exporters see, no row mixed."""
    import onnx

    onnx.checker.check_model(str(file))
    check_parity(file, [pixels, pixels[-1:]], [expected, [rows[-1:] for rows in expected]], name)
