"""The children that decode: what their death, their silence and their hunger cost, and that none is left behind."""

from __future__ import annotations

import gc
import io
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from classifiers.bundles.predictor import Predictor, Recipe
from classifiers.evaluation.registry import task_of
from extractor.backbones.registry import Backbone
from extractor.data.folders import ImageFolder
from extractor.pipeline.run import run_extract
from extractor.pipeline.settings import Options
from extractor.pipeline.summary import Summary
from extractor.pixels import decoder as decoding
from extractor.pixels.decoder import Decoder
from extractor.pixels.images import ImageError, decode
from extractor.pixels.preprocess import Preprocess
from extractor.signals import StopFlag
from store.cache import FeatureCache
from store.errors import InterruptedRunError, PenultError

REPO = Path(__file__).resolve().parents[3]
STANDARD = Preprocess(72, 64, "bilinear", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

# A worker that does what a file's last bytes say; a picture may end in anything.
OBEDIENT = """
import ctypes, os, signal, time
import numpy
import extractor.pixels.decoder as worker
read = worker.Preprocess.read

def hang():
    while True:
        signal.pause()

orders = {
    b"#segv": lambda: ctypes.string_at(0),
    b"#abort": os.abort,
    b"#exit": lambda: os._exit(7),
    b"#kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    b"#hang": hang,
    b"#spin": lambda: sum(iter(int, 1)),
    b"#stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    b"#eat": lambda: numpy.ones(2**30, numpy.uint8),
    b"#bug": lambda: {}["no such key"],
    b"#print": lambda: (os.write(1, b"a library that prints"), os.write(2, b"x" * 2**20)),
    b"#tell": lambda: (os.kill(os.getppid(), signal.SIGTERM), hang()),
}

def obey(preprocess, data, **options):
    for order, do in orders.items():
        if data.endswith(order):
            do()
    return read(preprocess, data, **options)

worker.Preprocess.read = obey
worker.serve()
"""
DEADLY = {"#segv": "signal 11", "#abort": "signal 6", "#exit": "exit status 7", "#kill": "signal 9"}

MakeImage = Callable[..., Path]
MakeDataset = Callable[..., Path]


def picture(seed: int = 0, order: str = "") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (60, 80, 3), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue() + order.encode()


def refusal(decoder: Decoder, data: bytes) -> ImageError:
    with pytest.raises(ImageError) as caught:
        decoder(data)
    return caught.value


def processes(decoder: Decoder) -> list[int]:
    return sorted(worker._process.pid for worker in decoder._workers)


@pytest.fixture
def obedient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "START", OBEDIENT)


# --- the pixels --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preprocess", [STANDARD, Preprocess(232, 224, "bicubic", (0,) * 3, (1,) * 3)], ids=["64", "224"])
def test_pixels_are_those_of_this_process(preprocess: Preprocess, make_image: MakeImage, tmp_path: Path) -> None:
    with Decoder(preprocess) as cropped, Decoder(preprocess, crop=False) as whole:
        for seed, size in enumerate([(500, 333), (64, 900), (1, 1), (72, 72), (30, 20)]):
            data = make_image(tmp_path / "one.jpg", seed, size).read_bytes()
            found = cropped(data)
            assert (found.dtype, found.flags.c_contiguous, found.flags.writeable) == (np.uint8, True, True)
            np.testing.assert_array_equal(found, preprocess.pixels(decode(data)))
            np.testing.assert_array_equal(whole(data), np.asarray(preprocess.scaled(decode(data))))


@pytest.mark.assets
def test_real_photos_are_the_same_to_the_bit(assets: Path) -> None:
    preprocess = Preprocess(256, 224, "bilinear", (0.5,) * 3, (0.5,) * 3)
    photos = [path.read_bytes() for path in sorted((assets / "data/photos").rglob("*.*"))[::5]]
    assert len(photos) == 50
    with Decoder(preprocess) as decoder, ThreadPoolExecutor(3) as pool:
        for data, found in zip(photos, pool.map(decoder, photos), strict=True):
            np.testing.assert_array_equal(found, preprocess.pixels(decode(data)))


def test_a_worker_imports_no_more_than_it_needs() -> None:
    unwanted = {"h5py", "torch", "onnx", "onnxruntime", "click"}
    code = f"import sys; import extractor.pixels.decoder; print({unwanted} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPO)
    assert done.stdout.strip() == "set()"


