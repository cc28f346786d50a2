"""Every file of a bundle has a digest: one that was changed, or is of another bundle, is refused before it is used."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import classifiers
from classifiers.bundles.bundle import Bundle
from classifiers.bundles.digests import SUMS
from classifiers.bundles.head_graph import head_function
from classifiers.evaluation.registry import task_of
from classifiers.training.settings import TrainOptions
from store.errors import BadDataError, InputMissingError, LockedError
from tests.conftest import seal

V1 = Path(__file__).resolve().parents[2] / "data/archives/v1"
IMAGE, CACHE = V1 / "extra.jpg", V1 / "photos.cache"
Penult = Callable[..., tuple[int, str, str]]
RGB = ["blue", "green", "red"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two new bundles of one cache."""
    folder = tmp_path_factory.mktemp("made")
    for head in ("centroid", "ridge"):
        classifiers.train(CACHE, folder / f"{head}.head", head, TrainOptions(thumbnails=False))
    return folder


@pytest.fixture
def bundle(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "centroid.head", tmp_path / "a.head"))


def edit(bundle: Path, change: Callable[[dict[str, Any]], None]) -> None:
    facts = json.loads((bundle / "head.json").read_text())
    change(facts)
    (bundle / "head.json").write_text(json.dumps(facts))


def permute(facts: dict[str, Any]) -> None:
    """Exchange the names of two classes wherever they are: the file is consistent, and wrong."""
    names = {"blue": "green", "green": "blue"}
    text = json.dumps(facts)
    for name in RGB:
        text = text.replace(f'"{name}"', f'"*{names.get(name, name)}"')
    facts |= json.loads(text.replace('"*', '"'))


def commands(bundle: Path, made: Path) -> list[tuple[object, ...]]:
    return [
        ("predict", bundle, IMAGE),
        ("predict", bundle, "--selftest"),
        ("evaluate", bundle, CACHE),
        ("compare", made / "ridge.head", bundle),
        ("fuse", bundle, "-o", bundle.parent / "one.onnx"),
        ("report", bundle, "-o", bundle.parent / "page.html"),
    ]


def test_sha256sum_reads_the_digests_of_all_files(bundle: Path) -> None:
    checked = subprocess.run(["sha256sum", "-c", SUMS], cwd=bundle, capture_output=True, text=True, check=True)
    names = sorted(path.name for path in bundle.iterdir() if path.name != SUMS)
    assert checked.stdout.splitlines() == [f"{name}: OK" for name in names]
    assert Bundle.load(bundle).files.keys() == {"backbone.onnx", "head.onnx", "novelty.h5", "predictions.h5"}


@pytest.mark.parametrize("name", ["head.json", "head.onnx", "predictions.h5", "novelty.h5", "backbone.onnx"])
def test_a_file_of_another_bundle_is_refused_by_every_command(name: str, made: Path, bundle: Path, penult: Penult) -> None:
    other = V1 / "layer.head" if name in ("backbone.onnx", "novelty.h5") else made / "ridge.head"
    shutil.copyfile(other / name, bundle / name)
    for arguments in commands(bundle, made):
        code, out, err = penult(*arguments)
        assert (code, out) == (65, ""), (arguments[0], err)
        assert "is not the file that was saved" in err
        assert name in err


def test_exchanged_names_of_classes_are_refused_by_every_command(made: Path, bundle: Path, penult: Penult) -> None:
    edit(bundle, permute)
    for arguments in commands(bundle, made):
        code, out, err = penult(*arguments)
        assert (code, out) == (65, ""), (arguments[0], err)
        assert "head.json or SHA256SUMS is not the file that was saved" in err


def test_a_bundle_without_its_sums_is_incomplete(bundle: Path, penult: Penult) -> None:
    (bundle / SUMS).unlink()
    code, _, err = penult("predict", bundle, IMAGE)
    assert code == 66
    assert f"{bundle} has no SHA256SUMS" in err


