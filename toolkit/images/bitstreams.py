"""Read from the headers of HEVC and AV1 streams how many frames of which size they hold, and nothing else of them."""

from __future__ import annotations

MAX_UNITS = 100_000
"""Most units of one stream that are looked at."""
SIZES = 33
"""Kind of an HEVC unit that holds a sequence's parameters; kinds below 32 hold slices."""


class Bits:
    """Take whole numbers from bytes, most significant bit first. Raises ValueError past the end."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def take(self, count: int) -> int:
        """Take ``count`` bits as an unsigned number; 0 for none."""
        begin, self._at = self._at, self._at + count
        if self._at > 8 * len(self._data):
            raise ValueError
        covering = int.from_bytes(self._data[begin // 8 : (self._at + 7) // 8], "big")
        return covering >> (-self._at % 8) & ((1 << count) - 1)

    def golomb(self) -> int:
        """Take a number in exponential Golomb code, as HEVC's ue(v) and AV1's uvlc() are."""
        zeros = 0
        while not self.take(1):
            zeros += 1
            if zeros > 32:
                raise ValueError
        return (1 << zeros) - 1 + self.take(zeros)


def av1_frames(data: bytes) -> tuple[int, int, int]:
    """Count the frames of an AV1 stream, and read its largest width and height, pixels (AV1 specification, 5.3–5.5).

    Raises ValueError for what is no such stream, or has more than ``MAX_UNITS`` units.
    """
    at = frames = width = height = 0
    for _ in range(MAX_UNITS):
        if at >= len(data):
            break
        head = data[at]
        kind, at = head >> 3 & 15, at + (2 if head & 4 else 1)
        length = len(data) - at
        if head & 2:
            length, at = _leb128(data, at)
        if at + length > len(data):
            raise ValueError
        if kind == 1:
            w, h = _av1_size(data[at : at + length])
            width, height = max(width, w), max(height, h)
        frames += kind in (3, 6, 7)  # headers of frames, alone or before their tiles
        at += length
    else:
        raise ValueError
    if not width or not frames:
        raise ValueError
    return frames, width, height


def hevc_frames(data: bytes, prefix: int) -> tuple[int, list[tuple[int, int]]]:
    """Count the slices of an HEVC picture and read the sizes that it sets up; ``prefix``: bytes of a unit's length.

    Each slice counts as a whole picture: one may cover all of it, whatever the others do. Raises ValueError.
    """
    at = slices = 0
    sizes: list[tuple[int, int]] = []
    for _ in range(MAX_UNITS):
        if at >= len(data):
            break
        length, at = int.from_bytes(data[at : at + prefix], "big"), at + prefix
        if length < 2 or at + length > len(data):
            raise ValueError
        kind = data[at] >> 1 & 63
        slices += kind < 32
        if kind == SIZES:
            sizes.append(hevc_size(data[at : at + length]))
        at += length
    else:
        raise ValueError
    if not slices:
        raise ValueError
    return slices, sizes


def hevc_size(unit: bytes) -> tuple[int, int]:
    """Read width and height, pixels, from a unit of sequence parameters (Rec. ITU-T H.265, 7.3.2.2)."""
    bits = Bits(unit[2:1000].replace(b"\0\0\3", b"\0\0"))  # the 3 keeps the bytes from looking like the start of a unit
    bits.take(4)
    layers = bits.take(3)
    bits.take(1)
    for _ in range(12):
        bits.take(8)  # the general profile, tier and level
    present = [(bits.take(1), bits.take(1)) for _ in range(layers)]
    bits.take(2 * (8 - layers) if layers else 0)
    for profile, level in present:
        bits.take(88 * profile + 8 * level)
    bits.golomb()
    if bits.golomb() == 3:
        bits.take(1)
    return bits.golomb(), bits.golomb()


def _av1_size(unit: bytes) -> tuple[int, int]:
    bits = Bits(unit)
    bits.take(4)  # profile and still_picture
    if bits.take(1):
        bits.take(5)
    else:
        _skip_timing(bits)
    wide, high = bits.take(4) + 1, bits.take(4) + 1
    return bits.take(wide) + 1, bits.take(high) + 1


def _skip_timing(bits: Bits) -> None:
    """Skip what a sequence header of a film says before its size."""
    delays = 0
    if bits.take(1):
        bits.take(64)
        if bits.take(1):
            bits.golomb()
        if bits.take(1):
            delays = bits.take(5) + 1
            bits.take(42)
    display = bits.take(1)
    for _ in range(bits.take(5) + 1):
        bits.take(12)
        if bits.take(5) > 7:
            bits.take(1)
        if delays and bits.take(1):
            bits.take(2 * delays + 1)
        if display and bits.take(1):
            bits.take(4)


def _leb128(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for step in range(8):
        byte = data[at]
        value |= (byte & 127) << 7 * step
        at += 1
        if byte < 128:
            return value, at
    raise ValueError
