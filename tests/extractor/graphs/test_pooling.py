"""Pooling of tokens: class tokens and registers are counted, left out or chosen."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from extractor.graphs.pooling import count_prefix, pooled, pooling_nodes, pooling_of
from store.errors import BadDataError, UsageError

TOKENS = (2, 7, 5)
SHAPES: list[tuple[tuple[int, ...], str, int | None, str, int, Any]] = [
    ((2, 5), "max", None, "none", 5, lambda x: x),
    ((2, 3, 4, 4), "average", None, "average", 3, lambda x: x.mean(axis=(2, 3))),
    ((2, 3, 4, 4), "max", None, "max", 3, lambda x: x.max(axis=(2, 3))),
    ((2, 4, 4, 3), "average", None, "average", 3, lambda x: x.mean(axis=(1, 2))),
    ((2, 4, 4, 3), "max", None, "max", 3, lambda x: x.max(axis=(1, 2))),
    ((2, 4, 4, 3), "patches", 0, "average", 3, lambda x: x.mean(axis=(1, 2))),
    (TOKENS, "average", 3, "average", 5, lambda x: x.mean(axis=1)),
    (TOKENS, "class", 3, "token", 5, lambda x: x[:, 0]),
    (TOKENS, "token", 3, "token", 5, lambda x: x[:, 0]),
    (TOKENS, "token", None, "token", 5, lambda x: x[:, 0]),
    (TOKENS, "patches", 3, "patches after 3", 5, lambda x: x[:, 3:].mean(axis=1)),
    (TOKENS, "patches", 0, "average", 5, lambda x: x.mean(axis=1)),
    (TOKENS, "class+mean", 3, "class+mean after 3", 10, lambda x: np.concatenate([x[:, 0], x[:, 3:].mean(axis=1)], axis=1)),
]


@pytest.mark.parametrize(("shape", "pooling", "prefix", "kind", "width", "expected"), SHAPES)
@pytest.mark.parametrize("opset", [9, 17, 20])
def test_any_layer_becomes_a_vector(
    shape: tuple[int, ...], pooling: str, prefix: int | None, kind: str, width: int, expected: Any, opset: int
) -> None:
    assert pooling_of(shape, "layer", pooling, prefix) == (kind, width)
    model = helper.make_model(
        helper.make_graph(
            pooling_nodes("x", shape, kind, "features", opset),
            "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", *shape[1:]])],
            [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["n", width])],
        ),
        opset_imports=[helper.make_opsetid("", opset)],
        ir_version=8,
    )
    onnx.checker.check_model(model)
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(session.run(None, {"x": x})[0], expected(x), rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(pooled(x, kind), expected(x))


@pytest.mark.parametrize(("shape", "pooling"), [((2, 3, 4, 5), "average"), ((2, 3, 4, 4, 4), "max")])
def test_a_layer_that_cannot_become_a_vector_is_refused(shape: tuple[int, ...], pooling: str) -> None:
    assert pooling_of((2, 3), "layer", "token") == ("none", 3)
    with pytest.raises(BadDataError, match=r"the layer 'layer' has shape .*; expected \(n, d\), \(n, t, d\)"):
        pooling_of(shape, "layer", pooling)


@pytest.mark.parametrize("pooling", ["class", "token", "class+mean"])
def test_a_layer_without_a_class_token_has_none_to_give(pooling: str) -> None:
    with pytest.raises(UsageError, match=r"'last' has no class token; all of its 7 tokens are patches. Pass --pooling average"):
        pooling_of(TOKENS, "last", pooling, 0)
    with pytest.raises(BadDataError, match=r"the layer 'last' has shape .*; expected tokens"):
        pooling_of((2, 3, 4, 4), "last", pooling, 0)


def test_tokens_that_are_the_same_for_all_images_are_counted() -> None:
    joined = np.random.default_rng(0).standard_normal((3, 7, 5)).astype(np.float32)
    assert count_prefix(7, [joined]) == 0
    joined[:, :3] = joined[0, :3]
    assert count_prefix(7, [joined]) == 3
    assert count_prefix(7, [joined.transpose(0, 2, 1)]) == 3
    assert count_prefix(4, [joined]) == 0  # the layer has its patches alone
    joined[:, -1] = joined[0, -1]  # a token after the patches
    assert count_prefix(7, [joined[:, ::-1][:, :7]]) == 1
