"""What an extraction is asked to do, and what it says of itself afterwards."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from store.errors import UsageError

from .augment import STANDARD, Augmentation
from .reading import Clock
from .views import Views

MIN_BUDGET = 3


@dataclass(frozen=True)
class Options:
    """How to extract; the defaults are the command line's.

    Attributes:
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:N``, or several of one kind with commas, by one process each.
        batch_size: images per inference call; None for what a CPU is measured to be fast with, where there is enough to do (see
            `tuning`), and for what goes into the memory of a GPU.
        workers: decoding threads; None for as many as are needed, see `reading.Crew`.
        storage: ``auto`` (float16 where the values fit) or ``float32``.
        val_fraction, test_fraction, seed: the split, where the data has none.
        fail_fast: stop at the first input that fails.
        max_failures: budget as a number, ``"N"``, or a share, ``"P%"`` (then at least 3 files).
        retry_failed: try recorded failures again.
        verify_content: read and hash files even where size, time and inode are unchanged.
        limit: only so many inputs, chosen by hash rank.
        overwrite: start a new cache in place of an old one.
        quiet: no progress line.
        precision: ``fp32``, ``int8`` (on the CPU, calibrated once on training images), or ``fp16`` (on a GPU).
        tf32: let a GPU round the products of float32 to 10 bits, for speed.
        views: of each image; from 2 on, the others are drawn by ``seed`` as ``augmentation`` says, see `views.Views`.
        augmentation: what the others may differ in.
    """

    device: str = "auto"
    batch_size: int | None = None
    workers: int | None = None
    storage: str = "auto"
    val_fraction: float = 0.2
    test_fraction: float = 0.2
    seed: int = 0
    fail_fast: bool = False
    max_failures: str = "1%"
    retry_failed: bool = False
    verify_content: bool = False
    limit: int | None = None
    overwrite: bool = False
    quiet: bool = False
    precision: str = "fp32"
    tf32: bool = False
    views: int = 1
    augmentation: Augmentation = STANDARD

    @property
    def drawn(self) -> Views | None:
        """How views are drawn; None where there is one of each image."""
        if self.views == 1 and self.augmentation != STANDARD:
            message = "an augmentation is drawn for --views of 2 and more; say how many, or leave it out"
            raise UsageError(message)
        return Views(self.views, self.seed, self.augmentation) if self.views != 1 else None

    def budget(self, inputs: int) -> int:
        """How many inputs may fail."""
        text = self.max_failures.strip()
        try:
            if text.startswith("-"):
                raise ValueError
            if text.endswith("%"):
                return max(MIN_BUDGET, int(float(text[:-1]) / 100 * inputs))
            return int(text)
        except ValueError:
            message = f"--max-failures {text}: expected a number such as 10, or a share such as 1%"
            raise UsageError(message) from None


@dataclass
class Summary:
    """What a run did; ok + duplicates + failed = inputs.

    Attributes:
        inputs, ok, duplicates, failed: outcome of every input; ok counts distinct contents.
        computed: images that went through the backbone in this run.
        inference_calls: calls of the backbone in this run.
        images_per_second: computed images over the time spent on them; 0 where there were none.
        cache_bytes: size of all shards.
        batch_size, lanes, workers: as used.
        views: of each image.
        seconds: wall time by stage. ``read+decode`` and ``backbone`` are summed over workers and lanes, ``write`` is
            beside them; ``wait`` was spent waiting for pixels, ``embed`` for features, ``settle`` for the disk.
        bottleneck: the stage that decided the speed: ``decoding``, ``backbone``, ``writing``, or none.
        codes: number of failures by code.
    """

    cache: str = ""
    inputs: int = 0
    ok: int = 0
    duplicates: int = 0
    failed: int = 0
    computed: int = 0
    inference_calls: int = 0
    provider: str = ""
    images_per_second: float = 0.0
    cache_bytes: int = 0
    batch_size: int = 0
    lanes: int = 0
    workers: int = 0
    views: int = 1
    bottleneck: str = ""
    seconds: dict[str, float] = field(default_factory=dict)
    codes: dict[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def text(self) -> str:
        """For people: one line that reconciles, one that says what the run did, and where it was long, why it took so long."""
        codes = f" ({', '.join(f'{code} {count}' for code, count in sorted(self.codes.items()))})" if self.codes else ""
        lines = [f"{self.inputs} inputs = {self.ok} ok + {self.duplicates} duplicates + {self.failed} failed{codes}"]
        total = self.seconds["total"]
        if not self.computed:
            return "\n".join([*lines, f"nothing to compute, 0 inference calls, {total:.1f} s"])
        each = {name: 1000 * self.seconds[name] / self.computed for name in ("read+decode", "backbone", "write")}
        views = f" in {self.views} views each" if self.views > 1 else ""
        lines.append(
            f"{self.computed} computed{views} on {self.provider} in {total:.1f} s, {self.images_per_second:.0f} images/s "
            f"(ms an image: decoding {each['read+decode']:.1f} in {self.workers} workers, "
            f"backbone {each['backbone']:.1f} in {self.lanes} lanes of {self.batch_size}, writing {each['write']:.1f})"
        )
        if total >= ADVICE_SECONDS:
            advice = ADVICE[self.bottleneck, "cpu" if self.provider == "cpu" else "gpu"]
            lines.append(f"bottleneck: {self.bottleneck}; {advice}")
        return "\n".join(lines)


ADVICE_SECONDS = 20.0  # nobody minds what took less
ADVICE = {
    ("decoding", "cpu"): "more cores, smaller photos, or another --pixel-path would help",
    ("decoding", "gpu"): "the GPU waited for images; more cores, smaller photos, or another --pixel-path would help",
    ("backbone", "cpu"): "--precision int8, a smaller network or a GPU would help",
    ("backbone", "gpu"): "--precision fp16 or a smaller network would help",
    ("writing", "cpu"): "the disk of the cache is slow",
    ("writing", "gpu"): "the disk of the cache is slow",
}


def bottleneck(seconds: Clock, provider: str) -> str:
    """The stage that decided the speed.

    On a GPU it is what the consumer waited for. On a CPU decoding and backbone share the cores, so it is the larger share of
    the work; unless the consumer waited for the disk.
    """
    waits = {"decoding": seconds["wait"], "backbone": seconds["embed"], "writing": seconds["settle"]}
    if provider == "cpu" and max(waits, key=waits.__getitem__) != "writing":
        return "decoding" if seconds["read+decode"] > seconds["backbone"] else "backbone"
    return max(waits, key=waits.__getitem__)


def check_for_gpu(precision: str, device: str, *, tf32: bool = False) -> None:
    """Refuse on a CPU what only a GPU gains from: there float16 is float32 with a cast before and after, and TF32 nothing."""
    for asked, flag in ((precision == "fp16", "--precision fp16"), (tf32, "--tf32")):
        if asked and device == "cpu":
            message = f"{flag} is for a GPU, and this is the CPU: leave it out, or pass --device cuda where there is a card"
            raise UsageError(message)


def device_of(options: Options) -> str:
    """Where to compute.

    Raises:
        UsageError: int8 on a GPU, whose kernels would give other numbers, and slower than float16.
    """
    if options.precision != "int8" or set(options.device.split(",")) == {"cpu"}:
        return options.device
    if options.device != "auto":
        message = f"--precision int8 is for the CPU, not for --device {options.device}; leave one of them out"
        raise UsageError(message)
    return "cpu"
