"""A GPU in the pipeline: providers and their proof, buffers that are bound once, out of memory, TF32, TensorRT, float16.

ONNX Runtime's answers are real; what this machine has not, a card, is staged by `FakeRuntime`. Tests marked ``gpu`` need one.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import types
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from threading import Barrier, Thread
from typing import Any

import numpy as np
import pytest

from classifiers.logistic import LogisticHead
from classifiers.predict import Predictor
from classifiers.train import train_head
from cli import calibration_text
from extractor import cuda, session
from extractor.backbones import Backbone
from extractor.cuda import BoundLane, Cuda, engine_folder, load_libraries, pin, prove, providers
from extractor.half import BOUND, COSINE, compare, halve
from extractor.onnxfile import read_facts
from extractor.options import Options
from extractor.parity import relative_l2
from extractor.pipeline import run_extract
from extractor.session import Embedder, resolve_device
from extractor.sources import ImageFolder
from extractor.tuning import tune
from store.cache import FeatureCache
from store.errors import BadDataError, DeviceUnavailableError, FingerprintMismatchError, OutputError, UsageError

REPO = Path(__file__).resolve().parent.parent
CUDA, TENSORRT, CPU = "CUDAExecutionProvider", "TensorrtExecutionProvider", "CPUExecutionProvider"
DTYPES = {"tensor(float)": np.dtype(np.float32), "tensor(uint8)": np.dtype(np.uint8)}


def batch(count: int, side: int = 64, seed: int = 1) -> Any:
    return np.random.default_rng(seed).standard_normal((count, 3, side, side)).astype(np.float32)


def pixels(count: int, side: int = 64, seed: int = 1) -> Any:
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), np.uint8)


def run(path: Path, given: Any) -> Any:
    import onnxruntime

    found = onnxruntime.InferenceSession(str(path), providers=[CPU])
    return found.run(None, {found.get_inputs()[0].name: given})[0]


class FakeRuntime(types.ModuleType):
    """ONNX Runtime on a machine with a GPU that this one is not: real answers from the CPU, staged providers and failures.

    Its buffers and bindings refuse what the real ones refuse: other sizes, other types, unknown names, another device than
    the session's. Every array that leaves the "device" is a copy, as there.
    """

    cuda_version = "13.0"

    def __init__(
        self, onnxruntime: Any, delivered: str, fits: int = 10**9, message: str = "", strays: tuple[str, str] | None = None
    ) -> None:
        super().__init__("onnxruntime")
        self.opened = 0
        self.sizes: list[int] = []
        self.buffers: list[tuple[tuple[int, ...], str]] = []
        self.graph_ids: list[str] = []
        self.printed, self.refused = "", ""
        self.SessionOptions, self.RunOptions = onnxruntime.SessionOptions, onnxruntime.RunOptions
        fake = self

        class OrtValue:
            def __init__(self, shape: list[int], dtype: Any, device: str, number: int) -> None:
                assert device == "cuda", f"{device}: the real one has no such memory for this session"
                fake.buffers.append((tuple(shape), device))
                self.data, self.number = np.zeros(shape, dtype), number

            ortvalue_from_shape_and_type = classmethod(lambda cls, *given: cls(*given))

            def update_inplace(self, data: Any) -> None:
                if data.nbytes != self.data.nbytes:
                    raise RuntimeError("The input size of numpy arrays does not match the size of the OrtValue.")
                assert data.dtype == self.data.dtype, "the real one takes it without a conversion"
                self.data[:] = data

            def numpy(self) -> Any:
                return self.data.copy()

        class Binding:
            def __init__(self, session: Any) -> None:
                self.session, self.inputs, self.outputs = session, {}, {}

            def bind_ortvalue_input(self, name: str, value: OrtValue) -> None:
                self._bind(self.inputs, self.session.get_inputs(), name, value)

            def bind_ortvalue_output(self, name: str, value: OrtValue) -> None:
                self._bind(self.outputs, self.session.get_outputs(), name, value)

            def _bind(self, bound: dict[str, OrtValue], known: Any, name: str, value: OrtValue) -> None:
                if name not in {each.name for each in known}:
                    raise RuntimeError(f"Failed to find input name in the mapping: {name}")
                assert value.number == self.session.number
                bound[name] = value

        class Session:
            def __new__(cls, model: Any, options: Any = None, providers: Any = (), **_: Any) -> Any:
                if providers == [CPU]:
                    return onnxruntime.InferenceSession(model, options, providers=providers)
                return super().__new__(cls)

            def __init__(self, model: Any, options: Any, providers: list[Any], enable_fallback: int = 1) -> None:
                assert not enable_fallback, "the real one prints to stdout and goes on with the CPU"
                assert options.get_session_config_entry("session.record_ep_graph_assignment_info") == "1"
                fake.opened += 1
                fake.providers = providers
                if fake.refused and providers[0][1].get("enable_cuda_graph") == "1":
                    raise RuntimeError(fake.refused)
                self.number, self.running = providers[0][1]["device_id"], threading.Lock()
                self.graph = providers[0][1].get("enable_cuda_graph") == "1"
                self._real = onnxruntime.InferenceSession(model, options, providers=[CPU])
                self.get_inputs, self.get_outputs = self._real.get_inputs, self._real.get_outputs

            def get_providers(self) -> list[str]:
                return [delivered, CPU]

            def get_provider_graph_assignment_info(self) -> Any:
                def part(name: str, kind: str) -> Any:
                    node = types.SimpleNamespace(op_type=kind, name="layer")
                    return types.SimpleNamespace(ep_name=name, get_nodes=lambda: [node])

                return [part(delivered, "Conv"), part(CPU, "Shape"), *([part(*strays)] if strays else [])]

            def io_binding(self) -> Binding:
                return Binding(self)

            def run_with_iobinding(self, binding: Binding, options: Any) -> None:
                if self.graph:
                    assert self.running.acquire(blocking=False), "a CUDA graph in two threads at once"
                    fake.graph_ids.append(options.get_run_config_entry("gpu_graph_id"))
                try:
                    ((name, value),) = binding.inputs.items()
                    wanted = DTYPES[self.get_inputs()[0].type]
                    if value.data.dtype != wanted:
                        raise RuntimeError(f"Unexpected input data type. Actual: {value.data.dtype}, expected: {wanted}")
                    fake.sizes.append(len(value.data))
                    if len(value.data) > fits:
                        raise RuntimeError(message)
                    found = self._real.run(list(binding.outputs), {name: value.data})
                    for bound, result in zip(binding.outputs.values(), found, strict=True):
                        if bound.data.shape != result.shape:
                            raise RuntimeError("OrtValue shape verification failed.")
                        bound.data[:] = result
                finally:
                    if self.graph:
                        self.running.release()

        self.InferenceSession, self.OrtValue = Session, OrtValue

    def get_available_providers(self) -> list[str]:
        return [TENSORRT, CUDA, CPU]

    def preload_dlls(self) -> None:
        print(self.printed)

    def set_default_logger_severity(self, level: int) -> None: ...


Stage = Callable[..., FakeRuntime]


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Stage:
    import onnxruntime
    import onnxruntime.transformers.float16  # a part of the real one, for those who import it later

    def on(delivered: str, **options: Any) -> FakeRuntime:
        fake = FakeRuntime(onnxruntime, delivered, **options)
        monkeypatch.setitem(sys.modules, "onnxruntime", fake)
        monkeypatch.setattr(session, "nvidia_driver_present", lambda: True)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
        monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "")
        return fake

    return on


# --- which device, and the proof ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["gpu", "", "cuda:", "cuda:x", "cpu:0", "auto:1", "cuda:-1", "tensorrt:-1", "cuda:0,"])
def test_a_device_that_is_none_is_a_usage_error(device: str) -> None:
    with pytest.raises(UsageError, match="expected auto, cpu, cuda"):
        resolve_device(device)


@pytest.mark.parametrize("device", ["cuda", "cuda:1", "tensorrt", "tensorrt:1"])
def test_a_gpu_session_that_silently_runs_elsewhere_is_an_error(backbone_file: Path, stage: Stage, device: str) -> None:
    stage(CPU)
    assert resolve_device("auto") == "cuda"
    assert resolve_device(device) == device
    with pytest.raises(DeviceUnavailableError, match="made a session on CPUExecutionProvider instead") as caught:
        Embedder(backbone_file, device=device)
    assert caught.value.exit_code == 69


def test_tensorrt_that_falls_back_to_cuda_is_an_error(backbone_file: Path, stage: Stage) -> None:
    stage(CUDA)
    with pytest.raises(DeviceUnavailableError, match=r"CUDAExecutionProvider instead: .* is TensorRT 10 here\?"):
        Embedder(backbone_file, device="tensorrt")


def test_auto_is_the_cpu_without_a_driver(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(session, "nvidia_driver_present", lambda: False)
    with caplog.at_level(logging.INFO):
        session._say_cpu.cache_clear()  # said once per process
        assert resolve_device("auto") == "cpu"
    assert "running on the CPU" in caplog.text
    assert resolve_device("cpu") == "cpu"
    with pytest.raises(DeviceUnavailableError, match="--device cuda:1: this machine has no NVIDIA driver") as caught:
        resolve_device("cuda:1")
    assert caught.value.exit_code == 69


@pytest.mark.parametrize(("device", "delivered", "advice"), [("cuda", CUDA, "cpu"), ("tensorrt", TENSORRT, "cuda")])
def test_layers_that_are_computed_elsewhere_are_an_error(
    backbone_file: Path, stage: Stage, device: str, delivered: str, advice: str
) -> None:
    stage(delivered, strays=(CPU, "Conv"))
    with pytest.raises(DeviceUnavailableError, match=f"gave Conv 'layer' to {CPU}; .* try --device {advice}"):
        Embedder(backbone_file, device=device)
    stage(delivered, strays=(CPU, "Gather"))  # shapes may be computed there
    assert Embedder(backbone_file, device=device).provider == device


def test_the_proof_reads_what_onnx_runtime_really_says(backbone_file: Path) -> None:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    real = onnxruntime.InferenceSession(str(backbone_file), options, providers=[CPU])
    faked = types.SimpleNamespace(
        get_providers=lambda: [CUDA], get_provider_graph_assignment_info=real.get_provider_graph_assignment_info
    )
    with pytest.raises(DeviceUnavailableError, match=f"gave Conv '.+' to {CPU}"):
        prove(faked, "cuda", onnxruntime)


def test_what_is_missing_is_in_the_message_and_not_on_stdout(
    backbone_file: Path, stage: Stage, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = stage(CPU)
    fake.printed = "Failed to load libcurand.so.10"
    with pytest.raises(DeviceUnavailableError, match=r"is cuDNN 9 here\?\) Failed to load libcurand.so.10$"):
        Embedder(backbone_file, device="cuda")
    assert capsys.readouterr().out == ""


def test_a_runtime_without_cuda_is_named(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = stage(CPU)
    monkeypatch.setattr(fake, "get_available_providers", lambda: [CPU])
    assert resolve_device("auto") == "cpu"
    with pytest.raises(DeviceUnavailableError, match="install onnxruntime-gpu"):
        resolve_device("cuda")
    with pytest.raises(DeviceUnavailableError, match="no TensorrtExecutionProvider"):
        resolve_device("tensorrt:1")


# --- options -----------------------------------------------------------------------------------------------------------


def test_a_gpu_session_asks_for_its_device_without_tf32(backbone_file: Path, stage: Stage) -> None:
    fake = stage(CUDA)
    assert Embedder(backbone_file, device="cuda:3").provider == "cuda"
    name, options = fake.providers[0]
    assert name == CUDA
    assert options == {
        "device_id": 3,
        "arena_extend_strategy": "kSameAsRequested",
        "use_tf32": "0",
        "cudnn_conv_algo_search": "EXHAUSTIVE",
        "prefer_nhwc": "0",
        "enable_cuda_graph": "0",
    }


@pytest.mark.parametrize("chosen", [Cuda(half=True), Cuda(tf32=True)])
def test_tensor_cores_get_nhwc(stage: Stage, chosen: Cuda) -> None:
    stage(CUDA)
    (_, options), last = providers("cuda", chosen, b"")
    assert (options["prefer_nhwc"], options["use_tf32"], last) == ("1", str(int(chosen.tf32)), CPU)
    assert providers("cuda", replace(chosen, nhwc=False), b"")[0][1]["prefer_nhwc"] == "0"


def test_tensorrt_keeps_engines_under_what_decides_the_numbers(
    backbone_file: Path, stage: Stage, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake = stage(TENSORRT)
    embed = Embedder(backbone_file, read_facts(backbone_file).preprocess, device="tensorrt:1", batch_size=4)
    assert (embed.provider, embed.lanes) == ("tensorrt", 2)
    (name, options), (second, _), last = fake.providers
    assert (name, second, last) == (TENSORRT, CUDA, CPU)
    assert (options["device_id"], options["trt_fp16_enable"], options["trt_engine_cache_enable"]) == (1, "0", "1")
    assert os.environ["NVIDIA_TF32_OVERRIDE"] == "0", "TensorRT has TF32 on, and the fingerprint says it is off"
    folder = Path(options["trt_engine_cache_path"])
    assert folder.is_dir()
    assert folder.parent == tmp_path / "xdg" / "penult" / "tensorrt"
    assert embed(pixels(5)).shape == (5, 512)
    assert tune(embed, 64, 10**9) == {}, "every size would build an engine for minutes"
    names = {engine_folder(b"a", Cuda()), engine_folder(b"b", Cuda()), engine_folder(b"a", Cuda(half=True))}
    assert len(names) == 3
    assert engine_folder(b"a", Cuda(graph=True)) in names, "how it is launched decides nothing"


def test_engines_have_a_place_or_the_message_says_how(
    backbone_file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert engine_folder(backbone_file, Cuda()).is_dir()
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(OutputError, match="for TensorRT's engines: Not a directory; PENULT_CACHE names another place"):
        engine_folder(b"", Cuda())


# --- lanes and buffers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cuda", "tensorrt:2"])
def test_buffers_are_made_once_for_each_lane(backbone_file: Path, stage: Stage, device: str) -> None:
    preprocess = read_facts(backbone_file).preprocess
    expected = Embedder(backbone_file, preprocess, batch_size=4)(pixels(40))
    fake = stage({"cuda": CUDA, "tensorrt:2": TENSORRT}[device])
    embed = Embedder(backbone_file, preprocess, device=device, batch_size=4)
    found = [future.result()[0] for future in [embed.submit(pixels(40)[i : i + 4]) for i in range(0, 40, 4)]]
    np.testing.assert_array_equal(np.concatenate(found), expected)
    assert 2 <= len(fake.buffers) <= 2 * embed.lanes, "one for pixels and one for features in each lane"
    assert set(fake.buffers) == {((4, 64, 64, 3), "cuda"), ((4, 512), "cuda")}
    embed.batch_size = 2
    np.testing.assert_array_equal(embed(pixels(3)), expected[:3])
    assert fake.buffers[-2:] == [((2, 64, 64, 3), "cuda"), ((2, 512), "cuda")]


def test_features_that_were_handed_out_are_not_written_again(backbone_file: Path) -> None:
    """On the CPU ONNX Runtime hands out views of its buffers: the very case that would go wrong."""
    import onnxruntime

    real = onnxruntime.InferenceSession(str(backbone_file), providers=[CPU])
    name = real.get_inputs()[0].name
    lane = BoundLane(real, "cpu", name, (4, 3, 64, 64), np.float32, {"features": 512}, threading.Lock())
    first = lane(batch(4))[0]
    kept = first.copy()
    second = lane(batch(4, seed=2))[0]
    np.testing.assert_array_equal(first, kept)
    np.testing.assert_array_equal(first, real.run(None, {name: batch(4)})[0])
    np.testing.assert_array_equal(second, real.run(None, {name: batch(4, seed=2)})[0])


def test_bound_lanes_of_one_session_run_at_once(backbone_file: Path) -> None:
    """The code of a GPU's lanes, on the CPU's buffers: two threads, one session, no row in the other's."""
    import onnxruntime

    real = onnxruntime.InferenceSession(str(backbone_file), providers=[CPU])
    name = real.get_inputs()[0].name
    start, results = Barrier(2), {}

    def work(seed: int) -> None:
        lane = BoundLane(real, "cpu", name, (2, 3, 64, 64), np.float32, {"features": 512}, nullcontext())
        start.wait()
        results[seed] = [lane(batch(2, seed=seed + i))[0] for i in range(5)]

    threads = [Thread(target=work, args=(seed,)) for seed in (10, 20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed, found in results.items():
        for i, features in enumerate(found):
            assert relative_l2(features, run_with(real, name, batch(2, seed=seed + i))).max() <= 1e-6


def run_with(real: Any, name: str, given: Any) -> Any:
    return real.run(None, {name: given})[0]


def test_a_batch_of_another_type_is_refused_rather_than_converted(backbone_file: Path) -> None:
    import onnxruntime

    real = onnxruntime.InferenceSession(str(backbone_file), providers=[CPU])
    name = real.get_inputs()[0].name
    lane = BoundLane(real, "cpu", name, (2, 3, 64, 64), np.float32, {"features": 512}, threading.Lock())
    with pytest.raises(TypeError, match="Cannot cast"):
        lane(batch(2).astype(np.float64))


def test_memory_that_cannot_be_pinned_is_used_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    class Runtime:
        status = 35  # cudaErrorInsufficientDriver

        def __getattr__(self, name: str) -> Any:
            return lambda *_: calls.append(name) or (self.status if name == "cudaHostRegister" else 0)

    fake = types.SimpleNamespace(cuda_version="13.0")
    monkeypatch.setattr(cuda.ctypes, "CDLL", lambda name: Runtime() if name == "libcudart.so.13" else pytest.fail(name))
    buffer = np.zeros(10)
    assert not pin(buffer, 1, fake)
    assert calls == ["cudaSetDevice", "cudaHostRegister", "cudaGetLastError"]
    Runtime.status = 0
    assert pin(buffer, 1, fake)
    calls.clear()
    del buffer
    assert calls == ["cudaHostUnregister"]
    monkeypatch.setattr(cuda.ctypes, "CDLL", lambda _: (_ for _ in ()).throw(OSError("no such file")))
    assert not pin(np.zeros(10), 0, fake)


def test_a_cuda_graph_is_each_lanes_own_and_runs_alone(backbone_file: Path, stage: Stage) -> None:
    fake = stage(CUDA)
    embed = Embedder(backbone_file, device="cuda", batch_size=2, lanes=1, cuda=Cuda(graph=True))
    assert fake.providers[0][1]["enable_cuda_graph"] == "1"
    futures = [embed.submit(batch(4)) for _ in range(5)]
    for _ in range(5):  # the lane of this thread beside the pool's
        embed(batch(4))
    for future in futures:
        future.result()
    assert len(set(fake.graph_ids)) == 2
    embed.batch_size = 4
    embed(batch(4))
    assert len(set(fake.graph_ids)) == 3, "other buffers, another graph"


def test_a_network_that_cannot_be_captured_runs_without_a_graph(
    backbone_file: Path, stage: Stage, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "penult")
    fake = stage(CUDA)
    fake.refused = "This session cannot use the graph capture feature as requested by the user"
    embed = Embedder(backbone_file, device="cuda", batch_size=2, lanes=1, cuda=Cuda(graph=True))
    assert fake.providers[0][1]["enable_cuda_graph"] == "0"
    assert embed(batch(2)).shape == (2, 512)
    assert "no CUDA graph" in caplog.text


def test_a_graph_is_for_one_lane(backbone_file: Path) -> None:
    with pytest.raises(ValueError, match="one lane"):
        Embedder(backbone_file, device="cuda", cuda=Cuda(graph=True))


# --- the whole way -----------------------------------------------------------------------------------------------------


def test_float16_is_extracted_on_a_gpu_and_predicted_from_on_a_cpu(
    dataset: Any, backbone: Backbone, stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = ImageFolder(dataset(tmp_path / "photos", {"ants": 6, "bees": 6}))
    run_extract(source, backbone, tmp_path / "exact.cache", Options(device="cpu", storage="float32"))
    fake = stage(CUDA)
    chosen = Options(device="cuda", precision="fp16", batch_size=4, storage="float32")
    summary = run_extract(source, backbone, tmp_path / "half.cache", chosen)
    assert (summary.provider, summary.ok, summary.batch_size, summary.lanes) == ("cuda", 12, 4, 2)
    assert fake.providers[0][1]["prefer_nhwc"] == "1"
    cache = FeatureCache(tmp_path / "half.cache")
    fields = cache.fingerprint.fields
    assert (fields["precision"], fields["provider"], fields["tf32"]) == ("fp16", "cuda", False)
    exact = FeatureCache(tmp_path / "exact.cache")
    worst = relative_l2(cache.subset().X, exact.subset().X).max()
    assert 0 < worst <= 1e-2
    assert run_extract(source, backbone, tmp_path / "half.cache", chosen).computed == 0, "the file is made once"
    before = (tmp_path / "half.cache" / "backbone.onnx").read_bytes()
    with pytest.raises(FingerprintMismatchError, match="precision"):
        run_extract(source, backbone, tmp_path / "half.cache", replace(chosen, precision="fp32"))
    with pytest.raises(FingerprintMismatchError, match="tf32"):
        run_extract(source, backbone, tmp_path / "half.cache", replace(chosen, tf32=True))
    assert (tmp_path / "half.cache" / "backbone.onnx").read_bytes() == before
    assert calibration_text(cache.describe()["facts"]["calibration"]).startswith(
        "float16, 0 layer(s) in float32; features moved"
    )
    train_head(cache, tmp_path / "a.head", LogisticHead())
    monkeypatch.undo()
    predictor = Predictor.load(tmp_path / "a.head", device="cpu", workers=1)
    assert len(list(predictor.predict(sorted((tmp_path / "photos").rglob("*.jpg"))))) == 12


@pytest.mark.parametrize(("flag", "option"), [("--precision fp16", {"precision": "fp16"}), ("--tf32", {"tf32": True})])
def test_what_is_for_a_gpu_is_refused_on_a_cpu(
    dataset: Any, backbone: Backbone, tmp_path: Path, flag: str, option: dict[str, Any]
) -> None:
    source = ImageFolder(dataset(tmp_path / "photos"))
    with pytest.raises(UsageError, match=f"{flag} is for a GPU, and this is the CPU"):
        run_extract(source, backbone, tmp_path / "c.cache", Options(device="cpu", **option))
    assert not (tmp_path / "c.cache").exists()


def test_tf32_is_in_the_options_and_the_fingerprint(dataset: Any, backbone: Backbone, stage: Stage, tmp_path: Path) -> None:
    fake = stage(CUDA)
    source = ImageFolder(dataset(tmp_path / "photos"))
    run_extract(source, backbone, tmp_path / "c.cache", Options(device="cuda", tf32=True))
    assert fake.providers[0][1]["use_tf32"] == "1"
    assert FeatureCache(tmp_path / "c.cache").fingerprint.fields["tf32"] is True


# --- out of memory -----------------------------------------------------------------------------------------------------

OUT_OF_MEMORY = (
    "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Non-zero status code returned while running Conv node. bfc_arena.cc:376 "
    "void* onnxruntime::BFCArena::AllocateRawInternal(size_t, bool) Failed to allocate memory for requested buffer"
)


def test_out_of_memory_halves_the_batch_and_loses_nothing(
    backbone_file: Path, stage: Stage, caplog: pytest.LogCaptureFixture
) -> None:
    expected = run(backbone_file, batch(21))
    fake = stage(CUDA, fits=3, message=OUT_OF_MEMORY)
    embed = Embedder(backbone_file, device="cuda", batch_size=16)
    found = embed(batch(21))
    assert found.shape == (21, 512)
    assert relative_l2(found, expected).max() <= 1e-6
    assert embed.batch_size == 2
    assert fake.sizes == [16, 8, 4, *[2] * 11]
    assert fake.opened == 4, "each failure gets a new session"
    assert len(fake.buffers) == 8, "and new buffers"
    assert "going on with batches of 2" in caplog.text


def test_out_of_memory_in_both_lanes_is_one_new_session(backbone_file: Path, stage: Stage) -> None:
    fake = stage(CUDA, fits=2, message=OUT_OF_MEMORY)
    embed = Embedder(backbone_file, device="cuda", batch_size=4)
    parts = [embed.submit(batch(4, seed=i)) for i in range(6)]
    for i, part in enumerate(parts):
        assert relative_l2(part.result()[0], run_real(backbone_file, batch(4, seed=i))).max() <= 1e-6
    assert (embed.batch_size, fake.opened) == (2, 2)


def run_real(path: Path, given: Any) -> Any:
    """`run`, where the module's name stands for the fake."""
    fake = sys.modules.pop("onnxruntime")
    try:
        return run(path, given)
    finally:
        sys.modules["onnxruntime"] = fake


def test_out_of_memory_with_one_image_is_the_end(backbone_file: Path, stage: Stage) -> None:
    stage(CUDA, fits=0, message=OUT_OF_MEMORY)
    with pytest.raises(DeviceUnavailableError, match="out of memory with a single image"):
        Embedder(backbone_file, device="cuda", batch_size=4)(batch(4))


def test_other_failures_are_not_taken_for_a_full_memory(backbone_file: Path, stage: Stage) -> None:
    fake = stage(CUDA, fits=3, message="cuDNN failure 8: CUDNN_STATUS_EXECUTION_FAILED\nmore")
    with pytest.raises(BadDataError, match=r"CUDNN_STATUS_EXECUTION_FAILED$"):
        Embedder(backbone_file, device="cuda", batch_size=8)(batch(8))
    assert fake.sizes == [8]


def test_the_benchmark_works_but_for_the_card(tmp_path: Path) -> None:
    """The very script, on the CPU and tiny; on a machine with a card it has nothing else to do."""
    command = [sys.executable, "benchmarks/gpu.py", "--device", "cpu", "--smoke", "--out", str(tmp_path / "page.md")]
    ran = subprocess.run(command, cwd=REPO, env={**os.environ, "PYTHONPATH": str(REPO)}, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    page = (tmp_path / "page.md").read_text()
    headings = ("Backbone alone", "Decoding alone", "JPEG files to a cache", "Memory over 20 batches", "Fidelity: 12")
    for heading in headings:
        assert f"### {heading}" in page
    assert "| fp32 on the device against fp32 on the CPU, relative L2 | 0 | <= 0.0001 | met |" in page
    assert "no card" in page


# --- with a card -------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_a_real_gpu_agrees_with_the_cpu(backbone_file: Path) -> None:
    found = Embedder(backbone_file, device="cuda", batch_size=4)
    assert found.provider == "cuda"
    assert relative_l2(found(batch(10)), run(backbone_file, batch(10))).max() <= 1e-4


@pytest.mark.gpu
def test_a_real_gpu_in_float16_stays_within_the_bound(backbone_file: Path, tmp_path: Path) -> None:
    facts = halve(backbone_file, tmp_path / "half.onnx", read_facts(backbone_file))
    exact = Embedder(backbone_file, facts.preprocess).embed(pixels(40))
    on_card = Embedder(tmp_path / "half.onnx", facts.preprocess, device="cuda", batch_size=8, cuda=Cuda(half=True))
    worst, cosine = compare(on_card.embed(pixels(40)), exact)
    assert worst <= BOUND
    assert cosine >= COSINE


@pytest.mark.gpu
def test_a_real_gpus_lanes_and_graph_agree(backbone_file: Path) -> None:
    preprocess = read_facts(backbone_file).preprocess
    expected = Embedder(backbone_file, preprocess, batch_size=4)(pixels(40))
    for lanes, chosen in ((2, Cuda()), (1, Cuda(graph=True))):
        embed = Embedder(backbone_file, preprocess, device="cuda", batch_size=4, lanes=lanes, cuda=chosen)
        parts = [embed.submit(pixels(40)[i : i + 4]) for i in range(0, 40, 4)]
        found = np.concatenate([part.result()[0] for part in parts])
        assert relative_l2(found, expected).max() <= 1e-4, chosen


@pytest.mark.gpu
def test_a_real_gpu_pins_memory(backbone_file: Path) -> None:
    import onnxruntime

    load_libraries(onnxruntime)
    assert pin(np.zeros(2**20, np.uint8), 0, onnxruntime)


@pytest.mark.gpu
def test_a_real_gpus_memory_is_flat(backbone_file: Path) -> None:
    import torch

    embed = Embedder(backbone_file, read_facts(backbone_file).preprocess, device="cuda", batch_size=16)

    def used(batches: int) -> int:
        for part in [embed.submit(pixels(16)) for _ in range(batches)]:
            part.result()
        free, total = torch.cuda.mem_get_info()
        return int(total - free)

    before = used(50)
    assert used(1000) <= before + 2**20


@pytest.mark.gpu
def test_a_real_gpu_that_is_full_gets_smaller_batches(backbone_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = cuda.providers

    def little(device: str, chosen: Cuda, model: bytes | Path) -> list[Any]:
        (name, given), last = options(device, chosen, model)
        return [(name, {**given, "gpu_mem_limit": str(64 * 2**20)}), last]

    monkeypatch.setattr(session, "providers", little)
    embed = Embedder(backbone_file, device="cuda", batch_size=1024)
    assert relative_l2(embed(batch(64)), run(backbone_file, batch(64))).max() <= 1e-4
    assert embed.batch_size < 1024
