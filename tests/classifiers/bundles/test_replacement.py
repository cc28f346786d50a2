"""A bundle is replaced by another: the old one or the new one is there at any time, whatever kills the run."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from classifiers.bundles.bundle import Bundle
from classifiers.bundles.bundle_folder import install, remove_leftovers
from store.format import atomic

REPO = Path(__file__).resolve().parents[3]
V1 = REPO / "tests/data/archives/v1"
OLD, NEW = "ridge.head", "knn.head"

AGAIN_AND_AGAIN = """
import shutil, sys
from pathlib import Path
from classifiers.bundles.bundle_folder import install
from store.format import atomic
if sys.argv[3] == "renames":
    atomic.exchange = lambda *_: False
target, archives = Path(sys.argv[1]), Path(sys.argv[2])
for i in range(10**6):
    finished = atomic.temporary(target)
    shutil.copytree(archives / ("ridge.head", "knn.head")[i % 2], finished)
    print(i, flush=True)
    install(finished, target)
"""

IN_A_CONTAINER = """
set -e
mount -t overlay overlay -o lowerdir="$1/image",upperdir="$1/upper",workdir="$1/work" "$1/container"
cd "$2"
"$3" -c "
import sys
from pathlib import Path
from classifiers.bundles.bundle_folder import install
install(Path(sys.argv[1], 'container/new.tmp'), Path(sys.argv[1], 'container/b.head'))
" "$1"
cp -r "$1/container" "$1/result"
"""


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return Path(shutil.copytree(V1 / OLD, tmp_path / "b.head"))


def finished(target: Path) -> Path:
    return Path(shutil.copytree(V1 / NEW, atomic.temporary(target)))


def without_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic, "exchange", lambda *_: False)


@pytest.mark.parametrize("exchange", [True, False])
def test_the_new_one_takes_the_place_and_nothing_is_left(
    target: Path, monkeypatch: pytest.MonkeyPatch, *, exchange: bool
) -> None:
    if not exchange:
        without_exchange(monkeypatch)
    install(finished(target), target)
    assert Bundle.load(target).head == "knn"
    assert [path.name for path in target.parent.iterdir()] == ["b.head"]


def test_an_interruption_between_the_renames_brings_the_old_one_back(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_exchange(monkeypatch)
    rename, new = Path.rename, finished(target)

    def interrupted(self: Path, other: Path) -> Path:
        if self == new:
            raise KeyboardInterrupt
        return rename(self, other)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        install(new, target)
    assert Bundle.load(target).head == "ridge"


def test_after_a_kill_between_the_renames_the_next_command_finds_the_old_one(
    target: Path, caplog: pytest.LogCaptureFixture
) -> None:
    target.rename(target.with_name(f".b.head.{'0123456789ab'}.old"))
    assert Bundle.load(target).head == "ridge"
    assert "is back: a run that would have replaced it was killed" in caplog.text


@pytest.mark.parametrize("way", ["exchange", "renames"])
def test_a_kill_at_any_moment_leaves_the_old_or_the_new_one(target: Path, way: str) -> None:
    draw = random.Random(0)
    for _ in range(5):
        command = [sys.executable, "-c", AGAIN_AND_AGAIN, target, V1, way]
        with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=REPO) as child:
            assert child.stdout is not None
            for _ in range(draw.randint(1, 30)):
                assert child.stdout.readline()
            child.kill()
        assert Bundle.load(target).head in ("ridge", "knn")
        remove_leftovers(target)
        assert [path.name for path in target.parent.iterdir()] == ["b.head"]


def test_a_bundle_of_a_containers_image_is_replaced(tmp_path: Path) -> None:
    """There, a folder cannot be renamed (EXDEV): every night's training would be lost."""
    for name in ("upper", "work", "container"):
        (tmp_path / name).mkdir()
    shutil.copytree(V1 / OLD, tmp_path / "image/b.head")
    shutil.copytree(V1 / NEW, tmp_path / "upper/new.tmp")
    command = ["unshare", "-rm", "bash", "-c", IN_A_CONTAINER, "bash", tmp_path, REPO, sys.executable]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("no unshare here")
    if "mount" in done.stderr or "unshare" in done.stderr:
        pytest.skip(f"no overlay file system may be mounted here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    assert Bundle.load(tmp_path / "result/b.head").head == "knn"
    assert [path.name for path in (tmp_path / "result").iterdir()] == ["b.head"]
