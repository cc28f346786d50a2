"""Zeros around a max pooling stay zeros: ONNX Runtime's own optimiser would make them minus infinity."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

import classifiers
from extractor.backbones import custom_onnx
from extractor.backbones.custom_onnx import import_onnx
from extractor.backbones.registry import Backbone
from extractor.graphs.backbone_facts import read_facts
from extractor.graphs.cpu_session import cpu_session
from extractor.graphs.graph import keep_zero_padding
from extractor.pipeline import prepare
from extractor.pipeline.run import extract
from extractor.pipeline.settings import Options
from store.errors import FingerprintMismatchError

SIDE = 32


def write_classifier(path: Path, opset: int = 17, value: float | None = None) -> Path:
    """A convolution whose values are mostly negative, zeros around them, a max pooling, and a classifier."""
    rng = np.random.default_rng(0)
    weights = (rng.normal(size=(16, 3, 7, 7)) * 0.1 - 0.2).astype(np.float32)
    pads = [0, 0, 1, 1, 0, 0, 1, 1]
    constants = {"w": weights, "v": rng.normal(size=(16, 5)).astype(np.float32), "b": np.zeros(5, np.float32)}
    if opset < 11:
        pad = helper.make_node("Pad", ["c"], ["y"], pads=pads, value=0.0)
    else:
        constants["p"] = np.array(pads)
        if value is not None:
            constants["z"] = np.array(value, np.float32)
        pad = helper.make_node("Pad", ["c", "p", *(["z"] if value is not None else [])], ["y"])
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], kernel_shape=[7, 7], strides=[2, 2], pads=[3, 3, 3, 3]),
        pad,
        helper.make_node("MaxPool", ["y"], ["m"], kernel_shape=[3, 3], strides=[2, 2]),
        helper.make_node("GlobalAveragePool", ["m"], ["a"]),
        helper.make_node("Flatten", ["a"], ["f"]),
        helper.make_node("Gemm", ["f", "v", "b"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "padded",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, SIDE, SIDE])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", 5])],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8), path)
    return path


def backbone_of(path: Path) -> Backbone:
    return Backbone(str(path), mean=(0.5,), std=(0.5,))


def features_of(path: Path, name: str, pixels: NDArray[np.float32], output: str, *, ours: bool) -> NDArray[np.float32]:
    """By a session of ours, or by one with every optimisation that ONNX Runtime has."""
    session = cpu_session(path) if ours else onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    outputs: Any = session.run([output], {name: pixels})[0]
    return np.asarray(outputs)


def by_definition(path: Path, pixels: NDArray[np.float32]) -> NDArray[np.float32]:
    """The features as ONNX defines them, by its reference implementation."""
    from onnx.reference import ReferenceEvaluator

    model = onnx.load(path)
    model.graph.output.append(onnx.ValueInfoProto(name="f"))
    return np.asarray(ReferenceEvaluator(model).run(["f"], {"x": pixels})[0])


@pytest.mark.parametrize(("opset", "value"), [(17, None), (17, 0.0), (11, None), (10, None)])
def test_features_are_those_that_onnx_defines(opset: int, value: float | None, tmp_path: Path) -> None:
    file = write_classifier(tmp_path / "theirs.onnx", opset, value)
    facts = import_onnx(backbone_of(file), tmp_path / "ours.onnx")
    assert facts.zero_padded_pooling
    assert facts.fingerprints()[0]["max_pool_padding"] == "zeros"
    pixels = np.random.default_rng(1).normal(size=(4, 3, SIDE, SIDE)).astype(np.float32)
    expected = by_definition(file, pixels)
    np.testing.assert_allclose(
        features_of(tmp_path / "ours.onnx", "pixels", pixels, "features", ours=True), expected, rtol=1e-4
    )
    if opset >= 11:  # and so in any other program that runs the file
        theirs = features_of(tmp_path / "ours.onnx", "pixels", pixels, "features", ours=False)
        np.testing.assert_allclose(theirs, expected, rtol=1e-4)


def test_zeros_before_a_transposition_stay_zeros_too(tmp_path: Path) -> None:
    """ONNX Runtime's TransposeOptimizer moves it away, and then its Pad_Fusion applies; other programs run the file as well."""
    model = onnx.load(write_classifier(tmp_path / "theirs.onnx"))
    conv, _, pool, *rest = model.graph.node
    pads = helper.make_tensor("last", TensorProto.INT64, [8], [0, 1, 1, 0, 0, 1, 1, 0])
    nodes = [
        conv,
        helper.make_node("Constant", [], ["last"], value=pads),
        helper.make_node("Transpose", ["c"], ["ct"], perm=[0, 2, 3, 1]),
        helper.make_node("Pad", ["ct", "last"], ["yt"]),
        helper.make_node("Transpose", ["yt"], ["y"], perm=[0, 3, 1, 2]),
        *(pool, *rest),
    ]
    graph = helper.make_graph(nodes, "last", model.graph.input, model.graph.output, model.graph.initializer)
    file = tmp_path / "last.onnx"
    onnx.save(helper.make_model(graph, opset_imports=model.opset_import, ir_version=8), file)
    facts = import_onnx(backbone_of(file), tmp_path / "ours.onnx")
    assert "max_pool_padding" not in facts.fingerprints()[0]  # they have been right since that pass is off
    pixels = np.random.default_rng(1).normal(size=(4, 3, SIDE, SIDE)).astype(np.float32)
    expected = by_definition(file, pixels)
    for ours in (True, False):
        rows = features_of(tmp_path / "ours.onnx", "pixels", pixels, "features", ours=ours)
        np.testing.assert_allclose(rows, expected, rtol=1e-4)


