"""The seeded short form of the fuzz in `make soak`: a hundred changes of each file that penult reads back."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import fuzz

COUNT = 100


@pytest.fixture(scope="module")
def tallies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, fuzz.Tally]:
    return fuzz.fuzz(fuzz.make_bases(tmp_path_factory.mktemp("bases")), list(fuzz.TARGETS), COUNT)


def test_what_was_changed_is_refused_or_gives_the_same_numbers(tallies: dict[str, fuzz.Tally]) -> None:
    failures = {name: tally.failures for name, tally in tallies.items() if tally.failures}
    assert not failures
    for name, tally in tallies.items():
        assert tally.counts.total() == COUNT, name
        assert tally.counts["refused with 65"] > COUNT / 10, (name, tally.counts)


def test_the_fuzz_notices_what_it_is_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the digests a changed file gives other numbers, and without the checks a traceback."""
    folder = fuzz.make_bases(tmp_path)
    target = fuzz.TARGETS["shard"]
    normal = {base: target.read(base) for base, _ in target.bases(folder)}
    monkeypatch.setattr("store.format.hdf5.verify", lambda *_: None)
    outcomes = {fuzz.one(target, folder, 0, number, normal, use=False)["outcome"] for number in range(0, 60, 2)}
    assert "other numbers" in outcomes
    monkeypatch.setattr("store.format.shard.Fingerprint.parse", lambda text: text)
    answers = [fuzz.one(target, folder, 0, number, normal, use=False) for number in range(0, 10, 2)]
    assert any(answer["failed"] and "Traceback" in answer["detail"] for answer in answers)
