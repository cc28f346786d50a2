"""How much of what photos lose in the middle is found: the table of docs/images.md.

Run by ``make soak`` with real photos (``--photos FOLDER``, by default those of ../shared, where it is). A photo is damaged at
a seeded place of its coded data, and decoded; so is the same photo made progressive. The exit status is 1 if a whole one is
refused.
"""

from __future__ import annotations

import argparse
import io
import os
import random
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path

from PIL import Image

REPO = Path(__file__).resolve().parent.parent
if str(REPO) not in sys.path:
    sys.path.insert(0, str(REPO))

from extractor.pixels.images import ImageError, decode  # noqa: E402

PAGE = REPO / "docs" / "images.md"
BEGIN, END = "<!-- made by benchmarks/holes.py -->", "<!-- end of the holes -->"
ASSETS = Path(os.environ.get("PENULT_TEST_ASSETS", REPO.parent / "shared"))

Damage = Callable[[bytes, int, list[bytes]], bytes]  # of a photo, at a place; the others


def lost(count: int) -> Damage:
    return lambda data, at, _: data[:at] + data[at + count :]


def replaced(new: Callable[[int], bytes], count: int) -> Damage:
    return lambda data, at, _: data[:at] + new(count) + data[at + count :]


def kinds(rng: random.Random) -> dict[str, tuple[int, Damage]]:
    """By name: how many bytes are affected, and how."""
    return {
        "cut, then an end marker": (2, lambda data, at, _: data[:at] + b"\xff\xd9"),
        "16 KiB missing": (2**14, lost(2**14)),
        "4 KiB missing": (2**12, lost(2**12)),
        "512 bytes missing": (512, lost(512)),
        "64 bytes missing": (64, lost(64)),
        "16 KiB of zeros": (2**14, replaced(bytes, 2**14)),
        "4 KiB of zeros": (2**12, replaced(bytes, 2**12)),
        "512 bytes of zeros": (512, replaced(bytes, 512)),
        "512 random bytes": (512, replaced(rng.randbytes, 512)),
        "the second half of another photo": (
            2,
            lambda data, at, others: data[:at] + (other := rng.choice(others))[len(other) // 2 :],
        ),
        "one bit": (1, lambda data, at, _: data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]),
    }


def is_read(data: bytes) -> bool:
    try:
        decode(data)
    except ImageError:
        return False
    return True


def progressive(data: bytes) -> bytes:
    buffer = io.BytesIO()
    Image.open(io.BytesIO(data)).convert("RGB").save(buffer, "JPEG", quality=90, progressive=True)
    return buffer.getvalue()


def found(photos: list[bytes], count: int, damage: Damage, rng: random.Random) -> str:
    """Of how many the damage is found."""
    begins = {data: max(data.rfind(b"\xff\xda", 0, len(data) // 2), data.find(b"\xff\xda")) + 20 for data in photos}
    tried = {data: begin for data, begin in begins.items() if len(data) - begin > count + 256}
    damaged = (damage(data, rng.randrange(begin, len(data) - count - 50), photos) for data, begin in tried.items())
    hits = sum(not is_read(data) for data in damaged)
    return f"{hits} of {len(tried)}, {hits / len(tried):.1%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, default=ASSETS / "data")
    folder = parser.parse_args().photos
    photos = [path.read_bytes() for path in sorted(folder.rglob("*.*")) if path.is_file()]
    photos = [data for data in photos if data.startswith(b"\xff\xd8\xff")]
    if not photos:
        print(f"damage is not measured: no JPEG photos in {folder} (see --help)")
        return
    others = [progressive(data) for data in photos]
    refused = sum(not is_read(data) for data in photos + others)
    rng = random.Random(0)
    rows = ["| damage | found, as they are | found, progressive |", "|---|---|---|"]
    for name, (count, damage) in kinds(rng).items():
        rows.append(f"| {name} | {found(photos, count, damage, rng)} | {found(others, count, damage, rng)} |")
        print(rows[-1], flush=True)
    text = (
        f"{date.today()}: of {len(photos)} whole photos, and the same made progressive, {refused} are refused.\n\n"
        + "\n".join(rows)
    )
    before, _, rest = PAGE.read_text("utf-8").partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{rest.partition(END)[2]}", "utf-8")
    sys.exit(refused > 0)


if __name__ == "__main__":
    main()
