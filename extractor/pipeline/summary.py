"""Summary of an extraction: counts, speed, and the bottleneck."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from extractor.machine import Clock, seconds_text
from extractor.pixels.preprocess import PIXEL_PATHS
from extractor.runtime.provider import provider_of
from store.progress.wording import rate_text


@dataclass
class Summary:
    """Counts and times of a run; ok + duplicates + failed = inputs.

    Attributes:
        inputs, ok, duplicates, failed: outcome of every input; ok counts distinct contents.
        computed: images whose features this run has added.
        calibrated: how many of these were computed when the backbone was calibrated, in this run or before it (see
            ``conversion``): their time is in ``seconds["convert"]``.
        cached: inputs whose features were in the cache when the run began.
        inference_calls: calls of the backbone in this run.
        images_per_second: ``computed`` without ``calibrated`` over ``seconds["images"]``; 0 if there were none.
        cache_bytes: size of all shards.
        batch_size, lanes, workers: as used.
        views: of each image.
        seconds: wall time by stage; ``total`` is the sum of ``images`` and of those in `PARTS`. ``images`` is the sum of
            ``wait``, for pixels, ``embed``, for features, and ``settle``, for the disk. ``read+decode`` and ``backbone`` are
            summed over workers and lanes, ``write`` is beside them.
        bottleneck: the stage that decided the speed: ``decoding``, ``backbone``, ``writing``, or none.
        codes: number of failures by code.
        labels: number of inputs by label.
        unlabelled: number of inputs without one.
        changes: number of samples of the last run whose ``split``, and whose ``label`` (or targets), is another now.
        subfolders: number of folders with images in a class folder, by label; they all have that label.
        backbone: its name, weights, layers, preprocessing and precision; of a custom ONNX file also where each feature set was
            found (``features``) and where each setting was said (``settings``), tokens before the patches (``prefix_tokens``),
            feature sets that may be class scores (``doubtful``), its class scores (``scores``), and what it sees in the first
            photo (``look``: ``image`` and ``classes``). ``prepared`` says where it is from: ``exported`` or ``imported`` in
            this run, the ``store`` of prepared backbones, or this ``cache``.
        conversion: of the backbone to int8. ``prepared`` says where it is from: ``calibrated`` in this run, or the ``store`` of
            prepared backbones. If it was calibrated also what that cost: ``core_seconds``, ``images_per_core_second`` of both
            networks, ``images`` of the run and ``pays_from``, the number of images from which on int8 is worth that. Empty if
            it was in the cache, or there is none.
        warnings: what was warned of, in order.
    """

    cache: str = ""
    inputs: int = 0
    ok: int = 0
    duplicates: int = 0
    failed: int = 0
    computed: int = 0
    calibrated: int = 0
    cached: int = 0
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
    labels: dict[str, int] = field(default_factory=dict)
    unlabelled: int = 0
    changes: dict[str, int] = field(default_factory=dict)
    subfolders: dict[str, int] = field(default_factory=dict)
    backbone: dict[str, Any] = field(default_factory=dict)
    conversion: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def codes_text(self) -> str:
        """The failures by code, in brackets after a blank; empty if there are none."""
        return f" ({', '.join(f'{code} {count}' for code, count in sorted(self.codes.items()))})" if self.codes else ""

    def text(self) -> str:
        """The summary for people: a line of counts, a line about what was computed, and the bottleneck of a long run."""
        lines = [f"{self.inputs} inputs = {self.ok} ok + {self.duplicates} duplicates + {self.failed} failed{self.codes_text}"]
        if not self.computed:
            what = "nothing to compute" if self.ok else "no input could be used"
            return "\n".join([*lines, f"{what}, 0 inference calls, {seconds_text(self.seconds['total'])}", *self._rest()])
        images = self.computed - self.calibrated
        each = {name: 1000 * self.seconds[name] / max(images, 1) for name in ("read+decode", "backbone", "write")}
        views = f" in {self.views} views each" if self.views > 1 else ""
        lines.append(
            f"{images} images{views} on {self.provider} in {seconds_text(self.seconds['images'])}, "
            f"{rate_text(self.images_per_second)} "
            f"(ms an image: decoding {each['read+decode']:.1f} in {self.workers} workers, "
            f"backbone {each['backbone']:.1f} in {self.lanes} lanes of {self.batch_size}, writing {each['write']:.1f})"
        )
        lines += self._rest()
        if self.seconds["images"] >= ADVICE_SECONDS:
            lines.append(f"bottleneck: {self.bottleneck}; {self._advice()}")
        return "\n".join(lines)

    def _rest(self) -> list[str]:
        """What the time went to beside the images, if that was long."""
        total = self.seconds["total"]
        if total - self.seconds["images"] < max(REST_SECONDS, REST_SHARE * total):
            return []
        parts = {name: self.seconds[name] for name in PARTS if self.seconds[name] >= REST_SHARE * total}
        work = "take its conversion from the store" if self.conversion.get("prepared") == "store" else "calibrate it"
        what = PARTS | ({"convert": f"to {work}, with {self.calibrated} of the images"} if self.calibrated else {})
        named = [f"{seconds_text(parts[name])} {what[name]}" for name in sorted(parts, key=lambda name: -parts[name])]
        return [f"{seconds_text(total)} in all: {', '.join(named)}"] if named else []

    def _advice(self) -> str:
        """What would make the bottleneck faster; nothing that the run has already, or that would not pay."""
        of_gpu = not provider_of(self.provider).shares_cores
        if self.bottleneck == "writing":
            return "the disk of the cache is slow"
        if self.bottleneck == "decoding":
            fastest = self.backbone.get("preprocess", {}).get("pixel_path") == list(PIXEL_PATHS)[-1]
            advice = "more cores or smaller photos" if fastest else "more cores, smaller photos, or another --pixel-path"
            return f"the GPU waited for images; {advice} would help" if of_gpu else f"{advice} would help"
        precision = self.backbone.get("precision", "fp32")
        if of_gpu:
            return "a smaller network would help" if precision == "fp16" else "--precision fp16 or a smaller network would help"
        if precision != "fp32" or self.computed * self.views < INT8_PAYS:
            return "a smaller network or a GPU would help"
        return "--precision int8, a smaller network or a GPU would help"


REST_SECONDS = 1.0  # less is not said ..
REST_SHARE = 0.05  # .. nor less than this share of the whole time
PARTS = {  # stages of a run beside the images, with what they are for
    "list": "to list the images",
    "export": "to export the network once",
    "import": "to import the network",
    "copy": "to copy the network that was prepared before",
    "convert": "to convert it once",
    "start": "to open the network",
    "compare": "to see which are cached",
    "finish": "to split and save the list",
    "other": "for everything else",
}


def stages(clock: Clock, total: float) -> dict[str, float]:
    """The seconds of every stage of a run: those beside the images, ``images`` and ``other`` make the ``total``."""
    known = {name: clock.get(name, 0.0) for name in (*PARTS, "images") if name != "other"}
    every = {**clock, **known, "other": max(total - sum(known.values()), 0.0), "total": total}
    return {name: round(seconds, 3) for name, seconds in every.items()}


ADVICE_SECONDS = 20.0  # shorter runs need no advice
INT8_PAYS = 4000  # passes of the backbone from which on its calibration is sure to pay, see docs/int8.md


def bottleneck(seconds: Clock, *, shares_cores: bool) -> str:
    """The stage that decided the speed.

    It is the stage that the consumer waited for. If decoding and backbone share the cores, it is the one with the larger
    share of the work, unless the consumer waited for the disk.
    """
    waits = {"decoding": seconds["wait"], "backbone": seconds["embed"], "writing": seconds["settle"]}
    if shares_cores and max(waits, key=waits.__getitem__) != "writing":
        return "decoding" if seconds["read+decode"] > seconds["backbone"] else "backbone"
    return max(waits, key=waits.__getitem__)
