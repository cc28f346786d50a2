"""How many images to hand over at once: measured, where there is enough to do that it pays."""

from __future__ import annotations

import logging
import time

import numpy as np

from .fleet import Fleet
from .session import MAX_BATCH, Embedder

log = logging.getLogger("penult.extractor")

WORTH = 60.0  # seconds that the backbone would take; below, measuring costs more than it gains
ROUNDS = 40  # rounds of batches, so many at least that the first look costs little
SECONDS = 0.5  # that one size is measured at least
GAIN = 1.03  # a larger batch must be faster by this factor: it costs memory, and a measurement is this uncertain
# On a CPU no network was seen to gain by more than 8, and ONNX Runtime keeps the memory of the largest batch it has seen.
LARGEST = {"cpu": 8, "cuda": 512}  # TensorRT builds an engine for every size, for minutes: it keeps the default


def tune(embedder: Embedder | Fleet, side: int, images: int) -> dict[int, float]:
    """Choose the batch size of an embedder by running it on noise in all its lanes.

    On a CPU it halves the default as long as that gains: large batches fall out of the caches. On a GPU it doubles as long as
    that gains, and takes the last size that did.

    Args:
        embedder: its ``batch_size`` is set.
        side: of its square input, pixels.
        images: how many there are to do.

    Returns:
        Images per second of each size that was tried; empty where nothing was measured.
    """
    default = embedder.batch_size
    if embedder.provider not in LARGEST or embedder.fixed_batch or images < ROUNDS * default * embedder.lanes:
        return {}
    if images * _seconds(embedder, default, side) / (default * embedder.lanes) < WORTH:
        return {}
    rates = {default: _rate(embedder, default, side)}
    best = default
    for factor in (2.0, 0.5):
        size = int(best * factor)
        while 1 <= size <= min(LARGEST[embedder.provider], MAX_BATCH) and size not in rates:
            rates[size] = _rate(embedder, size, side)
            if embedder.batch_size < size or rates[size] < rates[best] * (GAIN if size > best else 1.0):
                break  # it did not fit into the GPU's memory, or is no faster
            best, size = size, int(size * factor)
        if best != default:
            break
    embedder.batch_size = best if embedder.provider == "cpu" else min(best, embedder.batch_size)
    log.info("batches of %d: %s", best, ", ".join(f"{size} gives {rate:.0f} images/s" for size, rate in sorted(rates.items())))
    return rates


def _rate(embedder: Embedder | Fleet, size: int, side: int) -> float:
    """Images per second of batches of one size in all lanes."""
    embedder.batch_size = size
    _seconds(embedder, size, side)  # what is allocated and chosen at the first call
    rounds, spent = 0, 0.0
    while spent < SECONDS:
        spent += _seconds(embedder, size, side)
        rounds += 1
    return rounds * size * embedder.lanes / spent


def _seconds(embedder: Embedder | Fleet, size: int, side: int) -> float:
    """How long one batch in every lane takes."""
    pixels = np.random.default_rng(0).integers(0, 256, (size, side, side, 3), np.uint8)
    begin = time.perf_counter()
    for future in [embedder.submit(pixels) for _ in range(embedder.lanes)]:
        future.result()
    return time.perf_counter() - begin
