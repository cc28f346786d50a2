"""float16 backbones: how far they move features, which layers stay in float32, what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

from extractor.graphs.backbone_facts import read_facts
from extractor.pixels.decoder import Decoder
from extractor.precision import float16
from extractor.precision.float16 import BOUND, COSINE, compare, embed_as_on_a_gpu, noise_images, to_float16
from extractor.runtime.session import Embedder
from store.errors import BadDataError


def scaled(source: Path, out: Path, factor: float, layer: int) -> Path:
    """A copy whose one convolution has so much larger weights, and whose next undoes it: the same features in float32."""
    model = onnx.load(source)
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    convolutions = [node for node in model.graph.node if node.op_type == "Conv"]
    for name in convolutions[layer].input[1:]:
        weights[name].CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weights[name]) * np.float32(factor), name))
    after = convolutions[layer + 1].input[1]
    weights[after].CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weights[after]) / np.float32(factor), after))
    out.write_bytes(model.SerializeToString())
    return out


def test_the_file_is_half_as_large_and_takes_and_gives_float32(backbone_file: Path, tmp_path: Path) -> None:
    facts = to_float16(backbone_file, tmp_path / "half.onnx", read_facts(backbone_file))
    assert facts == read_facts(tmp_path / "half.onnx")
    assert facts.precision == "fp16"
    assert facts.calibration["float_layers"] == []
    assert 0 < facts.calibration["moved"] <= BOUND
    fields = facts.fingerprints()[0]
    assert (fields["precision"], fields["calibration"]) == ("fp16", facts.calibration["sha256"])
    assert "precision" not in read_facts(backbone_file).fingerprints()[0]
    assert (tmp_path / "half.onnx").stat().st_size < 0.6 * backbone_file.stat().st_size
    model = onnx.load(tmp_path / "half.onnx")
    onnx.checker.check_model(model)
    kinds = {value.type.tensor_type.elem_type for value in (*model.graph.input, *model.graph.output)}
    assert kinds == {TensorProto.FLOAT}
    assert {tensor.data_type for tensor in model.graph.initializer if tensor.dims} <= {TensorProto.FLOAT16, TensorProto.INT64}


def test_a_cpu_computes_from_it_within_the_bound(backbone_file: Path, tmp_path: Path) -> None:
    facts = to_float16(backbone_file, tmp_path / "half.onnx", read_facts(backbone_file))
    pixels = np.random.default_rng(3).integers(0, 256, (9, 64, 64, 3), np.uint8)
    exact = Embedder(backbone_file, facts.preprocess).embed(pixels)
    found = Embedder(tmp_path / "half.onnx", facts.preprocess).embed(pixels)
    assert found[0].dtype == np.float32
    worst, cosine = compare(found, exact)
    assert 0 < worst <= BOUND
    assert cosine >= COSINE


def test_a_layer_that_overflows_at_the_input_stays_in_float32(backbone_file: Path, tmp_path: Path) -> None:
    loud = scaled(backbone_file, tmp_path / "loud.onnx", 1e6, 0)
    facts = to_float16(loud, tmp_path / "half.onnx", read_facts(loud))
    assert 1 <= len(facts.calibration["float_layers"]) <= 4
    model = onnx.load(tmp_path / "half.onnx")
    first = next(node for node in model.graph.node if node.op_type == "Conv")
    assert first.name == facts.calibration["float_layers"][0]


def test_a_network_that_overflows_between_two_layers_is_refused(
    backbone_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Times 2^15, and back: nothing in float32, nor where the end alone is rounded, and infinity on a card."""
    model = onnx.load(backbone_file)
    nodes = list(model.graph.node)
    place = [i for i, node in enumerate(nodes) if node.op_type == "Conv"][20]
    first = last = nodes[place].output[0]
    steps = []
    for name, factor in (("up", 2**15), ("down", 2**-10), ("as_before", 2**-5)):
        model.graph.initializer.append(numpy_helper.from_array(np.array(factor, np.float32), f"{name}_by"))
        steps.append(onnx.helper.make_node("Mul", [last, f"{name}_by"], [name]))
        last = name
    for node in nodes:
        node.input[:] = [last if name == first else name for name in node.input]
    ordered = [type(node).FromString(node.SerializeToString()) for node in (*nodes[: place + 1], *steps, *nodes[place + 1 :])]
    del model.graph.node[:]
    model.graph.node.extend(ordered)
    loud, facts = tmp_path / "loud.onnx", read_facts(backbone_file)
    loud.write_bytes(model.SerializeToString())
    pixels = noise_images(facts.preprocess)[:2]
    exact, found = (Embedder(path, facts.preprocess).embed(pixels) for path in (backbone_file, loud))
    assert compare(found, exact)[0] < 1e-6
    with pytest.raises(BadDataError, match=r"moves the features of squeezenet1_1 by inf .* Use --precision fp32"):
        to_float16(loud, tmp_path / "half.onnx", facts)
    assert not (tmp_path / "half.onnx").exists()
    monkeypatch.setattr(float16, "BOUND", 1e-9)
    monkeypatch.setattr(float16, "ENOUGH", 1e-9)
    with pytest.raises(BadDataError, match=r"even with 16 layers in float32; 1e-09 and 0\.9995 are allowed"):
        to_float16(backbone_file, tmp_path / "half.onnx", read_facts(backbone_file))


