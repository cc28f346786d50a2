"""A structured fuzz of everything that penult reads back: caches, bundles, fused classifiers.

A mutation changes bytes, or one value, name, type or shape inside JSON, HDF5 or ONNX. Half of them are accidents: the digests
are those of before, and what is read must be refused (65 or 66) or give the same numbers. The others are signed: the digests
are computed again, as a hostile writer would; what is read must be refused or make sense: no traceback, crash or hang.

A worker process does the mutations, so that one that kills or hangs its reader is counted as such. Each is decided by target,
seed and number alone: ``python benchmarks/fuzz.py --only shard --seed 0 --number 17`` repeats one and shows its traceback.
Part of ``make soak``; a hundred of each target run in the test suite.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import os
import random
import resource
import select
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import onnx

REPO = Path(__file__).resolve().parent.parent
if str(REPO) not in sys.path:
    sys.path.insert(0, str(REPO))

from classifiers import train  # noqa: E402
from classifiers.bundles import fused  # noqa: E402
from classifiers.bundles.bundle import Bundle, task_of_bundle  # noqa: E402
from classifiers.bundles.digests import SUMS, file_sha256, sums_of  # noqa: E402
from classifiers.bundles.fuse import fuse, selftest  # noqa: E402
from classifiers.bundles.held_out import evaluate_bundle  # noqa: E402
from classifiers.bundles.predictor import Predictor  # noqa: E402
from classifiers.reports.bundle_page import report_again  # noqa: E402
from classifiers.training.settings import TrainOptions  # noqa: E402
from extractor.graphs.backbone_facts import PREFIX  # noqa: E402
from extractor.graphs.onnx_file import graph_digest, weights_digest  # noqa: E402
from store.cache import FeatureCache  # noqa: E402
from store.errors import BadDataError, PenultError  # noqa: E402
from store.format import hdf5  # noqa: E402
from store.format.metadata import meta_bytes  # noqa: E402

V1 = REPO / "tests/data/archives/v1"
USED = 10  # of so many mutations one is used, too
PATIENCE = 60.0  # seconds for one mutation
MEMORY = 8 * 2**30  # bytes of address space of a worker
REFUSED = (65, 66)
ODD: tuple[Any, ...] = (
    None,
    True,
    0,
    -1,
    2,
    2**31,
    2**63,
    10**400,
    1e308,
    0.5,
    float("nan"),
    "",
    "x",
    "../x",
    "\0",
    [],
    {},
    [1],
)

Numbers = dict[str, Any]
Task = tuple[str, int]  # the name of a target, and the number of a mutation


def of_cache(path: Path) -> Numbers:
    """All that a cache, or a compact file, is read for."""
    cache = FeatureCache(path)
    rows = cache.rows()
    cache.describe()
    repr(cache)
    numbers: Numbers = {"fingerprint": cache.fingerprint.canonical, "layers": cache.layers}
    numbers["rows"] = [(row.path, row.label, row.split, row.group, row.sha256, row.targets) for row in rows]
    numbers["features"] = cache.features([row.sha256 for row in rows], views=True).tobytes()
    numbers["truth"] = cache.samples.truth(rows).tolist()
    try:
        numbers["backbone"] = cache.read_backbone()
    except BadDataError:  # the features are right without it; who needs it is told
        numbers["backbone"] = None
    return numbers


def of_bundle(path: Path) -> Numbers:
    """All that a bundle is read for."""
    bundle = Bundle.load(path)
    task = task_of_bundle(bundle)
    repr(bundle)
    X = np.random.default_rng(0).normal(0, 1, (5, bundle.backbone.dim)).astype(np.float32)
    outputs = bundle.head_function()(X)
    held, novelty = bundle.predictions(), bundle.novelty()
    return {
        "names": list(task.names),
        "outputs": outputs.tobytes(),
        "labels": [task.decide(row) for row in outputs if np.isfinite(row).all()],
        "held": (held.sha256, held.paths, held.labels.tolist(), held.probabilities.tobytes(), held.ids, held.split),
        "fitted": bundle.fitted(),
        "novelty": None if novelty is None else novelty.scores(X).tobytes(),
        "metrics": json.dumps(bundle.metrics),
        "preprocess": bundle.backbone.preprocess.facts(),
        "fingerprint": bundle.fingerprint.canonical,
    }


def of_fused(path: Path) -> Numbers:
    """All that a fused classifier is read for."""
    description = fused.Fused.load(path)
    predictor = Predictor.fused(path, description, device="cpu")
    outputs = predictor.probabilities(fused.golden_images(description.preprocess.crop)[:4])
    return {
        "names": description.classes,
        "outputs": outputs.tobytes(),
        "labels": [predictor.task.decide(row) for row in outputs if np.isfinite(row).all()],
        "preprocess": description.preprocessing,
    }


def use_cache(path: Path, scratch: Path) -> None:
    """Train on a cache, and judge a bundle on it."""
    cache = FeatureCache(path)
    train(cache, scratch / "new.head", None if cache.samples.target_names or not cache.samples.task.stratifies else "centroid")
    evaluate_bundle(V1 / f"{'logistic' if path.suffix == '.h5' else path.stem.replace('photos', 'logistic')}.head", cache)


def use_bundle(path: Path, scratch: Path) -> None:
    """Judge a bundle, and draw its report."""
    evaluate_bundle(path, V1 / f"{path.name.partition('-')[0]}.cache")
    (scratch / "page.html").write_text(report_again(Bundle.load(path)))


def use_fused(path: Path, scratch: Path) -> None:
    """Predict, and replay the golden images."""
    list(Predictor.load(path, device="cpu").predict([V1 / "extra.jpg"]))
    selftest(path, device="cpu")


@dataclass(frozen=True)
class Target:
    """A file that is mutated.

    Attributes:
        name: of the kind.
        files: the file in each of the bases, as a glob below the folder of all bases.
        read: what is read, given the cache, bundle or fused file.
        change: mutates the file in place, and signs it if it is asked to.
        use: what takes long, for a mutation that was read: training, evaluation, the report.
    """

    name: str
    files: str
    read: Callable[[Path], Numbers]
    change: Callable[..., None]
    use: Callable[[Path, Path], object]

    def bases(self, folder: Path) -> list[tuple[Path, Path]]:
        """What is read, and the file of it that is mutated."""
        matches = sorted(folder.glob(self.files))
        return [(folder / match.relative_to(folder).parts[0], match) for match in matches]


def change_bytes(data: bytes, rng: random.Random) -> bytes:
    """Accidents of disks and networks: bits, bytes, runs that are zero, missing, twice or exchanged, another length."""
    at = rng.randrange(len(data))
    size = min(rng.choice((1, 2, 4, 16, 64, 512)), len(data) - at)
    run = data[at : at + size]
    other = rng.randrange(len(data) - size + 1)
    kinds: list[Callable[[], bytes]] = [
        lambda: data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :],
        lambda: data[:at] + rng.randbytes(size) + data[at + size :],
        lambda: data[:at] + bytes(size) + data[at + size :],
        lambda: data[:at] + data[at + size :],
        lambda: data[:at] + run + data[at:],
        lambda: data[:other] + run + data[other + size :],
        lambda: data[:at],
        lambda: data + run,
        lambda: b"",
    ]
    return rng.choices(kinds, weights=[4, 3, 2, 1, 1, 2, 1, 1, 0.1])[0]()


def places(value: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value inside JSON."""
    if above:
        yield above
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*above, key))


