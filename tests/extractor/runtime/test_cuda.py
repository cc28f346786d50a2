"""A GPU in the pipeline: the provider and its proof, buffers that are bound once, out of memory, TF32, float16.

ONNX Runtime's answers are real; what this machine has not, a card, is staged by `FakeRuntime`. Tests marked ``gpu`` need one.
"""

from __future__ import annotations

import ctypes
import logging
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from threading import Barrier, Thread
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

import classifiers
from classifiers.bundles.predictor import Predictor
from classifiers.finetuning import trainer
from classifiers.heads.logistic import LogisticHead
from extractor import machine
from extractor.backbones.export import export
from extractor.backbones.registry import Backbone
from extractor.data.folders import ImageFolder
from extractor.graphs.backbone_facts import BackboneFacts, read_facts
from extractor.graphs.graph import name_nodes
from extractor.graphs.normalisation import takes_pixels
from extractor.graphs.parity import relative_l2
from extractor.pipeline.run import run_extract
from extractor.pipeline.settings import Options
from extractor.precision.float16 import BOUND, COSINE, _convert, compare, to_float16
from extractor.precision.registry import precision_of
from extractor.runtime import cuda, session
from extractor.runtime.cuda import BoundLane, capability, free_memory, is_loaded, pin, prove, reason, trouble
from extractor.runtime.devices import DevicePool, resolve_devices
from extractor.runtime.session import Embedder, resolve_device
from store.cache import FeatureCache
from store.errors import BadDataError, DeviceUnavailableError, FingerprintMismatchError, UsageError

REPO = Path(__file__).resolve().parents[3]
CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
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
        self, onnxruntime: Any, delivered: str, fits: int = 10**9, message: str = "", strays: tuple[str, str, str] | None = None
    ) -> None:
        super().__init__("onnxruntime")
        self.opened = 0
        self.sizes: list[int] = []
        self.buffers: list[tuple[tuple[int, ...], str]] = []
        self.printed, self.broken, self.memory = "", "", "Cuda"
        self.severities: list[int] = []
        self.SessionOptions, self.__file__ = onnxruntime.SessionOptions, onnxruntime.__file__
        self.GraphOptimizationLevel = onnxruntime.GraphOptimizationLevel
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

            def __init__(
                self,
                model: Any,
                options: Any,
                providers: list[Any],
                enable_fallback: int = 1,
                disabled_optimizers: Sequence[str] = (),
            ) -> None:
                assert not enable_fallback, "the real one prints to stdout and goes on with the CPU"
                assert fake.severities[-1] == 4, "the real one would log to the terminal"
                self.options = options
                fake.opened += 1
                fake.providers = providers
                self.number = providers[0][1]["device_id"]
                self._real = onnxruntime.InferenceSession(model, options, providers=[CPU])
                self.get_inputs, self.get_outputs = self._real.get_inputs, self._real.get_outputs

            def get_providers(self) -> list[str]:
                return [delivered, CPU]

            def run(self, names: Any, inputs: dict[str, Any]) -> Any:
                if fake.broken:
                    raise RuntimeError(fake.broken)
                return self._real.run(names, inputs)

            def get_provider_graph_assignment_info(self) -> Any:
                assert self.options.get_session_config_entry("session.record_ep_graph_assignment_info") == "1"

                def part(name: str, kind: str, label: str) -> Any:
                    node = types.SimpleNamespace(op_type=kind, name=label)
                    return types.SimpleNamespace(ep_name=name, get_nodes=lambda: [node])

                return [part(delivered, "Conv", "a"), part(CPU, "Shape", "b"), *([part(*strays)] if strays else [])]

            def get_input_memory_infos(self) -> Any:
                return [types.SimpleNamespace(name=fake.memory, device_id=self.number)]

            def io_binding(self) -> Binding:
                return Binding(self)

            def run_with_iobinding(self, binding: Binding) -> None:
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

        self.InferenceSession, self.OrtValue = Session, OrtValue

    def get_available_providers(self) -> list[str]:
        return [CUDA, CPU]

    def preload_dlls(self) -> None:
        print(self.printed)

    def set_default_logger_severity(self, level: int) -> None:
        self.severities.append(level)


