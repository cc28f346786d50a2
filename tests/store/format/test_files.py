"""HDF5 files on disk: the commit protocol, the guard against hostile files, shards and the sample table."""

from __future__ import annotations

import errno
import hashlib
import itertools
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from store.errors import BadDataError, CorruptCacheError, InputMissingError, StorageError, display
from store.fingerprint import Fingerprint
from store.format import atomic, hdf5, shard
from store.format.samples import Row, SampleTable, check_relative

REPO = Path(__file__).resolve().parents[3]
FINGERPRINT = Fingerprint({"backbone": "tiny", "storage": "auto"})
KIND = shard.ENCODING_TYPE


def digests(count: int, start: int = 0) -> list[bytes]:
    return [hashlib.sha256(bytes([i])).digest() for i in range(start, start + count)]


def write_one(folder: Path, rows: int = 3, dim: int = 4) -> Path:
    features = np.arange(rows * dim, dtype=np.float32).reshape(rows, dim)
    paths = [b"a/%d.jpg" % i for i in range(rows)]
    return shard.write_shard(folder, 7, features, digests(rows), paths, FINGERPRINT)


def attributes(file: h5py.File, kind: str = KIND, version: int = 1, rows: int = 1) -> None:
    file.attrs["encoding-type"] = np.bytes_(kind.encode())
    file.attrs["encoding-version"] = np.int64(version)
    file.attrs["rows"] = np.int64(rows)
    file.attrs["fingerprint"] = np.bytes_(b"{}")
    file.attrs["payload-sha256"] = np.bytes_(b"0" * 64)


# --- the commit protocol -----------------------------------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """The system calls of a commit in their order, with the kind of thing each was applied to."""
    trace: list[tuple[str, str]] = []
    opened: dict[int, str] = {}
    real = {name: getattr(os, name) for name in ("open", "write", "fsync", "close", "rename")}

    def record_open(path: Any, flags: int, *rest: Any, **more: Any) -> int:
        descriptor: int = real["open"](path, flags, *rest, **more)
        opened[descriptor] = "folder" if Path(path).is_dir() else Path(path).name
        if flags & os.O_CREAT:
            assert flags & os.O_EXCL, "a temporary file must be new"
            assert not flags & os.O_TRUNC
        trace.append(("open", opened[descriptor]))
        return descriptor

    def on_descriptor(name: str) -> Callable[..., Any]:
        def record(descriptor: int, *rest: Any) -> Any:
            trace.append((name, opened.get(descriptor, "?")))
            return real[name](descriptor, *rest)

        return record

    def record_rename(source: Any, target: Any, **more: Any) -> None:
        trace.append(("rename", f"{Path(source).name} -> {Path(target).name}"))
        real["rename"](source, target, **more)

    monkeypatch.setattr(os, "open", record_open)
    monkeypatch.setattr(os, "rename", record_rename)
    for name in ("write", "fsync", "close"):
        monkeypatch.setattr(os, name, on_descriptor(name))
    return trace


def test_commit_makes_the_content_durable_before_the_name_and_the_name_before_returning(
    tmp_path: Path, calls: list[tuple[str, str]]
) -> None:
    atomic.commit(tmp_path / "final.h5", b"content")
    temporary = calls[0][1]
    assert temporary.startswith(".final.h5.")
    assert temporary.endswith(".tmp")
    assert calls == [
        ("open", temporary),
        ("write", temporary),
        ("fsync", temporary),
        ("close", temporary),
        ("rename", f"{temporary} -> final.h5"),
        ("open", "folder"),
        ("fsync", "folder"),
        ("close", "folder"),
    ]
    assert (tmp_path / "final.h5").read_bytes() == b"content"


def test_commit_continues_after_short_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real(descriptor, bytes(data[:3])))
    atomic.commit(tmp_path / "final", b"0123456789")
    assert (tmp_path / "final").read_bytes() == b"0123456789"


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
@pytest.mark.parametrize("call", ["write", "fsync", "rename"])
def test_a_failing_disk_is_a_storage_error_and_the_old_content_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int
) -> None:
    final = tmp_path / "final"
    atomic.commit(final, b"old")

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(StorageError, match=os.strerror(number)) as caught:
        atomic.commit(final, b"new")
    assert caught.value.exit_code == 74
    assert final.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["final"]


