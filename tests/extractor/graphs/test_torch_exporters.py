"""Torch's two exporters: the same bits from both, and the newer one wherever the older one might be wrong."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torchvision.models import densenet, efficientnet, mobilenetv2, mobilenetv3
from torchvision.models.googlenet import Inception

from extractor.backbones.export import to_onnx
from extractor.backbones.networks import Loaded, load
from extractor.backbones.registry import Backbone
from extractor.graphs.cpu_session import cpu_session
from extractor.graphs.torch_exporters import exported, traced
from extractor.pixels.preprocess import Preprocess
from store.cache import PENULTIMATE
from store.environment import python
from store.errors import BadDataError

SIDE = 32


def preprocess(side: int) -> Preprocess:
    return Preprocess(side, side, "bilinear", (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))


class Blocks(torch.nn.Module):
    """The blocks of torchvision's convolutional networks, one of each kind."""

    def __init__(self) -> None:
        super().__init__()
        residual = mobilenetv3.InvertedResidualConfig(16, 3, 24, 16, True, "HS", 1, 1, 1)
        expanded = efficientnet.MBConvConfig(2, 3, 1, 16, 16, 1)
        self.features = torch.nn.Sequential(
            mobilenetv2.Conv2dNormActivation(3, 16, stride=2, activation_layer=torch.nn.ReLU6),
            mobilenetv2.InvertedResidual(16, 16, 1, 2),
            mobilenetv3.InvertedResidual(residual, torch.nn.BatchNorm2d),
            efficientnet.MBConv(expanded, 0.1, torch.nn.BatchNorm2d),
            densenet._DenseBlock(2, 16, 2, 4, 0.0),
            densenet._Transition(24, 16),
            Inception(16, 4, 4, 4, 4, 4, 4),
            torch.nn.MaxPool2d(3, 2, ceil_mode=True),
        )
        self.pool = torch.nn.AdaptiveAvgPool2d(1)
        self.classifier = torch.nn.Sequential(
            torch.nn.Linear(16, 12), torch.nn.Hardswish(), torch.nn.Dropout(), torch.nn.Linear(12, 5)
        )

    def forward(self, pixels: Any) -> Any:
        return self.classifier(torch.flatten(self.pool(self.features(pixels)), 1))


@pytest.fixture(scope="module")
def blocks() -> Loaded:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = Blocks()
        for module in network.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                torch.nn.init.uniform_(module.weight, 0.5, 1.5)
                torch.nn.init.normal_(module.bias)
                module.running_mean = torch.randn(module.num_features)
                module.running_var = torch.rand(module.num_features) + 0.5
    return Loaded(network.eval(), preprocess(SIDE), "random", "0" * 64)


def features(file: Path, pixels: Any) -> list[Any]:
    session = cpu_session(file, threads=1)
    return list(session.run(None, {"pixels": pixels}))


def optimised(file: Path, folder: Path) -> tuple[list[str], list[bytes]]:
    """The operators and the weights of a file after ONNX Runtime's optimisation."""
    cpu_session(file, optimized_model_filepath=str(folder / "optimised.onnx"))
    graph = onnx.load(folder / "optimised.onnx").graph
    weights = [numpy_helper.to_array(each).tobytes() for each in graph.initializer if each.data_type == onnx.TensorProto.FLOAT]
    operators = [node.op_type for node in graph.node if node.op_type not in ("Flatten", "Reshape")]
    return sorted(operators), sorted(set(weights))


def require_same(loaded: Loaded, folder: Path, **what: Any) -> None:
    older, newer = folder / "older.onnx", folder / "newer.onnx"
    assert to_onnx(loaded, "net", older, exporters=[traced], **what) == to_onnx(
        loaded, "net", newer, exporters=[exported], **what
    )
    side = loaded.preprocess.crop
    for count in (1, 3, 8):
        pixels = np.random.default_rng(count).standard_normal((count, 3, side, side)).astype(np.float32)
        for one, other in zip(features(older, pixels), features(newer, pixels), strict=True):
            np.testing.assert_array_equal(one, other)
    assert optimised(older, folder)[1] == optimised(newer, folder)[1]


def test_both_give_the_same_bits_for_every_kind_of_block(blocks: Loaded, tmp_path: Path) -> None:
    require_same(blocks, tmp_path, layers=["features.2", "features.4", "features.7", PENULTIMATE])


