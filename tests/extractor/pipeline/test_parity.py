"""Features in a cache equal torchvision's own network on torchvision's own preprocessing, for a network of each kind;
`make backbones` compares them all."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from extractor.backbones.registry import Backbone
from extractor.data.folders import ImageFolder
from extractor.graphs.parity import relative_l2
from extractor.pipeline.run import run_extract
from extractor.pipeline.settings import Options
from store.cache import FeatureCache

# The attribute that holds the classification layer, and how to remove it; written by hand, so that the general rule of the
# exporter is compared with what people do.
LAST = {
    "resnet18": "fc",
    "googlenet": "fc",
    "mobilenet_v3_large": "classifier.3",
    "squeezenet1_1": "classifier",
    "swin_t": "head",
    "vit_b_32": "heads.head",
}


def by_torchvision(name: str, state: dict[str, torch.Tensor], paths: list[Path]) -> np.ndarray:
    """Penultimate features as one would compute them by hand."""
    # With the weights of its preset, torchvision sets transform_input for this one.
    transforms_input = {"transform_input": True} if name == "googlenet" else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        network = torchvision.models.get_model(name, weights=None, **transforms_input)
    network.load_state_dict(state)
    parent, _, child = LAST[name].rpartition(".")
    removed = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1)) if name == "squeezenet1_1" else torch.nn.Identity()
    setattr(network.get_submodule(parent), child, removed)
    preset = torchvision.models.get_model_weights(name)["IMAGENET1K_V1"].transforms()
    with torch.inference_mode():
        return network.eval()(torch.stack([preset(Image.open(path).convert("RGB")) for path in paths])).flatten(1).numpy()


@pytest.mark.usefixtures("exports_here")
@pytest.mark.parametrize("name", LAST)
def test_features_are_torchvisions(name: str, dataset: Callable[..., Path], tmp_path: Path) -> None:
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore", FutureWarning)
        torch.manual_seed(1)
        network = torchvision.models.get_model(name, weights=None)
    torch.save(network.state_dict(), tmp_path / "seeded.pth")
    root = dataset(tmp_path / "photos", {"a": 3, "b": 2})
    backbone = Backbone(name, str(tmp_path / "seeded.pth"), "IMAGENET1K_V1")
    run_extract(ImageFolder(root), backbone, tmp_path / "c", Options(storage="float32", val_fraction=0, test_fraction=0))
    cache = FeatureCache(tmp_path / "c")
    found = cache.subset()
    expected = by_torchvision(name, network.state_dict(), [root / path.decode() for path in found.paths])
    assert found.X.dtype == np.float32
    assert found.X.shape == expected.shape
    assert relative_l2(found.X, expected).max() <= 1e-5
