"""Makes this archive: caches, bundles and a fused file of every kind, in the formats of penult 0.1.0, and `expected.json`.

It was run once, with the versions that `expected.json` names, and is kept to say what is here; later versions must open, extend
and judge what lies here, so nothing here is ever made again. From the root of the repository as of that day:

    PYTHONPATH=. python tests/data/archives/v1/make.py OUT

Every picture and every weight comes from a seed. What is not here: float16 features of a GPU, and a cache of a torchvision
network, whose file alone would be 2 MB; the fine-tuned bundle (ShuffleNetV2 x0.5, the smallest there is) has such a file.
"""

from __future__ import annotations

import csv
import hashlib
import json
import platform
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from PIL import Image

import classifiers
from classifiers.bundles.bundle import Bundle
from classifiers.bundles.fuse import fuse
from classifiers.bundles.held_out import evaluate_bundle
from classifiers.bundles.predictor import Predictor
from classifiers.finetuning.finetune import finetune
from classifiers.finetuning.settings import FineTuneSettings
from classifiers.heads.registry import make_head
from classifiers.training.settings import TrainOptions
from extractor.backbones.registry import Backbone
from extractor.data.sources import open_source
from extractor.pipeline.prepare import library_versions
from extractor.pipeline.run import run_extract
from extractor.pipeline.settings import Options
from store.cache import FeatureCache
from store.compact import write_compact

SIDE = 16  # pixels of the network's input
COUNTS = {"train": 9, "val": 3, "test": 4}  # pictures of each class
COLOURS = {"red": (200, 90, 80), "green": (90, 190, 90), "blue": (80, 100, 200)}
PREDICTED = ["photos/test/red/000.jpg", "photos/test/green/001.jpg", "photos/test/blue/002.jpg", "extra.jpg"]
CACHES: dict[str, dict[str, Any]] = {  # how each is extracted
    "photos.cache": {"data": "photos"},
    "views.cache": {"data": "photos", "options": {"views": 3, "seed": 5}},
    "layers.cache": {"data": "photos", "layers": ["middle", "features"], "options": {"storage": "float32"}},
    "int8.cache": {"data": "photos", "options": {"precision": "int8"}},
    "tags.cache": {"data": "tags.csv", "task": "multi-label"},
    "sizes.cache": {"data": "sizes.csv", "task": "regression", "targets": ["brightness", "stripes"]},
}
BUNDLES: dict[str, dict[str, Any]] = {  # how each head is trained
    "logistic.head": {"cache": "photos.cache", "head": "logistic"},
    "mlp.head": {"cache": "photos.cache", "head": "mlp", "settings": {"hidden": [8], "lr": 0.01}},
    "ridge.head": {"cache": "photos.cache", "head": "ridge"},
    "knn.head": {"cache": "photos.h5", "head": "knn"},
    "centroid.head": {"cache": "photos.cache", "head": "centroid", "training": {"few_shot": [1, 3], "repeats": 3}},
    "layer.head": {"cache": "layers.cache", "layer": "middle", "head": "ridge", "settings": {"alpha": 0.5}},
    "views.head": {"cache": "views.cache", "head": "logistic", "training": {"average_views": True}},
    "int8.head": {"cache": "int8.cache", "head": "logistic", "settings": {"class_weight": "balanced"}},
    "tags.head": {"cache": "tags.cache", "head": "logistic"},
    "sizes.head": {"cache": "sizes.cache", "head": "ridge"},
}


