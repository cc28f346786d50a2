"""Locks: one holder, however often the lock file was removed, and nothing left of an output's."""

from __future__ import annotations

import fcntl
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from store.errors import LockedError, OutputExistsError
from store.format import lock
from store.format.lock import file_lock, lock_of, output_lock
from store.format.output import open_lines, write_output


def taken_by_another(path: Path) -> bool:
    """Whether another thread cannot have the lock on an output."""

    def take() -> None:
        with output_lock(path):
            pass

    with ThreadPoolExecutor(1) as another:
        return isinstance(another.submit(take).exception(), LockedError)


def test_an_output_has_one_writer_and_its_lock_file_goes(tmp_path: Path) -> None:
    path = tmp_path / "a.onnx"
    with output_lock(path):
        assert taken_by_another(path)
        with output_lock(path):  # by the one who holds it
            assert taken_by_another(path)
        assert taken_by_another(path)
    assert not taken_by_another(path)
    assert list(tmp_path.iterdir()) == []


def test_a_lock_file_that_its_holder_removes_meanwhile_locks_nobody_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, real = tmp_path / "a.onnx", fcntl.flock

    def removed_before(descriptor: int, operation: int) -> None:
        monkeypatch.setattr(fcntl, "flock", real)
        lock_of(path).unlink()
        real(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", removed_before)
    with output_lock(path):
        assert taken_by_another(path), "the lock that this thread got is that of a file with a name"


def test_a_lock_file_of_somebody_else_stays(tmp_path: Path) -> None:
    lock_of(tmp_path / "a.onnx").write_text("mine")
    with output_lock(tmp_path / "a.onnx"):
        pass
    assert lock_of(tmp_path / "a.onnx").read_text() == "mine"


def test_one_writer_of_a_cache(tmp_path: Path) -> None:
    with file_lock(tmp_path / ".lock", what="it"):
        assert not lock.is_locked(tmp_path), "by another process"
        with pytest.raises(LockedError, match="it is in use by another run"), file_lock(tmp_path / ".lock", what="it"):
            pass


def test_what_a_killed_run_left_of_an_output_goes_also_where_the_next_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.html"
    for name in (f".a.html.{'0' * 12}.tmp", f"..a.html.{'0' * 12}.tmp.{'1' * 12}.tmp", ".a.html.penult-lock"):
        (tmp_path / name).touch()
    write_output(path, b"new", overwrite=False)
    assert list(tmp_path.iterdir()) == [path]
    lock_of(path).touch()
    with pytest.raises(OutputExistsError):
        write_output(path, b"other", overwrite=False)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("before", "after"), [("", "new"), ("a\n", "a\nnew"), ("a\ncut", "a\ncut\nnew")])
def test_a_line_that_was_cut_off_spoils_no_other(tmp_path: Path, before: str, after: str) -> None:
    (tmp_path / "lines").write_text(before)
    with open_lines(tmp_path / "lines") as file:
        file.write("new")
    assert (tmp_path / "lines").read_text() == after