def test_sums_that_are_none_are_refused(bundle: Path) -> None:
    (bundle / SUMS).write_text("all is well\n")
    with pytest.raises(BadDataError, match=r"SHA256SUMS: line 1 is not a digest and the name of a file"):
        Bundle.load(bundle)


@pytest.mark.parametrize("name", ["logistic.head", "tags.head", "sizes.head"])
def test_bundles_from_before_open_without_sums(name: str) -> None:
    bundle = Bundle.load(V1 / name)
    assert not (V1 / name / SUMS).exists()
    assert len(bundle.predictions().paths) == (bundle.metrics or {})["n"]


def test_predictions_of_another_head_are_refused_in_bundles_from_before(tmp_path: Path, penult: Penult) -> None:
    bundle = Path(shutil.copytree(V1 / "logistic.head", tmp_path / "old.head"))
    shutil.copyfile(V1 / "ridge.head/predictions.h5", bundle / "predictions.h5")
    assert json.loads((V1 / "ridge.head/head.json").read_text())["metrics"]["correct"] == 5
    code, out, err = penult("compare", V1 / "knn.head", bundle)
    assert (code, out) == (65, "")
    assert "labels are right, and in head.json 6 are: it is of another head" in err


def test_a_bundle_that_another_run_replaces_is_not_called_damaged(made: Path, bundle: Path) -> None:
    before = Bundle.load(bundle)
    shutil.rmtree(bundle)
    shutil.copytree(made / "ridge.head", bundle)
    for use in (before.head_function, before.predictions, before.fitted):
        with pytest.raises(LockedError, match=r"a\.head was replaced by another run while it was read"):
            use()
    shutil.rmtree(bundle)
    with pytest.raises((LockedError, InputMissingError)):
        before.predictions()


def test_a_file_that_is_missing_is_named(bundle: Path) -> None:
    (bundle / "predictions.h5").unlink()
    with pytest.raises(InputMissingError, match=r"a\.head has no predictions\.h5"):
        Bundle.load(bundle)


def test_a_consistent_copy_with_new_sums_opens(bundle: Path) -> None:
    """The digests find accidents; whoever changes both is not stopped, and what he says still has to make sense."""
    edit(bundle, permute)
    seal(bundle)
    assert Bundle.load(bundle).classes == ["green", "blue", "red"]


def head(*nodes: Any, constants: dict[str, Any] | None = None, outputs: int = 3) -> bytes:
    """A head from 4 features."""
    graph = helper.make_graph(
        nodes,
        "head",
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["n", 4])],
        [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["rows", outputs])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in (constants or {}).items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return bytes(model.SerializeToString())


WEIGHTS = np.zeros((4, 3), np.float32)
ODD: dict[str, tuple[Any, str]] = {
    "another width": (
        head(helper.make_node("MatMul", ["features", "w"], ["probabilities"]), constants={"w": WEIGHTS[:, :2]}, outputs=2),
        r"outputs of shape \(5, 2\) for 5 images and 3 classes",
    ),
    "twice the rows": (
        head(
            helper.make_node("MatMul", ["features", "w"], ["z"]),
            helper.make_node("Softmax", ["z"], ["p"]),
            helper.make_node("Concat", ["p", "p"], ["probabilities"], axis=0),
            constants={"w": WEIGHTS},
        ),
        r"outputs of shape \(10, 3\) for 5 images and 3 classes",
    ),
    "19.95": (
        head(
            helper.make_node("MatMul", ["features", "w"], ["z"]),
            helper.make_node("Add", ["z", "b"], ["probabilities"]),
            constants={"w": WEIGHTS, "b": np.array([0.1, 0.2, 19.95], np.float32)},
        ),
        r"gives 19\.95 as a probability; expected numbers between 0 and 1",
    ),
    "less than nothing": (
        head(
            helper.make_node("MatMul", ["features", "w"], ["z"]),
            helper.make_node("Add", ["z", "b"], ["probabilities"]),
            constants={"w": WEIGHTS, "b": np.array([0.9, 0.2, -0.1], np.float32)},
        ),
        r"gives -0\.1 as a probability",
    ),
    "a sum of 0.6": (
        head(
            helper.make_node("MatMul", ["features", "w"], ["z"]),
            helper.make_node("Add", ["z", "b"], ["probabilities"]),
            constants={"w": WEIGHTS, "b": np.full(3, 0.2, np.float32)},
        ),
        r"add up to 0\.6; those of one label add up to 1",
    ),
}


