"""A bundle as one ONNX file: the same probabilities in plain ONNX Runtime, and whatever was changed in it is noticed."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

import classifiers
from classifiers.bundles import fused as format_of
from classifiers.bundles.bundle import Bundle, save_bundle
from classifiers.bundles.fuse import PARITY, fuse, rounding_nodes, selftest
from classifiers.bundles.fused import Fused, golden_images
from classifiers.bundles.held_out import evaluate_bundle
from classifiers.bundles.predictor import Predictor, list_images
from classifiers.finetuning.finetune import finetune
from classifiers.finetuning.settings import FineTuneSettings
from classifiers.heads.registry import make_head
from extractor.backbones.registry import Backbone
from extractor.data.folders import ImageFolder
from extractor.graphs import onnx_file
from extractor.graphs.backbone_facts import BackboneFacts, Layer, read_facts, write_facts
from extractor.graphs.onnx_file import save
from extractor.pipeline.run import run_extract
from extractor.pipeline.settings import Options
from extractor.pixels.preprocess import Preprocess
from extractor.precision.float16 import to_float16
from store.cache import FeatureCache
from store.errors import BadDataError, InputMissingError, OutputError, OutputExistsError, PenultError
from store.format.shard import as_stored
from tests.conftest import as_before

Penult = Callable[..., tuple[int, str, str]]

REPO = Path(__file__).resolve().parents[3]
SIDE = 16
DIM = 24
TINTS = {"blue": (70, 80, 180), "green": (70, 150, 80), "red": (180, 80, 70)}
PLAIN = """
import sys
import numpy, onnxruntime
classifier, given, answer = sys.argv[1:]
session = onnxruntime.InferenceSession(classifier, providers=["CPUExecutionProvider"])
pixels = numpy.load(given)
found = [session.run(["probabilities", "label"], {"pixels": part}) for part in (pixels[:1], pixels[1:4], pixels[4:])]
numpy.savez(answer, probabilities=numpy.concatenate([p for p, _ in found]), label=numpy.concatenate([l for _, l in found]))
assert not {"extractor", "classifiers", "store", "torch", "onnx"} & set(sys.modules)
"""


def write_network(path: Path, preprocess: Preprocess, *, batch: int | str = "n", factor: float = 1.0, opset: int = 17) -> Path:
    """A small backbone with random weights and two feature sets; names of its tensors are those that a classifier has too."""
    rng = np.random.default_rng(0)
    first = rng.normal(0, 0.3, (12, 3, 3, 3)).astype(np.float32)
    second = (rng.normal(0, 0.2, (DIM, 12, 3, 3)) * factor).astype(np.float32)
    nodes = [
        helper.make_node("Conv", ["input", "weight0"], ["probabilities"], strides=[2, 2]),
        helper.make_node("Relu", ["probabilities"], ["label"]),
        helper.make_node("Conv", ["label", "weight1"], ["pixels"]),
        helper.make_node("Relu", ["pixels"], ["head/features"]),
        *pooled("head/features", "features"),
        *pooled("label", "features_1"),
    ]
    shapes = {"input": [batch, 3, SIDE, SIDE], "features": [batch, DIM], "features_1": [batch, 12]}
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    weights = [numpy_helper.from_array(first, "weight0"), numpy_helper.from_array(second, "weight1")]
    graph = helper.make_graph(nodes, "tiny", values[:1], values[1:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)
    layers = (Layer("last", "average", DIM), Layer("first", "average", 12, "features_1"))
    fixed = batch if isinstance(batch, int) else None
    write_facts(model, BackboneFacts("tiny", f"x{factor}", f"{factor:064.3f}", layers, preprocess, fixed))
    save(model, path)
    return path


def pooled(name: str, output: str) -> list[Any]:
    mean = helper.make_node("GlobalAveragePool", [name], [f"{output}_map"])
    return [mean, helper.make_node("Flatten", [f"{output}_map"], [output], axis=1)]


PREPROCESS = Preprocess(20, SIDE, "bilinear", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noisy pictures of three tints, landscape and portrait, in a folder per class."""
    root, rng = tmp_path_factory.mktemp("tinted") / "photos", np.random.default_rng(0)
    for label, tint in TINTS.items():
        (root / label).mkdir(parents=True)
        for i in range(20):
            shape = (30, 41, 3) if i % 2 else (37, 29, 3)
            pixels = np.clip(np.array(tint) + rng.normal(0, 90, shape), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / label / f"{i:03d}.{'png' if i % 3 else 'jpg'}")
    return root


