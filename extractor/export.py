"""torch -> ONNX without the classifier, checked against torch before anyone uses it.

Runs in a child process: torch and torchvision are a gigabyte and seconds that the extracting process need not carry.
"""

from __future__ import annotations

import json
import logging
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
from numpy.typing import NDArray

import store.errors
from store import hdf5
from store.errors import BadDataError, InterruptedRunError, PenultError

from . import onnxfile
from .backbones import Backbone, Loaded, choose_weights, load, skeleton
from .onnxfile import BackboneFacts
from .progress import StopFlag

log = logging.getLogger("penult.extractor")

PARITY_BATCHES = (1, 7)
PARITY = 1e-5  # relative L2 per row, CONTRACTS: "CPU ONNX Runtime fp32 vs torch fp32 on identical pixels"
OPSET = 20
POLL_SECONDS = 0.2
PATIENCE = 25  # polls in which a child may tidy up


def export(backbone: Backbone, path: Path, stop: StopFlag | None = None) -> BackboneFacts:
    """Export a torchvision backbone in a child process.

    Args:
        backbone: what to export.
        path: the ONNX file; an existing one is replaced when the new one is complete.
        stop: ends the export when it is set.

    Raises:
        InterruptedRunError: a signal came, to this process or to the child.
        PenultError: whatever `load` and `to_onnx` raise, from the child.
    """
    request = json.dumps({"backbone": backbone.facts(), "path": str(path.absolute()), "sys.path": sys.path})
    code = (
        "import json, sys; request = json.load(sys.stdin); sys.path[:] = request['sys.path']; "
        "from extractor.export import _child; _child(request)"
    )
    status, out, err = _run_child([sys.executable, "-P", "-c", code], request, stop)
    if stop:
        raise InterruptedRunError(stop.signum)
    for number in (signal.SIGTERM, signal.SIGINT):  # a scheduler, or a terminal, signals the whole group of processes
        if status in (-number, 128 + number):
            raise InterruptedRunError(number)
    try:
        answer = json.loads(out.splitlines()[-1])
    except (IndexError, ValueError):
        message = f"the export of {backbone.name} died (exit {status})"
        error = PenultError(message)
        error.add_note(err[-4000:])
        raise error from None
    if "error" in answer:
        kind = getattr(store.errors, answer["error"], PenultError)
        raise kind(answer["message"])
    return BackboneFacts.from_json(answer["facts"])


