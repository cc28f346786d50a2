"""The classification layer of an ONNX graph: found by walking back from the outputs, through forks and joins too."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from typing import Any

from store.errors import BadDataError

from .graph import WEIGHTED, constant, free_names, in_order

PASS_THROUGH = ("Identity", "Transpose", "Cast", "DequantizeLinear", "Reshape", "Unsqueeze", "Squeeze")
# What may stand between a classification layer and the output: probabilities, biases, temperatures, shapes, pooling.
TAIL = (*PASS_THROUGH, "Sigmoid", "Flatten", "Add", "Sub", "Mul", "Div", "QuantizeLinear", "Dropout")
JOINS = ("Add", "Sum", "Mean", "Max", "Min", "Concat")  # of several classification layers
SCORES = ("Softmax", "LogSoftmax", "Hardmax", "ArgMax", "TopK")  # class scores alone go through these
# Operators whose weights are not inspected: quantised layers, ONNX Runtime's own layers, branches.
QUANTISED = ("QGemm", "MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "ConvInteger", "MatMulNBits")
OPAQUE = (*QUANTISED, "FusedMatMul", "FusedGemm", "FusedConv", "Einsum", "If", "Loop", "Scan")
POOLING = ("GlobalAveragePool", "AveragePool", "ReduceMean")
ACTIVATIONS = ("Relu", "Clip", "LeakyRelu", "PRelu", "Elu", "Gelu", "HardSwish", "Tanh")
SUMS = ("ReduceSum", "ReduceMax", "ReduceLogSumExp")  # over the classes, in a softmax that is written out
NORMS = ("ReduceL2", "ReduceSumSquare", "ReduceSum", "Sqrt")  # in a division by a length that is written out
SELECTIONS = ("Slice", "Gather", "Split")  # of some classes
WRITTEN_OUT = (*SUMS, *NORMS, *SELECTIONS, "Exp", "Log", "Neg", "Reciprocal", "Pow", "Abs", "Max", "Min", "Expand")
PER_FEATURE = (*PASS_THROUGH, "Flatten", "Dropout", "BatchNormalization", "Add", "Sub", "Mul", "Div", "QuantizeLinear")
# Class counts of the usual data sets: ImageNet with and without a background class, the sets of 21 thousand, Places
CLASS_COUNTS = (365, 1000, 1001, 10450, 11221, 11821, 18291, 21841, 21842, 21843)
RANDOM = ("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli")
SHOWN = 4  # layers in a message


@dataclass(frozen=True)
class _Path:
    """The way from an output back to a tensor.

    Attributes:
        name: of the tensor.
        trail: the tensors on the way.
        ops: the operators on the way.
        joins: of them, those that join several tensors.
        activated, pooled: an activation, or a pooling, is among them.
        scores: a softmax or a choice among classes is among them, so that what is before it are class scores.
    """

    name: str
    trail: tuple[str, ...] = ()
    ops: frozenset[str] = frozenset()
    joins: frozenset[str] = frozenset()
    activated: bool = False
    pooled: bool = False
    scores: bool = False

    def before(self, node: Any, names: Sequence[str], **flags: bool) -> Iterator[_Path]:
        joins = self.joins | ({node.op_type} if len(names) > 1 else set())
        for name in names:
            trail, ops = (*self.trail, self.name), self.ops | {node.op_type}
            yield replace(self, name=name, trail=trail, ops=ops, joins=joins, **flags)


class Graph:
    """A model's graph, searched backwards from its outputs."""

    def __init__(self, model: Any) -> None:
        self.graph = model.graph
        self.made_by = {name: node for node in model.graph.node for name in node.output}
        self._place = {name: i for i, node in enumerate(model.graph.node) for name in node.output}

    @cached_property
    def _of_pixels(self) -> set[str]:
        """Tensors that are computed from the values of the input, rather than from its shape or from constants."""
        tensors = {value.name for value in self.graph.input} - {tensor.name for tensor in self.graph.initializer}
        for node in in_order(self.graph.node):
            if node.op_type in RANDOM or (
                node.op_type not in ("Shape", "Size") and tensors.intersection([*node.input, *free_names(node)])
            ):
                tensors.update(filter(None, node.output))
        return tensors

    def is_constant(self, name: str) -> bool:
        """Whether a tensor is a weight, or computed from weights and shapes alone."""
        return name not in self._of_pixels

    def is_weighted(self, node: Any) -> bool:
        return node.op_type in WEIGHTED and len(node.input) > 1 and self.is_constant(node.input[1])

    def penultimate(self, output: str) -> str:
        """Name of the tensor that feeds the last layer with weights before an output: the last Gemm, MatMul or Conv.

        Raises:
            BadDataError: there is no such layer.
        """
        for node in self.backwards(output):
            if self.is_weighted(node):
                return str(node.input[0])
        message = "no Gemm, MatMul or Conv with constant weights stands before the network's output; nothing to cut at"
        raise BadDataError(message)

    def backwards(self, output: str) -> Iterator[Any]:
        """The nodes before a tensor, the nearest first."""
        pending, visited = deque([output]), set()
        while pending:
            node = self.made_by.get(pending.popleft())
            if node is not None and id(node) not in visited:
                visited.add(id(node))
                yield node
                pending.extend(node.input)

    def classifier_input(self, output: str) -> str | None:
        """The tensor that feeds the classification layer before an output; None if the output is the features.

        A classification layer is a Gemm, a MatMul or a 1x1 Conv followed by nothing but `TAIL`, or by anything if a softmax
        or a choice among classes follows. Several of them that the output joins have a common input. The result of an
        activation, a residual sum or a normalisation is already features.

        Raises:
            BadDataError: it may be either, as in SqueezeNet's classifier and a headless MobileNet; or class scores whose
                classification layer cannot be told. Names the layers to choose from.
        """
        layers, blocked = self._walk(output)
        layers, blocked, cosine = self._without_norms(layers, blocked)
        ops = frozenset[str]().union(*(path.ops for path in (*layers, *blocked)))
        joins = frozenset[str]().union(*(path.joins for path in (*layers, *blocked)))
        softmax = bool(joins) and ({"Exp", "ReduceSum"} <= ops or "ReduceLogSumExp" in ops)
        surely = softmax or any(path.scores for path in (*layers, *blocked))
        if blocked or not layers:
            if surely:
                raise BadDataError(self._unclear(output))
            return None
        nodes = list({path.name: self.made_by[path.name] for path in layers}.values())
        opaque = [node.op_type for node in nodes if _is_opaque(node)]
        if opaque and (surely or not joins):
            message = (
                f"{opaque[0]} stands before the output {output!r} and may be a classification layer (quantised, or in a "
                f"branch). Pass --layer NAME for the tensor with the features, or --layer {output} to use the output"
            )
            raise BadDataError(message)
        if opaque:
            return None
        if len(nodes) == 1 and surely:
            usual = ops <= {*TAIL, *SCORES, *POOLING, *ACTIVATIONS, *WRITTEN_OUT}
            if any(path.activated for path in layers) and (_is_spatial(nodes[0]) or not usual):
                raise BadDataError(self._unclear(output))
            return str(nodes[0].input[0])
        if len(nodes) > 1:
            return self._of_several(output, nodes, layers, surely=surely)
        written_out = not cosine and (joins or ops.intersection(WRITTEN_OUT))  # an activation, or a normalisation
        return None if written_out else self._of_one(output, nodes[0], layers)

    def is_pooled_convolution(self, output: str) -> bool:
        """Whether an output is a pooled 1x1 convolution, which may classify or be the last layer of the network's body."""
        layers, blocked = self._walk(output)
        if blocked or not layers or any(path.scores for path in layers):
            return False
        return all(path.pooled and self.made_by[path.name].op_type == "Conv" for path in layers)

    def _walk(self, output: str) -> tuple[list[_Path], list[_Path]]:
        """The ways from an output back to layers with weights, and those that end at something else."""
        layers: list[_Path] = []
        blocked: list[_Path] = []
        pending, visited = [_Path(output)], set()
        while pending:
            path = pending.pop()
            if (state := (path.name, path.activated, path.pooled, path.scores, path.joins)) in visited:
                continue
            visited.add(state)
            node = self.made_by.get(path.name)
            if node is not None and (self.is_weighted(node) or _is_opaque(node)):
                layers.append(path)
            elif node is None or not (before := self._before(path, node)):
                blocked.append(path)
            else:
                pending += before
        return layers, blocked

    def _before(self, path: _Path, node: Any) -> list[_Path]:
        """The ways on through the node that makes the end of a path; none if it is nothing that follows class scores."""
        op, names = node.op_type, self._values(node)
        if op in SCORES:
            return list(path.before(node, names[:1], scores=True, activated=False, pooled=False))
        if op in ACTIVATIONS:
            return list(path.before(node, names[:1], activated=path.activated or not self._only_limits(node)))
        if op in POOLING:
            return list(path.before(node, names[:1], pooled=True))
        if len(names) == 1 and path.scores:
            return list(path.before(node, names))
        by_length = any(set(self._chain(name)) & {"Reciprocal", *NORMS} for name in names)
        if op == "Mul" and len(set(names)) == 1:  # a square
            names = names[: 1 if path.ops.intersection(NORMS) else 2]
        if op in JOINS or op in WRITTEN_OUT or (op in TAIL and (op != "Mul" or len(names) == 1 or by_length)):
            return list(path.before(node, names))
        return []

    def _values(self, node: Any) -> list[str]:
        """The inputs of a node that are neither weights nor shapes."""
        return [name for name in node.input if name and not self.is_constant(name)]

    def _chain(self, name: str) -> Iterator[str]:
        """The operators of the chain of one input each that ends in a tensor."""
        while (node := self.made_by.get(name)) is not None and len(values := self._values(node)) == 1:
            if node.op_type not in (*PASS_THROUGH, *WRITTEN_OUT, "Clip", "Add"):
                return
            yield node.op_type
            name = values[0]

    def _only_limits(self, node: Any) -> bool:
        """Whether an activation is a Clip that keeps negative numbers, as one that limits class scores does."""
        if node.op_type != "Clip":
            return False
        values = {attribute.name: attribute.f for attribute in node.attribute}
        least: float | None = values.get("min")
        if len(node.input) > 1 and node.input[1]:
            array = constant(self.graph, node.input[1])
            return array is not None and bool((array < 0).all())
        return least is None or least < 0

    def _without_norms(self, layers: list[_Path], blocked: list[_Path]) -> tuple[list[_Path], list[_Path], bool]:
        """The ways without those that only compute the length of a layer's input, as a cosine does; and whether any did."""
        inputs = {str(self.made_by[path.name].input[0]) for path in layers if not path.ops.intersection(NORMS)}

        def is_norm(path: _Path) -> bool:
            divides = path.ops.intersection(NORMS) and path.joins <= {"Div", "Mul"}
            return bool(divides and inputs.intersection([*path.trail, path.name]))

        kept, left = ([path for path in paths if not is_norm(path)] for paths in (layers, blocked))
        return kept, left, len(kept) + len(left) < len(layers) + len(blocked)

    def _of_one(self, output: str, node: Any, paths: Sequence[_Path]) -> str | None:
        """The input of the one layer before an output, if it is a classification layer."""
        if _is_spatial(node):
            return None
        if not any(path.activated for path in paths):
            return str(node.input[0])
        if node.op_type == "Conv" and any(path.pooled for path in paths):
            message = (
                f"the last layer before the output {output!r} is a 1x1 convolution followed by an activation and a "
                f"pooling, which may be a classification layer or features. Pass --layer {output} to use the "
                f"output as it is, or --layer {node.input[0]} for the input of that layer"
            )
            raise BadDataError(message)
        return None

    def _of_several(self, output: str, nodes: Sequence[Any], paths: Sequence[_Path], *, surely: bool) -> str | None:
        """The common input of several layers that an output joins, if they are classification layers.

        Raises:
            BadDataError: they are, and have different inputs.
        """
        inputs = list(dict.fromkeys(str(node.input[0]) for node in nodes))
        common = self._common(inputs)
        if not surely:
            convolutions = [node for node in nodes if node.op_type == "Conv"]
            body = any(_is_spatial(node) or _ints(node, "group") for node in convolutions)
            joined = all(path.joins <= set(JOINS) and not path.activated for path in paths)
            if body or not joined or (not common and (convolutions or self._is_residual(inputs))):
                return None
        if common:
            return common
        inputs.sort(key=lambda name: self._place.get(name, -1))
        message = (
            f"the output {output!r} joins {len(nodes)} classification layers with different inputs, as after training by "
            f"distillation. Pass {' or '.join(f'--layer {name}' for name in inputs[-SHOWN:])}, or several of them for several "
            f"feature sets"
        )
        raise BadDataError(message)

    def _is_residual(self, names: Sequence[str]) -> bool:
        """Whether one of these tensors is computed from another."""
        return any(set(names) & (set(node.input) - {name}) for name in names for node in self.backwards(name))

    def _common(self, names: Sequence[str]) -> str | None:
        """The last tensor from which all these come by operations on each feature alone."""
        chains = [list(self._per_feature(name)) for name in names]
        return next((name for name in chains[0] if all(name in chain for chain in chains[1:])), None)

    def _per_feature(self, name: str) -> Iterator[str]:
        yield name
        while (node := self.made_by.get(name)) is not None and node.op_type in PER_FEATURE:
            values = self._values(node)
            if len(values) != 1:
                return
            name = values[0]
            yield name

    def _unclear(self, output: str) -> str:
        near = (node for node in self.backwards(output) if self.is_weighted(node))
        names = dict.fromkeys(str(node.input[0]) for node in islice(near, SHOWN))
        listing = f" The inputs of the last layers with weights are {', '.join(names)}." if names else ""
        return (
            f"the output {output!r} is class scores, and their classification layer cannot be told from the graph.{listing} "
            f"Pass --layer NAME for the tensor with the features, or --layer {output} to use the scores"
        )

    def looks_like_scores(self, tensor: str, width: int) -> bool:
        """Whether an output that is used as it is may be class scores: its width is a usual number of classes, or that of the
        weights from which it was made with no activation, normalisation or sum in between."""
        if width in CLASS_COUNTS:
            return True
        shapes = {each.name: [side for side in each.dims if side > 1] for each in self.graph.initializer}
        pending, visited = [(tensor, False)], set()
        while pending:
            name, normalised = pending.pop()
            node = self.made_by.get(name)
            if node is None or name in visited or node.op_type in (*ACTIVATIONS, *POOLING, "Conv") or "Norm" in node.op_type:
                continue
            visited.add(name)
            values, sides = self._values(node), [shapes[each] for each in node.input if each in shapes]
            layer = node.op_type in ("Gemm", "MatMul")
            if node.op_type != "Add" and not (layer and normalised) and any(len(each) > 1 and width in each for each in sides):
                return True
            if not layer and (len(values) == 1 or node.op_type in ("Div", "Sub")):
                divided = node.op_type == "Div" and len(values) > 1  # an embedding of length 1
                pending += [(each, normalised or divided) for each in (values[:1] if divided else values)]
        return False

    def tensors(self) -> list[str]:
        """Names of all inner tensors and outputs, in the order of computation."""
        return [name for node in self.graph.node for name in node.output if name and not self.is_constant(name)]


def _is_spatial(node: Any) -> bool:
    """Whether a layer is a convolution of more than one place."""
    return node.op_type == "Conv" and any(side != 1 for side in _ints(node, "kernel_shape"))


def _is_opaque(node: Any) -> bool:
    return node.op_type in OPAQUE or node.op_type.startswith("QLinear")


def _ints(node: Any, name: str) -> list[int]:
    """An attribute that is a list of numbers, or a number other than 1, as a list."""
    for attribute in node.attribute:
        if attribute.name == name:
            return list(attribute.ints) or ([attribute.i] if attribute.i != 1 else [])
    return []
