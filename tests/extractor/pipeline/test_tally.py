"""A run that continues says at once what it found, whatever became of the run before."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from extractor.backbones.registry import Backbone
from extractor.data.folders import ImageFolder
from extractor.pipeline.run import run_extract
from extractor.pipeline.settings import Options
from extractor.pipeline.tally import Tally
from extractor.runtime.session import Embedder
from store.errors import InterruptedRunError
from store.format.samples import Row

OPTIONS = Options(batch_size=4, quiet=True)


@pytest.fixture
def photos(tmp_path: Path, dataset: Callable[..., Path]) -> Path:
    return dataset(tmp_path / "photos", {"ants": 20, "bees": 20})


def found(caplog: pytest.LogCaptureFixture) -> list[str]:
    texts = [message for message in caplog.messages if message.startswith("found")]
    caplog.clear()
    return texts


def test_what_an_interrupted_first_run_has_left_is_said_before_anything_is_computed(
    photos: Path, backbone: Backbone, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its shards are there, and no sample table, which would say which files they are of."""
    caplog.set_level("INFO", "penult")
    embed, calls = Embedder.embed, list[int]()

    def interrupted(self: Embedder, pixels: object) -> object:
        calls.append(len(calls))
        if len(calls) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return embed(self, pixels)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(Embedder, "embed", interrupted)
        with pytest.raises(InterruptedRunError):
            run_extract(ImageFolder(photos), backbone, tmp_path / "cache", OPTIONS)
    assert not (tmp_path / "cache/samples.h5").exists()
    assert found(caplog) == []
    summary = run_extract(ImageFolder(photos), backbone, tmp_path / "cache", OPTIONS)
    assert 0 < summary.computed < 40
    assert summary.cached == 40 - summary.computed == summary.to_json()["cached"]
    rest = f"The last run did not finish: {summary.cached} files are read again to recognise them"
    counts = f"found {summary.cached} of 40 images in the cache; at most {summary.computed} to compute"
    assert found(caplog) == [f"{counts}. {rest}"]


def test_new_and_changed_and_failed_files_are_told_apart(
    photos: Path, backbone: Backbone, tmp_path: Path, caplog: pytest.LogCaptureFixture, make_image: Callable[..., Path]
) -> None:
    caplog.set_level("INFO", "penult")
    (photos / "ants/broken.jpg").write_bytes(b"no image")
    cache, options = tmp_path / "cache", OPTIONS.replace(max_failures="9")
    first = run_extract(ImageFolder(photos), backbone, cache, options)
    again = run_extract(ImageFolder(photos), backbone, cache, options)
    assert (first.cached, again.cached) == (0, 40)
    assert found(caplog) == [], "of a new cache, and where nothing is to be done"
    make_image(photos / "bees/900.jpg", seed=900)
    make_image(photos / "bees/000.jpg", seed=901)  # another picture under an old name
    os.utime(photos / "ants/001.jpg", (1, 1))  # the same content: it is read, and not computed
    (photos / "ants/002.jpg").rename(photos / "ants/902.jpg")
    third = run_extract(ImageFolder(photos), backbone, cache, options)
    assert (third.cached, third.computed) == (39, 2)
    assert found(caplog) == ["found 37 of 42 images in the cache, and 1 that failed before; at most 4 to compute"]


def test_inputs_are_counted_by_status_as_they_come() -> None:
    rows = [Row(b"a", sha256=b"1" * 32), Row(b"b", sha256=b"1" * 32), None, Row(b"c", code="truncated")]
    tally = Tally(rows, 4)
    tally.add(Row(b"d", sha256=b"2" * 32))
    assert tally.facts() == {"done": 4, "total": 4, "rows": {"ok": 2, "duplicates": 1, "failed": 1}}