def _run_child(command: list[str], request: str, stop: StopFlag | None) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of a child that is ended when ``stop`` is set: an export may take minutes."""
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as child:
        given: str | None = request
        polls = 0
        try:
            while True:
                try:
                    out, err = child.communicate(given, timeout=POLL_SECONDS)
                    return child.returncode, out, err
                except subprocess.TimeoutExpired:
                    given = None  # it is on its way
                    if stop:
                        polls += 1
                        child.terminate() if polls < PATIENCE else child.kill()
        except BaseException:
            child.terminate()
            raise


def _child(request: dict[str, Any]) -> None:
    # Exporters print; the answer must be the only thing on stdout.
    answer_to, sys.stdout = sys.stdout, sys.stderr
    signal.signal(signal.SIGTERM, _leave)  # so that a download at hand removes what it has of its file
    try:
        loaded = load(Backbone(**request["backbone"]))
        facts = to_onnx(loaded, request["backbone"]["name"], Path(request["path"]))
        answer = {"facts": facts.to_json()}
    except PenultError as error:
        answer = {"error": type(error).__name__, "message": str(error)}
    print(json.dumps(answer), file=answer_to)


def _leave(signum: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + signum)


def to_onnx(loaded: Loaded, name: str, path: Path) -> BackboneFacts:
    """Export a loaded network up to the input of its last classification layer.

    The whole network is exported and the graph cut by `onnxfile.penultimate`; torch's own features come from a hook on the
    last Linear or Conv2d that runs. Two independent ways must agree at batch 1 and 7.

    Raises:
        BadDataError: they differ by more than `PARITY`.
        StorageError: the file cannot be written.
    """
    import onnx
    import torch

    side = loaded.preprocess.crop
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(n, 3, side, side, generator=generator) for n in PARITY_BATCHES]
    module, features_of = torch_penultimate(loaded.network, batches[0])
    program = torch.onnx.export(
        loaded.network,
        (torch.randn(2, 3, side, side, generator=generator),),
        dynamo=True,
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        input_names=["pixels"],
        output_names=["logits"],
        opset_version=OPSET,
        verbose=False,
    )
    if program is None:
        message = f"torch exported nothing for {name}"
        raise BadDataError(message)
    whole = program.model_proto
    model, pooling, dim = onnxfile.cut(whole, onnxfile.penultimate(whole))
    facts = BackboneFacts(
        name=name,
        weights=loaded.weights_name,
        weights_sha256=loaded.weights_digest,
        layer=f"input of {module}",
        pooling=pooling,
        dim=dim,
        preprocess=loaded.preprocess,
        source=loaded.source,
    )
    onnxfile.write_facts(model, facts)
    data = model.SerializeToString()
    onnx.checker.check_model(data)
    check_parity(data, [batch.numpy() for batch in batches], features_of, name)
    hdf5.commit(path, data)
    return facts


def torch_penultimate(network: Any, example: Any) -> tuple[str, Callable[[NDArray[np.float32]], NDArray[np.float32]]]:
    """The penultimate features of a torch network, without looking at any graph.

    Returns:
        The name of the last Linear or Conv2d that runs, and a function from ``(n, 3, h, w)`` to its input ``(n, d)``, a
        spatial one averaged.
    """
    import torch

    ran: list[str] = []
    layers = {n: m for n, m in network.named_modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))}
    hooks = [m.register_forward_pre_hook(lambda *_, name=n: ran.append(name)) for n, m in layers.items()]
    with torch.inference_mode():
        network(example)
    for hook in hooks:
        hook.remove()
    last = ran[-1]

    def features(batch: NDArray[np.float32]) -> NDArray[np.float32]:
        caught = []
        hook = layers[last].register_forward_pre_hook(lambda _module, inputs: caught.append(inputs[0]))
        try:
            with torch.inference_mode():
                network(torch.from_numpy(batch))
        finally:
            hook.remove()
        tensor = caught[0]
        return np.asarray((tensor.mean(dim=(2, 3)) if tensor.ndim == 4 else tensor).numpy(), np.float32)

    return last, features


def describe(name: str) -> dict[str, Any]:
    """What a network's features are, found without weights: dim, layer and pooling, as JSON.

    Raises:
        UsageError: no such network.
    """
    import torch

    entry = choose_weights(name, None, "--weights")
    side = entry.transforms().crop_size[0]
    network = skeleton(name).eval()
    with torch.device("meta"):
        shapes: list[Any] = []
        last, _ = torch_penultimate(network, torch.empty(1, 3, side, side))
        module = network.get_submodule(last)
        module.register_forward_pre_hook(lambda _module, inputs: shapes.append(inputs[0].shape))
        with torch.inference_mode():
            network(torch.empty(1, 3, side, side))
    pooling = "average" if len(shapes[0]) == 4 else "none"
    return {"dim": int(shapes[0][1]), "layer": f"input of {last}", "pooling": pooling}


def check_parity(
    model: bytes,
    batches: list[NDArray[np.float32]],
    features_of: Callable[[NDArray[np.float32]], NDArray[np.float32]],
    name: str,
) -> None:
    """Compare ONNX Runtime with torch.

    Raises:
        BadDataError: a row differs by more than `PARITY`.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    for batch in batches:
        expected, found = features_of(batch), session.run(None, {session.get_inputs()[0].name: batch})[0]
        worst = relative_l2(found, expected).max()
        log.debug("%s: ONNX Runtime against torch at batch %d: %.1e", name, len(batch), worst)
        if not worst <= PARITY:
            message = f"the exported {name} differs from torch by {worst:.1e} at batch {len(batch)}; the limit is {PARITY}"
            raise BadDataError(message)


def relative_l2(found: NDArray[np.floating[Any]], expected: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """Per row of ``(n, d)``: norm of the difference over norm of the expected row; 0 where both are zero."""
    difference = np.linalg.norm(found.astype(np.float64) - expected, axis=1)
    norm = np.linalg.norm(expected.astype(np.float64), axis=1)
    return np.asarray(np.divide(difference, norm, out=np.where(difference == 0, 0.0, np.inf), where=norm > 0))