@pytest.mark.parametrize("name", ODD)
def test_outputs_that_no_head_of_this_task_gives_are_refused(name: str) -> None:
    data, reason = ODD[name]
    outputs = head_function(data, Path("head.onnx"), 4, task_of("single-label", RGB))
    with pytest.raises(BadDataError, match=reason):
        outputs(np.zeros((5, 4), np.float32))


def test_rows_that_are_not_finite_are_left_to_the_caller() -> None:
    data = head(
        helper.make_node("MatMul", ["features", "w"], ["z"]),
        helper.make_node("Softmax", ["z"], ["probabilities"]),
        constants={"w": WEIGHTS},
    )
    features = np.zeros((2, 4), np.float32)
    features[1] = np.inf
    rows = head_function(data, Path("head.onnx"), 4, task_of("single-label", RGB))(features)
    assert rows[0] == pytest.approx(1 / 3)
    assert np.isnan(rows[1]).all()


def stored_elsewhere(array: np.ndarray[Any, Any], name: str = "") -> Any:
    """A tensor whose values are in another file."""
    tensor = numpy_helper.from_array(array, name)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", "secret.bin"
    return tensor


def sparse_elsewhere() -> Any:
    return helper.make_sparse_tensor(
        stored_elsewhere(np.ones(1, np.float32)), numpy_helper.from_array(np.zeros(1, np.int64)), [4, 3]
    )


def branch(node: Any) -> Any:
    return helper.make_graph([node], "branch", [], [helper.make_tensor_value_info("w", TensorProto.FLOAT, [4, 3])])


HIDDEN = {
    "a Constant": [helper.make_node("Constant", [], ["w"], value=stored_elsewhere(WEIGHTS))],
    "a sparse Constant": [helper.make_node("Constant", [], ["w"], sparse_value=sparse_elsewhere())],
    "a branch": [
        helper.make_node("Constant", [], ["yes"], value=numpy_helper.from_array(np.array(True))),
        helper.make_node(
            "If",
            ["yes"],
            ["w"],
            then_branch=branch(helper.make_node("Constant", [], ["w"], value=stored_elsewhere(WEIGHTS))),
            else_branch=branch(helper.make_node("Constant", [], ["w"], value=numpy_helper.from_array(WEIGHTS))),
        ),
    ],
}


@pytest.mark.parametrize("name", HIDDEN)
def test_a_head_that_reads_other_files_is_refused(name: str) -> None:
    data = head(*HIDDEN[name], helper.make_node("MatMul", ["features", "w"], ["probabilities"]))
    with pytest.raises(BadDataError, match=r"data from other files \(secret\.bin\); a head may use only standard operators"):
        head_function(data, Path("head.onnx"), 4, task_of("single-label", RGB))


def test_a_head_whose_function_reads_other_files_is_refused() -> None:
    model = onnx.load_model_from_string(head(helper.make_node("Weigh", ["features"], ["probabilities"], domain="ai.onnx.ml")))
    body = [*HIDDEN["a Constant"], helper.make_node("MatMul", ["x", "w"], ["y"])]
    opsets = [helper.make_opsetid("", 17)]
    model.functions.append(helper.make_function("ai.onnx.ml", "Weigh", ["x"], ["y"], body, opsets))
    model.opset_import.append(helper.make_opsetid("ai.onnx.ml", 3))
    with pytest.raises(BadDataError, match="data from other files"):
        head_function(model.SerializeToString(), Path("head.onnx"), 4, task_of("single-label", RGB))
