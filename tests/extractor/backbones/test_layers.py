"""Layers of torchvision networks: what can be asked for, that the export gives it, and several of them in one pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torchvision.models import VisionTransformer

from cli import cli
from extractor.backbones.export import to_onnx
from extractor.backbones.layers import last_weighted, list_layers, require_layers, tapped
from extractor.backbones.networks import load
from extractor.backbones.registry import Backbone
from extractor.data.folders import ImageFolder
from extractor.graphs.backbone_facts import read_facts
from extractor.graphs.parity import relative_l2
from extractor.pipeline.run import run_extract
from extractor.pipeline.settings import Options
from extractor.runtime.session import Embedder
from store.cache import PENULTIMATE, FeatureCache
from store.errors import UsageError

RESNET = Backbone("resnet18", "random:3", resize=40, crop=32)
LAYERS = ("layer2", "layer1.0.relu", PENULTIMATE)


def by_hand(network: Any, pixels: Any) -> dict[str, Any]:
    """What torch gives, written out as the network's own forward is."""
    with torch.inference_mode():
        x = network.maxpool(network.relu(network.bn1(network.conv1(pixels))))
        block = network.layer1[0]
        out = block.relu(block.bn2(block.conv2(block.relu(block.bn1(block.conv1(x))))) + x)
        found = {"layer1.0.relu": out.clone()}  # the last of the block's two calls
        x = network.layer1[1](out)
        found["layer2"] = network.layer2(x).clone()
        x = network.layer4(network.layer3(network.layer2(x)))
        found[PENULTIMATE] = x
    return {name: value.mean(dim=(2, 3)).numpy() for name, value in found.items()}


OPTIONS = Options(device="cpu", quiet=True, storage="float32", val_fraction=0, test_fraction=0)


@pytest.fixture(scope="module")
def cache(dataset: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory, exports_here: None) -> Path:
    """Features of `LAYERS` in one pass."""
    folder = tmp_path_factory.mktemp("layers")
    run_extract(ImageFolder(dataset(folder / "data")), replace(RESNET, layers=LAYERS), folder / "all.cache", OPTIONS)
    return folder / "all.cache"


def test_every_layer_asked_for_is_torchs(cache: Path) -> None:
    path = cache / "backbone.onnx"
    facts = read_facts(path)
    assert [(each.layer, each.pooling, each.dim) for each in facts.layers] == [
        ("layer2", "average", 128),
        ("layer1.0.relu", "average", 64),
        ("input of fc", "none", 512),
    ]
    pixels = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    expected = by_hand(load(RESNET).network, pixels)
    for layer, found in zip(LAYERS, Embedder(path, outputs=facts.outputs).embed(pixels.numpy()), strict=True):
        assert relative_l2(found, expected[layer]).max() <= 1e-5
        assert np.linalg.norm(expected[layer], axis=1).min() > 0.01


def test_several_layers_in_one_pass_equal_their_single_runs(cache: Path, tmp_path: Path) -> None:
    for layer, name in (("layer2", "layer2"), (PENULTIMATE, "input of fc")):
        alone = RESNET if layer == PENULTIMATE else replace(RESNET, layers=(layer,))
        run_extract(ImageFolder(cache.with_name("data")), alone, tmp_path / name, OPTIONS)
        both, one = FeatureCache(cache, layer), FeatureCache(tmp_path / name)
        assert both.layer == one.layer == name
        assert both.fingerprint == one.fingerprint
        keys = [row.sha256 for row in one.rows()]
        # graphs with another output are fused differently: the sums are the same, in another order
        assert relative_l2(both.features(keys), one.features(keys)).max() <= 1e-6