# --- death, silence, hunger --------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("obedient")
@pytest.mark.parametrize("order", DEADLY)
def test_a_worker_that_dies_costs_one_file(order: str) -> None:
    with Decoder(STANDARD) as decoder:
        expected = decoder(picture(1))
        (first,) = processes(decoder)
        error = refusal(decoder, picture(1, order))
        assert error.code == "decoder_crash"
        assert DEADLY[order] in str(error)
        np.testing.assert_array_equal(decoder(picture(1)), expected)
        (second,) = processes(decoder)
        assert second != first


@pytest.mark.usefixtures("obedient")
@pytest.mark.parametrize("order", ["#hang", "#spin", "#stop"])
def test_a_worker_that_is_silent_is_replaced(order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with Decoder(STANDARD) as decoder:
        expected = decoder(picture(1))
        (first,) = processes(decoder)
        with monkeypatch.context() as patch:
            patch.setattr(decoding, "TIMEOUT", 0.25)
            error = refusal(decoder, picture(1, order))
        assert (error.code, str(error)) == ("timeout", "no answer from the decoder for 0.25 s")
        np.testing.assert_array_equal(decoder(picture(1)), expected)
        assert processes(decoder) != [first]


@pytest.mark.usefixtures("obedient")
def test_what_goes_wrong_inside_a_worker_does_not_end_it() -> None:
    with Decoder(STANDARD) as decoder:
        expected = decoder(picture(1))
        before = processes(decoder)
        error = refusal(decoder, picture(1, "#eat"))
        assert (error.code, str(error)) == ("too_large", "needs more than 1 GiB to decode")
        error = refusal(decoder, picture(1, "#bug"))
        assert (error.code, str(error)) == ("decoder_crash", "KeyError: 'no such key'")
        assert refusal(decoder, b"text").code == "not_an_image"
        np.testing.assert_array_equal(decoder(picture(1, "#print")), expected)
        assert processes(decoder) == before


def test_a_progressive_jpeg_that_does_not_fit_is_too_large_not_broken() -> None:
    """libjpeg keeps a progressive picture's coefficients; when it gets no memory, Pillow hears of a broken stream."""
    data = bytearray(picture_as_jpeg(progressive=True))
    at = data.index(b"\xff\xc2") + 5
    data[at : at + 4] = (13000).to_bytes(2) * 2
    with Decoder(STANDARD) as decoder:
        error = refusal(decoder, bytes(data))
    assert error.code == "too_large"
    assert "13000 x 13000 pixels probably need more than 1 GiB" in str(error)


def picture_as_jpeg(**options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (80, 60), (9, 99, 199)).save(buffer, "JPEG", **options)
    return buffer.getvalue()


def test_a_file_too_large_for_a_worker_is_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "MAX_BYTES", 99)
    with Decoder(STANDARD) as decoder:
        assert refusal(decoder, picture()).code == "too_large"
        assert processes(decoder) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_are_for_the_parent(number: int) -> None:
    with Decoder(STANDARD) as decoder:
        expected = decoder(picture(1))
        (child,) = processes(decoder)
        for _ in range(3):
            os.kill(child, number)
        np.testing.assert_array_equal(decoder(picture(1)), expected)
        assert processes(decoder) == [child]


def test_a_worker_killed_while_idle_costs_nothing() -> None:
    with Decoder(STANDARD) as decoder:
        expected = decoder(picture(1))
        (worker,) = decoder._workers
        os.kill(worker._process.pid, signal.SIGKILL)
        os.waitid(os.P_PID, worker._process.pid, os.WEXITED | os.WNOWAIT)
        np.testing.assert_array_equal(decoder(picture(1)), expected)
        assert len(processes(decoder)) == 1


def test_a_worker_that_cannot_start_is_no_files_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "START", "raise SystemExit('no numpy here')")
    with Decoder(STANDARD) as decoder:
        with pytest.raises(PenultError, match=r"the decode worker does not start: .* exit status 1") as caught:
            decoder(picture())
        assert caught.value.__notes__ == ["no numpy here\n"]
        assert processes(decoder) == []


# --- beginning and end -------------------------------------------------------------------------------------------------


