"""Weights on machines with and without internet: fetch, bring, import, and every way in which that goes wrong.

Downloads go through torch's own download from ``file://`` and local addresses; no test reaches a network.
"""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from extractor.backbones import weights
from extractor.backbones.networks import import_weights, load
from extractor.backbones.registry import Backbone, choose_weights
from extractor.backbones.weights import WeightsFile, all_files, checkpoints, fetch, install, read_state, recognise
from store.errors import BadDataError, InputMissingError, OutputError, StorageError, UsageError

REPO = Path(__file__).resolve().parents[3]
NETWORK = "squeezenet1_1"


@pytest.fixture(scope="module")
def state() -> dict[str, Any]:
    return dict(load(Backbone(NETWORK, "random:0")).network.state_dict())


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty torch folder of downloads, which does not exist yet."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path / "torch/hub/checkpoints"


@pytest.fixture
def served(tmp_path: Path, home: Path, state: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> WeightsFile:
    """One of torchvision's entries whose file really exists, named by its digest, behind a ``file://`` address."""
    import torch

    path = tmp_path / "server/new.pth"
    path.parent.mkdir()
    torch.save(state, path)
    path = path.rename(path.with_name(f"{NETWORK}-{hashlib.sha256(path.read_bytes()).hexdigest()[:8]}.pth"))
    entry = choose_weights(NETWORK, None, "--weights")
    monkeypatch.setattr(entry.value, "url", path.as_uri())
    return WeightsFile(NETWORK, entry)


def source(file: WeightsFile) -> Path:
    return Path(file.entry.url.removeprefix("file://"))


def content(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


Penult = Callable[..., tuple[int, str, str]]


# --- what torchvision has ----------------------------------------------------------------------------------------------


def test_every_registered_file_carries_its_digest_and_no_two_share_one() -> None:
    files = all_files()
    assert len(files) > 100
    assert all(len(file.prefix) >= 8 and set(file.prefix) <= set("0123456789abcdef") for file in files)
    assert len({file.prefix for file in files}) == len(files)
    assert next(file for file in files if file.network == "mnasnet0_5").prefix == "3ffadce67e", "not always 8 digits"
    assert "SWAG" in next(file for file in files if "SWAG" in file.entry.name).licence


def test_the_short_names_of_weights_are_understood() -> None:
    assert choose_weights("resnet50", "V1", "--weights").name == "IMAGENET1K_V1"
    assert choose_weights("regnet_y_16gf", "SWAG_LINEAR_V1", "--weights").name == "IMAGENET1K_SWAG_LINEAR_V1"
    with pytest.raises(UsageError, match="--weights V3: resnet50 has IMAGENET1K_V2, IMAGENET1K_V1"):
        choose_weights("resnet50", "V3", "--weights")


# --- the way from one machine to the other -----------------------------------------------------------------------------


def test_fetch_on_one_machine_import_on_the_other_then_no_flag(
    served: WeightsFile, home: Path, state: dict[str, Any], tmp_path: Path, penult: Penult, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    stick = tmp_path / "stick"
    code, out, err = penult("weights", "fetch", NETWORK, "-o", stick)
    sha256 = hashlib.sha256(source(served).read_bytes()).hexdigest()
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        f"{stick / served.name}: downloaded, {source(served).stat().st_size / 2**20:.1f} MiB",
        f"sha256 {sha256}",
        f"{NETWORK} IMAGENET1K_V1, licence BSD-3-Clause",
        f"Bring this file to the other machine and run there: penult weights import {served.name}",
    ]
    assert content(stick) == [served.name]
    assert not home.exists()

    monkeypatch.setattr(torch.hub, "urlopen", None)  # from here on, no network at all
    code, out, _ = penult("weights", "fetch", NETWORK, "-o", stick, "--json")
    again = json.loads(out)
    assert (code, again["downloaded"], again["sha256"]) == (0, False, sha256)

    code, out, err = penult("weights", "import", stick / served.name)
    assert (code, err) == (0, "")
    assert out == f"{home / served.name}: copied, checked; {NETWORK} IMAGENET1K_V1, licence BSD-3-Clause\n"
    assert content(home) == [served.name]
    loaded = load(Backbone(NETWORK))
    assert all(torch.equal(loaded.network.state_dict()[key], state[key]) for key in state)
    assert loaded.weights_name == "IMAGENET1K_V1"
    assert loaded.source == f"from {served.name} (sha256 {sha256}), torchvision's file"
    assert "already there and sound" in penult("weights", "import", stick / served.name)[1]
    code, out, _ = penult("weights", "list", "--json")
    assert [(f["network"], f["state"]) for f in json.loads(out)] == [(NETWORK, "sound")]


def test_a_slow_download_is_not_silent(
    served: WeightsFile, home: Path, penult: Penult, clock: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    clock.slow("extractor.backbones.weights:file_digest", 100)
    connect = torch.hub.urlopen

    def slow(*arguments: Any) -> Any:
        answer = connect(*arguments)
        read = answer.read

        def reads(size: int) -> bytes:
            clock.sleep(100)
            return bytes(read(size))

        answer.read = reads
        return answer

    monkeypatch.setattr(torch.hub, "urlopen", slow)
    assert penult("weights", "fetch", NETWORK)[0] == 0
    assert clock.longest_silence <= 40, clock.lines
    assert f"downloading {served.name}: 0 of " in clock.text
    assert content(home) == [served.name]


def test_a_renamed_file_is_recognised_by_its_content(served: WeightsFile, home: Path, tmp_path: Path) -> None:
    renamed = source(served).rename(tmp_path / "download (1)")
    assert recognise(renamed).name == served.name
    assert import_weights(renamed)[1:] == (home / served.name, True)
    assert content(home) == [served.name]


def test_loading_downloads_once_and_keeps_the_file(
    served: WeightsFile, home: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    first = load(Backbone(NETWORK))
    assert content(home) == [served.name]
    monkeypatch.setattr(torch.hub, "urlopen", None)
    assert load(Backbone(NETWORK)).weights_digest == first.weights_digest
    assert capfd.readouterr().out == "", "a command's stdout is its own"


# --- what goes wrong on the way: one sentence, the right code, nothing half-written ------------------------------------


@pytest.mark.parametrize("damage", ["flipped", "truncated", "empty"])
def test_a_damaged_file_is_not_imported(served: WeightsFile, home: Path, damage: str) -> None:
    path = source(served)
    if damage == "flipped":
        flip(path)
    else:
        os.truncate(path, 1000 if damage == "truncated" else 0)
    with pytest.raises(
        BadDataError, match=rf"is called like {served.name}, but its SHA-256 begins with .*damaged, or"
    ) as caught:
        import_weights(path)
    assert f"penult weights fetch {NETWORK} --weights IMAGENET1K_V1" in str(caught.value)
    partial = path.rename(path.with_name(f"{path.name}.0123456789abcdef.partial"))
    with pytest.raises(BadDataError, match="or incomplete"):
        import_weights(partial)
    assert content(home) == []


def test_an_unknown_or_missing_file_is_not_imported(home: Path, tmp_path: Path, penult: Penult) -> None:
    (tmp_path / "mine.pth").write_bytes(b"something")
    code, out, err = penult("weights", "import", tmp_path / "mine.pth")
    assert (code, out) == (65, "")
    assert "is none of torchvision's files" in err
    assert f"--weights {tmp_path / 'mine.pth'} --preset NAME" in err
    for missing in (tmp_path / "nowhere.pth", tmp_path):
        code, _, err = penult("weights", "import", missing)
        assert code == 66
        assert f"cannot read {missing}" in err
    assert penult("weights", "import")[0] == 2
    assert content(home) == []


def test_a_file_with_the_right_digest_that_is_not_a_safe_state_dict_is_not_imported(
    served: WeightsFile, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight digits can be forged; a payload must not run and another network's tensors must not be kept."""
    import torch

    for name, value in (("model", torch.nn.Linear(2, 2)), ("other", {"fc.weight": torch.ones(2, 2)})):
        path = tmp_path / f"{name}.pth"
        torch.save(value, path)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        monkeypatch.setattr(served.entry.value, "url", f"https://example.org/x-{digest[:8]}.pth")
        wanted = "holds Python objects" if name == "model" else f"does not fit {NETWORK}: .* tensors missing"
        with pytest.raises(BadDataError, match=wanted):
            import_weights(path)
    assert content(home) == []


def test_a_file_that_changes_while_it_is_copied_is_not_kept(served: WeightsFile, home: Path) -> None:
    flip(source(served))
    with pytest.raises(BadDataError, match="changed while it was read; nothing was kept"):
        install(source(served), served)
    assert content(home) == []


def test_a_damaged_file_in_torchs_folder_is_named_with_its_repair_and_repaired(
    served: WeightsFile, home: Path, caplog: pytest.LogCaptureFixture, penult: Penult
) -> None:
    fetch(served)
    for repair in (lambda: import_weights(source(served)), lambda: fetch(served)):
        os.truncate(home / served.name, 5000)
        with pytest.raises(BadDataError) as caught:
            load(Backbone(NETWORK))
        assert "is damaged or cut short" in str(caught.value)
        assert "`penult weights fetch squeezenet1_1 --weights IMAGENET1K_V1` replaces it" in str(caught.value)
        assert "penult weights import" in str(caught.value)
        assert "damaged" in penult("weights", "list")[1]
        caplog.clear()
        repair()
        assert "damaged" in caplog.text
        assert content(home) == [served.name]
        load(Backbone(NETWORK))


def test_a_damaged_file_stays_until_a_sound_one_is_complete(served: WeightsFile, home: Path) -> None:
    fetch(served)
    os.truncate(home / served.name, 5000)
    source(served).unlink()
    with pytest.raises(InputMissingError):
        fetch(served)
    assert [(path.name, path.stat().st_size) for path in home.iterdir()] == [(served.name, 5000)]


def test_what_killed_downloads_left_behind_is_listed(served: WeightsFile, home: Path, penult: Penult) -> None:
    fetch(served)
    (home / f"{served.name}.0123abcd.partial").write_bytes(b"half")
    (home / f".{served.name}.0123abcd.tmp").write_bytes(b"half")
    states = {Path(f["file"]).name: f["state"] for f in json.loads(penult("weights", "list", "--json")[1])}
    assert sorted(states.values()) == ["incomplete", "incomplete", "sound"]


def test_without_a_network_the_file_to_bring_is_named(served: WeightsFile, home: Path) -> None:
    source(served).unlink()
    with pytest.raises(InputMissingError) as caught:
        load(Backbone(NETWORK))
    assert caught.value.exit_code == 66
    for part in (
        f"cannot download {served.name} from {served.entry.url} (",
        f"`penult weights fetch {NETWORK} --weights IMAGENET1K_V1`",
        f"`penult weights import {served.name}`",
        f"5 MiB; its SHA-256 begins with {served.prefix}",
        f"into {home}",
        "--weights random",
    ):
        assert part in str(caught.value)
    assert content(home) == []


def test_a_command_without_a_network_says_so_in_one_sentence(home: Path, penult: Penult, tmp_path: Path) -> None:
    """No patched address: a name that no resolver knows, through the real command and its child process."""
    environment = {**os.environ, "TORCH_HOME": str(tmp_path / "torch"), "https_proxy": "http://127.0.0.1:9"}
    command = [sys.executable, REPO / "cli.py", "export", "resnet50", "-o", tmp_path / "r.onnx"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=REPO, check=False)
    assert (done.returncode, done.stdout) == (66, "")
    assert done.stderr.startswith(
        "error: cannot download resnet50-11ad3fa6.pth from https://download.pytorch.org/models/resnet"
    )
    assert "its SHA-256 begins with 11ad3fa6" in done.stderr
    assert f"into {home}" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert content(home) == []
    assert not (tmp_path / "r.onnx").exists()


def test_a_wrong_answer_is_not_kept(served: WeightsFile, home: Path, tmp_path: Path) -> None:
    source(served).write_text("<html>Please log in</html>")
    with pytest.raises(BadDataError, match="a proxy answered in the server's place; nothing was kept") as caught:
        fetch(served)
    assert caught.value.exit_code == 65
    with pytest.raises(BadDataError, match="nothing was kept"):
        load(Backbone(NETWORK))
    assert content(home) == []


class Half(http.server.BaseHTTPRequestHandler):
    """Sends half of what it announces, does what the test asks, and hangs up."""

    body = b""
    then: Callable[[], object] = staticmethod(lambda: None)

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.body)))
        self.end_headers()
        self.wfile.write(self.body[: len(self.body) // 2])
        self.wfile.flush()
        type(self).then()

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture
def half(served: WeightsFile, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Half]]:
    handler = type("Handler", (Half,), {"body": source(served).read_bytes()})
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with http.server.HTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        monkeypatch.setattr(served.entry.value, "url", f"http://127.0.0.1:{server.server_port}/{served.name}")
        yield handler
        server.shutdown()


def test_a_connection_that_breaks_leaves_nothing(half: type[Half], served: WeightsFile, home: Path) -> None:
    with pytest.raises(BadDataError, match="cut short"):
        fetch(served)
    assert content(home) == []


def test_an_interrupted_download_leaves_nothing(half: type[Half], served: WeightsFile, home: Path, penult: Penult) -> None:
    main, over = threading.main_thread().ident or 0, threading.Event()
    seen: list[list[str]] = []

    def interrupt() -> None:
        seen.append([name for name in content(home) if name.endswith(".partial")])
        signal.pthread_kill(main, signal.SIGINT)
        over.wait(30)

    half.then = staticmethod(interrupt)
    code, out, err = penult("weights", "fetch", NETWORK)
    over.set()
    assert (code, out) == (130, "")
    assert "Traceback" not in err
    assert len(seen[0]) == 1, "half of it was there under another name"
    assert content(home) == []


@pytest.mark.parametrize("act", ["fetch", "import", "load"])
def test_a_folder_that_cannot_be_made_is_named(
    served: WeightsFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, act: str
) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "file/torch"))
    run = {
        "fetch": lambda: fetch(served),
        "import": lambda: import_weights(source(served)),
        "load": lambda: load(Backbone(NETWORK)),
    }
    with pytest.raises(OutputError, match=r"cannot write .*file/torch/.*: Not a directory; TORCH_HOME=FOLDER") as caught:
        run[act]()
    assert caught.value.exit_code == 73


@pytest.mark.parametrize("act", ["fetch", "import"])
def test_a_folder_in_the_place_of_the_file_is_left_alone(served: WeightsFile, home: Path, act: str) -> None:
    (home / served.name).mkdir(parents=True)
    with pytest.raises(OutputError, match="Is a directory"):
        fetch(served) if act == "fetch" else import_weights(source(served))
    assert content(home) == [served.name]


@pytest.mark.parametrize("act", ["fetch", "import"])
def test_a_full_disk_is_74_and_leaves_nothing(served: WeightsFile, home: Path, act: str) -> None:
    """A limit on the size of files stands in for the full disk: the write itself fails, as it does there."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
    try:
        with pytest.raises(StorageError, match=r"cannot write .*: File too large") as caught:
            fetch(served) if act == "fetch" else install(source(served), served)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.exit_code == 74
    assert content(home) == []


# --- somebody's own file -----------------------------------------------------------------------------------------------


def test_another_networks_file_is_refused_with_a_few_names(tmp_path: Path, state: dict[str, Any]) -> None:
    import torch

    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(BadDataError) as caught:
        load(Backbone("resnet50", str(tmp_path / "w.pth"), preset="IMAGENET1K_V1"))
    message = str(caught.value)
    assert "w.pth does not fit resnet50: " in message
    assert "tensors missing (conv1.weight, bn1.weight, bn1.bias and " in message
    assert "tensors unexpected (features.0.weight, " in message
    assert len(message) < 500

    wider = {key: value.repeat(2, *[1] * (value.ndim - 1)) for key, value in state.items()}
    torch.save(wider, tmp_path / "w.pth")
    with pytest.raises(
        BadDataError, match=r"\d+ of another shape \(features.0.weight, features.0.bias, .* and \d+ more\)"
    ) as caught:
        load(Backbone(NETWORK, str(tmp_path / "w.pth"), preset="IMAGENET1K_V1"))
    assert len(str(caught.value)) < 500


def test_a_whole_pickled_model_is_answered_with_how_to_save_its_state(tmp_path: Path) -> None:
    import torch

    path = tmp_path / "model.pth"
    torch.save(torch.nn.Linear(2, 2), path)
    with pytest.raises(BadDataError) as caught:
        read_state(path)
    assert "it holds Python objects (torch.nn.modules.linear.Linear), which would execute code" in str(caught.value)
    assert 'torch.save(model.state_dict(), "model-state.pth")' in str(caught.value)


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("w.safetensors", b"anything", "is a safetensors file, which is not supported; convert it: python -c 'import torch"),
        ("w.pth", (2).to_bytes(8, "little") + b"{}", "is a safetensors file"),
        ("w.pth", b"version https://git-lfs.github.com/spec/v1\n", "only Git LFS's pointer to the weights; `git lfs pull`"),
        ("w.pth", b"\n<!DOCTYPE html>", "is a web page, not weights"),
        ("w.ckpt", b"PK\x03\x04 half a zip", "Pass --preset IMAGENET1K_V1"),
    ],
)
def test_what_is_often_taken_for_weights_is_named_before_a_preset_is_asked_for(
    tmp_path: Path, name: str, data: bytes, says: str
) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises((BadDataError, UsageError)) as caught:
        load(Backbone(NETWORK, str(tmp_path / name)))
    assert says in str(caught.value)


def test_a_truncated_file_of_ones_own_is_named(tmp_path: Path, state: dict[str, Any]) -> None:
    import torch

    torch.save(state, tmp_path / "w.pth")
    os.truncate(tmp_path / "w.pth", 100_000)
    with pytest.raises(BadDataError, match=r"it is damaged, cut short, or no file of torch.save \(.*bring it again"):
        load(Backbone(NETWORK, str(tmp_path / "w.pth"), preset="IMAGENET1K_V1"))


# --- where they came from is recorded ----------------------------------------------------------------------------------


@pytest.mark.usefixtures("exports_here")
def test_the_cache_says_where_its_weights_came_from(
    penult: Penult, dataset: Callable[..., Path], state: dict[str, Any], tmp_path: Path
) -> None:
    import torch

    photos = dataset(tmp_path / "photos", {"ants": 3, "bees": 3})
    torch.save(state, tmp_path / "mine.pth")
    sha256 = hashlib.sha256((tmp_path / "mine.pth").read_bytes()).hexdigest()
    sizes = ("--resize", 72, "--crop", 64)
    chosen = ("--weights", tmp_path / "mine.pth", "--preset", "IMAGENET1K_V1")
    expected = f"from mine.pth (sha256 {sha256}) given by --weights, preset IMAGENET1K_V1"
    for _ in range(2):  # the second time nothing is exported
        code, _, err = penult("extract", photos, "-m", NETWORK, *chosen, *sizes, "-o", tmp_path / "c")
        assert code == 0, err
        assert f"weights mine.pth, {expected}\n" in penult("info", tmp_path / "c")[1]
    assert json.loads((tmp_path / "c/cache.json").read_text())["facts"]["source"] == expected


def test_random_weights_say_so(backbone_file: Path, penult: Penult, dataset: Callable[..., Path], tmp_path: Path) -> None:
    photos = dataset(tmp_path / "photos", {"ants": 3, "bees": 3})
    assert penult("extract", photos, "-m", backbone_file, "-o", tmp_path / "c")[0] == 0
    assert "weights random:0, random numbers, seed 0\n" in penult("info", tmp_path / "c")[1]


def test_checkpoints_follow_torchs_own_settings(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert checkpoints() == home
    monkeypatch.delenv("TORCH_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert weights.checkpoints() == tmp_path / "cache/torch/hub/checkpoints"
