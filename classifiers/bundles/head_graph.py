"""``head.onnx``: the graph from features to outputs, checked before it runs, and what it gives checked after."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from classifiers.evaluation.probabilities import why_no_probabilities
from classifiers.evaluation.task import HeadTask
from extractor.graphs.cpu_session import cpu_session
from extractor.graphs.onnx_file import external_files, read_model
from extractor.graphs.reasons import reason
from store.errors import BadDataError

Head = Callable[[NDArray[np.float32]], NDArray[np.float32]]

BLOCK = 1024  # rows in one call of a head, because a knn head compares each with every training image
ALLOWED_DOMAINS = {"", "ai.onnx", "ai.onnx.ml"}


def head_function(data: bytes, path: Path, dim: int, task: HeadTask) -> Head:
    """The ONNX file of a head as a function from features ``(n, d)`` to outputs ``(n, k)``, on the CPU.

    Args:
        data: content of the file.
        path: of the file, for messages.
        dim: length of a feature vector.
        task: of the head, with the names of its outputs.

    Raises:
        BadDataError: it is not ONNX, uses non-standard operators or data from other files, or has other inputs or outputs; and
            from the function, see `require_outputs`.
    """
    model = read_model(path, data)
    domains = {opset.domain for opset in model.opset_import} - ALLOWED_DOMAINS
    files = external_files(model)
    if domains or files:
        foreign = ", ".join(sorted(domains)) or f"data from other files ({', '.join(files[:3])})"
        message = f"{path} uses {foreign}; a head may use only standard operators and its own data"
        raise BadDataError(message)
    try:
        session = cpu_session(data, threads=min(os.cpu_count() or 1, 4))
    except Exception as error:  # onnxruntime's exceptions have no common public base
        message = f"{path} cannot be run: {reason(error)}"
        raise BadDataError(message) from error
    inputs = [(each.name, list(each.shape)[1:]) for each in session.get_inputs()]
    if inputs != [("features", [dim])]:
        message = f"{path} takes {inputs}; expected features of width {dim}"
        raise BadDataError(message)

    def outputs(features: NDArray[np.float32]) -> NDArray[np.float32]:
        parts = np.split(features.astype(np.float32), range(BLOCK, len(features), BLOCK))
        try:
            numbers = np.concatenate([session.run(None, {"features": part})[0] for part in parts])
        except Exception as error:  # a node whose inputs do not fit; or no output, or one that is no array of rows
            message = f"{path} cannot be run: {reason(error)}"
            raise BadDataError(message) from error
        return require_outputs(numbers, len(features), task, path)

    return outputs


def require_outputs(outputs: NDArray[np.float32], rows: int, task: HeadTask, path: Path) -> NDArray[np.float32]:
    """The outputs of a head, if they can be those of its task; rows with NaN or infinity are left to the caller.

    Args:
        outputs: what the graph gave.
        rows: how many images it was given.
        task: of the head, with the names of its outputs.
        path: the file that holds the head, for messages.

    Raises:
        BadDataError: they have another shape, or are called probabilities and are none.
    """
    if outputs.shape != (rows, len(task.names)):
        message = f"{path} gives outputs of shape {outputs.shape} for {rows} images and {len(task.names)} {task.plural}"
        raise BadDataError(message)
    why = "" if task.intervals else why_no_probabilities(outputs, exclusive=task.exclusive)
    if why:
        message = f"{path} gives {why}"
        raise BadDataError(message)
    return outputs
