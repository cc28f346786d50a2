"""From torch to ONNX and into a session: the cut, its parity with torch, weights and their errors, providers, back-off."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import signal
import subprocess
import sys
import time
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from extractor import machine
from extractor.backbones import networks, prepared
from extractor.backbones.export import export, to_onnx
from extractor.backbones.layers import list_layers, torch_penultimate
from extractor.backbones.networks import load, row, with_classifier
from extractor.backbones.registry import Backbone, choose_weights, names, weights_of
from extractor.backbones.weights import read_state
from extractor.graphs import backbone_facts
from extractor.graphs.backbone_facts import read_facts
from extractor.graphs.classification_layer import Graph
from extractor.graphs.graph import cut
from extractor.graphs.parity import PARITY, check_parity, relative_l2
from extractor.graphs.pooling import pooling_nodes, pooling_of
from extractor.runtime.session import Embedder
from extractor.signals import StopFlag
from store.errors import (
    BadDataError,
    DeviceUnavailableError,
    InputMissingError,
    InterruptedRunError,
    OutputError,
    StorageError,
    UsageError,
)
from tests.conftest import export_here

REPO = Path(__file__).resolve().parents[3]
SQUEEZENET = Backbone("squeezenet1_1", "random:0", resize=72, crop=64)  # what conftest's backbone_file was made from


@pytest.fixture(autouse=True)
def nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is exported here is exported anew."""
    monkeypatch.setenv(prepared.LIMIT_VARIABLE, "0")


def batch(count: int, side: int = 64, seed: int = 1) -> Any:
    return np.random.default_rng(seed).standard_normal((count, 3, side, side)).astype(np.float32)


def run(path: Path, pixels: Any) -> Any:
    import onnxruntime

    found = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return found.run(None, {found.get_inputs()[0].name: pixels})[0]


# --- parity ------------------------------------------------------------------------------------------------------------


def test_a_spatial_layer_is_averaged_and_equals_torch(backbone_file: Path) -> None:
    import torch

    network = load(SQUEEZENET).network
    pixels = batch(3)
    with torch.inference_mode():
        expected = network.features(torch.from_numpy(pixels)).mean(dim=(2, 3)).numpy()
    found = run(backbone_file, pixels)
    assert found.shape == (3, 512)
    assert found.dtype == np.float32
    assert relative_l2(found, expected).max() <= PARITY
    assert np.linalg.norm(expected, axis=1).min() > 0.1


def test_a_pooled_layer_is_cut_before_the_classifier_and_equals_torch(tmp_path: Path) -> None:
    import torch

    resnet = Backbone("resnet18", "random:3", resize=40, crop=32)
    facts = export_here(resnet, tmp_path / "m.onnx")
    assert (facts.dim, facts.pooling, facts.layer) == (512, "none", "input of fc")
    network = load(resnet).network
    network.fc = torch.nn.Identity()
    for count in (1, 2, 5):
        pixels = batch(count, 32)
        with torch.inference_mode():
            expected = network(torch.from_numpy(pixels)).numpy()
        assert relative_l2(run(tmp_path / "m.onnx", pixels), expected).max() <= PARITY
    assert not any(node.op_type == "Gemm" for node in onnx.load(tmp_path / "m.onnx").graph.node)


def test_the_file_takes_any_batch_and_rows_do_not_depend_on_it(backbone_file: Path) -> None:
    pixels = batch(9)
    whole = run(backbone_file, pixels)
    for count in (1, 2, 4):
        assert relative_l2(run(backbone_file, pixels[:count]), whole[:count]).max() <= 1e-6