def test_an_unsynced_folder_is_not_called_success(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.fsync

    def fail_on_folders(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):  # noqa: PTH112 - a magic link
            raise OSError(errno.EIO, "Input/output error")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fail_on_folders)
    with pytest.raises(StorageError):
        atomic.commit(tmp_path / "final", b"new")


def test_a_really_full_disk_leaves_nothing_behind(tmp_path: Path) -> None:
    """RLIMIT_FSIZE makes the kernel refuse, in the middle of a shard; HDF5 itself was seen to die with SIGSEGV here."""
    code = f"""
import os, resource, signal, sys
sys.path.insert(0, {str(REPO)!r})
from pathlib import Path
import numpy as np
from store.format import shard
from store.errors import PenultError
from store.fingerprint import Fingerprint
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
keys = [bytes([i]) * 32 for i in range(100)]
try:
    shard.write_shard(Path({str(tmp_path)!r}), 0, np.ones((100, 100), np.float32), keys, [b"x"] * 100, Fingerprint({{}}))
except PenultError as error:
    print(type(error).__name__, error)
    sys.exit(error.exit_code)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 74, done.stderr
    assert done.stdout.startswith("StorageError")
    assert "File too large" in done.stdout
    assert list(tmp_path.iterdir()) == []


# --- shards and their format -------------------------------------------------------------------------------------------


def test_plain_h5py_reads_a_shard_as_the_format_says(tmp_path: Path) -> None:
    path = write_one(tmp_path)
    with h5py.File(path, "r") as file:
        assert sorted(file) == ["features", "path", "path-offsets", "sha256"]
        assert file["features"].dtype == np.dtype("<f4")
        np.testing.assert_array_equal(file["features"][()], np.arange(12).reshape(3, 4))
        assert file["sha256"].shape == (3, 32)
        assert file["sha256"].dtype == np.uint8
        assert bytes(file["sha256"][1]) == digests(3)[1]
        blob, offsets = file["path"][()].tobytes(), file["path-offsets"][()]
        assert [blob[a:b] for a, b in itertools.pairwise(offsets)] == [b"a/0.jpg", b"a/1.jpg", b"a/2.jpg"]
        assert file.attrs["rows"] == 3
        assert file.attrs["encoding-type"] == b"penult-shard"
        assert file.attrs["encoding-version"] == 1
        assert file.attrs["fingerprint"] == b'{"backbone":"tiny","storage":"auto"}'
        for name in file:
            assert file[name].chunks is None
            assert file[name].compression is None


def digest_of_rule_8(path: Path) -> str:
    """Written from FORMAT.md alone."""
    sha = hashlib.sha256()
    with h5py.File(path, "r") as file:
        for name in sorted(file):
            data = file[name][()]
            sha.update(name.encode() + b"\0" + data.dtype.str.encode() + b"\0")
            sha.update(",".join(str(side) for side in data.shape).encode() + b"\0" + data.tobytes(order="C"))
        for name in sorted(file.attrs):
            if name != "payload-sha256":
                value = file.attrs[name]
                text = value if isinstance(value, bytes) else str(int(value)).encode()
                sha.update(name.encode() + b"\0" + text + b"\0")
    return sha.hexdigest()


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_the_payload_digest_is_the_one_of_rule_8(tmp_path: Path, dtype: Any) -> None:
    features = np.linspace(-1, 1, 20, dtype=np.float32).reshape(5, 4).astype(dtype)
    path = shard.write_shard(tmp_path, 3, features, digests(5), [b"p%d" % i for i in range(5)], FINGERPRINT)
    found = digest_of_rule_8(path)
    with h5py.File(path, "r") as file:
        assert file.attrs["payload-sha256"].decode() == found
    assert path.name == f"00003-{found[:12]}.h5"
    hdf5.verify(path, KIND)


def test_the_digest_is_the_same_whatever_is_read_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_one(tmp_path, rows=70, dim=5)
    monkeypatch.setattr(hdf5, "BLOCK", 64)
    hdf5.verify(path, KIND)
    arrays = {"one": np.array(3.0), "none": np.empty((10**12, 0)), "wide": np.arange(300.0).reshape(2, 150)}
    small = hdf5.payload_sha256(arrays, {})
    monkeypatch.undo()
    assert hdf5.payload_sha256(arrays, {}) == small


def test_a_sample_tables_digest_is_the_one_of_rule_8(tmp_path: Path) -> None:
    path = tmp_path / "samples.h5"
    path.write_bytes(SampleTable([Row(b"a", "x", sha256=digests(1)[0])], {"root": "00"}).to_bytes())
    with h5py.File(path, "r") as file:
        assert file.attrs["payload-sha256"].decode() == digest_of_rule_8(path)


@pytest.mark.parametrize("wanted", [[0], [49, 0, 7, 7], list(range(49, -1, -1)), []])
def test_rows_come_in_the_order_asked_for(tmp_path: Path, wanted: list[int]) -> None:
    path = write_one(tmp_path, rows=50, dim=3)
    found = shard.read_rows(shard.read_shard(path), np.array(wanted, np.intp))
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, np.arange(150, dtype=np.float32).reshape(50, 3)[wanted])


def test_the_float16_rule_looks_at_each_row_alone() -> None:
    features = np.array(
        [
            [1, 2, 3],  # exact
            [0, 0, 0],  # nothing to lose
            [0.1, 0.2, 0.3],  # rounded, well inside 5e-4
            [1e-7, 2e-7, 1e-7],  # below float16's subnormals: lost
            [1, 1e-7, 1e-7],  # the same small numbers do not matter beside a large one
            [65504, 1, 1],  # the largest float16
            [65521, 1, 1],  # overflows
            [3e-5, 1e-6, 0],  # subnormal and coarse
        ],
        np.float32,
    )
    expected = [True, True, True, False, True, True, False, False]
    assert shard.fits_float16(features).tolist() == expected
    assert [bool(shard.fits_float16(row[None])[0]) for row in features] == expected
    kept = features[np.array(expected)]
    error = np.linalg.norm(kept.astype(np.float16).astype(np.float64) - kept, axis=1)
    assert (error <= 5e-4 * np.linalg.norm(kept.astype(np.float64), axis=1)).all()


def test_the_float16_rule_at_its_threshold() -> None:
    """Subnormals are multiples of 2**-24, so a value half-way between two loses half a step: here just above and below 5e-4."""
    step = 2.0**-24
    coarse, fine = np.float32(999.5 * step), np.float32(1001.5 * step)  # half a step is 5.003e-4 and 4.993e-4 of them
    assert shard.fits_float16(np.array([[coarse], [fine]], np.float32)).tolist() == [False, True]


# --- damaged and hostile files -----------------------------------------------------------------------------------------


def refused(path: Path, reason: str) -> None:
    with pytest.raises(CorruptCacheError, match=reason), hdf5.open_checked(path, KIND) as (datasets, _):
        raise AssertionError(f"opened: {sorted(datasets)}")


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"", "damaged"), (b"<html>not found</html>" * 50, "damaged"), (b"\x89HDF\r\n\x1a\n" + bytes(100), "damaged")],
    ids=["zero-byte", "html", "header-only"],
)
def test_what_is_not_hdf5_is_refused(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "x.h5"
    path.write_bytes(content)
    refused(path, reason)
    assert path.read_bytes() == content


def test_a_missing_file_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputMissingError, match="does not exist"), hdf5.open_checked(tmp_path / "x.h5", KIND):
        pass


@pytest.mark.parametrize("share", [0.05, 0.3, 0.6, 0.9, 0.999])
def test_a_truncated_shard_is_refused(tmp_path: Path, share: float) -> None:
    path = write_one(tmp_path, rows=20, dim=30)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    refused(path, "damaged")


SECRET = b"SECRETSECRETSECR"


def external_storage(file: h5py.File, secret: Path) -> None:
    file.create_dataset("features", (1, 4), np.float32, external=[(str(secret), 0, 16)])


def external_link(file: h5py.File, secret: Path) -> None:
    other = secret.with_suffix(".h5")
    with h5py.File(other, "w") as target:
        target["features"] = np.ones((1, 4), np.float32)
    file["features"] = h5py.ExternalLink(str(other), "/features")


def soft_link(file: h5py.File, _: Path) -> None:
    file["real"] = np.ones((1, 4), np.float32)
    file["features"] = h5py.SoftLink("/real")


def virtual(file: h5py.File, secret: Path) -> None:
    other = secret.with_suffix(".h5")
    with h5py.File(other, "w") as target:
        target["features"] = np.ones((1, 4), np.float32)
    layout = h5py.VirtualLayout((1, 4), np.float32)
    layout[:] = h5py.VirtualSource(str(other), "features", (1, 4))
    file.create_virtual_dataset("features", layout)


def chunked(file: h5py.File, _: Path) -> None:
    file.create_dataset("features", data=np.ones((1, 4), np.float32), chunks=(1, 4))


def filtered(file: h5py.File, _: Path) -> None:
    file.create_dataset("features", data=np.ones((1, 4), np.float32), compression="gzip")


def shape_bomb(file: h5py.File, _: Path) -> None:
    file.create_dataset("features", (2**40, 4), np.float32)  # late allocation: nothing is stored


def big_endian(file: h5py.File, _: Path) -> None:
    file["features"] = np.ones((1, 4), ">f4")


def strings(file: h5py.File, _: Path) -> None:
    file.create_dataset("features", data=["a", "b"], dtype=h5py.string_dtype())


def compound(file: h5py.File, _: Path) -> None:
    file["features"] = np.zeros(3, [("a", "<f4"), ("b", "<i4")])


def no_shape(file: h5py.File, _: Path) -> None:
    file["features"] = h5py.Empty("<f4")


@pytest.mark.parametrize(
    ("attack", "reason"),
    [
        (external_storage, "external storage"),
        (external_link, "link to another"),
        (soft_link, "link to another"),
        (virtual, "virtual"),
        (chunked, "chunked or filtered"),
        (filtered, "chunked or filtered"),
        (shape_bomb, "declares 17592186044416 bytes and stores 0"),
        (big_endian, "has type >f4"),
        (strings, "has type object"),
        (compound, "has type"),
        (no_shape, "no shape"),
    ],
)
def test_a_hostile_dataset_is_refused_with_its_reason(
    tmp_path: Path, attack: Callable[[h5py.File, Path], None], reason: str
) -> None:
    secret = tmp_path / "secret.bin"
    secret.write_bytes(SECRET)
    path = tmp_path / "hostile.h5"
    with h5py.File(path, "w") as file:
        attributes(file)
        attack(file, secret)
        file["sha256"] = np.zeros((1, 32), np.uint8)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    refused(path, reason)
    with pytest.raises(CorruptCacheError, match=reason):
        shard.read_shard(path)
    with pytest.raises(CorruptCacheError, match=reason):
        hdf5.verify(path, KIND)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_hostile_dataset_beside_good_ones_is_refused_too(tmp_path: Path) -> None:
    path = write_one(tmp_path)
    with h5py.File(path, "r+") as file:
        file["zzz"] = h5py.ExternalLink("/etc/passwd", "/")
    refused(path, "link to another")


def test_a_shape_bomb_in_the_layout_message_is_refused(tmp_path: Path) -> None:
    """Both the dataspace and the stored size are forged, so that declared == stored; the file is still 5 kB."""
    path = write_one(tmp_path)
    raw = path.read_bytes()
    dims, size = np.array([3, 4, 3, 4], "<u8").tobytes(), np.array([48], "<u8").tobytes()
    assert raw.count(dims) == 1
    assert raw.count(size) == 1
    forged = np.array([2**38, 4, 2**38, 4], "<u8").tobytes()
    path.write_bytes(raw.replace(dims, forged).replace(size, np.array([2**42], "<u8").tobytes()))
    refused(path, "damaged|declares")


def test_a_newer_format_is_refused_with_its_version(tmp_path: Path) -> None:
    path = tmp_path / "x.h5"
    with h5py.File(path, "w") as file:
        attributes(file, version=2)
    refused(path, "format version 2; this penult reads up to 1. Upgrade penult")


def test_another_kind_of_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.h5"
    with h5py.File(path, "w") as file:
        attributes(file, kind="penult-samples")
    refused(path, "is not a penult-shard file .encoding-type: 'penult-samples'")


def test_attributes_of_variable_length_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.h5"
    with h5py.File(path, "w") as file:
        attributes(file)
        file.attrs["fingerprint"] = "a str makes a variable-length string"
    refused(path, "'fingerprint' has type object")


@pytest.mark.parametrize(
    ("features", "keys"),
    [
        (np.ones((2, 4), np.float32), np.zeros((1, 32), np.uint8)),
        (np.ones(1, np.float32), np.zeros((1, 32), np.uint8)),
        (np.ones((1, 4), np.float32), np.zeros((1, 31), np.uint8)),
        (np.ones((1, 4), np.float32), np.zeros((1, 32), np.int16)),
        (np.ones((1, 4), np.float64), np.zeros((1, 32), np.uint8)),
        (np.ones((1, 4), np.int32), np.zeros((1, 32), np.uint8)),
    ],
)
def test_a_shard_whose_columns_do_not_fit_is_refused(tmp_path: Path, features: Any, keys: Any) -> None:
    path = tmp_path / "x.h5"
    with h5py.File(path, "w") as file:
        attributes(file, rows=1)
        file["features"], file["sha256"] = features, keys
    with pytest.raises(CorruptCacheError):
        shard.read_shard(path)


def test_unknown_datasets_and_attributes_are_ignored(tmp_path: Path) -> None:
    """Rule 7: a later version 1.x may add some."""
    features = np.ones((1, 4), np.float32)
    datasets = {"features": features, "sha256": np.zeros((1, 32), np.uint8), "view": np.zeros(1, np.int32)}
    data, _ = hdf5.build(KIND, datasets, {"rows": 1, "fingerprint": "{}", "note": "später"})
    path = tmp_path / "x.h5"
    path.write_bytes(data)
    hdf5.verify(path, KIND)
    assert shard.read_shard(path).dim == 4


@pytest.mark.parametrize("place", ["features", "sha256", "path", "path-offsets"])
def test_verify_finds_one_changed_bit_of_the_payload(tmp_path: Path, place: str) -> None:
    path = write_one(tmp_path)
    with h5py.File(path, "r") as file:
        offset = file[place].id.get_offset()
    raw = bytearray(path.read_bytes())
    raw[offset] ^= 1
    path.write_bytes(raw)
    with pytest.raises(CorruptCacheError, match=r"its payload is .* it was written as"):
        hdf5.verify(path, KIND)


def test_verify_finds_a_changed_attribute(tmp_path: Path) -> None:
    path = write_one(tmp_path)
    raw = path.read_bytes()
    assert raw.count(b'"backbone":"tiny"') == 1
    path.write_bytes(raw.replace(b'"backbone":"tiny"', b'"backbone":"huge"'))
    with pytest.raises(CorruptCacheError, match="payload"):
        hdf5.verify(path, KIND)


FLIPPER = """
import sys
sys.path.insert(0, {repo!r})
from pathlib import Path
import h5py
from store.format import hdf5
from store.errors import PenultError
path = Path({path!r})
raw = path.read_bytes()
with h5py.File(path, "r") as file:
    good = {{name: file[name][()].tobytes() for name in file}}, dict(file.attrs)
