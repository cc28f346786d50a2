"""The rows of providers: names of devices, and a row more, which is all that another kind of device needs."""

from __future__ import annotations

import re
import subprocess
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from extractor.graphs.backbone_facts import read_facts
from extractor.runtime.cpu import Cpu
from extractor.runtime.devices import parse_devices
from extractor.runtime.provider import DEVICES_HELP, PROVIDERS, check_device, check_devices
from extractor.runtime.session import Embedder, resolve_device
from store.errors import DeviceUnavailableError, UsageError

REPO = Path(__file__).resolve().parents[3]
ONE = r"auto|cpu|cuda(:[0-9]+)?"
SEVERAL = r"auto|cpu(,cpu)*|cuda(:[0-9]+)?(,cuda(:[0-9]+)?)*"


def test_names_of_devices_are_as_written_here() -> None:
    assert DEVICES_HELP == "auto, cpu, cuda or cuda:N, or several of one kind with commas, such as cuda:0,cuda:1"
    for words in product(["", "auto", "cpu", "cuda", ":", ":0", ":12", ":N", ",", "\n", "tpu"], repeat=4):
        text = "".join(words)
        if re.fullmatch(SEVERAL, text):
            assert check_devices(text) == text
            assert parse_devices(text) == text.split(",")
        else:
            with pytest.raises(ValueError, match=re.escape(DEVICES_HELP)):
                check_devices(text)
        if re.fullmatch(ONE, text):
            check_device(text)
        else:
            with pytest.raises(UsageError, match="expected auto, cpu, cuda or cuda:N"):
                check_device(text)


def test_the_rows_are_read_without_numpy_and_onnx_runtime() -> None:
    code = "import sys, extractor.runtime.provider; print({'numpy', 'onnx', 'onnxruntime', 'pydantic'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


class Third(Cpu):
    """A card that pads, and whose second one is broken."""

    devices = ("third", "third:N")
    shares_cores = False
    pads = True

    def lanes(self) -> int:
        return 3

    def batch_size(self, device: str) -> int:
        return 5

    def trouble(self, device: str) -> str:
        return "it is broken" if device == "third:1" else ""


def test_a_third_provider_is_a_row(backbone_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="--device third: expected"):
        resolve_device("third")
    monkeypatch.setitem(PROVIDERS, "third", Third())
    pixels = np.random.default_rng(1).integers(0, 256, (7, 64, 64, 3), np.uint8)
    preprocess = read_facts(backbone_file).preprocess
    embed = Embedder(backbone_file, preprocess, device="third:0")
    assert (embed.provider, embed.shares_cores, embed.lanes, embed.batch_size) == ("third", False, 3, 5)
    np.testing.assert_array_equal(embed(pixels), Embedder(backbone_file, preprocess)(pixels))
    assert check_devices("third,third:2") == "third,third:2"
    with pytest.raises(UsageError, match="of one kind"):
        parse_devices("third,cuda")
    with pytest.raises(DeviceUnavailableError, match="--device third:1: it is broken"):
        Embedder(backbone_file, preprocess, device="third:1")