def test_the_file_says_what_it_is(backbone_file: Path) -> None:
    facts = read_facts(backbone_file)
    assert (facts.name, facts.weights, facts.dim, facts.pooling) == ("squeezenet1_1", "random:0", 512, "average")
    assert facts.layer == "input of classifier.1"
    assert (facts.preprocess.resize, facts.preprocess.crop, facts.preprocess.interpolation) == (72, 64, "bilinear")
    assert facts.weights_sha256 == load(SQUEEZENET).weights_digest
    assert backbone_facts.BackboneFacts.from_json(facts.to_json()) == facts
    assert sorted(facts.fingerprints()[0]) == ["backbone", "layer", "pixels", "pooling", "weights"]
    model = onnx.load(backbone_file)
    assert [(value.name, value.type.tensor_type.shape.dim[1].dim_value) for value in model.graph.output] == [("features", 512)]


def test_parity_refuses_a_network_that_differs(backbone_file: Path) -> None:
    pixels = [batch(2)]
    right = run(backbone_file, pixels[0])
    assert check_parity(backbone_file, pixels, [[right]], "net") == 0
    with pytest.raises(BadDataError, match=r"the exported net differs from torch by 1\.\de-04 at batch 2"):
        check_parity(backbone_file, pixels, [[right * np.float32(1.0001)]], "net")
    with pytest.raises(BadDataError, match="differs from torch by inf"):
        check_parity(backbone_file, pixels, [[right * np.float32("nan")]], "net")


def test_relative_l2_of_nothing_is_nothing_and_of_something_against_nothing_infinite() -> None:
    found = relative_l2(np.array([[0, 0], [1, 0], [3, 4]]), np.array([[0, 0], [0, 0], [3, 3.0]]))
    assert found[0] == 0
    assert found[1] == np.inf
    assert found[2] == pytest.approx(1 / np.sqrt(18))