def test_onnx_runtime_still_has_the_fault(tmp_path: Path) -> None:
    """When this fails, `cpu_session.WRONG_FUSIONS` and `keep_zero_padding` may go."""
    file = write_classifier(tmp_path / "theirs.onnx")
    pixels = np.random.default_rng(1).normal(size=(4, 3, SIDE, SIDE)).astype(np.float32)
    plain = features_of(file, "x", pixels, "logits", ours=False)
    assert np.abs(plain - features_of(file, "x", pixels, "logits", ours=True)).max() > 1e-3


def test_other_padding_and_other_networks_are_left_alone(tmp_path: Path, backbone_file: Path) -> None:
    for path in (write_classifier(tmp_path / "one.onnx", value=1.0), backbone_file):
        model = onnx.load(path)
        before = model.SerializeToString()
        assert not keep_zero_padding(model)
        assert model.SerializeToString() == before
    assert "max_pool_padding" not in read_facts(backbone_file).fingerprints()[0]


@pytest.mark.usefixtures("exports_here")
def test_features_from_before_are_not_mixed_with_those_of_now(
    tmp_path: Path, dataset: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos = dataset(tmp_path / "photos", {"ants": 8, "bees": 8})
    backbone = backbone_of(write_classifier(tmp_path / "theirs.onnx"))
    quiet = Options(device="cpu", quiet=True)
    with monkeypatch.context() as patch:  # an import that knows nothing of it
        for module in (custom_onnx, prepare):
            patch.setattr(module, "keep_zero_padding", lambda _: False)
        cache = extract(photos, backbone, tmp_path / "c", quiet)
        assert "max_pool_padding" not in cache.fingerprint.fields
        bundle = classifiers.train(cache, tmp_path / "h", "centroid")
    with pytest.raises(FingerprintMismatchError, match="max_pool_padding"):
        extract(photos, backbone, tmp_path / "c", quiet)
    with pytest.raises(FingerprintMismatchError, match="max_pool_padding"):
        next(classifiers.Predictor.of(bundle).predict(sorted(photos.glob("ants/*"))))
    again = extract(photos, backbone, tmp_path / "c", quiet.replace(overwrite=True))
    assert again.fingerprint.fields["max_pool_padding"] == "zeros"
    assert extract(photos, backbone, tmp_path / "c", quiet).samples.counts["ok"] == 16