def test_weights_beside_the_file_are_refused(backbone_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(float16.onnx_file, "external_files", lambda _: ["x.data"])
    with pytest.raises(BadDataError, match="weights over 2 GB"):
        to_float16(backbone_file, tmp_path / "half.onnx", read_facts(backbone_file))


def test_compare_knows_zero_rows_and_no_numbers() -> None:
    rows = np.array([[3, 4], [0, 0]], np.float32)
    assert compare([rows], [rows]) == (0, 1)
    assert compare([rows * np.float32(np.nan)], [rows]) == (np.inf, -1)
    worst, cosine = compare([rows, rows * np.float32(1.1)], [rows, rows])
    assert worst == pytest.approx(0.1, rel=1e-5)
    assert cosine == pytest.approx(1)


def test_the_noise_images_are_the_same_each_time_and_differ(backbone_file: Path) -> None:
    preprocess = read_facts(backbone_file).preprocess
    found = noise_images(preprocess)
    assert found.shape == (16, 64, 64, 3)
    np.testing.assert_array_equal(found, noise_images(preprocess))
    assert len({picture.tobytes() for picture in found}) == 16
    assert all(40 < picture.std() < 80 for picture in found)


@pytest.mark.assets
def test_on_real_photos_it_stays_within_the_bound(assets: Path, imagenet: Path, tmp_path: Path) -> None:
    facts = to_float16(imagenet, tmp_path / "half.onnx", read_facts(imagenet))
    assert len(facts.calibration["float_layers"]) == 8
    photos = sorted((assets / "data" / "photos").iterdir())[::10]
    with Decoder(facts.preprocess) as decoder:
        pixels: Any = np.stack([decoder(photo.read_bytes()) for photo in photos])
    exact = Embedder(imagenet, facts.preprocess).embed(pixels)
    worst, cosine = compare(Embedder(tmp_path / "half.onnx", facts.preprocess).embed(pixels), exact)
    assert 0 < worst <= BOUND
    assert cosine >= COSINE


def test_what_is_float16_already_says_so(backbone_file: Path, tmp_path: Path) -> None:
    facts = to_float16(backbone_file, tmp_path / "half.onnx", read_facts(backbone_file))
    assert replace(facts, precision="fp32", calibration={}) == read_facts(backbone_file)


def test_what_is_judged_is_rounded_behind_every_operator(backbone_file: Path) -> None:
    """Also behind those of ONNX Runtime's own, whose types ONNX does not know."""
    helper, half_type = onnx.helper, TensorProto.FLOAT16
    nodes = [
        helper.make_node("Cast", ["pixels"], ["cast"], to=half_type),
        helper.make_node("Mul", ["cast", "factor"], ["product"]),
        helper.make_node("Gelu", ["product"], ["gelu"], domain="com.microsoft"),
        helper.make_node("Cast", ["gelu"], ["features"], to=TensorProto.FLOAT),
    ]
    factor = helper.make_tensor("factor", half_type, [], [3.001])
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 3, 64, 64]) for name in ("pixels", "features")]
    graph = helper.make_graph(nodes, "gelu", ends[:1], ends[1:], [factor])
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    facts = read_facts(backbone_file)
    given = noise_images(facts.preprocess)[:5]
    (found,) = embed_as_on_a_gpu(helper.make_model(graph, opset_imports=opsets, ir_version=10), facts, given)
    np.testing.assert_array_equal(found, found.astype(np.float16))
    product = facts.preprocess.normalise(given).astype(np.float16) * np.float16(3.001)
    large = product > 6  # where GELU changes nothing
    assert large.any()
    np.testing.assert_array_equal(found[large], product[large])
