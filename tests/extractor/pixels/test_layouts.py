"""A seeded hundred of the matrix of layouts, of which `make soak` reads all: right pixels, or refused by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks import layouts
from benchmarks.layouts import Cell

CELLS = list(layouts.cells())
SOME = [CELLS[i] for i in np.random.default_rng(0).choice(len(CELLS), 100, replace=False)]


@pytest.mark.parametrize("cell", SOME, ids=str)
def test_a_layout_is_read_as_it_was_written_or_refused_by_its_name(cell: Cell, tmp_path: Path) -> None:
    assert layouts.ours(cell) == ""
    if cell.second:
        assert not layouts.theirs(cell, tmp_path), "the file is not what it claims to be"


def test_the_hundred_are_of_every_kind(tmp_path: Path) -> None:
    assert {(cell.format, cell.within > 0) for cell in SOME} == {(cell.format, cell.within > 0) for cell in CELLS}
    assert sum(cell.second and layouts.theirs(cell, tmp_path) == "" for cell in SOME if cell.within) > 20


def test_the_check_sees_a_wrong_level_a_wrong_size_and_a_file_that_should_be_refused() -> None:
    cell = next(cell for cell in CELLS if cell.within == 1)
    assert "differs by" in layouts.difference((cell.pixels + 2).round(), cell)
    assert "is (1, 1, 3)" in layouts.difference(np.zeros((1, 1, 3)), cell)
    refused = Cell(cell.format, cell.layout, cell.bits, cell.storage, cell.write, cell.pixels, 0, "")
    assert layouts.ours(refused) == "is read"
