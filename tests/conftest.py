"""What every test file may ask for: small synthetic pictures, a dataset of them, and one exported backbone per session."""

from __future__ import annotations

import functools
import importlib
import itertools
import json
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from filelock import FileLock
from PIL import Image

import cli
from classifiers.bundles import fused
from classifiers.bundles.digests import SUMS, sums_of
from extractor.backbones.custom_onnx import import_onnx
from extractor.backbones.export import export, to_onnx
from extractor.backbones.networks import load
from extractor.backbones.registry import Backbone
from extractor.graphs import onnx_file
from extractor.graphs.backbone_facts import PREFIX, BackboneFacts, facts_in, read_facts, write_facts
from extractor.machine import nvidia_driver_present
from store.progress.stages import WATCH, Clock

REPO = Path(__file__).resolve().parent.parent
ASSETS = Path(os.environ.get("PENULT_TEST_ASSETS") or REPO.parent / "shared")

MakeImage = Callable[..., Path]
MakeDataset = Callable[..., Path]
Once = Callable[[str, Callable[[Path], object]], Path]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("assets") and not ASSETS.is_dir():
            item.add_marker(pytest.mark.skip(reason=f"no shared assets: {ASSETS} does not exist (see PENULT_TEST_ASSETS)"))
        if item.get_closest_marker("gpu") and not nvidia_driver_present():
            item.add_marker(pytest.mark.skip(reason="this machine has no NVIDIA driver"))


@pytest.fixture(autouse=True)
def signals_as_before() -> Iterator[None]:
    """A command that was run in this process leaves SIGTERM ignored, which the children of later tests would inherit; and a
    shell leaves SIGINT ignored in what it runs in the background, which a test of an interruption must not."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def one_torch_thread() -> Iterator[None]:
    """Threads of tiny networks wait for each other where other processes use the cores: 20 times slower."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def assets() -> Path:
    """The folder of real photos and weights; only for tests marked ``assets``."""
    return ASSETS


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all processes of a test run share."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session", autouse=True)
def own_cache_folder(shared_folder: Path) -> Iterator[None]:
    """Prepared backbones are kept for one test run, whose processes share them; nothing is read from the home folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PENULT_CACHE", str(shared_folder / "penult"))
        yield


@pytest.fixture(scope="session")
def once(shared_folder: Path) -> Once:
    """``once(name, make) -> path``: what takes long is made by ``make(path)`` once for all processes of a test run."""

    def path_of(name: str, make: Callable[[Path], object]) -> Path:
        path, unfinished = shared_folder / name, shared_folder / f"unfinished-{name}"
        with FileLock(shared_folder / f"{name}.lock"):
            if not path.exists():
                make(unfinished)
                unfinished.rename(path)
        return path

    return path_of


def export_here(backbone: Backbone, path: Path, *_: object) -> BackboneFacts:
    """`in_child` without a child, whose start and import of torch take longer than its work."""
    if backbone.is_file:
        return import_onnx(backbone, path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's
        return to_onnx(load(backbone), backbone.name, path, layers=backbone.layers, pooling=backbone.pooling)


def as_theirs(own: Path, path: Path, *layers: str) -> Backbone:
    """A file of penult's own as somebody else's, which says nothing of itself: its tensors are layers, without torch."""
    model, pixels = onnx.load(own), read_facts(own).preprocess
    del model.metadata_props[:]
    onnx.save(model, path)
    sizes = {"resize": pixels.resize, "crop": pixels.crop, "interpolation": pixels.interpolation}
    return Backbone(str(path), layers=layers, mean=pixels.mean, std=pixels.std, **sizes)


@pytest.fixture(scope="module")
def exports_here() -> Iterator[None]:
    """Whatever exports a network does it in this process: where the child is not the subject."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("extractor.backbones.export.in_child", export_here)
        yield


@pytest.fixture(scope="session")
def imagenet(assets: Path, once: Once) -> Path:
    """MobileNetV2 with the shared ImageNet weights, as ONNX; only for tests marked ``assets``."""
    weights = str(assets / "weights/mobilenet_v2-imagenet.pth")
    return once("imagenet.onnx", lambda path: export(Backbone("mobilenet_v2", weights, "IMAGENET1K_V1"), path))