@pytest.fixture(scope="module")
def train(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Bundle]:
    """``train(head, preprocess, layer=, **network) -> Bundle`` on a cache of its own."""
    numbers = count()

    def make(head: str = "logistic", preprocess: Preprocess = PREPROCESS, layer: str | None = None, **network: Any) -> Bundle:
        folder = tmp_path_factory.mktemp(f"bundle{next(numbers)}")
        file = write_network(folder / "tiny.onnx", preprocess, **network)
        run_extract(ImageFolder(photos), Backbone(str(file)), folder / "c.cache", Options(quiet=True, batch_size=7))
        settings = {"hidden": [8]} if head == "mlp" else {"C": 1.0}
        return classifiers.train(FeatureCache(folder / "c.cache", layer), folder / "c.head", make_head(head, **settings))

    return make


@pytest.fixture(scope="module")
def bundle(train: Callable[..., Bundle]) -> Bundle:
    return train()


@pytest.fixture(scope="module")
def file(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fused") / "photos.onnx"
    fuse(bundle, path)
    return path


def pixels_of(files: list[bytes], preprocess: Preprocess) -> np.ndarray:
    return np.stack([preprocess.read(Path(os.fsdecode(path)).read_bytes()) for path in files])


def plain(code: str, *arguments: object) -> str:
    """What a Python without penult prints: isolated, so that neither this folder nor PYTHONPATH counts."""
    command = [sys.executable, "-I", "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout


KINDS: dict[str, dict[str, Any]] = {
    "logistic": {},
    "mlp": {"head": "mlp"},
    "other pixels": {"preprocess": Preprocess(0, SIDE, "bicubic", (104.0,) * 3, (58.0,) * 3, 255.0, "bgr", squash=True)},
    "another layer": {"layer": "first"},
    "fast pixels": {"preprocess": replace(PREPROCESS, pixel_path="pillow-crop")},
    "features beyond float16": {"factor": 3e5},
    "an old opset": {"opset": 11},
    "a new opset": {"opset": 21},
}


@pytest.mark.parametrize("kind", KINDS)
def test_fused_in_plain_onnxruntime_is_predict_is_the_head_on_cached_features(
    kind: str, train: Callable[..., Bundle], photos: Path, tmp_path: Path
) -> None:
    bundle = train(**KINDS[kind])
    cache = FeatureCache(bundle.path.with_name("c.cache"), KINDS[kind].get("layer"))
    out = tmp_path / "c.onnx"
    fuse(bundle, out)
    _, cached = evaluate_bundle(bundle, cache.path)  # the head on cached features
    files = [os.fsencode(photos) + b"/" + path for path in cached.paths]
    assert len(files) == 12
    for path in (bundle.path, out):
        found = list(Predictor.load(path, batch_size=5).predict(files))
        np.testing.assert_allclose(np.stack([p.probabilities for p in found]), cached.probabilities, atol=PARITY, rtol=0)
        assert [p.label for p in found] == [bundle.classes[i] for i in cached.probabilities.argmax(axis=1)]
    np.save(tmp_path / "pixels.npy", pixels_of(files, bundle.backbone.preprocess))
    plain(PLAIN, out, tmp_path / "pixels.npy", tmp_path / "answer.npz")
    with np.load(tmp_path / "answer.npz") as arrays:
        answer = dict(arrays)
    np.testing.assert_allclose(answer["probabilities"], cached.probabilities, atol=PARITY, rtol=0)
    assert (answer["label"] == cached.probabilities.argmax(axis=1)).all()
    assert answer["label"].dtype == np.int64
    assert np.ptp(cached.probabilities[:, 0]) > 0.1, "else this would prove nothing"
    assert "16 golden vectors agree" in selftest(out)


def test_the_twenty_lines_of_the_docs(
    file: Path, bundle: Bundle, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ORT_DISABLE_TELEMETRY")
    monkeypatch.setenv("HOME", str(tmp_path))
    (code,) = re.findall(r"```python\n(.*?)```", (REPO / "docs/fuse.md").read_text(), re.DOTALL)
    assert len([line for line in code.splitlines() if line]) <= 25
    files = sorted(photos.glob("*/01*.*"))
    lines = [line.rsplit(" ", 2) for line in plain(code, file, *files).splitlines()]
    assert not list(tmp_path.iterdir()), "ONNX Runtime reports"
    found = list(Predictor.load(bundle.path).predict(files))
    assert len(found) == 30
    assert [(path, label) for path, label, _ in lines] == [(p.name, p.label) for p in found]
    np.testing.assert_allclose([float(line[2]) for line in lines], [p.probability or 0 for p in found], atol=PARITY, rtol=0)


def test_a_fine_tuned_network(photos: Path, tmp_path: Path) -> None:
    tuned = finetune(
        ImageFolder(photos),
        tmp_path / "t.head",
        FineTuneSettings(
            backbone="resnet18", weights="random:0", resize=40, crop=32, epochs=1, device="cpu", quiet=True, refit=False
        ),
    )
    fused = fuse(tuned, tmp_path / "t.onnx")
    assert (fused.kind, fused.fingerprint["storage"]) == ("fine-tuned", "float32")
    assert "stored/half" not in {name for node in onnx.load(tmp_path / "t.onnx").graph.node for name in node.output}
    expected = tuned.predictions()
    files = [os.fsencode(photos) + b"/" + path for path in expected.paths]
    found = np.stack(
        [p.probabilities for p in Predictor.load(tmp_path / "t.onnx").predict(files) if p.probabilities is not None]
    )
    np.testing.assert_allclose(found, expected.probabilities, atol=PARITY, rtol=0)
    assert "golden vectors agree" in selftest(tmp_path / "t.onnx")


def converted(bundle: Bundle, network: Path, facts: BackboneFacts, out: Path) -> Bundle:
    """The bundle with another form of its network, as a cache of that precision would give it."""
    fields = {**bundle.fingerprint.fields, **facts.only(bundle.backbone.layer).fingerprints()[0]}
    made = replace(bundle, path=out, backbone=facts.only(bundle.backbone.layer), fingerprint=type(bundle.fingerprint)(fields))
    head = (bundle.path / "head.onnx").read_bytes()
    return save_bundle(made, backbone=network, head=head, predictions=bundle.predictions(), fitted=[], page="")


def test_float16_networks(bundle: Bundle, file: Path, tmp_path: Path) -> None:
    source = bundle.path / "backbone.onnx"
    facts = to_float16(source, tmp_path / "half.onnx", read_facts(source))
    fused = fuse(converted(bundle, tmp_path / "half.onnx", facts, tmp_path / "h.head"), tmp_path / "h.onnx")
    assert fused.precision == "fp16"
    assert "golden vectors agree" in selftest(tmp_path / "h.onnx")
    pictures = golden_images(SIDE)
    moved = Predictor.load(tmp_path / "h.onnx").probabilities(pictures) - Predictor.load(file).probabilities(pictures)
    assert 0 < np.abs(moved).max() < 0.02


def test_int8_networks(bundle: Bundle, photos: Path, tmp_path: Path) -> None:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static

    class Some(CalibrationDataReader):
        def __init__(self) -> None:
            files = sorted(map(os.fsencode, photos.glob("*/*.png")))
            self.batches = iter(PREPROCESS.normalise(pixels_of(files, PREPROCESS)))

        def get_next(self) -> dict[str, np.ndarray] | None:
            found = next(self.batches, None)
            return None if found is None else {"input": found[None]}

    source, network = bundle.path / "backbone.onnx", tmp_path / "int8.onnx"
    quantize_static(source, network, Some(), quant_format=QuantFormat.QDQ, per_channel=True)
    facts = replace(read_facts(source), precision="int8", calibration={"sha256": "0" * 64})
    fused = fuse(converted(bundle, network, facts, tmp_path / "i.head"), tmp_path / "i.onnx")
    assert fused.precision == "int8"
    assert "golden vectors agree" in selftest(tmp_path / "i.onnx")
    assert {"QuantizeLinear", "DequantizeLinear"} <= {node.op_type for node in onnx.load(tmp_path / "i.onnx").graph.node}


def test_a_fixed_batch_stays_fixed(train: Callable[..., Bundle], tmp_path: Path) -> None:
    bundle = train(batch=4)
    fuse(bundle, tmp_path / "four.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "four.onnx", providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape == [4, SIDE, SIDE, 3]
    assert "16 golden vectors agree" in selftest(tmp_path / "four.onnx")


def test_rounding_in_the_graph_is_that_of_the_cache() -> None:
    rng = np.random.default_rng(0)
    sizes = np.array([1, 1e3, 1e-3, 1e-5, 1e-7, 1e6, 0, 2, 2, 2, 2, 2], np.float32)
    rows = rng.normal(0, 1, (12, 64)).astype(np.float32) * sizes[:, None]
    rows[7, 3] = 1e5  # one value beyond float16
    rows[8] *= 1e-30
    rows[9, 1:] *= 1e-7  # most of it vanishes in float16, and hardly anything is lost
    nodes, constants = rounding_nodes("given", "taken", 64)
    given, taken = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 64]) for name in ("given", "taken"))
    graph = helper.make_graph(nodes, "rounding", [given], [taken], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    found = session.run(None, {"given": rows})[0]
    np.testing.assert_array_equal(found, as_stored(rows, "auto"))
    assert np.flatnonzero((found != rows).any(axis=1)).tolist() == [0, 1, 2, 9, 10, 11], "those that fit"


def test_what_it_says_of_itself(file: Path, bundle: Bundle) -> None:
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    assert [(v.name, v.shape, v.type) for v in session.get_inputs()] == [("pixels", ["n", SIDE, SIDE, 3], "tensor(uint8)")]
    assert [(v.name, v.type) for v in session.get_outputs()] == [("probabilities", "tensor(float)"), ("label", "tensor(int64)")]
    facts = {key.removeprefix("penult."): json.loads(v) for key, v in session.get_modelmeta().custom_metadata_map.items()}
    assert facts["classes"] == bundle.classes == ["blue", "green", "red"]
    assert Preprocess.from_facts(facts["preprocessing"]) == bundle.backbone.preprocess
    assert facts["fingerprint"] == bundle.fingerprint.fields
    assert (facts["task"], facts["kind"], facts["head"], facts["format"]) == ("single-label", "frozen", "logistic", 1)
    assert np.array(facts["golden"]["probabilities"]).shape == (16, 3)
    model = onnx.load(file)
    onnx.checker.check_model(model, full_check=True)
    assert not {"head/features_1", "backbone/features_1"} & {name for node in model.graph.node for name in node.output}


def test_golden_images_are_the_same_bytes_everywhere() -> None:
    pictures = golden_images(SIDE)
    assert (pictures.shape, pictures.dtype) == ((16, SIDE, SIDE, 3), np.uint8)
    assert hashlib.sha256(pictures.tobytes()).hexdigest() == "63edc0ae4325f849c60d23f4ced96744977f6d1f2ac5c576f8179ce04964be35"
    assert len({picture.tobytes() for picture in golden_images(33)}) == 16


def spans(data: bytes) -> list[range]:
    """Where the weights lie in a file."""
    found = []
    for tensor in onnx.load_model_from_string(data).graph.initializer:
        if len(tensor.raw_data) > 3:
            start = data.index(tensor.raw_data)
            found.append(range(start, start + len(tensor.raw_data)))
    return found


def test_a_flipped_bit_of_any_weight_is_found(file: Path, tmp_path: Path) -> None:
    data = file.read_bytes()
    changed = tmp_path / "changed.onnx"
    places = [place for span in spans(data) for place in (span[0], *span[1 :: max(len(span) // 20, 1)], span[-1])]
    assert len(spans(data)) >= 9  # normalisation, two convolutions, rounding, standardisation, a layer, the temperature
    for i, place in enumerate(places):
        changed.write_bytes(data[:place] + bytes([data[place] ^ (1 << i % 8)]) + data[place + 1 :])
        with pytest.raises(BadDataError):
            selftest(changed)


def test_a_flipped_bit_anywhere_is_refused_or_changes_nothing(file: Path, tmp_path: Path) -> None:
    data, rng, changed = file.read_bytes(), np.random.default_rng(0), tmp_path / "changed.onnx"
    passed = 0
    for place, bit in zip(rng.integers(len(data), size=300), rng.integers(8, size=300), strict=True):
        changed.write_bytes(data[:place] + bytes([data[place] ^ (1 << bit)]) + data[place + 1 :])
        try:
            selftest(changed)
            passed += 1
        except PenultError:
            continue
    assert passed < 10, "names of nodes, which nobody computes with"


def test_changed_metadata_are_found(file: Path, tmp_path: Path) -> None:
    data = file.read_bytes()
    changed = tmp_path / "changed.onnx"
    for old, new in ((b'"blue"', b'"grey"'), (b'"resize": 20', b'"resize": 21'), (b'"cpu"', b'"gpu"')):
        assert old in data
        changed.write_bytes(data.replace(old, new, 1))
        with pytest.raises(BadDataError, match="the digest of its metadata differs"):
            selftest(changed)
    start = data.index(b'"probabilities": [[') + 22
    changed.write_bytes(data[:start] + bytes([data[start] ^ 1]) + data[start + 1 :])
    with pytest.raises(BadDataError, match="metadata"):
        selftest(changed)


def test_the_command_line(bundle: Bundle, photos: Path, tmp_path: Path, penult: Penult) -> None:
    out = tmp_path / "photos.onnx"
    code, said, _ = penult("fuse", bundle.path, "-o", out)
    assert (code, said.strip()) == (0, f"{out}: 16 x 16 pixels to 3 classes, 0.0 MiB")
    assert penult("fuse", bundle.path, "-o", out)[0] == 73
    assert penult("fuse", bundle.path, "-o", out, "--overwrite")[0] == 0
    assert sorted(tmp_path.iterdir()) == [out]
    code, said, _ = penult("predict", out, "--selftest")
    assert code == 0
    assert re.fullmatch(r".*weights and metadata as saved; 16 golden vectors agree to \d\.\de-\d\d on cpu\n", said)
    (code, apart, err), (_, fused, _) = (
        penult("predict", path, photos / "red", "--format", "csv", "--selftest") for path in (bundle.path, out)
    )
    assert (code, "all files as saved" in err) == (0, True)
    rows = list(csv.DictReader(io.StringIO(apart)))
    assert all(float(row.pop("novelty")) >= 0 for row in rows), "which a fused file cannot tell"
    assert list(csv.DictReader(io.StringIO(fused))) == rows
    code, _, err = penult("predict", out)
    assert (code, "no images: name files" in err) == (2, True)
    (place, *_), *_ = spans(out.read_bytes())
    data = bytearray(out.read_bytes())
    data[place + 1] ^= 1
    out.write_bytes(data)
    for more in (["--selftest"], [photos]):
        code, said, err = penult("predict", out, *more)
        assert (code, said) == (65, "")
        assert "is not the file that was saved (the digest of its weights differs); fuse the bundle again" in err
    data = bytearray((bundle.path / "backbone.onnx").read_bytes())
    (tmp_path / "b.head").mkdir()
    for name in ("head.onnx", "head.json", "novelty.h5", "predictions.h5", "SHA256SUMS"):
        (tmp_path / "b.head" / name).write_bytes((bundle.path / name).read_bytes())
    data[-20] ^= 1
    (tmp_path / "b.head/backbone.onnx").write_bytes(data)
    code, _, err = penult("predict", tmp_path / "b.head", "--selftest")
    assert (code, "backbone.onnx is not the file that was saved" in err) == (65, True)


def test_a_graph_that_computes_something_else_fails_the_selftest(file: Path, tmp_path: Path) -> None:
    model = onnx.load(file)
    relu = next(node for node in model.graph.node if node.op_type == "Relu")
    relu.op_type = "Sigmoid"
    save(model, tmp_path / "sigmoid.onnx")
    with pytest.raises(BadDataError, match="the digest of its graph differs"):
        Fused.load(tmp_path / "sigmoid.onnx")
    as_before(model)  # or computed by another library
    save(model, tmp_path / "sigmoid.onnx")
    Fused.load(tmp_path / "sigmoid.onnx")
    with pytest.raises(BadDataError, match=r"computes something else here: on cpu, .* from the saved ones; 0\.001 is allowed"):
        selftest(tmp_path / "sigmoid.onnx")


def test_a_file_that_does_not_give_what_the_bundle_gives_is_not_kept(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("classifiers.bundles.fuse.MAX_ROUNDING", 0.0)  # then nothing is rounded
    monkeypatch.setattr("classifiers.bundles.fuse.PARITY", 1e-9)
    with pytest.raises(BadDataError, match="Nothing was written; predict with the bundle"):
        fuse(bundle, tmp_path / "c.onnx")
    assert list(tmp_path.iterdir()) == []


def test_what_is_taken_is_not_overwritten(bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "c.onnx").write_text("mine")
    with pytest.raises(OutputExistsError, match="--overwrite"):
        fuse(bundle, tmp_path / "c.onnx")
    with pytest.raises(OutputExistsError, match="choose another name"):
        fuse(bundle, bundle.path, overwrite=True)
    with pytest.raises(OutputError, match="there is no folder"):
        fuse(bundle, tmp_path / "no/c.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["c.onnx"]
    assert (tmp_path / "c.onnx").read_text() == "mine"


def test_overwriting_does_not_destroy_the_bundle_itself(bundle: Bundle) -> None:
    before = {path.name: path.read_bytes() for path in bundle.path.iterdir()}
    assert {"backbone.onnx", "head.onnx", "head.json"} <= set(before)
    for name in before:
        with pytest.raises(OutputExistsError, match="is a part of"):
            fuse(bundle, bundle.path / name, overwrite=True)
    assert {path.name: path.read_bytes() for path in bundle.path.iterdir()} == before


def test_weights_beside_the_file(
    train: Callable[..., Bundle], file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_file, "MAX_INLINE", 1000)
    large = train()
    assert len(list(large.path.glob("*.data"))) == 1
    out = tmp_path / "large.onnx"
    for _ in range(2):
        fuse(large, out, overwrite=True)
    (beside,) = set(tmp_path.iterdir()) - {out}
    assert re.fullmatch(r"large-[0-9a-f]{8}\.data", beside.name)
    assert "16 golden vectors agree" in selftest(out)
    assert Fused.load(out).weights_sha256 == Fused.load(file).weights_sha256, "it does not depend on where they lie"
    data = beside.read_bytes()
    assert data.startswith(onnx_file.MARKER)
    for place in (len(onnx_file.MARKER), len(data) // 2, len(data) - 1):
        beside.write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
        with pytest.raises(BadDataError, match="the digest of its weights differs"):
            selftest(out)
    beside.write_bytes(data[:-4])
    with pytest.raises(BadDataError, match="cannot be read"):
        selftest(out)
    beside.unlink()
    with pytest.raises(InputMissingError, match=r"large-[0-9a-f]{8}\.data, which is not beside it"):
        selftest(out)


class Payload:
    marker = ""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (Payload.marker,)


def test_what_is_no_fused_classifier(file: Path, bundle: Bundle, tmp_path: Path, penult: Penult) -> None:
    Payload.marker = str(tmp_path / "executed")
    (tmp_path / "payload.onnx").write_bytes(pickle.dumps(Payload()))
    (tmp_path / "empty.onnx").touch()
    for name in ("payload.onnx", "empty.onnx"):
        for more in (["--selftest"], [file]):
            code, _, err = penult("predict", tmp_path / name, *more)
            assert (code, "is not an ONNX file" in err) == (65, True)
    assert not Path(Payload.marker).exists()
    code, _, err = penult("predict", bundle.path / "backbone.onnx", "--selftest")
    assert (code, "is not a fused classifier; `penult fuse BUNDLE -o CLASSIFIER.onnx` makes one" in err) == (65, True)
    code, _, err = penult("predict", tmp_path / "gone.onnx", "--selftest")
    assert (code, "does not exist; expected a bundle, or a file made by `penult fuse`" in err) == (66, True)
    code, _, err = penult("predict", tmp_path, "--selftest")
    assert (code, "is not a bundle" in err) == (66, True)
    code, _, err = penult("fuse", file, "-o", tmp_path / "again.onnx")
    assert (code, "is not a bundle" in err) == (66, True)


def test_hostile_and_newer_files_are_refused(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = onnx.load(file)
    model.graph.node[0].domain = "somebody.elses"
    model.opset_import.append(helper.make_opsetid("somebody.elses", 1))
    save(model, tmp_path / "domain.onnx")
    with pytest.raises(BadDataError, match=r"needs operators of somebody\.elses"):
        Fused.load(tmp_path / "domain.onnx")
    model = onnx.load(file)
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../outside")
    (tmp_path / "in").mkdir()
    (tmp_path / "in/outside.onnx").write_bytes(model.SerializeToString())
    (tmp_path / "outside").write_bytes(bytes(1000))
    with pytest.raises(BadDataError, match="outside its own folder"):
        Fused.load(tmp_path / "in/outside.onnx")
    fused = Fused.load(file)
    for changes, message in (
        ({"classes": ["a", "b"]}, r"says 16 x 16 x 3 pixels, 2 probabilities; its graph has \[\[16, 16, 3\], \[3\]\]"),
        ({"preprocessing": {"resize": 4}}, "the description of the classifier in its metadata cannot be read"),
        ({"golden": replace(fused.golden, recipe="shake-blocks-9")}, "golden vectors of other images"),
    ):
        restate(file, replace(fused, **changes), tmp_path / "changed.onnx")
        with pytest.raises(BadDataError, match=message):
            selftest(tmp_path / "changed.onnx")
    monkeypatch.setattr(format_of, "FORMAT_VERSION", 2)
    restate(file, fused, tmp_path / "newer.onnx")
    monkeypatch.undo()
    with pytest.raises(BadDataError, match="has format version 2; this penult reads up to 1"):
        Fused.load(tmp_path / "newer.onnx")


def restate(file: Path, fused: Fused, out: Path) -> None:
    """A copy of a file that says something else of itself, with the digest that goes with it."""
    model = onnx.load(file)
    helper.set_model_props(model, {f"penult.{name}": value for name, value in fused.metadata().items()})
    save(model, out)


def test_predict_reads_a_folder_as_it_goes(file: Path, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (source, *_) = photos.glob("red/*.png")
    asked = 0

    def many() -> Any:
        nonlocal asked
        for _ in range(100_000):
            asked += 1
            yield os.fsencode(source)

    predictor = Predictor.load(file, workers=2, batch_size=8)
    predictions = predictor.predict(many())
    assert next(predictions).label in TINTS
    assert asked <= 2 * 8 + (predictor.embedder.lanes + 2) * 8, "no more than wait to be decoded, and the batches on their way"
    predictions.close()  # type: ignore[attr-defined]
    scanned = []
    scan = os.scandir
    monkeypatch.setattr("os.scandir", lambda path: scanned.append(path) or scan(path))
    names = list_images([photos / "blue", photos])
    assert next(names) == os.fsencode(photos / "blue/000.jpg")
    assert os.fsencode(photos / "green") not in scanned
    assert len(list(names)) == 19 + 60
    with pytest.raises(InputMissingError, match="no files in"):
        list_images([photos, file.parent / "empty"] if (file.parent / "empty").mkdir() is None else [])


@pytest.mark.gpu
def test_a_gpu_gives_the_golden_vectors(file: Path) -> None:
    assert re.search(r"16 golden vectors agree to .* on cuda$", selftest(file, device="cuda"))