Stage = Callable[..., FakeRuntime]


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stage]:
    import onnxruntime
    import onnxruntime.transformers.float16  # a part of the real one, for those who import it later

    def on(delivered: str, **options: Any) -> FakeRuntime:
        fake = FakeRuntime(onnxruntime, delivered, **options)
        monkeypatch.setitem(sys.modules, "onnxruntime", fake)
        monkeypatch.setattr(cuda, "nvidia_driver_present", lambda: True)
        monkeypatch.setattr(cuda, "is_loaded", lambda _library: True)
        trouble.cache_clear()  # of another runtime
        session._say_cpu.cache_clear()
        return fake

    yield on
    trouble.cache_clear()


# --- which device, and the proof ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["gpu", "", "cuda:", "cuda:x", "cpu:0", "auto:1", "cuda:-1", "tensorrt", "cuda:0,"])
def test_a_device_that_is_none_is_a_usage_error(device: str) -> None:
    with pytest.raises(UsageError, match="expected auto, cpu, cuda"):
        resolve_device(device)


@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_a_gpu_session_that_silently_runs_elsewhere_is_an_error(backbone_file: Path, stage: Stage, device: str) -> None:
    stage(CPU)
    for use in (resolve_device, lambda wanted: Embedder(backbone_file, device=wanted)):
        with pytest.raises(DeviceUnavailableError, match="made a session on CPUExecutionProvider instead") as caught:
            use(device)
        assert caught.value.exit_code == 69


