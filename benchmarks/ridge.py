"""The ridge head against scikit-learn's `RidgeClassifierCV`: the same lambdas, the same leave-one-out, on the same features.

Run by ``make bench``, after cpu.py; writes its part of docs/benchmarks.md. The head standardises, decomposes, judges every
lambda, fits and calibrates; scikit-learn gets the features standardised and does not calibrate. Both use every core.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from classifiers.heads.ridge import ALPHAS, RidgeHead

PAGE = Path(__file__).resolve().parent.parent / "docs" / "benchmarks.md"
BEGIN, END = "<!-- made by benchmarks/ridge.py -->", "<!-- end -->"
LARGEST = (50_000, 2048, 10)
SIZES = ((5_000, 1280, 10), (500, 2048, 10), LARGEST)
RANK = 200  # directions that classes and most of the variance lie in, as in real features

Data = tuple[NDArray[np.float32], NDArray[np.int64]]


def digits() -> Data:
    """scikit-learn's handwritten digits."""
    from sklearn.datasets import load_digits

    X, y = load_digits(return_X_y=True)
    return X.astype(np.float32), y


def synthetic(n: int, d: int, k: int) -> Data:
    """Features after a ReLU: correlated, with noise of their own, and classes that overlap."""
    rng = np.random.default_rng(0)
    y = np.arange(n) % k
    hidden = rng.normal(size=(n, RANK)).astype(np.float32) + 0.35 * rng.normal(size=(k, RANK)).astype(np.float32)[y]
    X = hidden @ rng.normal(size=(RANK, d)).astype(np.float32) / np.float32(RANK**0.5)
    X += 0.3 * rng.standard_normal((n, d), dtype=np.float32)
    return np.maximum(X, 0, out=X), y


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    begin = time.perf_counter()
    done = work()
    return time.perf_counter() - begin, done


def measure(name: str, data: Data, turns: int) -> str:
    """A line of the table."""
    from sklearn.linear_model import RidgeClassifier, RidgeClassifierCV

    X, y = data
    Z = (X - X.mean(axis=0, dtype=np.float64)) / np.maximum(X.std(axis=0, dtype=np.float64), 1e-12)
    ours, theirs = [], []
    for _ in range(turns):
        seconds, head = timed(lambda: RidgeHead().fit(X, y))
        ours.append(seconds)
        seconds, reference = timed(lambda: RidgeClassifierCV(ALPHAS).fit(Z, y))
        theirs.append(seconds)
    exact = RidgeClassifier(alpha=head.alpha_).fit(Z, y).coef_
    apart = np.linalg.norm(head.fitted_.layers[0][0] - exact) / np.linalg.norm(exact)
    mine, other = statistics.median(ours), statistics.median(theirs)
    cells = [name, f"{other:.2f}", f"{mine:.2f}", f"**{other / mine:.0f}**", f"{reference.alpha_:.3g}", f"{head.alpha_:.3g}"]
    line = f"| {' | '.join([*cells, f'{apart:.0e}'])} |"
    print(line, flush=True)
    return line


def page(lines: list[str], turns: int) -> str:
    by = f"{date.today()}, {os.cpu_count()} cores, scikit-learn {version('scikit-learn')}"
    return f"""{BEGIN}
## The ridge head

{by}: seconds for {len(ALPHAS)} values of lambda, leave-one-out,
median of {turns} interleaved run(s). The last column is the relative distance of the weights to those of scikit-learn's
`RidgeClassifier` at the lambda that the head chose.

| rows x features x classes | `RidgeClassifierCV` | `--head ridge` | times faster | its lambda | ours | weights apart |
|---|---|---|---|---|---|---|
{chr(10).join(lines)}
{END}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=1)
    parser.add_argument("--small", action="store_true", help="leave out the largest, which takes scikit-learn minutes")
    parser.add_argument("--dry-run", action="store_true", help="print, write nothing")
    given = parser.parse_args()
    lines = [measure("digits, 1,797 x 64 x 10", digits(), given.turns)]
    for n, d, k in SIZES:
        if not (given.small and (n, d, k) == LARGEST):
            lines.append(measure(f"{n:,} x {d:,} x {k}", synthetic(n, d, k), given.turns))
    if given.dry_run:
        return
    text = PAGE.read_text()
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2].lstrip("\n")
    PAGE.write_text(f"{before.rstrip()}\n\n{page(lines, given.turns)}" + (f"\n{after}" if after else ""))


if __name__ == "__main__":
    main()
