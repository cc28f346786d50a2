"""Errors of ONNX Runtime and ONNX become sentences without places in their source, temporary files and addresses."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from extractor.graphs.cpu_session import cpu_session
from extractor.graphs.reasons import reason

NOISE = ("/", ".cc", "ONNXRuntimeError", "0x", "Status Message", "\n", "==>")


def model(*nodes: onnx.NodeProto, ir_version: int = 8, dims: tuple[int, ...] = (2, 3)) -> bytes:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, dims)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=ir_version)
    return bytes(made.SerializeToString())


@pytest.mark.parametrize(
    ("broken", "sentence"),
    [
        (model(helper.make_node("Relu", ["x"], ["y"]), ir_version=99), "Unsupported model IR version: 99"),
        (model(helper.make_node("Nothing", ["x"], ["y"])), "Nothing"),
        (model(helper.make_node("Relu", ["z"], ["y"])), "'?z'?"),
        (model(helper.make_node("Softmax", ["x"], ["y"], axis=7)), "axis"),
        (model(helper.make_node("Concat", ["x", "x"], ["y"], axis=5)), "axis"),
        (model(helper.make_node("Relu", ["x", "x", "x"], ["y"])), "Relu"),
        (b"not a model", "Protobuf parsing failed"),
    ],
)
def test_a_session_that_does_not_open_is_explained_in_a_sentence(
    tmp_path: Path, broken: bytes, sentence: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "penult-x" / "whole.onnx"
    path.parent.mkdir()
    path.write_bytes(broken)
    with pytest.raises(Exception, match=r"\S") as refused:
        cpu_session(path)
    with caplog.at_level(logging.DEBUG, "penult.extractor"):
        text = reason(refused.value)
    assert not [noise for noise in NOISE if noise in text], text
    assert 10 < len(text) <= 240
    assert re.search(sentence, text), text
    assert str(refused.value).strip() in caplog.text  # with -v


def test_an_operator_that_fails_is_named(tmp_path: Path) -> None:
    shape = helper.make_tensor("shape", TensorProto.INT64, [2], [5, 5])
    nodes = [
        helper.make_node("Constant", [], ["s"], value=shape),
        helper.make_node("Reshape", ["x", "s"], ["y"], name="flatten_7"),
    ]
    with pytest.raises(Exception, match=r"\S") as refused:
        cpu_session(model(*nodes)).run(None, {"x": [[1, 2, 3], [4, 5, 6]]})
    text = reason(refused.value)
    assert not [noise for noise in NOISE if noise in text], text
    assert "Reshape" in text