def descriptors() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd" if sys.platform == "linux" else "/dev/fd"))  # noqa: PTH208 - it changes


def test_nothing_is_left_open() -> None:
    before = descriptors()
    with Decoder(STANDARD) as decoder, ThreadPoolExecutor(3) as pool:
        assert len(list(pool.map(decoder, [picture(seed) for seed in range(20)]))) == 20
        workers = list(decoder._workers)
        assert 1 <= len(workers) <= 3
    assert descriptors() == before
    assert all(worker._process.returncode is not None for worker in workers)
    with pytest.raises(ValueError, match="closed"):
        decoder(picture())


@pytest.mark.usefixtures("obedient")
def test_leaving_does_not_wait_for_a_worker_that_hangs() -> None:
    """Ctrl-C where nobody handles it: the exception passes, and what hangs in another thread ends with it."""
    before, begin = descriptors(), time.perf_counter()
    with ThreadPoolExecutor(2) as pool, suppress(KeyboardInterrupt), Decoder(STANDARD) as decoder:
        expected = decoder(picture(1))
        future = pool.submit(decoder, picture(1, "#hang"))
        np.testing.assert_array_equal(decoder(picture(1)), expected)
        raise KeyboardInterrupt
    assert isinstance(future.exception(), ImageError | ValueError)
    assert time.perf_counter() - begin < decoding.TIMEOUT / 2
    assert descriptors() == before


@pytest.mark.usefixtures("obedient")
def test_a_run_that_is_to_stop_does_not_wait_either() -> None:
    stop = StopFlag()
    begin = time.perf_counter()
    with Decoder(STANDARD, stop=stop) as decoder:
        decoder(picture())
        stop.signum = signal.SIGTERM
        with pytest.raises(InterruptedRunError):
            decoder(picture(1, "#hang"))
        assert processes(decoder) == []
    assert time.perf_counter() - begin < decoding.TIMEOUT / 2


PARENT = """
import json, os, signal, sys
request = json.load(sys.stdin)
sys.path.insert(0, request["repo"])
from pathlib import Path
import extractor.pixels.decoder as decoding
from extractor.backbones.registry import Backbone
from extractor.pipeline.settings import Options
from extractor.pipeline.run import run_extract
from extractor.pixels.preprocess import Preprocess
from extractor.data.folders import ImageFolder
from store.errors import PenultError

decoding.START = request["start"]
decoding.TIMEOUT = request["timeout"]
if "net" in request:
    options = Options(device="cpu", batch_size=2, workers=2, quiet=True)
    try:
        run_extract(ImageFolder(Path(request["data"])), Backbone(request["net"]), Path(request["cache"]), options)
    except PenultError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
else:
    decoder = decoding.Decoder(Preprocess(72, 64, "bilinear", (0, 0, 0), (1, 1, 1)))
    files = [Path(name).read_bytes() for name in request["files"]]
    decoder(files[0])
    (worker,) = decoder._workers
    print(worker._process.pid, flush=True)
    if len(files) == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    decoder(files[1])
"""


def in_child(**request: Any) -> subprocess.Popen[str]:
    request = {"repo": str(REPO), "start": OBEDIENT, "timeout": 60, **request}
    pipe = subprocess.PIPE
    child = subprocess.Popen([sys.executable, "-c", PARENT], stdin=pipe, stdout=pipe, stderr=pipe, text=True)
    assert child.stdin is not None
    child.stdin.write(json.dumps(request))
    child.stdin.close()
    child.stdin = None
    return child


