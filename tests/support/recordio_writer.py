"""A plain writer of RecordIO from its published layout (dmlc-core, recordio.h; MXNet, recordio.py: IRHeader).

test_recordio holds it against bytes that MXNet 1.9.1 wrote.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from pathlib import Path

MAGIC = struct.pack("<I", 0xCED7230A)
Label = float | Sequence[float]


def frames(data: bytes) -> bytes:
    """One record: cut wherever the magic number stands at a multiple of four, which is then left out."""
    cuts = [i for i in range(0, len(data) // 4 * 4, 4) if data[i : i + 4] == MAGIC]
    bounds = list(zip([0, *(cut + 4 for cut in cuts)], [*cuts, len(data)], strict=True))
    flags = [0] if len(bounds) == 1 else [1, *[2] * (len(bounds) - 2), 3]
    out = b""
    for flag, (start, stop) in zip(flags, bounds, strict=True):
        out += MAGIC + struct.pack("<I", flag << 29 | stop - start) + data[start:stop] + bytes(-(stop - start) % 4)
    return out


def image_record(key: int, label: Label, image: bytes) -> bytes:
    """IRHeader and image: one label in the header, several after it."""
    if isinstance(label, Sequence):
        return struct.pack("<IfQQ", len(label), 0, key, 0) + struct.pack(f"<{len(label)}f", *label) + image
    return struct.pack("<IfQQ", 0, label, key, 0) + image


def write_records(path: Path, records: Iterable[tuple[int, Label, bytes]], *, index: bool = True) -> Path:
    """Write ``.rec`` and ``.idx`` from (key, label, image)."""
    data, lines = b"", []
    for key, label, image in records:
        lines.append(f"{key}\t{len(data)}\n")
        data += frames(image_record(key, label, image))
    path.write_bytes(data)
    if index:
        path.with_suffix(".idx").write_text("".join(lines))
    return path


def insightface_records(images: Sequence[tuple[int, bytes]]) -> list[tuple[int, Label, bytes]]:
    """(label, image) by label as InsightFace lays them out: record 0 and, behind the images, each identity's keys."""
    records: list[tuple[int, Label, bytes]] = [(key, label, image) for key, (label, image) in enumerate(images, 1)]
    end, ranges = len(images) + 1, []
    for label in sorted({label for label, _ in images}):
        keys = [key for key, (own, _) in enumerate(images, 1) if own == label]
        ranges.append((float(keys[0]), float(keys[-1] + 1)))
    tail = [(end + i, pair, b"") for i, pair in enumerate(ranges)]
    return [(0, (float(end), float(end + len(ranges))), b""), *records, *tail]
