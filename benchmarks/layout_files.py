"""Writers of PNG, TIFF and BMP files in every layout, byte by byte. They know nothing of any decoder."""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

WIDTH, HEIGHT = 21, 19  # odd, so that rows end within a byte, and the image within a tile and a strip

Samples = NDArray[Any]


def packed(rows: Samples, bits: int, order: str = ">") -> list[bytes]:
    """Rows ``(height, n)`` of whole numbers or floats as bytes: less than 8 bits, and 12, most significant bit first."""
    if bits in (16, 32, 64):
        kind = "f" if rows.dtype.kind == "f" else "u"
        return [row.astype(f"{order}{kind}{bits // 8}").tobytes() for row in rows]
    if bits == 8:
        return [row.astype(np.uint8).tobytes() for row in rows]
    places = rows.astype(np.uint64)[..., None] >> np.arange(bits - 1, -1, -1, dtype=np.uint64) & np.uint64(1)
    return [np.packbits(row.reshape(-1).astype(np.uint8)).tobytes() for row in places]


# --- PNG ---------------------------------------------------------------------------------------------------------------

PASSES = ((0, 8, 0, 8), (0, 8, 4, 8), (4, 8, 0, 4), (0, 4, 2, 4), (2, 4, 0, 2), (0, 2, 1, 2), (1, 2, 0, 1))  # y, dy, x, dx


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def filtered(lines: list[bytes], step: int, kinds: tuple[int, ...]) -> bytes:
    """PNG scan lines, their filters in turn; ``step`` is the distance in bytes to the pixel on the left."""
    out, above = b"", bytes(len(lines[0])) if lines else b""
    for i, line in enumerate(lines):
        kind = kinds[i % len(kinds)]
        left, corner = bytes(step) + line[:-step], bytes(step) + above[:-step]
        coded = bytearray()
        for x, a, b, c in zip(line, left, above, corner, strict=False):
            near = min((abs(b - c), 0, a), (abs(a - c), 1, b), (abs(a + b - 2 * c), 2, c))[2]
            coded.append((x - (0, a, b, (a + b) // 2, near)[kind]) % 256)
        out, above = out + bytes([kind]) + coded, line
    return out


def png(values: Samples, kind: tuple[int, int, bool], filters: tuple[int, ...], pieces: int, extra: bytes) -> bytes:
    """A PNG of samples ``(height, width, n)``; ``kind`` is the depth, the colour type, and whether it is interlaced."""
    depth, colour, interlaced = kind
    height, width, count = values.shape
    step = max(depth * count // 8, 1)
    passes = [values[y::dy, x::dx] for y, dy, x, dx in PASSES] if interlaced else [values]
    images = [each.reshape(len(each), -1) for each in passes if each.size]
    body = zlib.compress(b"".join(filtered(packed(each, depth), step, filters) for each in images))
    size = -(-len(body) // pieces)
    parts = b"".join(chunk(b"IDAT", body[i : i + size]) for i in range(0, len(body), size))
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + extra + parts + chunk(b"IEND", b"")


# --- TIFF --------------------------------------------------------------------------------------------------------------

COMPRESSIONS = {1: "uncompressed", 5: "LZW", 8: "deflate", 32773: "PackBits"}
REVERSED = bytes(int(f"{i:08b}"[::-1], 2) for i in range(256))


@dataclass(frozen=True)
class Storage:
    """How a TIFF stores its samples: in strips of 5 rows, in one strip or in tiles of 16 x 16; together or each in a plane."""

    order: str = "<"
    planar: int = 1
    pieces: str = "strips"
    compression: int = 1
    predictor: int = 1
    fill_order: int = 1
    big: bool = False

    def __str__(self) -> str:
        words = [
            {"<": "II", ">": "MM"}[self.order],
            COMPRESSIONS[self.compression],
            *(["predictor"] if self.predictor == 2 else []),
            self.pieces,
            *(["planes"] if self.planar == 2 else []),
            *(["fill order 2"] if self.fill_order == 2 else []),
            *(["BigTIFF"] if self.big else []),
        ]
        return ", ".join(words)


def lzw(data: bytes) -> bytes:
    """Valid LZW that compresses nothing: codes of 9 bits, the table cleared before they would need 10."""
    codes = [code for i in range(0, len(data), 200) for code in (256, *data[i : i + 200])] + [257]
    bits = "".join(f"{code:09b}" for code in codes)
    return int(bits.ljust(-(-len(bits) // 8) * 8, "0"), 2).to_bytes(-(-len(bits) // 8))


def packbits(rows: list[bytes]) -> bytes:
    return b"".join(bytes([len(row[i : i + 128]) - 1]) + row[i : i + 128] for row in rows for i in range(0, len(row), 128))


def differences(block: Samples, bits: int) -> Samples:
    """TIFF's predictor 2 over ``(height, width, n)``."""
    before = np.concatenate([np.zeros_like(block[:, :1]), block[:, :-1]], axis=1)
    return (block - before) & np.uint64(2**bits - 1)


def piece(block: Samples, bits: int, storage: Storage) -> bytes:
    """A strip or tile ``(height, width, n)`` as it stands in the file."""
    block = differences(block, bits) if storage.predictor == 2 else block
    rows = packed(block.reshape(len(block), -1), bits, storage.order)
    if storage.compression == 32773:
        data = packbits(rows)
    else:
        data = {1: bytes, 5: lzw, 8: zlib.compress}[storage.compression](b"".join(rows))
    return data.translate(REVERSED) if storage.fill_order == 2 else data


def tiff(values: Samples, bits: int, tags: dict[int, tuple[int, ...]], storage: Storage) -> bytes:
    """A TIFF of samples ``(height, width, n)``; ``tags`` says what they are."""
    height, width, count = values.shape
    planes = [values[..., i : i + 1] for i in range(count)] if storage.planar == 2 else [values]
    tiled, step = storage.pieces == "tiles", {"strips": 5, "one strip": height, "tiles": 16}[storage.pieces]
    if tiled:
        planes = [np.pad(each, ((0, -height % step), (0, -width % step), (0, 0))) for each in planes]
    blocks = [
        plane[y : y + step, x : x + (step if tiled else width)]
        for plane in planes
        for y in range(0, len(plane), step)
        for x in range(0, plane.shape[1] if tiled else 1, step)
    ]
    data = [piece(block, bits, storage) for block in blocks]
    head = 16 if storage.big else 8
    offsets = [head + sum(map(len, data[:i])) for i in range(len(data))]
    sizes = tuple(map(len, data))
    tags = tags | {256: (width,), 257: (height,), 258: (bits,) * count, 259: (storage.compression,), 277: (count,)}
    tags |= {284: (storage.planar,)} | ({317: (2,)} if storage.predictor == 2 else {})
    tags |= {266: (2,)} if storage.fill_order == 2 else {}
    tags |= (
        {322: (16,), 323: (16,), 324: tuple(offsets), 325: sizes} if tiled else {273: tuple(offsets), 278: (step,), 279: sizes}
    )
    return with_directory(b"".join(data), tags, storage)


def with_directory(body: bytes, tags: dict[int, tuple[int, ...]], storage: Storage) -> bytes:
    """Header, the pieces, and then the directory with what does not fit in its entries."""
    order, big = storage.order, storage.big
    head, word, room = (16, "Q", 8) if big else (8, "I", 4)
    body += bytes(-len(body) % 2)
    start = head + len(body)
    entry_size = 2 + 2 + 2 * room
    after = start + (8 if big else 2) + entry_size * len(tags) + room
    entries, beyond = b"", b""
    for tag, values in sorted(tags.items()):
        long = tag in (273, 279, 324, 325)
        raw = struct.pack(f"{order}{len(values)}{(word if long else 'H')}", *values)
        kind = (16 if big else 4) if long else 3
        if len(raw) > room:
            entries += struct.pack(f"{order}HH{word}{word}", tag, kind, len(values), after + len(beyond))
            beyond += raw
        else:
            entries += struct.pack(f"{order}HH{word}", tag, kind, len(values)) + raw.ljust(room, b"\0")
    count = struct.pack(order + ("Q" if big else "H"), len(tags))
    mark = {"<": b"II", ">": b"MM"}[order]
    first = struct.pack(order + ("HHHQ" if big else "HI"), *((43, 8, 0, start) if big else (42, start)))
    return mark + first + body + count + entries + bytes(room) + beyond


# --- BMP ---------------------------------------------------------------------------------------------------------------


def bmp(
    rows: list[bytes],
    bits: int,
    header: int,
    *,
    compression: int = 0,
    top_down: bool = False,
    masks: tuple[int, ...] = (),
    entries: Samples | None = None,
) -> bytes:
    """A BMP of rows from top to bottom; those of run lengths are one piece."""
    lines = [row + bytes(-len(row) % 4) for row in (rows if top_down else rows[::-1])] if compression not in (1, 2) else rows
    body = b"".join(lines)
    if header == 12:
        head = struct.pack("<IHHHH", 12, WIDTH, HEIGHT, 1, bits)
    else:
        count = 0 if entries is None else len(entries)
        head = struct.pack(
            "<IiiHHIIiiII", 40, WIDTH, -HEIGHT if top_down else HEIGHT, 1, bits, compression, len(body), 2835, 2835, count, 0
        )
        head = struct.pack("<I", header) + head[4:header]
    inside = struct.pack("<4I", *masks)[: max(header - 40, 0)] if masks and header != 64 else b""
    head = head + inside + bytes(header - len(head + inside))
    if masks and header == 40:
        head += struct.pack("<3I" if compression == 3 else "<4I", *masks[: 3 if compression == 3 else 4])
    if entries is not None:
        room = np.zeros((len(entries), 3 if header == 12 else 4), np.uint8)
        room[:, :3] = entries[:, ::-1]
        head += room.tobytes()
    return struct.pack("<2sIHHI", b"BM", 14 + len(head) + len(body), 0, 0, 14 + len(head)) + head + body


def run_lengths(index: Samples, bits: int) -> bytes:
    """RLE8 or RLE4 of a palette image: runs, literal pixels and a line that a delta skips."""
    out = b""
    for y, line in enumerate(index[::-1].tolist()):
        if y == 5:  # one line of index 0, skipped
            out += b"\0\2\0\1"
            continue
        x = 0
        while x < len(line):
            run = next((i for i in range(x, len(line)) if line[i] != line[x]), len(line)) - x
            if run > 1 or len(line) - x < 4:
                out += bytes([run, line[x] if bits == 8 else line[x] * 17])
                x += run
                continue
            some = line[x : x + 5]
            literal = bytes(some) if bits == 8 else packed(np.array([some]), 4)[0]
            out += bytes([0, len(some)]) + literal + bytes(len(literal) % 2)
            x += len(some)
        out += b"\0\0"
    return out + b"\0\1"