def change_json(value: Any, rng: random.Random) -> Any:
    """One value replaced, removed, renamed, moved or altered a little."""
    value = json.loads(json.dumps(value))
    *above, last = rng.choice(list(places(value)) or [(None,)])
    if last is None:
        return rng.choice(ODD)
    inside = value
    for key in above:
        inside = inside[key]
    before, kind = inside[last], rng.randrange(6)
    if kind == 0:
        del inside[last]
    elif kind == 1 and isinstance(inside, dict):
        inside[f"{last}x"] = inside.pop(last)
    elif kind == 2 and isinstance(inside, list):
        inside.insert(rng.randrange(len(inside) + 1), inside.pop(last) if rng.random() < 0.5 else before)
    elif kind == 3 and isinstance(before, int | float) and not isinstance(before, bool):
        inside[last] = rng.choice((before + 1, before - 1, -before, before * 2, before * 1e6, str(before)))
    elif kind == 4 and isinstance(before, str):
        inside[last] = rng.choice((before[:-1], before + "x", before.upper(), before[::-1], before * 100))
    else:
        inside[last] = rng.choice(ODD)
    return value


def change_array(array: Any, rng: random.Random) -> Any:
    """One number, the type, the shape, or the order of rows."""
    array = array.copy()
    odd = (0, -1, 1, 2**7, 2**31 - 1) if array.dtype.kind in "iu" else (0, -1, 19.95, float("nan"), float("inf"), 1e30)
    kind = rng.randrange(8)
    with np.errstate(all="ignore"):
        if kind <= 2 and array.size:
            array.reshape(-1)[rng.randrange(array.size)] = np.array(rng.choice(odd)).astype(array.dtype)
        elif kind == 3:
            array = array.astype(rng.choice((np.uint8, np.int32, np.int64, np.float16, np.float32, np.float64)))
        elif kind == 4 and array.ndim:
            array = array[: rng.randrange(len(array) + 1)]
        elif kind == 5 and array.ndim and len(array):
            array = np.concatenate([array, array[: rng.randrange(1, len(array) + 1)]])
        elif kind == 6 and array.ndim and len(array):
            array = np.roll(array, rng.randrange(1, len(array) + 1), axis=0)
        else:
            array = rng.choice((array.reshape(-1), array[None], array.T.copy(), array[..., :1] if array.ndim else array))
    return np.ascontiguousarray(array)


