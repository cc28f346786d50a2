"""How near a split by hash rank is to the shares that were asked for, and how many samples one more file moves.

Run by ``make bench``; rewrites its table in docs/splits.md. 20 % test and 20 % validation are asked for; sizes of groups are
drawn as the table says, and everything is repeated with several seeds.
"""

from __future__ import annotations

import argparse
import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import numpy as np

from store.errors import BadDataError
from store.splits import VERSION, hash_rank_split

PAGE = Path(__file__).resolve().parent.parent / "docs" / "splits.md"
BEGIN, END = "<!-- shares: made by `make bench` -->", "<!-- end -->"
SHARES = {"train": 0.6, "test": 0.2, "val": 0.2}
SMALL = 8  # groups of which every split is tried

Sizes = Callable[[np.random.Generator], Sequence[int]]


@dataclass(frozen=True)
class Data:
    """Classes of groups.

    Attributes:
        text: for the table.
        classes: how many there are.
        sizes: draws the sizes of the groups of one class.
    """

    text: str
    classes: int
    sizes: Sizes

    def draw(self, rng: np.random.Generator) -> tuple[list[str], list[bytes], list[int]]:
        """The class and group of each sample, and the sizes of all groups."""
        labels, groups, sizes = list[str](), list[bytes](), list[int]()
        for k in range(self.classes):
            for i, size in enumerate(self.sizes(rng)):
                labels += [f"class {k}"] * size
                groups += [b"%d/%d/%d" % (k, i, rng.integers(2**31))] * size
                sizes.append(size)
        return labels, groups, sizes


def single(count: int) -> Sizes:
    return lambda rng: [1] * count


def drawn(count: int, least: int, most: int) -> Sizes:
    return lambda rng: rng.integers(least, most + 1, count).tolist()


DATA = (
    *(Data(f"{n} images", 1, single(n)) for n in (3, 6, 13, 100, 100_000)),
    *(Data(f"1,000 classes of {n} images", 1000, single(n)) for n in (3, 6, 7, 50)),
    Data("10 groups of 20 to 40", 1, drawn(10, 20, 40)),
    Data("7 groups of 1 to 900", 1, drawn(7, 1, 900)),
    Data("groups of 282, 85 and 29", 1, lambda rng: [282, 85, 29]),
    Data("a group of 900, 50 of 1 to 5", 1, lambda rng: [900, *rng.integers(1, 6, 50).tolist()]),
    Data("10 classes of 20 groups of 1 to 30", 10, drawn(20, 1, 30)),
    Data("100 classes of 5 groups of 1 to 900", 100, drawn(5, 1, 900)),
)


def distance(have: Counter[str]) -> float:
    """Of the split that is furthest from its share, in samples."""
    return max(abs(have[name] - share * have.total()) for name, share in SHARES.items())


def best_distance(sizes: Sequence[int]) -> float:
    """Of the best split that has every part."""
    least = float("inf")
    for names in itertools.product(SHARES, repeat=len(sizes)):
        if set(names) == set(SHARES):
            have = Counter[str]()
            for name, size in zip(names, sizes, strict=True):
                have[name] += size
            least = min(least, distance(have))
    return least


def split(labels: Sequence[str], groups: Sequence[bytes], version: int) -> list[str]:
    return hash_rank_split(labels, groups, val=SHARES["val"], test=SHARES["test"], version=version)


def moved(labels: list[str], groups: list[bytes], names: list[str], version: int) -> int:
    """How many of the samples have another split if there is one more of the first class."""
    more = split([*labels, labels[0]], [*groups, b"one more"], version)
    return sum(a != b for a, b in zip(names, more[:-1], strict=True))


def row(data: Data, seeds: int) -> str:
    rng = np.random.default_rng(0)
    far: dict[int, list[float]] = {1: [], VERSION: []}
    movers: dict[int, list[int]] = {1: [], VERSION: []}
    excess, largest, shown = [], [], {}
    for _ in range(seeds):
        labels, groups, sizes = data.draw(rng)
        for version, distances in far.items():
            names = split(labels, groups, version)
            shown[version] = Counter(names)
            distances.append(distance(shown[version]) / len(labels))
            movers[version].append(moved(labels, groups, names, version))
        largest.append(max(sizes))
        if data.classes == 1 and len(sizes) <= SMALL:
            excess.append(distance(shown[VERSION]) - best_distance(sizes))
    cells = [" / ".join(str(shown[version][name]) for name in SHARES) for version in far]
    points = [f"{100 * float(np.mean(each)):.1f} ({100 * max(each):.1f})" for each in far.values()]
    over = f"{max(excess):.0f} of {max(largest)}" if excess else "-"
    moves = [f"{np.mean(each):.0f} ({max(each)})" for each in movers.values()]
    both = [text for version in zip(cells, points, moves, strict=True) for text in version]
    return f"| {data.text} | " + " | ".join([*both, over]) + " |"


def report(seeds: int) -> str:
    lines = [
        f"{date.today()}, {seeds} seeds each (5 of 10,000 samples and more). The parts are those of the last seed.",
        "",
        "| data | version 1: train / test / val | points off (worst) | moved by one more file (worst) | version 2 "
        "| points off (worst) | moved by one more file (worst) | further than the best split, in samples; largest group |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for data in DATA:
        try:
            lines.append(row(data, 5 if data.classes > 10 or "100000" in data.text else seeds))
        except BadDataError as error:
            message = f"{data.text}: {error}"
            raise SystemExit(message) from error
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=50, help="of each kind of data (default 50)")
    parser.add_argument("--no-page", action="store_true", help="print only")
    options = parser.parse_args()
    text = report(options.seeds)
    print(text)
    if not options.no_page:
        before, _, rest = PAGE.read_text("utf-8").partition(BEGIN)
        PAGE.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{rest.partition(END)[2]}", "utf-8")


if __name__ == "__main__":
    main()
