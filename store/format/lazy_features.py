"""Lazy features: arrays that stay on disk and are read block by block, for caches that do not fit into memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from store.errors import CorruptCacheError, InputMissingError, PenultError

from . import shard

ROWS = 8192  # at once: 64 MiB of 2,048 float32


@dataclass(frozen=True, eq=False)
class LazyFeatures:
    """Features of some samples of a cache, or of their views, left on disk.

    Indexing by a slice or by row numbers gives lazy features again; ``np.asarray`` reads them. Each shard is checked
    completely when it is first read.

    Attributes:
        shards: the shards that hold them.
        owner, row: the shard of each feature vector, and its number there (see `shard.read_rows`), ``(n,)``.
        dtype: of the arrays that are read: float16 if all shards are, else float32.
        sound: numbers of shards that were checked; shared by all of one cache.
        blamed: returns the error to raise for a missing or damaged shard, see `FeatureCache.blamed`.
    """

    shards: Sequence[shard.Shard]
    owner: NDArray[np.int32]
    row: NDArray[np.int32]
    dtype: np.dtype[Any]
    sound: set[int]
    blamed: Callable[[PenultError], PenultError]

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.owner), self.shards[0].dim if self.shards else 0

    @property
    def size(self) -> int:
        return self.shape[0] * self.shape[1]

    def __len__(self) -> int:
        return len(self.owner)

    def __getitem__(self, rows: slice | NDArray[np.intp]) -> LazyFeatures:
        return replace(self, owner=self.owner[rows], row=self.row[rows])

    def __array__(self, dtype: np.dtype[Any] | None = None, *, copy: bool | None = None) -> NDArray[np.floating[Any]]:
        if copy is False:
            message = "features on disk cannot become an array without a copy"
            raise ValueError(message)
        return self.read(dtype)

    def read(self, dtype: np.dtype[Any] | None = None, advance: Callable[[int], None] | None = None) -> NDArray[Any]:
        """Read all of them, ``(n, d)``.

        Args:
            dtype: of the array; by default their own.
            advance: is called with the number of rows of each shard that has been read.

        Raises:
            CorruptCacheError: a shard is damaged; names it.
            LockedError: another run has replaced the cache.
        """
        out = np.empty(self.shape, dtype or self.dtype)
        for i in np.unique(self.owner).tolist():
            mine = np.flatnonzero(self.owner == i)
            whole = slice(mine[0], mine[-1] + 1) if mine[-1] - mine[0] + 1 == len(mine) else mine
            try:
                if i not in self.sound:
                    own = self.shards[i].encoding_type == shard.ENCODING_TYPE  # opening a compact file compares its digest
                    shard.require_sound(self.shards[i], digest=own)
                    self.sound.add(i)
                vectors = shard.read_rows(self.shards[i], self.row[whole])
            except (CorruptCacheError, InputMissingError) as error:
                raise self.blamed(error) from error
            if isinstance(whole, slice) and out.dtype == np.float32:
                shard.widen(vectors, out[whole])
            else:
                out[whole] = vectors
            if advance:
                advance(len(mine))
        return out

    @property
    def order(self) -> NDArray[np.intp]:
        """Their order on disk, in which they are read sequentially."""
        return self.order_of_runs(1)

    def order_of_runs(self, length: int) -> NDArray[np.intp]:
        """As `order`, with each run of ``length`` rows kept together: the views of an image, also of one that occurs twice."""
        runs = np.lexsort((self.row[::length], self.owner[::length]))
        return (runs[:, None] * length + np.arange(length)).ravel()

    def joined(self, other: LazyFeatures) -> LazyFeatures:
        """These followed by others of the same cache."""
        return replace(self, owner=np.append(self.owner, other.owner), row=np.append(self.row, other.row))

    def blocks(self) -> Iterator[tuple[slice, NDArray[np.float32]]]:
        """All of them in blocks of at most `ROWS` rows, in float32, each with its slice."""
        for begin in range(0, len(self), ROWS):
            block = slice(begin, begin + ROWS)
            yield block, np.asarray(self[block], np.float32)