def write_network(path: Path) -> None:
    """Three convolutions and a classifier with random weights, as somebody's ONNX file with a TOML file of its name."""
    rng = np.random.default_rng(7)
    nodes, tensors, last = [], [], "image"
    for i, (inputs, outputs, stride) in enumerate([(3, 8, 1), (8, 12, 2), (12, 24, 2)]):
        weights = rng.normal(0, np.sqrt(2 / (9 * inputs)), (outputs, inputs, 3, 3)).astype(np.float32)
        tensors += [onnx.numpy_helper.from_array(weights, f"weights_{i}")]
        tensors += [onnx.numpy_helper.from_array(rng.normal(0, 0.1, outputs).astype(np.float32), f"bias_{i}")]
        named = [last, f"weights_{i}", f"bias_{i}"]
        nodes.append(onnx.helper.make_node("Conv", named, [f"sum_{i}"], pads=[1] * 4, strides=[stride] * 2))
        last = ["first", "middle", "last"][i]
        nodes.append(onnx.helper.make_node("Relu", [f"sum_{i}"], [last]))
    nodes.append(onnx.helper.make_node("GlobalAveragePool", ["last"], ["pooled"]))
    nodes.append(onnx.helper.make_node("Flatten", ["pooled"], ["features"], axis=1))
    nodes.append(onnx.helper.make_node("Gemm", ["features", "weights_3"], ["logits"]))
    tensors.append(onnx.numpy_helper.from_array(rng.normal(0, 0.2, (24, 5)).astype(np.float32), "weights_3"))
    image = onnx.helper.make_tensor_value_info("image", onnx.TensorProto.FLOAT, ["n", 3, SIDE, SIDE])
    logits = onnx.helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, ["n", 5])
    graph = onnx.helper.make_graph(nodes, "tiny", [image], [logits], tensors)
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=10), path)
    path.with_suffix(".toml").write_text(
        f'mean = 0.5\nstd = 0.25\nresize = {SIDE + 2}\ncrop = {SIDE}\ninterpolation = "bilinear"\n'
    )


def write_picture(path: Path, label: str, seed: int) -> tuple[float, float]:
    """A tinted smooth pattern, on half of which lie stripes; returns its brightness and the strength of the stripes."""
    rng = np.random.default_rng(seed)
    coarse = rng.normal(0, 60, (7, 9, 3)) + np.array(COLOURS[label]) * 0.5 + rng.uniform(30, 90, 3)
    image = Image.fromarray(coarse.clip(0, 255).astype(np.uint8)).resize((32, 26), Image.Resampling.BICUBIC)
    stripes = float(rng.uniform(20, 60)) * (seed % 2)
    pixels = np.asarray(image, np.float64) + stripes * np.sign(np.sin(np.arange(32) * 1.3))[None, :, None]
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=88)
    return round(float(pixels.mean()), 1), round(stripes, 1)


def write_data(root: Path) -> None:
    """A folder with splits, two manifests of the same pictures, and a picture more for which there are no features yet."""
    listed, seed = [], 0
    for split, count in COUNTS.items():
        for label in COLOURS:
            for i in range(count):
                seed += 1
                name = f"photos/{split}/{label}/{i:03d}.jpg"
                brightness, stripes = write_picture(root / name, label, seed)
                tags = "|".join([label] * (seed % 5 > 0) + ["striped"] * (stripes > 0))
                listed.append((name, tags, f"pair {seed // 2}", brightness, stripes or ""))
    (root / "photos/train/red/copy.jpg").write_bytes((root / "photos/train/red/000.jpg").read_bytes())
    (root / "photos/train/blue/cut.jpg").write_bytes((root / "photos/train/blue/000.jpg").read_bytes()[:300])
    write_picture(root / "extra.jpg", "green", 1000)
    for name, columns, places in (
        ("tags.csv", ("path", "label", "group"), (0, 1, 2)),
        ("sizes.csv", ("path", "brightness", "stripes"), (0, 3, 4)),
    ):
        with (root / name).open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(columns)
            writer.writerows([row[i] for i in places] for row in listed if name == "tags.csv" or row[4] != "")


def extract(root: Path, name: str, *, data: str, layers: Any = (), options: Any = None, **task: Any) -> dict[str, Any]:
    """Make a cache; returns what its summary counts."""
    source = open_source(root / data, **task)
    backbone = Backbone(str(root / "network.onnx"), layers=tuple(layers))
    summary = run_extract(source, backbone, root / name, Options(device="cpu", quiet=True, **(options or {})))
    return {key: getattr(summary, key) for key in ("inputs", "ok", "duplicates", "failed", "computed")}