def write_image(path: Path, seed: int = 0, size: tuple[int, int] = (80, 60), fmt: str | None = None, **options: Any) -> Path:
    """A smooth coloured pattern that depends on the seed: compresses like a photo, and no two seeds give equal bytes."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8))
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse.resize(size, Image.Resampling.BICUBIC).save(path, fmt, **options)
    return path


def other_network(source: Path, target: Path) -> Path:
    """The same architecture with other weights, which says so of itself."""
    model = onnx.load(source)
    for tensor in model.graph.initializer:
        if len(tensor.raw_data) > 1000 and tensor.data_type == onnx.TensorProto.FLOAT:
            tensor.raw_data = (-np.frombuffer(tensor.raw_data, np.float32)[::-1]).tobytes()
    facts = facts_in(model)
    assert facts is not None
    del model.metadata_props[:]
    write_facts(model, facts)
    onnx_file.save(model, target)
    return target


def as_before(model: onnx.ModelProto) -> None:
    """Make a fused classifier one of an earlier version, without a digest of its graph: a test may change what it computes."""
    texts = {entry.key: entry for entry in model.metadata_props if entry.key.startswith(PREFIX)}
    model.metadata_props.remove(texts.pop(f"{PREFIX}graph_sha256"))
    entries = {key.removeprefix(PREFIX): entry.value for key, entry in texts.items()}
    del entries["facts_sha256"]
    texts[f"{PREFIX}facts_sha256"].value = json.dumps(fused._facts_digest(entries))


def seal(bundle: Path) -> None:
    """Write the digests of a bundle's files again, for a test that changes one and is about what comes after the digests."""
    (bundle / SUMS).write_bytes(sums_of(bundle))


@pytest.fixture(scope="session")
def make_image() -> MakeImage:
    """``make_image(path, seed=0, size=(80, 60), fmt=None, **save_options) -> path``; makes the folder too."""
    return write_image


@pytest.fixture(scope="session")
def dataset() -> MakeDataset:
    """``dataset(root, {"ants": 6, "bees": 6}, seed=0) -> root``: a folder per class, ``ants/000.jpg`` and so on, all distinct.

    A name may have a split before it, as in ``train/ants``.
    """

    def make(root: Path, classes: Mapping[str, int] | None = None, seed: int = 0) -> Path:
        number = 1000 * seed
        for label, count in (classes or {"ants": 6, "bees": 6}).items():
            for i in range(count):
                number += 1
                write_image(root / label / f"{i:03d}.jpg", number)
        return root

    return make


@pytest.fixture(scope="session")
def backbone_file(once: Once) -> Path:
    """SqueezeNet with random weights for 64 x 64 pixels, as ONNX: 512 features, a spatial layer that is averaged."""
    return once("squeezenet.onnx", lambda path: export(Backbone("squeezenet1_1", "random:0", resize=72, crop=64), path))


@pytest.fixture(scope="session")
def backbone(backbone_file: Path) -> Backbone:
    """`backbone_file` as `extract` takes it; making a cache with it costs milliseconds and no torch."""
    return Backbone(str(backbone_file))


class SlowClock(Clock):
    """A clock on which time passes only where a test says that work takes long; and what was said, and when."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.time, self.lines = 0.0, list[tuple[float, str]]()
        self._patch, self._lock = patch, threading.RLock()

    def now(self) -> float:
        return self.time

    def wait(self, change: threading.Condition, seconds: float) -> None:
        change.wait()  # for the end: what is due until then, `sleep` has written at its time

    def sleep(self, seconds: float) -> None:
        """Work for so long, in any thread."""
        with self._lock:
            end = self.time + seconds
            while WATCH.due <= end:
                self.time = max(self.time, WATCH.due)
                WATCH.tick()
            self.time = end

    def slow(self, where: str, seconds: float) -> None:
        """Make every call of ``module:name`` take so much longer."""
        module, _, name = where.partition(":")
        *owners, last = name.split(".")
        owner: Any = functools.reduce(getattr, owners, importlib.import_module(module))
        function = getattr(owner, last)

        @functools.wraps(function)
        def slowly(*arguments: Any, **named: Any) -> Any:
            self.sleep(seconds)
            return function(*arguments, **named)

        self._patch.setattr(owner, last, slowly)

    @property
    def longest_silence(self) -> float:
        times = [0.0, *(time for time, _ in self.lines), self.time]
        return max(after - before for before, after in itertools.pairwise(times))

    @property
    def text(self) -> str:
        return "\n".join(text for _, text in self.lines)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[SlowClock]:
    """The clock of all progress, see `SlowClock`."""
    slow = SlowClock(monkeypatch)

    class Heard(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            slow.lines.append((slow.time, record.getMessage()))

    handler, logger = Heard(logging.INFO), logging.getLogger("penult")
    level = logger.level
    WATCH.forget()
    monkeypatch.setattr(WATCH, "clock", slow)
    logger.setLevel(logging.INFO)
    logging.getLogger().addHandler(handler)  # a command replaces those of penult's own logger
    yield slow
    logging.getLogger().removeHandler(handler)
    logger.setLevel(level)


@pytest.fixture
def penult(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[Callable[..., tuple[int, str, str]]]:
    """``penult("info", path) -> (exit code, stdout, stderr)``, in this process (torch need not be imported again)."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["penult", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit_info:
            cli.main()
        out, err = capfd.readouterr()
        return int(exit_info.value.code or 0), out, err

    logger = logging.getLogger("penult")
    handlers, level = logger.handlers, logger.level
    yield call
    logger.handlers = handlers
    logger.setLevel(level)
