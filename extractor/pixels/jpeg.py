"""Data lost inside a JPEG whose end is there: libjpeg fills it with grey, and Pillow does not hear its warnings."""

from __future__ import annotations

import re

import numpy as np

from .header import COPIED, Header

START = b"\xff\xd8\xff"
# Begins a segment: neither stuffing nor restart. It begins with one byte (\xff, not \xff+), which `re` finds 20 times as fast.
MARKER = re.compile(rb"\xff([\x02-\xcf\xd9-\xfe])", re.DOTALL)
SEQUENTIAL, PROGRESSIVE = (b"\xc0", b"\xc1"), b"\xc2"  # frames with Huffman codes
ARITHMETIC = (b"\xc9", b"\xca")
FRAMES = {bytes([code]) for code in (*range(0xC0, 0xD0), 0xF7)} - {b"\xc4", b"\xc8", b"\xcc"}  # of all processes, and JPEG-LS
END, SCAN = b"\xd9", b"\xda"
AHEAD = bytes(8)  # libjpeg reads up to 64 bits before it needs them
UNKNOWN = 15  # bits of a coefficient that no scan has told


class Jpeg(Header):
    """A JPEG by its markers: a thumbnail inside a segment has an end marker of its own, and phones append videos.

    Attributes:
        end: where its end marker stands; -1 if it has none.
        frame: the marker of its frame.
        precision: bits of a sample.
        components: their numbers, from the header of the frame.
        scans: the headers of the scans.
    """

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.end, self.frame, self.precision, self.components = -1, b"", 0, b""
        self.scans: list[bytes] = []
        at = 2
        while marker := MARKER.search(data, at):
            if marker[1] == END:
                self.end = marker.start()
                break
            at = marker.end() + int.from_bytes(data[marker.end() : marker.end() + 2])
            if marker[1] == SCAN:
                self.scans.append(data[marker.end() + 2 : at])
            elif marker[1] in FRAMES:
                self.frame, self.components = marker[1], data[marker.end() + 8 : at : 3]
                self.precision = int.from_bytes(data[marker.end() + 2 : marker.end() + 3])

    def decoded(self) -> bytes:
        """The file without its end, where libjpeg needs none: sequential, in one scan.

        At an end marker libjpeg makes up the blocks that are missing. Without one it asks for more data, and Pillow says so.
        """
        one = self.frame in SEQUENTIAL and len(self.scans) == 1 and 0 <= self.end < COPIED
        return self.data[: self.end] + AHEAD if one else self.data

    def layout(self) -> str:
        known = (*SEQUENTIAL, PROGRESSIVE, *ARITHMETIC)
        usual = self.frame in known and self.precision == 8 and len(self.components) in (1, 3, 4)
        if usual or self.end < 0 or not self.components or self.precision > 16:
            return ""
        count = len(self.components)
        process = "" if self.frame in known else f", process {self.frame.hex().upper()}"
        return f"JPEG of {count} sample{'s' * (count > 1)} x {self.precision} bits{process}"

    def damage(self) -> str:
        if self.end < 0:
            return "has no end marker"
        count = self._unrefined() if self.frame == PROGRESSIVE else 0
        return f"lacks scans: {count} of its coefficients are not there, or not to the last bit" if count else ""

    def _unrefined(self) -> int:
        """How many coefficients no scan brings to the last bit (ITU-T T.81, B.2.3 and G.1.1.1)."""
        bits = np.full((256, 64), UNKNOWN)
        for scan in self.scans:
            if not scan or len(scan) < 4 + 2 * scan[0]:
                return 0
            first, last, low = scan[1 + 2 * scan[0] :][:3]
            bits[list(scan[1 : 1 + 2 * scan[0] : 2]), first : last + 1] = low & 15
        return int(np.count_nonzero(bits[list(self.components)]))