@pytest.mark.parametrize(
    ("name", "layer", "shape", "dim"),
    [
        ("resnet18", "layer3.1", [256, 14, 14], 256),
        ("vit_b_32", "encoder.layers.encoder_layer_7", [50, 768], 768),
        ("swin_t", "features.3", [28, 28, 192], 192),
        ("regnet_y_400mf", "trunk_output", [440, 7, 7], 440),
        ("maxvit_t", "blocks.1", [128, 28, 28], 128),
        ("vit_h_14", "encoder.ln", [1370, 1280], 1280),  # its weights were trained at 518 pixels
    ],
)
def test_the_layers_of_a_network_are_listed_with_their_shapes(name: str, layer: str, shape: list[int], dim: int) -> None:
    layers = {each["layer"]: each for each in list_layers(name)}
    assert next(iter(layers)) == PENULTIMATE
    assert (layers[layer]["shape"], layers[layer]["dim"], layers[layer]["pooling"]) == (shape, dim, "average")
    assert not any("dropout" in each for each in layers)


def test_a_size_that_a_network_does_not_take_is_refused_before_the_export(tmp_path: Path) -> None:
    import torchvision

    torch.save(torchvision.models.vit_b_32(weights=None).state_dict(), tmp_path / "v.pth")
    backbone = Backbone("vit_b_32", str(tmp_path / "v.pth"), "IMAGENET1K_V1", crop=128)
    with pytest.raises(UsageError, match="vit_b_32 with these weights does not take 128 x 128 pixels: Wrong image height"):
        to_onnx(load(backbone), "vit_b_32", tmp_path / "m.onnx")


@pytest.mark.parametrize("kind", ["average", "max", "token", "patches after 1", "class+mean after 1"])
def test_tokens_are_pooled_as_asked(kind: str) -> None:
    network = VisionTransformer(32, 16, 3, 2, 24, 48).eval()
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    layer = "encoder.layers.encoder_layer_1"
    caught: list[Any] = []
    network.get_submodule(layer).register_forward_hook(lambda _module, _inputs, output: caught.append(output.clone()))
    with torch.inference_mode():
        found = tapped(network, {layer: kind}, last_weighted(network, pixels))(pixels)[1]
    tokens = caught[-1]
    patches = tokens[:, 1:].mean(dim=1)
    expected = {
        "average": tokens.mean(dim=1),
        "max": tokens.amax(dim=1),
        "token": tokens[:, 0],
        "patches after 1": patches,
        "class+mean after 1": torch.cat([tokens[:, 0], patches], dim=1),
    }[kind]
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_a_layer_is_caught_before_the_next_one_works_in_place() -> None:
    network = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(inplace=True), torch.nn.Linear(4, 2)).eval()
    pixels = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        found = tapped(network, {"0": "none"}, "2")(pixels)[1]
        torch.testing.assert_close(found, network[0](pixels), rtol=0, atol=0)
    assert (found < 0).any()


@pytest.mark.parametrize(
    ("layers", "pooling", "sentence"),
    [
        (("layer5",), "average", r"--layer layer5: there is no such layer; did you mean 'layer[1-4]'"),
        (("layer1", "layer1"), "average", "one of them is named twice"),
        (("layer1",), "median", "--pooling median: expected average, max, class, patches, class.mean, token"),
    ],
)
def test_layers_that_are_not_there_are_refused(layers: tuple[str, ...], pooling: str, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        require_layers(load(RESNET).network, layers, pooling)


def test_a_layer_that_does_not_run_is_refused_before_the_export(tmp_path: Path) -> None:
    auxiliary = Backbone("googlenet", "random:0")  # its auxiliary heads are for training alone
    with pytest.raises(UsageError, match=r"--layer aux1\.fc1: it does not run, or gives no tensor"):
        to_onnx(load(auxiliary), "googlenet", tmp_path / "m.onnx", layers=["aux1.fc1"])


def test_the_command_lists_layers() -> None:
    shown = CliRunner().invoke(cli, ["backbones", "resnet18", "--layers"], catch_exceptions=False)
    assert shown.exit_code == 0
    assert any(line.split() == ["layer4", "Sequential", "512", "x", "7", "x", "7", "512"] for line in shown.stdout.splitlines())
    assert CliRunner().invoke(cli, ["backbones", "--layers"]).exit_code == 2


def test_statements_about_pixels_are_for_onnx_files() -> None:
    with pytest.raises(UsageError, match="resnet18 has the preprocessing of its weights: leave --mean, --squash out"):
        load(Backbone("resnet18", "random:0", mean=(0.5,), squash=True))