def test_torchs_own_features_come_from_the_last_layer_that_runs() -> None:
    import torch

    class Net(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.head = torch.nn.Linear(4, 2)  # registered first, runs last
            self.body = torch.nn.Linear(12, 4)
            self.unused = torch.nn.Linear(9, 9)

        def forward(self, x: Any) -> Any:
            return self.head(self.body(x.flatten(1)))

    network = Net().eval()
    pixels = batch(2, 2)
    layer, features = torch_penultimate(network, torch.from_numpy(pixels))
    assert layer == "head"
    with torch.inference_mode():
        np.testing.assert_array_equal(features(pixels), network.body(torch.from_numpy(pixels).flatten(1)).numpy())


# --- the cut -----------------------------------------------------------------------------------------------------------


def graph(nodes: list[Any], output: tuple[str, list[Any]], weights: dict[str, Any]) -> Any:
    name, shape = output
    return helper.make_model(
        helper.make_graph(
            nodes,
            "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 4, 4])],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)],
            [numpy_helper.from_array(np.asarray(value), key) for key, value in weights.items()],
        ),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=10,
    )


def test_the_cut_looks_through_transposed_weights_and_activations() -> None:
    nodes = [
        helper.make_node("Flatten", ["x"], ["flat"]),
        helper.make_node("Gemm", ["flat", "w1"], ["hidden"]),
        helper.make_node("Relu", ["hidden"], ["relu"]),
        helper.make_node("Transpose", ["w2"], ["w2t"]),
        helper.make_node("MatMul", ["relu", "w2t"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["out"]),
    ]
    weights = {"w1": np.ones((48, 7), np.float32), "w2": np.ones((5, 7), np.float32)}
    model = graph(nodes, ("out", ["n", 5]), weights)
    assert Graph(model).penultimate("out") == Graph(model).classifier_input("out") == "relu"
    pooling, dim = pooling_of((2, 7), "relu", "average")
    assert (pooling, dim) == ("none", 7)
    nodes = pooling_nodes("relu", (2, 7), pooling, "features", 20)
    cut(model, [(nodes, "features", dim)])
    assert [node.op_type for node in model.graph.node] == ["Flatten", "Gemm", "Relu", "Identity"]
    assert [tensor.name for tensor in model.graph.initializer] == ["w1"]
    onnx.checker.check_model(model)


def test_attention_products_of_two_activations_are_no_classifier() -> None:
    nodes = [
        helper.make_node("Flatten", ["x"], ["flat"]),
        helper.make_node("Gemm", ["flat", "w"], ["a"]),
        helper.make_node("Transpose", ["a"], ["at"]),
        helper.make_node("MatMul", ["a", "at"], ["out"]),
    ]
    model = graph(nodes, ("out", ["n", "n"]), {"w": np.ones((48, 7), np.float32)})
    assert Graph(model).penultimate("out") == "flat"
    assert Graph(model).classifier_input("out") is None


def test_a_network_without_weights_has_nothing_to_cut() -> None:
    model = graph([helper.make_node("Relu", ["x"], ["out"])], ("out", ["n", 3, 4, 4]), {})
    with pytest.raises(BadDataError, match="nothing to cut at"):
        Graph(model).penultimate("out")


def test_files_that_say_nothing_of_their_preprocessing_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(graph([helper.make_node("Relu", ["x"], ["out"])], ("out", ["n", 3, 4, 4]), {}).SerializeToString())
    with pytest.raises(BadDataError, match="was not made by penult"):
        read_facts(path)
    path.write_bytes(b"\x00not onnx at all")
    with pytest.raises(BadDataError, match="is not an ONNX file"):
        read_facts(path)
    with pytest.raises(InputMissingError, match=r"cannot read .*nowhere.onnx: No such file"):
        read_facts(tmp_path / "nowhere.onnx")


# --- backbones and weights ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "right"), [("resnet-50", "resnet50"), ("ResNet50", "resnet50"), ("mobilenetv2", "mobilenet_v2")]
)
def test_an_unknown_name_answers_with_the_nearest(wrong: str, right: str) -> None:
    with pytest.raises(UsageError, match=f"no backbone '{wrong}'; did you mean .*'{right}'") as caught:
        weights_of(wrong)
    assert caught.value.exit_code == 2


def test_a_name_like_no_other_gets_no_suggestion() -> None:
    with pytest.raises(UsageError) as caught:
        load(Backbone("zzzzzzzzzzzzqq"))
    assert "did you mean" not in str(caught.value)
    assert "penult backbones" in str(caught.value)


def test_unknown_weights_name_those_there_are() -> None:
    with pytest.raises(UsageError, match="--weights IMAGENET1K_V9: resnet50 has IMAGENET1K_V2, IMAGENET1K_V1"):
        choose_weights("resnet50", "IMAGENET1K_V9", "--weights")
    assert choose_weights("resnet50", None, "--weights").name == "IMAGENET1K_V2"
    assert choose_weights("resnet50", "DEFAULT", "--weights").name == "IMAGENET1K_V2"
    with pytest.raises(UsageError, match="the seed must be an integer"):
        load(Backbone("resnet18", "random:x"))


def test_the_registry_lists_every_classification_network() -> None:
    known = names()
    assert len(known) >= 80
    assert {"resnet50", "vit_b_16", "squeezenet1_1"} <= set(known)
    assert not any("segmentation" in name or "rcnn" in name for name in known)
    facts = row("resnet50")
    assert facts["default"] == "IMAGENET1K_V2"
    assert facts["weights"]["IMAGENET1K_V1"]["top1"] == 76.13
    assert facts["weights"]["IMAGENET1K_V2"]["resize"] == 232
    assert json.loads(json.dumps(facts)) == json.loads(json.dumps(facts))


def test_random_weights_depend_on_their_seed_alone() -> None:
    import torch

    torch.manual_seed(5)
    first = load(SQUEEZENET)
    after = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(after, torch.rand(1))  # the caller's random numbers are left alone
    assert load(SQUEEZENET).weights_digest == first.weights_digest
    assert load(replace(SQUEEZENET, weights="random")).weights_digest == first.weights_digest
    assert load(replace(SQUEEZENET, weights="random:1")).weights_digest != first.weights_digest
    assert not first.network.training


@pytest.fixture(scope="module")
def state() -> dict[str, Any]:
    return dict(load(SQUEEZENET).network.state_dict())


def save(state: Any, path: Path, **options: Any) -> Path:
    import torch

    torch.save(state, path, **options)
    return path


def test_a_file_of_unknown_content_needs_a_preset(tmp_path: Path, state: dict[str, Any]) -> None:
    path = save(state, tmp_path / "mine.pth")
    with pytest.raises(UsageError, match=r"mine.pth is not one of torchvision's files .* --preset IMAGENET1K_V1"):
        load(Backbone("squeezenet1_1", str(path)))
    loaded = load(Backbone("squeezenet1_1", str(path), preset="IMAGENET1K_V1"))
    assert loaded.weights_name == "mine.pth"
    assert loaded.weights_digest == load(SQUEEZENET).weights_digest
    assert (loaded.preprocess.resize, loaded.preprocess.crop) == (256, 224)
    with pytest.raises(UsageError, match="--preset V7: squeezenet1_1 has IMAGENET1K_V1"):
        load(Backbone("squeezenet1_1", str(path), preset="V7"))


def test_a_file_whose_digest_torchvision_knows_needs_none(
    tmp_path: Path, state: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(state, tmp_path / "renamed.pth")
    entry = weights_of("squeezenet1_1")["IMAGENET1K_V1"]
    prefix = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
    known = types.SimpleNamespace(url=f"https://x/squeezenet-{prefix}.pth", transforms=entry.transforms)
    monkeypatch.setattr(networks, "weights_of", lambda _: {"IMAGENET1K_V1": known})
    assert networks._preset_name(Backbone("squeezenet1_1", str(path))) == "IMAGENET1K_V1"
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(UsageError, match="--preset"):
        networks._preset_name(Backbone("squeezenet1_1", str(path)))


@pytest.mark.parametrize("wrap", ["model", "state_dict", "module."])
def test_usual_wrappings_of_a_state_dict_are_opened(tmp_path: Path, state: dict[str, Any], wrap: str) -> None:
    import torch

    wrapped = {f"module.{key}": value for key, value in state.items()} if wrap == "module." else {wrap: state, "epoch": 7}
    found = read_state(save(wrapped, tmp_path / "w.pth"))
    assert list(found) == list(state)
    assert all(torch.equal(found[key], state[key]) for key in state)


@pytest.mark.parametrize("classes", [2, 1000, None])
def test_a_checkpoint_of_other_classes_or_none_is_as_good(tmp_path: Path, state: dict[str, Any], classes: int | None) -> None:
    import torch

    changed = {key: value for key, value in state.items() if not key.startswith("classifier.")}
    if classes:
        changed |= {"classifier.1.weight": torch.ones(classes, 512, 1, 1), "classifier.1.bias": torch.ones(classes)}
    path = save(changed, tmp_path / "w.pth")
    loaded = load(Backbone("squeezenet1_1", str(path), preset="IMAGENET1K_V1"))
    assert loaded.weights_digest == load(SQUEEZENET).weights_digest
    assert with_classifier("squeezenet1_1", changed)["classifier.1.weight"].shape == (1000, 512, 1, 1)


def test_a_checkpoint_of_another_network_is_bad_data(tmp_path: Path, state: dict[str, Any]) -> None:
    path = save(state, tmp_path / "w.pth")
    with pytest.raises(BadDataError, match=r"w.pth does not fit resnet18"):
        load(Backbone("resnet18", str(path), preset="IMAGENET1K_V1"))


@pytest.mark.parametrize("content", [[1, 2], {}, {"a": 1}, "text"])
def test_what_is_no_state_dict_is_bad_data(tmp_path: Path, content: Any) -> None:
    with pytest.raises(BadDataError, match="holds no state dict"):
        read_state(save(content, tmp_path / "w.pth"))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 half a zip", b"\x80\x04."])
def test_a_damaged_weights_file_is_bad_data(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "w.pth").write_bytes(content)
    with pytest.raises(BadDataError, match=r"w.pth is not a state dict that can be loaded safely"):
        read_state(tmp_path / "w.pth")


def test_a_missing_weights_file_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputMissingError, match=r"nowhere\.pth"):
        load(Backbone("squeezenet1_1", str(tmp_path / "nowhere.pth"), preset="IMAGENET1K_V1"))


class Payload:
    """Unpickling it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (self.marker,))


@pytest.mark.parametrize("zipped", [True, False])
def test_a_payload_in_a_weights_file_is_not_executed(tmp_path: Path, zipped: bool) -> None:
    marker = tmp_path / "executed"
    path = tmp_path / "w.pth"
    if zipped:
        save({"weight": Payload(marker)}, path)
    else:
        path.write_bytes(pickle.dumps({"weight": Payload(marker)}))
    with pytest.raises(BadDataError, match="loaded safely"):
        read_state(path)
    assert not marker.exists()


# --- export as a whole -------------------------------------------------------------------------------------------------


def test_a_folder_that_is_not_there_is_found_out_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"cannot write .*nowhere/net\.onnx: there is no folder"):
        export(SQUEEZENET, tmp_path / "nowhere/net.onnx")


@pytest.mark.parametrize(
    ("sizes", "sentence"),
    [
        ({"crop": 288}, "--crop 288 is larger than --resize 256: every image would get black borders"),
        ({"resize": 0}, "--resize is 0; expected 1 to 4096 pixels"),
        ({"resize": 10**8, "crop": 64}, "--resize is 100000000; expected 1 to 4096 pixels"),
    ],
)
def test_sizes_that_make_no_sense_are_refused(sizes: dict[str, int], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        load(Backbone("squeezenet1_1", "random:0", **sizes))


def test_errors_of_the_child_keep_their_kind_and_message(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no backbone 'resnet-18'; did you mean .*'resnet18'"):
        export(Backbone("resnet-18"), tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_child_is_an_interruption_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    """A scheduler signals the whole group: the child may be gone before this process looks."""

    class Signalled(subprocess.Popen[str]):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            self.send_signal(number)

    monkeypatch.setattr(subprocess, "Popen", Signalled)
    with pytest.raises(InterruptedRunError) as caught:
        export(SQUEEZENET, tmp_path / "m.onnx")
    assert caught.value.exit_code == 128 + number
    assert list(tmp_path.iterdir()) == []


def test_a_signal_to_the_parent_ends_the_child(tmp_path: Path) -> None:
    stop = StopFlag()
    stop.signum = signal.SIGTERM
    begin = time.perf_counter()
    with pytest.raises(InterruptedRunError) as caught:
        export(Backbone("vit_b_16", "random"), tmp_path / "m.onnx", stop)  # would take a minute
    assert caught.value.exit_code == 143
    assert time.perf_counter() - begin < 15
    assert list(tmp_path.iterdir()) == []


def test_an_extraction_that_is_ended_while_it_exports_exits_with_143(make_image: Callable[..., Path], tmp_path: Path) -> None:
    for i in range(3):
        make_image(tmp_path / f"photos/{i}.jpg", i)
    command = [sys.executable, "cli.py", "extract", tmp_path / "photos", "-m", "vit_b_16", "--weights", "random"]
    child = subprocess.Popen(
        [*command, "-o", tmp_path / "c"], stderr=subprocess.PIPE, text=True, cwd=REPO, start_new_session=True
    )
    assert child.stderr is not None
    while "RANDOM WEIGHTS" not in child.stderr.readline():  # from here on it exports
        pass
    os.killpg(child.pid, signal.SIGTERM)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 143, err
    assert "error: interrupted by signal 15; run the same command again to continue" in err
    assert "died" not in err


@pytest.mark.parametrize("name", ["regnet_y_400mf", "densenet121"])
def test_shapes_are_known_without_weights(name: str) -> None:
    assert row(name)["dim"] == list_layers(name)[0]["dim"] == {"regnet_y_400mf": 440, "densenet121": 1024}[name]


@pytest.mark.filterwarnings("ignore")
def test_an_export_that_cannot_be_written_is_a_storage_error_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "m.onnx").write_bytes(b"old")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="No space left"):
        to_onnx(load(SQUEEZENET), "squeezenet1_1", tmp_path / "m.onnx")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("m.onnx", b"old")]


@pytest.mark.assets
def test_real_weights_from_a_file_recognise_real_photos(assets: Path, imagenet: Path) -> None:
    """The features times the checkpoint's own classifier: nothing of this works if a weight or a pixel is off."""
    from extractor.pixels.images import decode

    facts = read_facts(imagenet)
    assert (facts.dim, facts.pooling, facts.weights) == (1280, "none", "mobilenet_v2-imagenet.pth")
    photos = sorted(path for path in (assets / "data/photos").rglob("*") if path.is_file())
    assert len(photos) == 250
    chosen = range(0, 250, 6)
    pixels = np.stack([facts.preprocess.pixels(decode(photos[i].read_bytes())) for i in chosen])
    features = Embedder(imagenet, device="cpu")(facts.preprocess.normalise(pixels))
    state = read_state(assets / "weights/mobilenet_v2-imagenet.pth")
    logits = features @ state["classifier.1.weight"].numpy().T + state["classifier.1.bias"].numpy()
    right = logits.argmax(axis=1) == [4 * i for i in chosen]
    assert right.mean() >= 0.7  # 81 % on all of them


# --- the session -------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(machine.nvidia_driver_present(), reason="this machine has an NVIDIA driver")
def test_a_requested_gpu_that_is_not_there_is_an_error(backbone_file: Path) -> None:
    """The real runtime: it gives a session on the CPU, and says nothing."""
    with pytest.raises(DeviceUnavailableError, match="--device cuda:") as caught:
        Embedder(backbone_file, device="cuda")
    assert caught.value.exit_code == 69


def test_the_cpu_session_gives_the_files_features(backbone_file: Path) -> None:
    embed = Embedder(backbone_file, device="cpu", batch_size=4)
    assert (embed.provider, embed.dims, embed.calls) == ("cpu", [512], 0)
    pixels = batch(11)
    found = embed(pixels)
    assert found.dtype == np.float32
    assert found.shape == (11, 512)
    assert embed.calls == 3
    assert relative_l2(found, run(backbone_file, pixels)).max() <= 1e-6


def test_a_row_does_not_depend_on_its_neighbours_or_place(backbone_file: Path) -> None:
    embed = Embedder(backbone_file, device="cpu", batch_size=4)
    pixels = batch(8)
    whole = embed(pixels)
    np.testing.assert_array_equal(embed(pixels[4:7]), whole[4:7])  # the last batch is padded, so bit-equal
    np.testing.assert_array_equal(embed(pixels[:1]), whole[:1])


def test_pixels_of_another_size_are_bad_data(backbone_file: Path) -> None:
    with pytest.raises(BadDataError, match="onnx"):
        Embedder(backbone_file, device="cpu")(np.zeros((2, 4, 64, 64), np.float32))


@pytest.mark.parametrize("content", [b"", b"junk", None], ids=["empty", "junk", "flipped"])
def test_a_damaged_model_is_bad_data(tmp_path: Path, backbone_file: Path, content: bytes | None) -> None:
    path = tmp_path / "m.onnx"
    raw = bytearray(backbone_file.read_bytes())
    raw[10:40] = bytes(30)
    path.write_bytes(bytes(raw) if content is None else content)
    with pytest.raises(BadDataError):
        Embedder(path, device="cpu")


def test_a_model_that_does_not_give_vectors_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(graph([helper.make_node("Relu", ["x"], ["out"])], ("out", ["n", 3, 4, 4]), {}).SerializeToString())
    with pytest.raises(BadDataError, match=r"gives an output of shape .*; expected \(n, d\)"):
        Embedder(path, device="cpu")