def change_hdf5(path: Path, rng: random.Random, *, signed: bool) -> None:
    """A dataset or an attribute of an HDF5 file."""
    with h5py.File(path, "r") as file:
        datasets = {name: file[name][()] for name in file}
        attrs = {name: value.decode() if isinstance(value, bytes) else int(value) for name, value in file.attrs.items()}
    kind, before = str(attrs.pop("encoding-type")), str(attrs.pop("payload-sha256"))
    del attrs["encoding-version"]
    if rng.random() < 0.25:
        name = rng.choice(sorted(attrs))
        text = attrs[name]
        if isinstance(text, int):
            attrs[name] = rng.choice((text + 1, text - 1, 0, -1, 2**62))
        else:
            try:
                attrs[name] = json.dumps(change_json(json.loads(text), rng))
            except ValueError:
                attrs[name] = rng.choice((text + "x", text[:-1], "", "{}", "[]", "null"))
        if rng.random() < 0.1:
            del attrs[name]
    else:
        name = rng.choice(sorted(datasets))
        if rng.random() < 0.1:
            changed = datasets.pop(name)
            if rng.random() < 0.5:
                datasets[f"{name}x"] = changed
        else:
            datasets[name] = change_array(datasets[name], rng)
    data, _ = hdf5.build(kind, datasets, attrs)
    path.write_bytes(data)
    if not signed:
        with h5py.File(path, "r+") as file:
            file.attrs["payload-sha256"] = np.bytes_(before.encode())


def change_onnx(model: Any, rng: random.Random) -> None:
    """A node, an attribute, a weight, a name, a type or a shape of a graph."""
    graph, kind = model.graph, rng.randrange(10)
    node, tensor = rng.choice(graph.node), rng.choice(graph.initializer)
    if kind == 0:
        node.op_type = rng.choice(
            (*{each.op_type for each in graph.node}, "Softmax", "Sigmoid", "Neg", "Abs", "Identity", "Nothing")
        )
    elif kind == 1:
        graph.node.remove(node)
    elif kind == 2 and node.input:
        node.input[rng.randrange(len(node.input))] = rng.choice((*graph.node[0].output, tensor.name, "", "nowhere"))
    elif kind == 3 and node.attribute:
        attribute = rng.choice(node.attribute)
        if rng.random() < 0.3:
            node.attribute.remove(attribute)
        elif attribute.ints:
            attribute.ints[rng.randrange(len(attribute.ints))] = rng.choice((0, -1, 1, 2, 3, 10**6))
        else:
            attribute.i, attribute.f = rng.choice((0, -1, 1, 2, 99)), rng.choice((0.0, -1.0, 2.0, float("nan")))
    elif kind == 4 and tensor.raw_data:
        tensor.raw_data = change_bytes(tensor.raw_data, rng)
    elif kind == 5 and tensor.dims:
        tensor.dims[rng.randrange(len(tensor.dims))] = rng.choice((0, 1, 2, 10**6, -1))
    elif kind == 6:
        tensor.data_type = rng.randrange(0, 24)
    elif kind == 7:
        value = rng.choice((*graph.input, *graph.output))
        dims = value.type.tensor_type.shape.dim
        if dims and rng.random() < 0.7:
            rng.choice(dims).dim_value = rng.choice((1, 2, 5, 10**6))
        else:
            value.name = rng.choice(("x", "features", "label", ""))
    elif kind == 8:
        model.opset_import[0].version = rng.choice((1, 7, 13, 21, 99))
    else:
        tensor.name = rng.choice(("x", "", graph.node[0].output[0] if graph.node[0].output else "y"))


def mutate_json(path: Path, rng: random.Random) -> None:
    path.write_text(json.dumps(change_json(json.loads(path.read_text()), rng)))


def mutate_onnx(path: Path, rng: random.Random) -> None:
    model = onnx.load(path)
    change_onnx(model, rng)
    path.write_bytes(model.SerializeToString())


