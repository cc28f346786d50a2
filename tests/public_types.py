"""What a type checker sees of the public names; mypy reads this file, nobody runs it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import assert_type

import classifiers
import extractor
import store
from classifiers.bundles.fused import Fused
from classifiers.comparison.compare import Comparison
from classifiers.evaluation.task import Evaluation, Prediction
from extractor.data.sources import Source


def from_images_to_decisions() -> None:
    options = extractor.Options(device="cpu", views=4)
    network = extractor.Backbone("resnet50", weights="IMAGENET1K_V1")
    assert_type(extractor.open_source("pets.csv", group_by="owner"), Source)
    cache = extractor.extract("pets/", network, Path("pets.cache"), options)
    assert_type(cache, store.FeatureCache)
    assert_type(cache.subset("train"), store.Subset)
    assert_type(store.write_compact(cache, "pets.h5"), int)
    bundle = classifiers.train(cache, "pets.head", head="logistic", options=classifiers.TrainOptions(few_shot=(1, 5)))
    assert_type(bundle, classifiers.Bundle)
    assert_type(
        classifiers.finetune(cache, "tuned.head", classifiers.FineTuneSettings(backbone="resnet50")), classifiers.Bundle
    )
    assert_type(classifiers.compare([bundle, "tuned.head"]), Comparison)
    assert_type(classifiers.fuse(bundle, "pets.onnx"), Fused)
    assert_type(classifiers.Predictor.load("pets.head").predict(["cat.jpg"]), Iterator[Prediction])
    train, test = cache.split(test=0.2)
    head = classifiers.LogisticHead(C=1.0).fit(train.X, train.y)
    assert_type(head, classifiers.LogisticHead)
    assert_type(classifiers.evaluate(head, test), Evaluation)


def what_a_type_checker_refuses() -> None:
    classifiers.train("pets.cache", "pets.head", haed="logistic")  # type: ignore[call-arg]
    extractor.Options(device=3)  # type: ignore[arg-type]
    extractor.nothing  # type: ignore[attr-defined]  # noqa: B018
