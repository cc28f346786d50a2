"""From features to decisions: heads, evaluation, bundles, prediction, fine-tuning for comparison, jobs.

The names in ``__all__`` are public. Each is imported when it is first asked for, so that importing this package is cheap.

>>> import classifiers
>>> classifiers.Predictor.load("pets.head", device="cpu").task.names
['cat', 'dog']
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from store.faces import lazily  # importing store first sets the environment of libraries

if TYPE_CHECKING:
    from .bundles.bundle import Bundle as Bundle
    from .bundles.fuse import fuse as fuse
    from .bundles.held_out import evaluate as evaluate
    from .bundles.held_out import evaluate_bundle as evaluate_bundle
    from .bundles.predictor import Predictor as Predictor
    from .comparison.compare import compare as compare
    from .finetuning.finetune import finetune as finetune
    from .finetuning.settings import FineTuneSettings as FineTuneSettings
    from .heads.centroid import CentroidHead as CentroidHead
    from .heads.knn import KnnHead as KnnHead
    from .heads.logistic import LogisticHead as LogisticHead
    from .heads.mlp import MlpHead as MlpHead
    from .heads.mlp import MultiLabelMlpHead as MultiLabelMlpHead
    from .heads.multilabel_logistic import MultiLabelLogisticHead as MultiLabelLogisticHead
    from .heads.ridge import RidgeHead as RidgeHead
    from .heads.ridge import RidgeRegressionHead as RidgeRegressionHead
    from .jobs.run import run_job as run_job
    from .training.settings import TrainOptions as TrainOptions
    from .training.train import save_head as save_head
    from .training.train import train as train

HOME = {
    "Bundle": "bundles.bundle",
    "CentroidHead": "heads.centroid",
    "FineTuneSettings": "finetuning.settings",
    "KnnHead": "heads.knn",
    "LogisticHead": "heads.logistic",
    "MlpHead": "heads.mlp",
    "MultiLabelLogisticHead": "heads.multilabel_logistic",
    "MultiLabelMlpHead": "heads.mlp",
    "Predictor": "bundles.predictor",
    "RidgeHead": "heads.ridge",
    "RidgeRegressionHead": "heads.ridge",
    "TrainOptions": "training.settings",
    "compare": "comparison.compare",
    "evaluate": "bundles.held_out",
    "evaluate_bundle": "bundles.held_out",
    "finetune": "finetuning.finetune",
    "fuse": "bundles.fuse",
    "run_job": "jobs.run",
    "save_head": "training.train",
    "train": "training.train",
}
__all__ = sorted(HOME)

if not TYPE_CHECKING:
    __getattr__, __dir__ = lazily(__name__, HOME)