def sign(bundle: Path, name: str) -> None:
    """Record the digest of a bundle's file as if it had been saved so."""
    if name != "head.json":
        facts = json.loads((bundle / "head.json").read_text())
        facts["files"][name] = file_sha256(bundle / name)
        (bundle / "head.json").write_text(json.dumps(facts))
    (bundle / SUMS).write_bytes(sums_of(bundle))


def accident(path: Path, rng: random.Random) -> bool:
    """Change bytes, or leave that to a mutation of the format; return whether it was done."""
    if rng.random() < 0.5:
        return False
    path.write_bytes(change_bytes(path.read_bytes(), rng))
    return True


def in_hdf5(path: Path, rng: random.Random, *, signed: bool) -> None:
    if signed or not accident(path, rng):
        change_hdf5(path, rng, signed=signed)


def in_cache_json(path: Path, rng: random.Random, *, signed: bool) -> None:
    if not signed:
        return None if accident(path, rng) else mutate_json(path, rng)
    meta = json.loads(path.read_text())
    meta.pop("sha256", None)
    changed = change_json(meta, rng)
    path.write_bytes(meta_bytes(changed))
    return None


def in_bundle(path: Path, rng: random.Random, *, signed: bool) -> None:
    if signed or not accident(path, rng):
        if path.suffix == ".json":
            mutate_json(path, rng)
        elif path.suffix == ".onnx":
            mutate_onnx(path, rng)
        elif path.suffix == ".h5":
            change_hdf5(path, rng, signed=signed)
    if signed:
        sign(path.parent, path.name)


def in_fused(path: Path, rng: random.Random, *, signed: bool) -> None:
    if not signed and accident(path, rng):
        return
    model = onnx.load(path)
    entries = {each.key.removeprefix(PREFIX): each for each in model.metadata_props if each.key.startswith(PREFIX)}
    if rng.random() < 0.5:
        entry = entries[rng.choice(sorted(set(entries) - {"facts_sha256"}))]
        entry.value = json.dumps(change_json(json.loads(entry.value), rng))
    else:
        change_onnx(model, rng)
    if signed:
        with suppress(PenultError):  # the weights cannot be read, whatever is recorded
            entries["weights_sha256"].value = json.dumps(weights_digest(model, path.parent))
        entries["graph_sha256"].value = json.dumps(graph_digest(model))
        texts = {key: entry.value for key, entry in entries.items() if key != "facts_sha256"}
        entries["facts_sha256"].value = json.dumps(fused._facts_digest(texts))
    path.write_bytes(model.SerializeToString())


TARGETS = {
    each.name: each
    for each in (
        Target("samples.h5", "*.cache/samples.h5", of_cache, in_hdf5, use_cache),
        Target("cache.json", "*.cache/cache.json", of_cache, in_cache_json, use_cache),
        Target("shard", "*.cache/shards/*.h5", of_cache, in_hdf5, use_cache),
        Target("compact file", "*.h5", of_cache, in_hdf5, use_cache),
        Target("head.json", "*.head/head.json", of_bundle, in_bundle, use_bundle),
        Target("head.onnx", "*.head/head.onnx", of_bundle, in_bundle, use_bundle),
        Target("predictions.h5", "*.head/predictions.h5", of_bundle, in_bundle, use_bundle),
        Target("fused file", "*.onnx", of_fused, in_fused, use_fused),
    )
}


def make_bases(folder: Path) -> Path:
    """Caches, a compact file, bundles and fused files, of each task."""
    for name in ("photos", "views", "tags", "sizes"):
        shutil.copytree(V1 / f"{name}.cache", folder / f"{name}.cache")
        (folder / f"{name}.cache/cache.json").write_bytes(meta_bytes(FeatureCache(V1 / f"{name}.cache").meta))
    shutil.copy(V1 / "photos.h5", folder)
    options = TrainOptions(thumbnails=False)
    for cache, head in (("photos", "centroid"), ("photos", "logistic"), ("tags", "logistic"), ("sizes", "ridge")):
        bundle = train(V1 / f"{cache}.cache", folder / f"{cache}-{head}.head", None if cache == "tags" else head, options)
        fuse(bundle, folder / f"{cache}-{head}.onnx")
    return folder


@dataclass
class Tally:
    """The outcomes of one target."""

    counts: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return ", ".join(f"{outcome} {n}" for outcome, n in self.counts.most_common())

    def add(self, answer: dict[str, Any]) -> None:
        self.counts[answer["outcome"]] += 1
        if answer["failed"]:
            self.failures.append(f"number {answer['number']}: {answer['outcome']} {answer['detail']}")


