"""Which tensors of a custom ONNX file are its features: those that were requested, or the penultimate one."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from extractor.graphs.classification_layer import CLASS_COUNTS, Graph
from store.cache import PENULTIMATE
from store.errors import BadDataError, UsageError, did_you_mean

log = logging.getLogger("penult.extractor")

CUT, OUTPUT, LAYER = "input of the classification layer", "output", "layer"
CONVOLUTION = "input of the last convolution"  # which may be a classification layer, or not


@dataclass(frozen=True)
class Choice:
    """The tensors with features.

    Attributes:
        tensors: their names.
        how: for each `CUT`, `CONVOLUTION`, `OUTPUT` (used as it is) or `LAYER` (named by the user).
        scores: the outputs that a classification layer makes.
    """

    tensors: tuple[str, ...]
    how: tuple[str, ...]
    scores: tuple[str, ...] = ()


def choose_tensors(graph: Graph, layers: Sequence[str], file: Path) -> Choice:
    """The requested tensors, or the penultimate one.

    Raises:
        UsageError: unknown names, with the nearest; several outputs and none chosen.
        BadDataError: it is unclear whether there is a classification layer.
    """
    known = graph.tensors()
    if not layers:
        return _penultimate(graph, file, requested=False)
    choices = [
        _penultimate(graph, file, requested=True)
        if layer == PENULTIMATE and PENULTIMATE not in known
        else Choice((layer,), (LAYER,))
        for layer in layers
    ]
    tensors = [choice.tensors[0] for choice in choices]
    if len(set(tensors)) != len(tensors):
        message = f"--layer {' --layer '.join(layers)}: one of them is named twice"
        raise UsageError(message)
    for layer in tensors:
        if layer not in known:
            hint = did_you_mean(layer, known, f"its last ones are {', '.join(known[-4:])}")
            message = f"--layer {layer}: {file} has no such tensor{hint}"
            raise UsageError(message)
    scores = tuple(name for name in outputs_of(graph) if _input_of_scores(graph, name))
    return Choice(tuple(tensors), tuple(choice.how[0] for choice in choices), scores)


def outputs_of(graph: Graph) -> list[str]:
    return [value.name for value in graph.graph.output]


def _penultimate(graph: Graph, file: Path, *, requested: bool) -> Choice:
    """The features of a file of which no tensor is named.

    Raises:
        UsageError: it has several outputs that may be features; names them, the likeliest first.
        BadDataError: it is unclear whether its one output comes from a classification layer.
    """
    outputs = outputs_of(graph)
    if len(outputs) == 1:
        try:
            tensor = graph.classifier_input(outputs[0])
        except BadDataError as error:
            message = f"{file}: {error}"
            raise BadDataError(message) from error
        if tensor is None:
            log.info("%s: no classification layer before the output %r, which is used as it is", file.name, outputs[0])
            return Choice((outputs[0],), (OUTPUT,))
        how = CONVOLUTION if graph.is_pooled_convolution(outputs[0]) else CUT
        log.info("%s: cut at %r, the %s", file.name, tensor, how)
        return Choice((tensor,), (how,), (outputs[0],))
    inputs = {name: _input_of_scores(graph, name) for name in outputs}
    scores = tuple(name for name in outputs if inputs[name])
    vectors = [value.name for value in graph.graph.output if not inputs[value.name] and _is_vector(value)]
    cuts = [name for name in dict.fromkeys(inputs.values()) if name and name not in vectors]
    if len(cuts) == 1 and len(scores) == len(outputs):
        log.info("%s: cut at %r, from which all of its %d outputs are classified", file.name, cuts[0], len(outputs))
        return Choice((cuts[0],), (CUT,), scores)
    candidates = [*vectors, *cuts]
    if requested and len(candidates) == 1:
        return Choice((candidates[0],), (OUTPUT if vectors else CUT,), scores)
    others = [name for name in outputs if name not in candidates and name not in scores]
    likely = [*candidates, *others] or outputs
    kinds = {"made by a linear layer, as class scores are": scores, "several vectors an image": others if vectors else ()}
    listing = [
        f"{' and '.join(map(repr, names))} {'is' if len(names) == 1 else 'are'} {kind}"
        for kind, names in kinds.items()
        if names
    ]
    more = f"; {', '.join(listing)}" if listing else ""
    message = (
        f"{file} has {len(outputs)} outputs ({', '.join(outputs)}){more}. "
        f"Choose the features: {' or '.join(f'--layer {name}' for name in likely)}"
    )
    raise UsageError(message)


def _input_of_scores(graph: Graph, output: str) -> str | None:
    try:
        return graph.classifier_input(output)
    except BadDataError:  # it may be either
        return None


def _is_vector(value: Any) -> bool:
    """Whether an output is declared as one vector for each image, or one that has sides of 1."""
    kind = value.type.tensor_type
    dims = [dim.dim_value for dim in kind.shape.dim]
    return kind.elem_type in (1, 10, 11) and (len(dims) == 2 or (len(dims) == 4 and 1 == dims[2] == dims[3]))  # floats


def warnings_of(graph: Graph, choice: Choice, dims: Sequence[int], file: Path) -> dict[str, str]:
    """Warnings of features that may be class scores, or be from before the last layer of the network, by their tensors."""
    outputs, warnings = outputs_of(graph), {}
    for tensor, how, dim in zip(choice.tensors, choice.how, dims, strict=True):
        if how == CONVOLUTION:
            warnings[tensor] = (
                f"{file.name}: cut at {tensor!r}, before a 1x1 convolution and a pooling, which may be a classification layer "
                f"or belong to the network; --layer {outputs[0]} takes the output instead, --layer {tensor} this, unwarned"
            )
        if how in (CUT, CONVOLUTION) or tensor not in outputs:
            continue
        if before := _input_of_scores(graph, tensor):
            warnings[tensor] = (
                f"{file.name}: {tensor!r} is what a classification layer makes, class scores rather than features; "
                f"--layer {before} takes the input of that layer"
            )
        elif how == OUTPUT and graph.looks_like_scores(tensor, dim):
            warnings[tensor] = (
                f"{file.name}: its output {tensor!r} has {dim} values and may be class scores rather than features, and no "
                f"classification layer was recognised before it; --layer {_last_input(graph, tensor)} takes the input of the "
                f"last layer with weights, --layer {tensor} this output without this warning"
            )
    return warnings


def class_counts(choice: Choice, values: Mapping[str, NDArray[Any]]) -> dict[str, Any]:
    """The first output that has a score for each of many classes, for the facts."""
    for name in (*choice.scores, *choice.tensors):
        rows = values[name]
        usual = name in choice.scores or (choice.how[0] != LAYER and rows.shape[-1:] and rows.shape[-1] in CLASS_COUNTS)
        if usual and rows.dtype.kind == "f" and rows.ndim == 2:
            return {"scores": {"output": name, "count": int(rows.shape[1])}}
    return {}


def _last_input(graph: Graph, tensor: str) -> str:
    try:
        return graph.penultimate(tensor)
    except BadDataError:
        return "NAME"