def test_auto_is_the_cpu_without_a_driver(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(cuda, "nvidia_driver_present", lambda: False)
    with caplog.at_level(logging.INFO):
        session._say_cpu.cache_clear()  # said once per process
        assert resolve_device("auto") == "cpu"
    assert "running on the CPU" in caplog.text
    assert resolve_device("cpu") == "cpu"
    with pytest.raises(DeviceUnavailableError, match="--device cuda:1: this machine has no NVIDIA driver") as caught:
        resolve_device("cuda:1")
    assert caught.value.exit_code == 69


@pytest.mark.parametrize("kind", ["Conv", "MaxPool", "Concat", "Cast"])
def test_a_layer_that_is_computed_elsewhere_is_an_error(backbone_file: Path, stage: Stage, kind: str) -> None:
    preprocess = read_facts(backbone_file).preprocess
    graph = onnx.load_model_from_string(takes_pixels(backbone_file, preprocess) or b"").graph
    name = next(node.name for node in graph.node if node.op_type == kind)
    stage(CUDA, strays=(CPU, kind, name))
    with pytest.raises(DeviceUnavailableError, match=f"gave {kind} '{name}' to {CPU}; .* as a whole, try --device cpu"):
        Embedder(backbone_file, preprocess, device="cuda")


@pytest.mark.parametrize(("kind", "refused"), [("Gather", False), ("FusedConv", True), ("HardSigmoid", True)])
def test_of_what_the_runtime_has_named_itself_all_but_shapes_is_refused(
    backbone_file: Path, stage: Stage, kind: str, refused: bool
) -> None:
    stage(CUDA, strays=(CPU, kind, "a fusion"))
    with pytest.raises(DeviceUnavailableError, match=f"gave {kind} 'a fusion'") if refused else nullcontext():
        assert Embedder(backbone_file, device="cuda").provider == "cuda"


def test_pixels_that_are_wanted_elsewhere_are_an_error(backbone_file: Path, stage: Stage) -> None:
    """An input that is bound once is copied once to where it is wanted: every batch would be the first."""
    stage(CUDA).memory = "Cpu"
    with pytest.raises(DeviceUnavailableError, match="wants the pixels in memory 'Cpu', card 1"):
        Embedder(backbone_file, device="cuda:1")


def test_the_proof_reads_what_onnx_runtime_really_says(tmp_path: Path) -> None:
    """Each node that the real runtime has, as if it alone were computed off the card: only arithmetic of shapes may be."""
    helper, ints = onnx.helper, onnx.TensorProto.INT64
    make = helper.make_node
    nodes = [
        make("Conv", ["image", "weights"], ["sums"], name="conv"),
        make("MaxPool", ["sums"], ["most"], name="pool", kernel_shape=[2, 2], strides=[2, 2]),
        make("Shape", ["most"], ["shape"], name="shape"),
        make("Gather", ["shape", "first"], ["count"], name="gather"),
        make("Mul", ["count", "two"], ["twice"], name="mul"),
        make("Concat", ["twice", "rest"], ["wanted"], name="concat", axis=0),
        make("Reshape", ["most", "wanted"], ["halves"], name="reshape"),
        make("Concat", ["halves", "halves"], ["features"], name="join", axis=1),
    ]
    constants = [
        onnx.numpy_helper.from_array(np.ones((4, 3, 3, 3), np.float32), "weights"),
        *(helper.make_tensor(name, ints, [1], [value]) for name, value in (("first", 0), ("two", 2), ("rest", -1))),
    ]
    image = helper.make_tensor_value_info("image", onnx.TensorProto.FLOAT, ["n", 3, 6, 6])
    features = helper.make_tensor_value_info("features", onnx.TensorProto.FLOAT, ["m", 16])
    graph = helper.make_graph(nodes, "shapes", [image], [features], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    real = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=[CPU])

    def proof(away: list[Any], infos: list[Any]) -> None:
        elsewhere = types.SimpleNamespace(ep_name=CPU, get_nodes=lambda: away)
        faked = types.SimpleNamespace(
            get_providers=lambda: [CUDA],
            get_provider_graph_assignment_info=lambda: [elsewhere],
            get_input_memory_infos=lambda: infos,
        )
        prove(faked, "cuda", model.graph)

    refused = set()
    for node in [node for part in real.get_provider_graph_assignment_info() for node in part.get_nodes()]:
        try:
            proof([node], [])
        except DeviceUnavailableError:
            refused.add(node.name)
    assert refused == {"conv", "pool", "reshape", "join"}
    with pytest.raises(DeviceUnavailableError, match="wants the pixels in memory 'Cpu', card 0"):
        proof([], real.get_input_memory_infos())


def test_what_is_missing_is_in_the_message_and_not_on_stdout(
    stage: Stage, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = stage(CPU)
    fake.printed = "Failed to load libcurand.so.10"
    monkeypatch.setattr(cuda.ctypes, "CDLL", lambda name: name)  # the provider's library is sound
    assert trouble("cuda").endswith("did not load (Failed to load libcurand.so.10)")
    assert capsys.readouterr().out == ""
    assert fake.severities == [4, 2], "what is logged later may be seen again"


LACKS_CUDA = pytest.mark.skipif(
    machine.nvidia_driver_present() or CUDA not in onnxruntime.get_available_providers(),
    reason="CUDA works here, or ONNX Runtime has none: neither is a card that does not work",
)


@LACKS_CUDA
def test_auto_goes_on_with_the_cpu_where_a_card_does_not_work(
    penult: Any, dataset: Any, backbone_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    """The real runtime, which lists CUDA and cannot load it, on a machine that looks as if it had a driver."""
    monkeypatch.setattr(cuda, "nvidia_driver_present", lambda: True)
    session._say_cpu.cache_clear()
    photos, why = dataset(tmp_path / "photos", {"ants": 2}), "libcuda.so.1: cannot open shared object file"
    command = ("extract", photos, "-m", backbone_file, "--val-fraction", "0", "--test-fraction", "0", "-o")
    code, out, err = penult(*command, tmp_path / "a.cache")  # --device auto is the default
    assert code == 0
    assert f"warning: there is a GPU, and it cannot be used: running on the CPU. ONNX Runtime made a session on {CPU}" in err
    assert why in err
    assert "2 images on cpu" in out
    assert "[E:onnxruntime" not in err
    code, _, err = penult(*command, tmp_path / "b.cache", "--device", "cuda")
    assert code == 69
    assert f"error: --device cuda: ONNX Runtime made a session on {CPU} instead: {CUDA} did not load ({why}" in err
    assert not (tmp_path / "b.cache").exists()
    assert resolve_devices("auto") == ["cpu"]
    assert free_memory("cuda") == 0, "CUDA's own runtime is there, and no driver"
    bundle = REPO / "tests/data/archives/v1/ridge.head"
    predictor = Predictor.load(bundle, device="auto", workers=1)
    assert [each.code for each in predictor.predict(photos.rglob("*.jpg"))] == [None, None]
    with pytest.raises(DeviceUnavailableError, match=r"--device cuda:[01]: "):  # told by a child
        DevicePool(
            ["cuda:0", "cuda:1"],
            backbone_file,
            read_facts(backbone_file).preprocess,
            batch_size=None,
            outputs=["features"],
            tf32=False,
        )


@pytest.mark.skipif(machine.nvidia_driver_present(), reason="this machine has an NVIDIA driver")
def test_fine_tuning_goes_on_with_the_cpu_where_torch_has_no_card(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for present, level in ((True, logging.WARNING), (False, logging.INFO)):
        monkeypatch.setattr(trainer, "nvidia_driver_present", lambda: present)  # noqa: B023
        caplog.clear()
        with caplog.at_level(logging.INFO):
            assert trainer._device("auto") == "cpu"
        assert [(each.levelno, "training on the CPU. " in each.getMessage()) for each in caplog.records] == [(level, True)]
        why = r"torch .* does not compute there: .* Try" if present else "this machine has no NVIDIA driver"
        with pytest.raises(DeviceUnavailableError, match=rf"--device cuda:1: {why}"):
            trainer._device("cuda:1")


def test_a_card_that_has_no_cudnn_is_refused(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    stage(CUDA)
    assert resolve_device("auto") == "cuda"
    trouble.cache_clear()
    monkeypatch.setattr(cuda, "is_loaded", lambda _library: False)
    with pytest.raises(DeviceUnavailableError, match="--device cuda: ONNX Runtime finds no cuDNN, and is slow without"):
        resolve_device("cuda")
    assert resolve_device("auto") == "cpu"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_library_counts_once_it_is_in_the_process() -> None:
    assert is_loaded("libc")
    assert not is_loaded("libanl")
    ctypes.CDLL("libanl.so.1")  # a part of glibc that nothing else here asks for
    assert is_loaded("libanl")


def test_a_card_that_the_wheel_has_no_code_for_is_named(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = stage(CUDA)
    fake.broken = (
        "Non-zero status code returned while running Cast node. cuda_call.cc:121 CudaCall CUDA failure 209: no kernel image is "
        "available for execution on the device ; GPU=1 ; hostname=secret ; expr=cudaGetLastError();"
    )

    def attribute(found: Any, number: int, card: int) -> None:
        found._obj.value = {(75, 1): 10, (76, 1): 3}[number, card]

    monkeypatch.setattr(cuda.ctypes, "CDLL", lambda _name: types.SimpleNamespace(cudaDeviceGetAttribute=attribute))
    with pytest.raises(DeviceUnavailableError) as caught:
        resolve_device("cuda:1")
    says = "this onnxruntime has no code for a card of compute capability 10.3: CUDA failure 209: no kernel image is"
    assert str(caught.value) == f"--device cuda:1: {says} available for execution on the device"
    monkeypatch.undo()
    assert capability("cuda:1", types.SimpleNamespace(cuda_version="0.0")) == "unknown", "there is no such CUDA"


def test_a_card_that_computes_something_else_is_refused(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = stage(CUDA)
    right = fake.InferenceSession.run
    monkeypatch.setattr(fake.InferenceSession, "run", lambda *given: [right(*given)[0] + 1])
    assert trouble("cuda") == "a convolution gives other values there than on a CPU"


def test_a_runtime_without_cuda_is_named(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = stage(CPU)
    monkeypatch.setattr(fake, "get_available_providers", lambda: [CPU])
    assert resolve_device("auto") == "cpu"
    for devices in ("cuda", "cuda:0,cuda:1"):
        with pytest.raises(DeviceUnavailableError, match=f"--device {devices}: .* install onnxruntime-gpu"):
            resolve_devices(devices)


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
        "prefer_nhwc": "0",
    }


@pytest.mark.parametrize("kept", [0, 2])
def test_tensor_cores_are_for_float16_throughout(backbone_file: Path, stage: Stage, tmp_path: Path, kept: int) -> None:
    """In float32 layers they would round as coarsely as the float16 that these were spared."""
    facts = read_facts(backbone_file)
    model = onnx.load(backbone_file)
    name_nodes(model.graph)
    front = [node.name for node in model.graph.node if node.op_type == "Conv"][:kept]
    (tmp_path / "half.onnx").write_bytes(_convert(model, front).SerializeToString())
    fake = stage(CUDA)
    Embedder(tmp_path / "half.onnx", facts.preprocess, device="cuda")
    on = "0" if kept else "1"
    assert [fake.providers[0][1][name] for name in ("use_tf32", "prefer_nhwc")] == [on, on]
    Embedder(tmp_path / "half.onnx", facts.preprocess, device="cuda", tf32=True)
    assert fake.providers[0][1]["use_tf32"] == "1", "asked for"


def test_the_batch_goes_by_the_memory_that_is_free(backbone_file: Path, stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    stage(CUDA)

    def told(free: Any, total: Any) -> int:
        free._obj.value, total._obj.value = most, 141 * 10**9
        return status

    runtime = types.SimpleNamespace(cudaSetDevice=lambda number: None, cudaMemGetInfo=told)
    monkeypatch.setattr(cuda.ctypes, "CDLL", lambda _name: runtime)
    found = {}
    for status, most in ((0, 139 * 10**9), (0, 40 * 10**9), (0, 22 * 10**9), (0, 8 * 10**9), (35, 139 * 10**9)):
        found[status, most // 10**9] = Embedder(backbone_file, device="cuda").batch_size
    assert found == {(0, 139): 256, (0, 40): 256, (0, 22): 128, (0, 8): 64, (35, 139): 64}
    assert Embedder(backbone_file, device="cuda", batch_size=7).batch_size == 7


# --- lanes and buffers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cuda", "cuda:2"])
def test_buffers_are_made_once_for_each_lane(backbone_file: Path, stage: Stage, device: str) -> None:
    preprocess = read_facts(backbone_file).preprocess
    expected = Embedder(backbone_file, preprocess, batch_size=4)(pixels(40))
    fake = stage(CUDA)
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
    lane = BoundLane(real, "cpu", name, (4, 3, 64, 64), np.float32, {"features": 512})
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
        lane = BoundLane(real, "cpu", name, (2, 3, 64, 64), np.float32, {"features": 512})
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
    lane = BoundLane(real, "cpu", name, (2, 3, 64, 64), np.float32, {"features": 512})
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
    assert (fake.providers[0][1]["use_tf32"], fake.providers[0][1]["prefer_nhwc"]) == ("1", "1")
    cache = FeatureCache(tmp_path / "half.cache")
    fields = cache.fingerprint.fields
    assert (fields["precision"], fields["provider"], fields["tf32"]) == ("fp16", "cuda", False)
    exact = FeatureCache(tmp_path / "exact.cache")
    worst = relative_l2(cache.subset().X, exact.subset().X).max()
    assert 0 < worst <= 1e-2
    assert run_extract(source, backbone, tmp_path / "half.cache", chosen).computed == 0, "the file is made once"
    before = (tmp_path / "half.cache" / "backbone.onnx").read_bytes()
    with pytest.raises(FingerprintMismatchError, match="precision"):
        run_extract(source, backbone, tmp_path / "half.cache", chosen.replace(precision="fp32"))
    assert (tmp_path / "half.cache" / "backbone.onnx").read_bytes() == before
    assert (
        precision_of("fp16")
        .describe(cache.describe()["facts"]["calibration"])
        .startswith("float16, 0 layer(s) in float32; features moved")
    )
    classifiers.train(cache, tmp_path / "a.head", LogisticHead())
    monkeypatch.undo()
    predictor = Predictor.load(tmp_path / "a.head", device="cpu", workers=1)
    assert len(list(predictor.predict(sorted((tmp_path / "photos").rglob("*.jpg"))))) == 12


@pytest.mark.parametrize("precision", ["fp16", "tf32"])
def test_what_is_for_a_gpu_is_refused_where_there_is_none(
    dataset: Any, backbone: Backbone, stage: Stage, tmp_path: Path, precision: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage(CPU)
    monkeypatch.setattr(cuda, "nvidia_driver_present", lambda: False)
    source = ImageFolder(dataset(tmp_path / "photos"))
    with pytest.raises(UsageError, match=f"--precision {precision} is for a GPU, and this is the CPU"):
        run_extract(source, backbone, tmp_path / "c.cache", Options(precision=precision))
    assert not (tmp_path / "c.cache").exists()


def test_tf32_is_in_the_options_and_the_fingerprint(dataset: Any, backbone: Backbone, stage: Stage, tmp_path: Path) -> None:
    fake = stage(CUDA)
    source = ImageFolder(dataset(tmp_path / "photos"))
    run_extract(source, backbone, tmp_path / "c.cache", Options(device="cuda", precision="tf32"))
    assert fake.providers[0][1]["use_tf32"] == "1"
    assert FeatureCache(tmp_path / "c.cache").fingerprint.fields["tf32"] is True


# --- out of memory -----------------------------------------------------------------------------------------------------

OUT_OF_MEMORY = (
    "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Non-zero status code returned while running Conv node. bfc_arena.cc:376 "
    "void* onnxruntime::BFCArena::AllocateRawInternal(size_t, bool) Failed to allocate memory for requested buffer"
)
OF_LIBRARIES = (
    "CUDNN_FE failure 11: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    "CUBLAS failure 3: CUBLAS_STATUS_ALLOC_FAILED ; GPU=0",
    "CUDA failure 2: out of memory ; GPU=0",
)


@pytest.mark.parametrize("message", OF_LIBRARIES)
def test_what_the_libraries_say_is_out_of_memory_too(backbone_file: Path, stage: Stage, message: str) -> None:
    stage(CUDA, fits=2, message=message)
    embed = Embedder(backbone_file, device="cuda", batch_size=4)
    assert embed(batch(4)).shape == (4, 512)
    assert embed.batch_size == 2


def test_the_reason_is_one_line_without_the_source_and_the_host() -> None:
    text = "/src/cuda_call.cc:121 onnxruntime::CudaCall() CUDA failure 100: no CUDA-capable device is detected ; GPU=0 ; x"
    assert reason(RuntimeError(text)) == "CUDA failure 100: no CUDA-capable device is detected"
    assert (reason(RuntimeError("one\ntwo")), reason(RuntimeError())) == ("one two", "RuntimeError")


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
    assert fake.opened == 5, "one to see whether it works, and each failure gets a new one"
    assert len(fake.buffers) == 8, "and new buffers"
    assert "going on with batches of 2" in caplog.text


def test_out_of_memory_in_both_lanes_is_one_new_session(backbone_file: Path, stage: Stage) -> None:
    fake = stage(CUDA, fits=2, message=OUT_OF_MEMORY)
    embed = Embedder(backbone_file, device="cuda", batch_size=4)
    parts = [embed.submit(batch(4, seed=i)) for i in range(6)]
    for i, part in enumerate(parts):
        assert relative_l2(part.result()[0], run_real(backbone_file, batch(4, seed=i))).max() <= 1e-6
    assert (embed.batch_size, fake.opened) == (2, 3)


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
    with pytest.raises(BadDataError, match=r"CUDNN_STATUS_EXECUTION_FAILED more$"):
        Embedder(backbone_file, device="cuda", batch_size=8)(batch(8))
    assert fake.sizes == [8]


def test_the_benchmark_works_but_for_the_card(backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The very script, on the CPU and tiny; on a machine with a card it has nothing else to do."""
    import torch

    from benchmarks import gpu

    def exported(wanted: Backbone, path: Path) -> BackboneFacts:
        assert (wanted.name, wanted.weights, wanted.resize, wanted.crop) == ("squeezenet1_1", "random:0", 72, 64), "as at hand"
        return export(backbone, path)

    monkeypatch.setattr(gpu, "export", exported)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "cpu", "--smoke", "--out", str(tmp_path / "page.md")])
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)  # the script sets it, and it is set back
    gpu.main()
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
    facts = to_float16(backbone_file, tmp_path / "half.onnx", read_facts(backbone_file))
    exact = Embedder(backbone_file, facts.preprocess).embed(pixels(40))
    on_card = Embedder(tmp_path / "half.onnx", facts.preprocess, device="cuda", batch_size=8)
    worst, cosine = compare(on_card.embed(pixels(40)), exact)
    assert worst <= BOUND
    assert cosine >= COSINE


@pytest.mark.gpu
def test_a_real_gpus_lanes_agree(backbone_file: Path) -> None:
    preprocess = read_facts(backbone_file).preprocess
    expected = Embedder(backbone_file, preprocess, batch_size=4)(pixels(40))
    embed = Embedder(backbone_file, preprocess, device="cuda", batch_size=4)
    parts = [embed.submit(pixels(40)[i : i + 4]) for i in range(0, 40, 4)]
    assert relative_l2(np.concatenate([part.result()[0] for part in parts]), expected).max() <= 1e-4


@pytest.mark.gpu
def test_a_real_gpu_pins_memory(backbone_file: Path) -> None:
    assert trouble("cuda") == ""
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

    def little(device: str, **chosen: bool) -> list[Any]:
        (name, given), last = options(device, **chosen)
        return [(name, {**given, "gpu_mem_limit": str(64 * 2**20)}), last]

    monkeypatch.setattr(cuda, "providers", little)
    embed = Embedder(backbone_file, device="cuda", batch_size=1024)
    assert relative_l2(embed(batch(64)), run(backbone_file, batch(64))).max() <= 1e-4
    assert embed.batch_size < 1024