def one(target: Target, folder: Path, seed: int, number: int, normal: dict[Path, Numbers], *, use: bool) -> dict[str, Any]:
    """Mutate, read, use if it was signed and read, put back."""
    rng = random.Random(f"{target.name} {seed} {number}")
    base, file = rng.choice(target.bases(folder))
    signed = number % 2 == 1
    around = [path for path in (file.parent.iterdir() if base.is_dir() else [file]) if path.is_file()]
    before = {path: path.read_bytes() for path in around}
    outcome, detail, failed = "", "", False
    try:
        target.change(file, rng, signed=signed)
        if {path: path.read_bytes() for path in around} == before:
            return {"number": number, "outcome": "nothing changed", "detail": "", "failed": False}
        try:
            numbers = target.read(base)
            if signed and use and number % USED == 1:
                with tempfile.TemporaryDirectory() as scratch:
                    target.use(base, Path(scratch))
        except PenultError as error:
            outcome, detail = f"refused with {error.exit_code}", str(error)
            failed = error.exit_code not in REFUSED
        except Exception:
            outcome, detail, failed = "traceback", traceback.format_exc(), True
        else:
            unread = {"backbone"} if numbers.get("backbone", "") is None else set()
            differ = [key for key, value in normal[base].items() if numbers[key] != value and key not in unread]
            outcome = "the same numbers" if not differ else "other numbers, signed" if signed else "other numbers"
            detail, failed = f"{base.name}: {', '.join(differ)}", bool(differ) and not signed
    finally:
        for path, data in before.items():
            path.write_bytes(data)
    return {"number": number, "outcome": outcome, "detail": detail, "failed": failed}


def worker(folder: Path, tasks: Sequence[Task], seed: int, *, use: bool) -> None:
    """Do some mutations, and print a line for each."""
    logging.getLogger("penult").setLevel(logging.ERROR)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    normal: dict[Path, Numbers] = {}
    for name, number in tasks:
        target = TARGETS[name]
        for base, _ in target.bases(folder):
            normal[base] = normal.get(base) or target.read(base)
        answer = one(target, folder, seed, number, normal, use=use)
        os.write(1, json.dumps(answer).encode() + b"\n")


def fuzz(folder: Path, names: Sequence[str], count: int, seed: int = 0, *, use: bool = False) -> dict[str, Tally]:
    """Mutate each target ``count`` times, in one worker and another after each that dies.

    Args:
        folder: of `make_bases`; it is copied.
        names: of the targets.
        count: number of mutations of each.
        seed: decides them, with the target and the number of each.
        use: train, judge and draw too with a part of what was signed and could be read.
    """
    tallies = {name: Tally() for name in names}
    tasks = list(itertools.product(names, range(count)))
    while tasks:
        with tempfile.TemporaryDirectory(prefix="penult-fuzz-") as scratch:
            copy = Path(shutil.copytree(folder, Path(scratch) / "bases"))
            command = [sys.executable, __file__, "--worker", str(copy), "--seed", str(seed), *(["--use"] if use else [])]
            with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0) as process:
                assert process.stdin is not None
                assert process.stdout is not None
                process.stdin.write(json.dumps(tasks).encode())
                process.stdin.close()
                line = b"1"
                while tasks and line:
                    name, number = tasks.pop(0)
                    ready, _, _ = select.select([process.stdout], [], [], PATIENCE)
                    line = process.stdout.readline() if ready else b""
                    if not line:
                        process.kill()
                        outcome = f"crash with status {process.wait()}" if ready else "hang"
                    dead = {"number": number, "outcome": outcome, "detail": "", "failed": True} if not line else {}
                    tallies[name].add(dead or json.loads(line))
    return tallies


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=TARGETS, help="this target alone")
    parser.add_argument("--count", type=int, default=2000, help="mutations of each target")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--number", type=int, help="repeat this one")
    parser.add_argument("--use", action="store_true", help="train, judge and draw too with what was signed")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return worker(options.worker, json.load(sys.stdin), options.seed, use=options.use)
    failed = False
    with tempfile.TemporaryDirectory(prefix="penult-fuzz-") as scratch:
        folder = make_bases(Path(scratch))
        for name in options.only or TARGETS:
            if options.number is not None:
                worker(folder, [(name, options.number)], options.seed, use=options.use)
                continue
            tally = fuzz(folder, [name], options.count, options.seed, use=options.use)[name]
            print(f"{name}: {tally}", flush=True)
            print(*(f"  {failure}" for failure in tally.failures[:20]), sep="\n", flush=True)
            failed = failed or bool(tally.failures)
    sys.exit(failed)


if __name__ == "__main__":
    main()
