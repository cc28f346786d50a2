"""Torchvision's datasets, made here in their on-disk formats and read by torchvision's own classes."""

from __future__ import annotations

import bz2
import hashlib
import io
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torchvision
from PIL import Image

import classifiers
from classifiers.bundles.held_out import evaluate_bundle
from classifiers.finetuning.finetune import finetune
from classifiers.finetuning.settings import FineTuneSettings
from classifiers.heads.registry import make_head
from extractor.backbones.registry import Backbone
from extractor.data.folders import ImageFolder
from extractor.data.sources import files_of, open_source
from extractor.data.torchvision_datasets import BELONGS, TorchvisionDataset
from extractor.pipeline.plan import preview
from extractor.pipeline.run import run_extract
from extractor.pipeline.settings import Options
from extractor.pixels.images import ImageError, decode
from store.cache import FeatureCache
from store.errors import BadDataError, InputMissingError, UsageError

QUIET = Options(quiet=True, batch_size=4)


def digits(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Grey 28 x 28 pictures of stripes, two classes, no two alike."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 2
    stripes = np.where(np.arange(28) % 6 < 3, 200, 20)[None, :, None]
    images = np.where(labels[:, None, None] == 0, stripes, stripes.transpose(0, 2, 1)) + rng.integers(0, 30, (count, 28, 28))
    return images.astype(np.uint8), labels.astype(np.uint8)


def write_mnist(root: Path, name: str = "MNIST") -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The idx files of MNIST: 14 training images and 6 test images."""
    raw = root / name / "raw"
    raw.mkdir(parents=True)
    made = {"train": digits(14, 1), "t10k": digits(6, 2)}
    for part, (images, labels) in made.items():
        header = struct.pack(">4i", 0x803, *images.shape)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 0x801, len(labels)) + labels.tobytes())
    return made


def write_pets(root: Path, make_image: Callable[..., Path]) -> Path:
    """The layout of OxfordIIITPet: five images of each of two breeds for trainval, and three of each for test."""
    base = root / "oxford-iiit-pet"
    (base / "annotations").mkdir(parents=True)
    for seed, (split, numbers) in enumerate({"trainval": range(5), "test": range(5, 8)}.items()):
        lines = []
        for breed, (name, species) in enumerate({"Abyssinian": 1, "american_bulldog": 2}.items()):
            for i in numbers:
                make_image(base / f"images/{name}_{i}.jpg", seed=100 * seed + 10 * breed + i)
                lines.append(f"{name}_{i} {breed + 1} {species} 1\n")
        (base / f"annotations/{split}.txt").write_text("".join(lines))
    return base


def source(name: str, root: Path, **options: Any) -> TorchvisionDataset:
    found = open_source(f"torchvision:{name}@{root}", **options)
    assert isinstance(found, TorchvisionDataset)
    return found


def features(data: Any, backbone: Backbone, cache: Path) -> FeatureCache:
    run_extract(data, backbone, cache, QUIET)
    return FeatureCache(cache)


# --- arrays ------------------------------------------------------------------------------------------------------------


def test_mnist_gives_the_features_of_a_folder_of_its_images(backbone: Backbone, tmp_path: Path) -> None:
    made = write_mnist(tmp_path / "data")
    folder = tmp_path / "folder"
    for split, (images, labels) in zip(("train", "test"), made.values(), strict=True):
        for i, (pixels, label) in enumerate(zip(images, labels.tolist(), strict=True)):
            path = folder / split / torchvision.datasets.MNIST.classes[label] / f"{i:05d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
    mine = source("MNIST", tmp_path / "data")
    samples = mine.samples()
    assert [s.path for s in samples] == [
        f"MNIST/{split}/{i:05d}".encode() for split, n in (("test", 6), ("train", 14)) for i in range(n)
    ]
    assert {(s.label, s.split) for s in samples} == {(c, s) for c in ("0 - zero", "1 - one") for s in ("train", "test")}
    array, files = features(mine, backbone, tmp_path / "a"), features(ImageFolder(folder), backbone, tmp_path / "f")
    by_number = sorted(files.rows(), key=lambda row: (row.split, row.path.rpartition(b"/")[2]))
    assert [(row.label, row.split) for row in by_number] == [(row.label, row.split) for row in array.rows()]
    np.testing.assert_array_equal(
        files.features([row.sha256 for row in by_number]), array.features([row.sha256 for row in array.rows()])
    )


def test_arrays_are_netpbm_files_whose_bytes_depend_on_nothing_else(tmp_path: Path) -> None:
    images, _ = write_mnist(tmp_path)["train"]
    files = source("MNIST", tmp_path).files
    data, stat = files.read(b"MNIST/train/00003")
    assert data == b"P5\n28 28\n255\n" + images[3].tobytes()
    assert stat[0] == len(data)
    assert files.stat(b"MNIST/train/00003") == stat != files.stat(b"MNIST/train/00004")
    np.testing.assert_array_equal(np.asarray(decode(data).convert("L")), images[3])
    for gone in (b"MNIST/train/00014", b"MNIST/val/00000", b"MNIST/train/x"):
        assert files.stat(gone) is None
        with pytest.raises(ImageError) as caught:
            files.read(gone)
        assert caught.value.code == "not_found"


def test_a_second_run_reads_nothing_again(backbone: Backbone, tmp_path: Path) -> None:
    write_mnist(tmp_path)
    run_extract(source("MNIST", tmp_path), backbone, tmp_path / "c", QUIET)
    would = preview(source("MNIST", tmp_path), backbone, tmp_path / "c", QUIET)
    labels = {"labels": {"0 - zero": 10, "1 - one": 10}, "unlabelled": 0, "subfolders": {}, "warnings": []}
    assert would == {"inputs": 20, "unchanged": 20, "to_read": 0, **labels}
    assert run_extract(source("MNIST", tmp_path), backbone, tmp_path / "c", QUIET).computed == 0


def test_cifar_and_svhn_have_colours_in_their_own_orders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (4, 32, 32, 3), np.uint8)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    batch = {"data": pixels.transpose(0, 3, 1, 2).reshape(4, -1), "labels": [0, 1, 1, 0]}
    contents = {"data": pickle.dumps(batch), "meta": pickle.dumps({"label_names": ["airplane", "automobile"]})}
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    digest = {name: hashlib.md5(content).hexdigest() for name, content in contents.items()}
    cifar = torchvision.datasets.CIFAR10
    for name in ("train_list", "test_list"):
        monkeypatch.setattr(cifar, name, [["data", digest["data"]]])
    monkeypatch.setattr(cifar, "meta", {"filename": "meta", "key": "label_names", "md5": digest["meta"]})
    found = source("CIFAR10", tmp_path)
    assert [s.label for s in found.samples() if s.split == "train"] == ["airplane", "automobile", "automobile", "airplane"]

    from scipy.io import savemat

    mat = io.BytesIO()
    savemat(mat, {"X": pixels.transpose(1, 2, 3, 0), "y": np.array([[1], [10], [1], [2]], np.uint8)})
    (tmp_path / "train_32x32.mat").write_bytes(mat.getvalue())
    entry = ["", "train_32x32.mat", hashlib.md5(mat.getvalue()).hexdigest()]
    monkeypatch.setattr(torchvision.datasets.SVHN, "split_list", {"train": entry})
    house = source("SVHN", tmp_path)
    assert [(s.label, s.split) for s in house.samples()] == [(label, "train") for label in ("1", "0", "1", "2")]
    for files, path in ((found.files, b"CIFAR10/train/00002"), (house.files, b"SVHN/train/00002")):
        np.testing.assert_array_equal(np.asarray(decode(files.read(path)[0])), pixels[2])


# --- files -------------------------------------------------------------------------------------------------------------


def test_pets_give_the_features_of_a_folder_of_the_same_files(
    make_image: Callable[..., Path], backbone: Backbone, tmp_path: Path
) -> None:
    base = write_pets(tmp_path / "data", make_image)
    mine = source("OxfordIIITPet", tmp_path / "data")
    samples = mine.samples()
    assert len(samples) == 16
    assert {(s.label, s.split) for s in samples} == {
        (breed, split) for breed in ("Abyssinian", "American Bulldog") for split in ("train", "test")
    }
    assert samples[0].path == b"oxford-iiit-pet/images/Abyssinian_0.jpg"
    pets = features(mine, backbone, tmp_path / "pets")
    flat = features(ImageFolder(base / "images"), backbone, tmp_path / "flat")
    assert [row.sha256 for row in pets.rows()] == [row.sha256 for row in flat.rows()]
    digests = [row.sha256 for row in pets.rows()]
    np.testing.assert_array_equal(pets.features(digests), flat.features(digests))
    assert "source" not in pets.samples.facts  # they are plain files


def test_a_dataset_without_splits_gets_them_by_hash_rank(
    make_image: Callable[..., Path], backbone: Backbone, tmp_path: Path
) -> None:
    for i in range(10):
        make_image(tmp_path / "data/eurosat/2750" / ("Forest" if i % 2 else "River") / f"{i}.jpg", seed=i)
    found = features(source("EuroSAT", tmp_path / "data"), backbone, tmp_path / "c")
    assert found.samples.facts["split"]["rule"] == "hash-rank"
    assert found.samples.classes == ["Forest", "River"]


# --- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ("torchvision:MNIST", "expected torchvision:NAME@DIR, such as"),
        ("torchvision:@x", "expected torchvision:NAME@DIR"),
        ("torchvision:CIFAR@.", r"no dataset 'CIFAR'; did you mean .*CIFAR10"),
        ("torchvision:mnist@.", r"did you mean 'MNIST'"),
        ("torchvision:qqqqq@.", r"no dataset 'qqqqq'; see torchvision\.datasets"),
        ("torchvision:CocoDetection@.", "it takes root, annFile, .*, not just a folder; write a CSV manifest"),
        ("torchvision:FakeData@.", "not just a folder"),
    ],
)
def test_what_torchvision_does_not_have_is_a_usage_error(data: str, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        open_source(data).samples()


@pytest.mark.parametrize("name", sorted(BELONGS))
def test_what_is_not_on_disk_is_said_with_its_place(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputMissingError, match=f"{name} is not, or not completely, in .*{BELONGS[name]}, as") as caught:
        source(name, tmp_path).samples()
    assert caught.value.exit_code == 66
    assert not list(tmp_path.iterdir())
    with pytest.raises(InputMissingError, match=f"nowhere is not a folder; {name} belongs in .*{BELONGS[name]}"):
        source(name, tmp_path / "nowhere").samples()


def test_the_places_are_those_that_torchvision_looks_in(tmp_path: Path) -> None:
    """Its constructors are let run into the missing files, and asked where they looked."""
    attributes = [
        "raw_folder",
        "base_folder",
        "filename",
        "_data_folder",
        "_data_path",
        "_data_dir",
        "_size_root",
        "_base_folder",
    ]
    for name, place in BELONGS.items():
        kind = getattr(torchvision.datasets, name)
        with pytest.raises((RuntimeError, OSError)) as caught:
            kind(str(tmp_path))
        frames = [entry.frame.f_locals for entry in caught.traceback]
        looked = next(frame["self"] for frame in frames if isinstance(frame.get("self"), kind))
        values = [str(getattr(looked, a)) for a in attributes if hasattr(looked, a)]
        values += [str(frame["full_path"]) for frame in frames if "full_path" in frame]
        assert any(tmp_path / value == tmp_path / place for value in values), (name, values)


def test_half_a_dataset_is_used_and_said(
    make_image: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = write_pets(tmp_path, make_image)
    (base / "annotations/test.txt").unlink()
    assert {sample.split for sample in source("OxfordIIITPet", tmp_path).samples()} == {"train"}
    assert "OxfordIIITPet: only train is in" in caplog.text


def test_damaged_files_are_bad_data(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    (tmp_path / "MNIST/raw/train-images-idx3-ubyte").write_bytes(b"\0\0\x08\x03")
    with pytest.raises(BadDataError, match="torchvision cannot read MNIST in"):
        source("MNIST", tmp_path).samples()


def test_what_is_not_images_with_one_class_is_refused(tmp_path: Path) -> None:
    write_mnist(tmp_path, "QMNIST")
    raw = tmp_path / "QMNIST/raw"
    for name in ("train", "test"):
        part = "train" if name == "train" else "t10k"
        (raw / f"{part}-images-idx3-ubyte").rename(raw / f"qmnist-{name}-images-idx3-ubyte")
        table = np.zeros((14 if name == "train" else 6, 8), ">i4")
        (raw / f"qmnist-{name}-labels-idx2-int").write_bytes(struct.pack(">3i", 0xC02, *table.shape) + table.tobytes())
    with pytest.raises(UsageError, match=r"QMNIST: \d+ images, and labels of shape \(\d+, 8\); expected one class"):
        source("QMNIST", tmp_path).samples()
    with pytest.raises(UsageError, match="EMNIST: its splits are not train, val or test"):
        source("EMNIST", tmp_path).samples()
    frames = tmp_path / "MovingMNIST"
    frames.mkdir()
    np.save(frames / "mnist_test_seq.npy", np.zeros((20, 2, 64, 64), np.uint8))
    with pytest.raises(UsageError, match=r"MovingMNIST: its images are neither files nor 8-bit arrays .* write a CSV"):
        source("MovingMNIST", tmp_path).samples()


# --- afterwards --------------------------------------------------------------------------------------------------------


def test_a_cache_finds_its_arrays_again(backbone: Backbone, tmp_path: Path) -> None:
    write_mnist(tmp_path / "data")
    cache = features(source("MNIST", tmp_path / "data"), backbone, tmp_path / "c")
    assert cache.samples.facts["source"] == "torchvision:MNIST"
    (tmp_path / "data").rename(tmp_path / "moved")
    with pytest.raises(InputMissingError, match=r"MNIST is not, or not completely, in .*data"):
        files_of(cache.samples)
    files = files_of(cache.samples, tmp_path / "moved")
    for row in cache.rows():
        assert hashlib.sha256(files.read(row.path)[0]).digest() == row.sha256
    bundle = classifiers.train(cache, tmp_path / "h", make_head("logistic"))
    used, _ = evaluate_bundle(bundle, cache.path)
    run_extract(source("MNIST", tmp_path / "moved"), backbone, tmp_path / "other", Options(quiet=True, storage="float32"))
    embedded, _ = evaluate_bundle(bundle, tmp_path / "other")
    direct, _ = evaluate_bundle(bundle, f"torchvision:MNIST@{tmp_path / 'moved'}", split="test")
    assert used.n == embedded.n == direct.n == 6
    assert used.accuracy == embedded.accuracy == direct.accuracy


def test_fine_tuning_takes_the_images_of_a_cache_wherever_they_are(backbone: Backbone, tmp_path: Path) -> None:
    write_mnist(tmp_path / "data")
    cache = features(source("MNIST", tmp_path / "data"), backbone, tmp_path / "c")
    network: dict[str, Any] = {"backbone": "resnet18", "weights": "random:0", "resize": 40, "crop": 32}
    settings = FineTuneSettings(**network, epochs=1, freeze_until="head", device="cpu", quiet=True, refit=False)
    bundle = finetune(cache, tmp_path / "h", settings)
    assert bundle.metrics is not None
    assert bundle.metrics["n"] == 6
    (tmp_path / "data").rename(tmp_path / "moved")
    with pytest.raises(InputMissingError) as caught:
        finetune(cache, tmp_path / "i", settings)
    assert "--root says where they are" in caught.value.__notes__[0]
    again = finetune(cache, tmp_path / "i", settings.replace(root=tmp_path / "moved"))
    assert again.metrics == bundle.metrics


def test_usps_is_grey_too(tmp_path: Path) -> None:
    for name, count in (("usps.bz2", 3), ("usps.t.bz2", 2)):
        lines = "".join(f"{i + 1} " + " ".join(f"{k + 1}:{k / 128 - 1}" for k in range(256)) + "\n" for i in range(count))
        (tmp_path / name).write_bytes(bz2.compress(lines.encode()))
    found = source("USPS", tmp_path)
    expected = [("0", "test"), ("1", "test"), ("0", "train"), ("1", "train"), ("2", "train")]
    assert [(s.label, s.split) for s in found.samples()] == expected
    assert decode(found.files.read(b"USPS/test/00001")[0]).size == (16, 16)
