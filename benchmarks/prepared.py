"""Faults in the store of prepared backbones: flipped bits, a disk that is full at any write, a store that is only read.

Kills at any call, and two commands side by side, are in `kills`. What a run does with the store is `kills.PREPARED`.
"""

from __future__ import annotations

import os
import random
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

from benchmarks.kills import ARCHIVE, Command, Server, network_digest, prepared_code, prepared_state, require
from extractor.backbones import prepared
from extractor.graphs.prepared_entry import key_of
from store.errors import InputMissingError

# From write number AT below the store on nothing more fits on the disk, until a write fails; what is written elsewhere fits.
FULL = """
import os, resource, sys
write, count, full, most = os.write, 0, AT, resource.RLIM_INFINITY
def limited(descriptor, data):
    global count, full
    if "/penult/" not in os.readlink(f"/proc/self/fd/{descriptor}"):
        return write(descriptor, data)
    count += 1
    if count < full or not full:
        return write(descriptor, data)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, most))
    try:
        return write(descriptor, data)
    except OSError:
        full = 0
        raise
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
os.write = limited
"""
SAY = "\nprint(count)\n"
# Root obeys the permissions of files, too, without its capabilities.
WITHOUT_POWER = """
import ctypes, struct, sys
if ctypes.CDLL(None).capset(struct.pack("Ii", 0x20080522, 0), bytes(24)):
    sys.exit(99)
"""
REQUEST = {"network": "ours"}


def place(folder: Path) -> Path:
    """An empty folder with a network."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "tmp").mkdir(parents=True)
    shutil.copy(ARCHIVE / "photos.cache/backbone.onnx", folder / "network.onnx")
    return folder


@contextmanager
def store_of(folder: Path) -> Iterator[Path]:
    """The store of a place in this process, and the folder of the entry that `kills.PREPARED` keeps in it."""
    with mock.patch.dict(os.environ, {"PENULT_CACHE": str(folder / "penult")}):
        yield folder / "penult/backbones" / key_of(REQUEST)


def flips(folder: Path, server: Server, count: int, seed: int = 0) -> Counter[str]:
    """Flip ``count`` single bits of an entry, one at a time; each time the network is right or made again, and then right.

    Returns:
        How many bits of each file were found.

    Raises:
        NotMetError: another network or other notes were taken, or the entry was not made again.
    """
    place(folder)
    kept = server.run(prepared_code(), folder)
    require(kept.code == 0, kept.stderr[-800:])
    rng, outcomes = random.Random(seed), Counter[str]()
    with store_of(folder) as entry:
        sound = {path.name: path.read_bytes() for path in sorted(entry.iterdir())}
        for number in range(count):
            name = sorted(sound)[number % len(sound)]
            at, bit = rng.randrange(len(sound[name])), rng.randrange(8)
            spoilt = bytearray(sound[name])
            spoilt[at] ^= 1 << bit
            (entry / name).write_bytes(spoilt)
            where = f"bit {bit} of byte {at} of {name}"
            taken = prepared.take(REQUEST, folder / "out.onnx")
            require(taken is None, f"{where} is not noticed")
            require(not entry.exists(), f"the entry with {where} is not removed")
            again = server.run(prepared_code(), folder)
            require(again.code == 0, f"{where}: exit {again.code}: {again.stderr[-800:]}")
            prepared_state(folder)
            outcomes[name.rpartition(".")[2]] += 1
            shutil.rmtree(entry)
            entry.mkdir()
            for each, data in sound.items():
                (entry / each).write_bytes(data)
    return outcomes


def full_disk(folder: Path, server: Server) -> int:
    """Let the disk be full at each write into the store: the run goes on, warns once, and leaves nothing there.

    Returns:
        How many writes were cut short.

    Raises:
        NotMetError: it fails, another network comes out, or a part is left; or with space, the next run does not keep it.
    """

    def run(at: int) -> tuple[str, str]:
        ended = server.run(Command(code=FULL.replace("AT", str(at)) + prepared_code().code + SAY), place(folder))
        require(ended.code == 0, f"write {at}: exit {ended.code}: {ended.stderr[-800:]}")
        return ended.stdout, ended.stderr

    writes = int(run(0)[0])
    for at in range(1, writes + 1):
        _, stderr = run(at)
        require(stderr.count("cannot be kept in") == 1, f"write {at}: it says {stderr!r}")
        left = list((folder / "penult/backbones").iterdir())
        require(not left, f"write {at}: {left} left")
        made = network_digest(folder / "out.onnx")
        require(made == network_digest(folder / "network.onnx"), f"write {at}: another network")
        again = server.run(prepared_code(), folder)
        require(again.code == 0 and not again.stderr, f"write {at}: the next run: exit {again.code}: {again.stderr[-800:]}")
        prepared_state(folder)
    return writes


def only_read(folder: Path, server: Server) -> bool:
    """Use a store in which nothing may be written: what is there is taken without a word, what is not is made, with a warning.

    Returns:
        False if this system has no such thing as a process without rights.

    Raises:
        NotMetError: something is taken or said that should not be.
    """
    place(folder)
    kept = server.run(prepared_code(), folder)
    require(kept.code == 0, kept.stderr[-800:])
    store = folder / "penult/backbones"
    places = [store.parent, store, *store.iterdir()]
    for path in places:
        path.chmod(0o555)
    try:
        hit, miss = (
            server.run(Command(code=WITHOUT_POWER + prepared_code(name, f"{name}.onnx").code), folder)
            for name in ("ours", "theirs")
        )
    finally:
        for path in places:
            path.chmod(0o755)
    if hit.code == 99:
        return False
    require((hit.code, hit.stderr) == (0, ""), f"a hit: exit {hit.code}: {hit.stderr[-800:]}")
    require(miss.code == 0 and miss.stderr.count("it is not writable") == 1, f"a miss: exit {miss.code}: {miss.stderr[-800:]}")
    prepared_state(folder, target="ours.onnx")
    try:
        prepared_state(folder, "theirs", "theirs.onnx")
    except InputMissingError:
        return True
    require(False, "something was kept")  # noqa: FBT003
    return True