victim = path.with_name("victim.h5")
for line in sys.stdin:
    place, bit = map(int, line.split())
    flipped = bytearray(raw)
    flipped[place] ^= 1 << bit
    victim.write_bytes(flipped)
    try:
        hdf5.verify(victim, "penult-shard")
    except PenultError:
        print(place, "refused", flush=True)
        continue
    with h5py.File(victim, "r") as file:
        same = ({{name: file[name][()].tobytes() for name in file}}, dict(file.attrs)) == good
    print(place, "harmless" if same else "WRONG", flush=True)
"""


def flip(path: Path, flips: list[tuple[int, int]]) -> Iterator[tuple[int, str]]:
    """The outcome of each flip. A damaged file may kill its reader, so a child reads, and another goes on where it died."""
    while flips:
        text = "".join(f"{place} {bit}\n" for place, bit in flips)
        code = FLIPPER.format(repo=str(REPO), path=str(path))
        done = subprocess.run([sys.executable, "-c", code], input=text, capture_output=True, text=True, timeout=60, check=False)
        lines = [line.split() for line in done.stdout.splitlines()]
        yield from ((int(place), outcome) for place, outcome in lines)
        if done.returncode == 0:
            assert len(lines) == len(flips)
            return
        assert done.returncode < 0, f"a traceback instead of a verdict: {done.stderr[-2000:]}"
        yield flips[len(lines)][0], "died"
        flips = flips[len(lines) + 1 :]


def test_200_byte_flips_never_pass_a_changed_payload(tmp_path: Path) -> None:
    path = write_one(tmp_path, rows=12, dim=16)
    size = path.stat().st_size
    rng = random.Random(20)
    outcomes = list(flip(path, [(rng.randrange(size), rng.randrange(8)) for _ in range(200)]))
    assert len(outcomes) == 200
    assert [place for place, outcome in outcomes if outcome == "WRONG"] == []
    refusals = sum(outcome == "refused" for _, outcome in outcomes)
    assert refusals > 40, "the flips must hit more than padding"


# --- the sample table --------------------------------------------------------------------------------------------------


def some_rows() -> list[Row]:
    a, b = digests(2)
    return [
        Row(b"ants/1.jpg", "ants", "train", b"patient 1", a, stat=(10, 2**62, 2**63 - 1)),
        Row(b"ants/caf\xe9.jpg", "ants", "test", b"", a, stat=(1, -1, 3)),
        Row(b"ants/line\nbreak.jpg", "ants", None, b"\xff\x00\xfe", b, stat=(1, 2, 3)),
        Row(b"bees/gone.jpg", "bees", None, code="not_found", message="no such file"),
        Row("bees/zerrüttet.jpg".encode(), "bees", None, sha256=b, code="truncated", message="— abgeschnitten\n\t"),
        Row(b"z", None, None, b"", b[::-1]),
    ]


def round_trip(table: SampleTable, folder: Path) -> SampleTable:
    (folder / "samples.h5").write_bytes(table.to_bytes())
    return SampleTable.read(folder / "samples.h5")


def test_the_sample_table_survives_a_round_trip(tmp_path: Path) -> None:
    facts = {"root": os.fsencode("/data/ü").hex(), "split": {"rule": "source"}, "budget_exceeded": False}
    back = round_trip(SampleTable(some_rows(), facts), tmp_path)
    assert list(back.rows) == some_rows()
    assert back.facts == facts
    assert type(back.rows[0].stat[1]) is int


def test_an_empty_sample_table_survives_a_round_trip(tmp_path: Path) -> None:
    back = round_trip(SampleTable([], {"root": "2f"}), tmp_path)
    assert list(back.rows) == []
    assert back.counts == {"inputs": 0, "ok": 0, "duplicates": 0, "failed": 0}


def test_counts_reconcile() -> None:
    counts = SampleTable(some_rows()).counts
    assert counts == {"inputs": 6, "ok": 3, "duplicates": 1, "failed": 2}
    assert counts["ok"] + counts["duplicates"] + counts["failed"] == counts["inputs"]


def test_classes_and_splits_are_those_of_good_rows() -> None:
    rows = [*some_rows(), Row(b"zz", "wasps", "holdout", code="truncated"), Row(b"y", "ants", "val", sha256=digests(1)[0])]
    table = SampleTable(rows)
    assert table.classes == ["ants"]
    assert table.splits() == ["train", "val", "test"]


@pytest.mark.parametrize("path", [b"/etc/passwd", b"..", b"../x", b"a/../../x", b"a/..", b"", b"a\0b"])
def test_paths_that_leave_the_root_are_refused_on_reading(tmp_path: Path, path: bytes) -> None:
    with pytest.raises(CorruptCacheError, match="leaves the dataset's root"):
        round_trip(SampleTable([Row(path, "x")], {"root": "2f"}), tmp_path)
    with pytest.raises(CorruptCacheError):
        check_relative(path)


@pytest.mark.parametrize("path", [b"a..b", b"..a/b", b"a/...", b"a/b..", b"\xff"])
def test_dots_inside_a_name_are_no_escape(path: bytes) -> None:
    assert check_relative(path) == path


def test_names_are_safe_to_print() -> None:
    assert display(b"a\nb\x1b[31m\xe9\xc3\xbc") == "a\\nb\\x1b[31m\\xe9ü"
    assert display("\u202egpj.exe".encode()) == "\\u202egpj.exe"


def column(name: str, **over: Any) -> dict[str, Any]:
    return {name: np.array([-1], np.int32), **hdf5.pack_strings(f"{name}-names", [b"x"]), **over}


@pytest.mark.parametrize(
    ("datasets", "attrs"),
    [
        ({"label": np.array([1], np.int32)}, {}),
        ({"label": np.array([-2], np.int32)}, {}),
        ({"label": np.array([0.0])}, {}),
        ({"status": np.ones(1, np.uint8)}, {}),
        ({"stat": np.zeros((1, 2), np.int64)}, {}),
        ({"sha256": np.zeros((1, 33), np.uint8)}, {}),
        ({"path-offsets": np.array([0, 2], np.int64)}, {}),
        ({"path-offsets": np.array([0, -5, 1], np.int64)}, {}),
        ({"path-offsets": np.zeros(0, np.int64)}, {}),
        ({"label-names": np.array([255], np.uint8), "label": np.zeros(1, np.int32)}, {}),
        ({}, {"rows": 2}),
        ({}, {"rows": "many"}),
        ({}, {"facts": "{"}),
    ],
)
def test_a_forged_table_with_a_good_digest_is_refused(tmp_path: Path, datasets: dict[str, Any], attrs: dict[str, Any]) -> None:
    good = {
        "status": np.zeros(1, np.uint8),
        "sha256": np.ones((1, 32), np.uint8),
        "stat": np.zeros((1, 3), np.int64),
        **hdf5.pack_strings("path", [b"a"]),
        **hdf5.pack_strings("group", [b""]),
        **hdf5.pack_strings("message", [b""]),
        **column("label"),
        **column("split"),
        **column("code"),
    }
    path = tmp_path / "samples.h5"
    path.write_bytes(hdf5.build("penult-samples", good, {"rows": 1, "facts": '{"root": "2f"}'})[0])
    assert len(SampleTable.read(path).rows) == 1
    path.write_bytes(hdf5.build("penult-samples", {**good, **datasets}, {"rows": 1, "facts": '{"root": "2f"}', **attrs})[0])
    with pytest.raises(CorruptCacheError):
        SampleTable.read(path)


def test_a_missing_column_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "samples.h5"
    path.write_bytes(hdf5.build("penult-samples", {"status": np.zeros(0, np.uint8)}, {"rows": 0, "facts": "{}"})[0])
    with pytest.raises(CorruptCacheError):
        SampleTable.read(path)


def test_corrupt_is_bad_data() -> None:
    assert issubclass(CorruptCacheError, BadDataError)
    assert CorruptCacheError("x").exit_code == 65