def test_both_give_the_same_graph_for_a_network_of_torchvision(tmp_path: Path) -> None:
    loaded = load(Backbone("squeezenet1_1", "random:0", resize=72, crop=64))
    require_same(loaded, tmp_path, pooling="max")
    assert optimised(tmp_path / "older.onnx", tmp_path) == optimised(tmp_path / "newer.onnx", tmp_path)


# --- what the older one cannot be trusted with ---------------------------------------------------------------------------


class Small(torch.nn.Module):
    """A convolution and a classifier, with something between them."""

    def __init__(self, between: Callable[[Any], Any]) -> None:
        super().__init__()
        self.conv, self.head, self.between = torch.nn.Conv2d(3, 4, 3), torch.nn.Linear(4, 2), between

    def forward(self, pixels: Any) -> Any:
        return self.head(self.between(self.conv(pixels).relu().mean((2, 3))))


def small(between: Callable[[Any], Any]) -> Loaded:
    return Loaded(Small(between).eval(), preprocess(8), "random", "0" * 64)


def frozen(x: Any) -> Any:
    """Adds a number to each row of the batch; the tracer does not see where their count comes from."""
    return x + torch.ones(x.untyped_storage().nbytes() // 16, 1)


def chosen(x: Any) -> Any:
    return x if x.shape[1] == 4 else -x


WRONG = {
    "a choice by a size, of which the tracer warns": (chosen, "cannot write it"),
    "a batch size that becomes a constant": (frozen, "does not take a batch of 3"),
    "a computation with shapes": (lambda x: x.reshape(x.shape[0], 2, 2).flatten(1), "may write .*Reshape.* differently"),
    "a layer normalisation": (torch.nn.LayerNorm(4), "layer normalisation"),
    "an operator that may be written differently": (torch.nn.Softmax(1), "Softmax"),
}


@pytest.mark.parametrize("case", WRONG)
def test_the_older_one_is_refused(case: str, tmp_path: Path) -> None:
    between, reason = WRONG[case]
    with pytest.raises(BadDataError, match=reason):
        to_onnx(small(between), "net", tmp_path / "m.onnx", exporters=[traced])
    assert not list(tmp_path.glob("*.onnx"))


def test_then_the_newer_one_exports(tmp_path: Path) -> None:
    loaded = small(chosen)
    to_onnx(loaded, "net", tmp_path / "m.onnx")
    pixels = torch.randn(5, 3, 8, 8)
    with torch.inference_mode():
        expected = loaded.network.conv(pixels).relu().mean((2, 3)).numpy()
    np.testing.assert_allclose(features(tmp_path / "m.onnx", pixels.numpy())[0], expected, rtol=1e-5)


def test_rows_that_mix_are_refused_whoever_exports(tmp_path: Path) -> None:
    loaded = small(lambda x: x - x.mean(0, keepdim=True))
    with pytest.raises(BadDataError, match=r"the exported net differs from torch by .* at batch 1"):
        to_onnx(loaded, "net", tmp_path / "m.onnx")


# --- imports -------------------------------------------------------------------------------------------------------------

CHILD = """
from extractor.backbones import export
export._child()
import sys
unwanted = [name for name in ("torch._dynamo", "torch._inductor", "onnxscript", "onnx_ir", "sympy") if name in sys.modules]
from torchvision.ops import roi_align
from torch._dynamo.utils import is_compile_supported
assert roi_align.__globals__["is_compile_supported"]("cpu") == is_compile_supported("cpu")
print(unwanted, file=sys.stderr)
"""
LACKING = """
from types import ModuleType
from extractor.backbones import networks
class Lacking(ModuleType):
    def __setattr__(self, name, value):
        if name != "is_compile_supported":
            super().__setattr__(name, value)
networks.ModuleType = Lacking
networks.import_without_compiler()
import torchvision, torch._dynamo.utils
assert torchvision.models.get_model("squeezenet1_1").eval() and hasattr(torch._dynamo.utils, "is_compile_supported")
"""


def test_an_export_imports_neither_the_newer_exporter_nor_the_compiler(tmp_path: Path) -> None:
    import os

    backbone = Backbone("squeezenet1_1", "random:0", resize=72, crop=64)
    request = {"backbone": backbone.facts(), "path": str(tmp_path / "m.onnx"), "parent": os.getpid()}
    done = subprocess.run(python(CHILD), input=json.dumps(request), capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-1] == "[]"
    assert json.loads(done.stdout)["facts"]


def test_a_torchvision_that_needs_more_of_the_compiler_gets_it() -> None:
    done = subprocess.run(python(LACKING), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