def ended(pid: int, within: float) -> bool:
    """Whether a process that is not our child ends in so many seconds."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([handle], [], [], within)[0])
    finally:
        os.close(handle)


@pytest.mark.skipif(sys.platform != "linux", reason="needs pidfd_open")
@pytest.mark.parametrize(("orders", "timeout"), [([""], 60), (["", "#hang"], 1)], ids=["idle", "hanging"])
def test_a_killed_parent_leaves_no_worker_behind(orders: list[str], timeout: float, tmp_path: Path) -> None:
    """An idle one sees the end of its input; one that hangs in a library has an alarm set."""
    files = [tmp_path / f"{i}.png" for i in range(len(orders))]
    for i, (file, order) in enumerate(zip(files, orders, strict=True)):
        file.write_bytes(picture(i, order))
    with in_child(files=[str(file) for file in files], timeout=timeout) as parent:
        assert parent.stdout is not None
        worker = int(parent.stdout.readline())
        parent.kill()
        assert parent.wait() == -signal.SIGKILL
    assert ended(worker, 30)


def test_sigterm_ends_a_run_whose_decoder_hangs(dataset: MakeDataset, backbone: Backbone, tmp_path: Path) -> None:
    data = dataset(tmp_path / "data", {"ants": 6, "bees": 6})
    (data / "bees/002.jpg").write_bytes((data / "bees/002.jpg").read_bytes() + b"#tell")
    begin = time.perf_counter()
    with in_child(data=str(data), cache=str(tmp_path / "c"), net=backbone.name) as parent:
        _, stderr = parent.communicate(timeout=60)
    assert parent.returncode == 143, stderr
    assert "interrupted by signal 15; run the same command again" in stderr
    assert time.perf_counter() - begin < 20
    (data / "bees/002.jpg").write_bytes(picture(5))
    chosen = Options(device="cpu", batch_size=2, workers=2, quiet=True)
    summary = run_extract(ImageFolder(data), backbone, tmp_path / "c", chosen)
    assert (summary.ok, summary.failed) == (12, 0)


# --- whole commands ----------------------------------------------------------------------------------------------------


@pytest.fixture
def run(backbone: Backbone) -> Callable[..., Summary]:
    def go(data: Path, cache: Path, **options: Any) -> Summary:
        chosen = Options(**{"device": "cpu", "batch_size": 4, "workers": 2, "quiet": True, **options})
        return run_extract(ImageFolder(data), backbone, cache, chosen)

    return go


def features(cache: Path) -> dict[bytes, bytes]:
    subset = FeatureCache(cache).subset()
    return {path: x.tobytes() for path, x in zip(subset.paths, subset.X, strict=True)}


@pytest.mark.usefixtures("obedient")
def test_each_fault_costs_one_entry_of_the_ledger(
    run: Callable[..., Summary], dataset: MakeDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoding, "TIMEOUT", 3.0)
    data = dataset(tmp_path / "data", {"ants": 6, "bees": 6})
    run(data, tmp_path / "sound", storage="float32")
    expected = {**dict.fromkeys(DEADLY, "decoder_crash"), "#hang": "timeout", "#eat": "too_large"}
    for i, order in enumerate(expected):
        (data / f"ants/{i}{order}.png").write_bytes(picture(i, order))
    summary = run(data, tmp_path / "c", storage="float32", max_failures="6")
    assert (summary.ok, summary.failed, summary.computed) == (12, 6, 12)
    failed = {row.name: row.code for row in FeatureCache(tmp_path / "c").samples.rows if not row.ok}
    assert failed == {f"ants/{i}{order}.png": code for i, (order, code) in enumerate(expected.items())}
    assert features(tmp_path / "c") == features(tmp_path / "sound")


def test_an_unchanged_data_set_starts_no_worker(
    run: Callable[..., Summary], dataset: MakeDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = dataset(tmp_path / "data", {"ants": 6, "bees": 6})
    run(data, tmp_path / "c")
    monkeypatch.setattr(decoding, "START", "raise SystemExit('started')")
    assert run(data, tmp_path / "c").computed == 0


@pytest.mark.usefixtures("obedient")
def test_a_prediction_survives_what_kills_a_decoder(backbone_file: Path, tmp_path: Path) -> None:
    names = ["a.png", "b#segv.png", "c.png", "d#exit.png", "e.png"]
    for i, name in enumerate(names):
        (tmp_path / name).write_bytes(picture(i, name[1:-4]))

    def head(features: np.ndarray) -> np.ndarray:
        return np.tile(np.float32([0.25, 0.75]), (len(features), 1))

    recipe = Recipe(backbone_file, STANDARD, head, task_of("single-label", ["ants", "bees"]))
    predictor = Predictor(recipe, device="cpu", workers=2)
    found = list(predictor.predict(tmp_path / name for name in names))
    assert [(one.label, one.code) for one in found] == [
        ("bees", None),
        (None, "decoder_crash"),
        ("bees", None),
        (None, "decoder_crash"),
        ("bees", None),
    ]