def kept_features(cache: FeatureCache) -> dict[str, str]:
    """Features of every seventh image by the digest of its content, as the hexadecimal digits of their bytes."""
    digests = sorted({row.sha256 for row in cache.rows()})[::7]
    found = cache.features(digests, views=cache.views > 1)
    return {digest.hex(): each.tobytes().hex() for digest, each in zip(digests, found, strict=True)}


def describe_cache(path: Path) -> list[dict[str, Any]]:
    """What each feature set of a cache must give."""
    opened = FeatureCache(path)
    sets = [opened.with_layer(layer) for layer in opened.layers]
    return [
        {
            "layer": each.layer,
            "fingerprint": each.fingerprint.canonical,
            "dtype": str(each.dtype),
            "dim": each.dim,
            "views": each.views,
            "splits": {name: len(each.rows(name)) for name in each.samples.splits()},
            "features": kept_features(each),
        }
        for each in sets
    ]


def describe_bundle(path: Path, data: Path, root: Path) -> dict[str, Any]:
    """What a bundle must give for `PREDICTED`, and its evaluation on a cache or on pictures."""
    bundle = Bundle.load(path)
    found = list(Predictor.of(bundle, device="cpu").predict([root / name for name in PREDICTED]))
    return {
        "made_from": bundle.made_from,
        "evaluated_on": data.name,
        "evaluation": evaluate_bundle(bundle, data)[0].to_json(),
        "probabilities": [each.probabilities.tolist() for each in found],
        "labels": [each.label for each in found],
    }


def options_of(training: dict[str, Any]) -> TrainOptions:
    """How a head was trained, as the archive has it: thumbnails were called pictures then."""
    return TrainOptions(**{"thumbnails" if name == "pictures" else name: value for name, value in training.items()})


def make(root: Path) -> dict[str, Any]:
    """Everything, below an empty folder; returns what must be found there."""
    write_data(root)
    write_network(root / "network.onnx")
    counts = {name: extract(root, name, **how) for name, how in CACHES.items()}
    write_compact(FeatureCache(root / "photos.cache"), root / "photos.h5")
    caches = {name: {**CACHES[name], "counts": counts[name], "sets": describe_cache(root / name)} for name in CACHES}
    caches["photos.h5"] = {"sets": describe_cache(root / "photos.h5")}
    bundles: dict[str, Any] = {}
    for name, how in BUNDLES.items():
        cache = FeatureCache(root / how["cache"], how.get("layer"))
        head = make_head(how["head"], cache.samples.task.name, seed=0, **how.get("settings", {}))
        training = {"pictures": name == "logistic.head", **how.get("training", {})}  # one page with thumbnails is enough
        classifiers.train(cache, root / name, head, options_of(training))
        bundles[name] = {**how, "training": training, **describe_bundle(root / name, root / how["cache"], root)}
    network = {"backbone": "shufflenet_v2_x0_5", "weights": "random:0", "resize": 32, "crop": 32}
    lively = {"epochs": 8, "lr": 1e-3, "head_lr_factor": 1.0, "batch_size": 4, "batch_statistics": True, "patience": 9}
    settings = FineTuneSettings(**network, **lively, device="cpu", quiet=True, thumbnails=False)
    finetune(FeatureCache(root / "photos.cache"), root / "finetuned.head", settings)
    bundles["finetuned.head"] = describe_bundle(root / "finetuned.head", root / "photos", root)
    fuse(Bundle.load(root / "logistic.head"), root / "fused.onnx")
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {
        "made_with": {"python": platform.python_version(), **library_versions()},
        "predicted": PREDICTED,
        "caches": caches,
        "bundles": bundles,
        "files": {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files},
    }


if __name__ == "__main__":
    out, root = Path(sys.argv[1]), Path(tempfile.gettempdir()) / "penult-archive"  # a sample table holds its root's name
    root.mkdir()
    try:
        expected = make(root)
        (root / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")
        shutil.copytree(root, out, dirs_exist_ok=True)
    finally:
        shutil.rmtree(root)
