"""Reads the boxes of an .mp4 file (ISO/IEC 14496-12), without the library that wrote it."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

INSIDE = (b"moov", b"trak", b"mdia", b"minf", b"stbl")
"""Boxes that hold nothing but boxes, on the way to the table of a track's frames."""


def boxes(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Name and contents of every box, those inside of others after them."""
    at = 0
    while at < len(data):
        length, name = struct.unpack_from(">I4s", data, at)
        start = at + 8
        if length == 1:
            (length,) = struct.unpack_from(">Q", data, start)
            start += 8
        inner = data[start : at + length if length else None]
        yield name, inner
        if name in INSIDE:
            yield from boxes(inner)
        at = at + length if length else len(data)


def read(path: Path) -> tuple[int, int, int, float]:
    """Frames, height, width and frames a second of a file with one track, all frames as long as the first."""
    found = dict(boxes(path.read_bytes()))
    (count,) = struct.unpack_from(">I", found[b"stsz"], 8)
    width, height = struct.unpack(">II", found[b"tkhd"][-8:])  # 16.16
    (scale,) = struct.unpack_from(">I", found[b"mdhd"], 12 if found[b"mdhd"][0] == 0 else 20)
    entries, first, each = struct.unpack_from(">III", found[b"stts"], 4)
    assert (entries, first) == (1, count)
    return count, height >> 16, width >> 16, scale / each
