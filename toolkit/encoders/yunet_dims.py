"""Free the declared sizes of a YuNet file, so that runtimes other than OpenCV take pictures of any multiple of 32.

OpenCV ignores a declared input of 640×640; onnxruntime refuses any other size, and padding to 640 moves landmarks by up
to seven pixels. Reads and writes protobuf's wire format, as ``bundle/onnx_check.py`` does: serving has no onnx. Field
numbers: onnx.proto3 of ONNX 1.17.
"""

from __future__ import annotations

from collections.abc import Iterator

from pkd.toolkit.core.errors import InputError

GRAPH = 7
INPUT, OUTPUT, VALUE_INFO = 11, 12, 13
TYPE, TENSOR, SHAPE, DIM = 2, 1, 2, 1
DIM_PARAM = 2
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5


def free_dims(data: bytes) -> bytes:
    """Return the same network with height and width of its input and all sizes of its outputs left open.

    Batch and channels of the input stay. What the file says of values in between is left out: it would no longer be
    true. Raises InputError where ``data`` is no ONNX file.
    """
    try:
        return b"".join(_rewritten(field, raw, value) for field, raw, value in _fields(data))
    except (IndexError, ValueError):
        raise InputError("the detector is no ONNX file. Give a YuNet .onnx file.") from None


def _rewritten(field: int, raw: bytes, value: bytes) -> bytes:
    if field != GRAPH:
        return raw
    made = []
    for part, part_raw, part_value in _fields(value):
        if part == VALUE_INFO:
            continue
        made.append(_message(part, _declared(part_value, part == INPUT)) if part in (INPUT, OUTPUT) else part_raw)
    return _message(GRAPH, b"".join(made))


def _declared(value: bytes, is_input: bool, path: tuple[int, ...] = (TYPE, TENSOR, SHAPE)) -> bytes:
    """Rewrite the dimensions within a ValueInfoProto; ``path``: the fields that lead to them."""
    made, dims = [], 0
    for field, raw, part in _fields(value):
        if path and field == path[0]:
            raw = _message(field, _declared(part, is_input, path[1:]))
        elif not path and field == DIM:
            name = f"{'input' if is_input else 'output'}_{dims}"
            if not is_input or dims > 1:
                raw = _message(DIM, _message(DIM_PARAM, name.encode()))
            dims += 1
        made.append(raw)
    return b"".join(made)


def _fields(data: bytes) -> Iterator[tuple[int, bytes, bytes]]:
    """Yield number, bytes as they stand, and the value (of a message or text) of every field."""
    place = 0
    while place < len(data):
        start = place
        tag, place = _varint(data, place)
        first = place
        if tag & 7 == VARINT:
            _, place = _varint(data, place)
        elif tag & 7 == BYTES:
            length, first = _varint(data, place)
            place = first + length
        elif tag & 7 in (FIXED64, FIXED32):
            place += 8 if tag & 7 == FIXED64 else 4
        else:
            raise ValueError
        if place > len(data):
            raise ValueError
        yield tag >> 3, data[start:place], data[first:place]


def _varint(data: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[place]
        value |= (byte & 0x7F) << shift
        place, shift = place + 1, shift + 7
        if byte < 0x80:
            return value, place


def _message(field: int, value: bytes) -> bytes:
    return _number(field << 3 | BYTES) + _number(len(value)) + value


def _number(value: int) -> bytes:
    made = bytearray()
    while value > 0x7F:
        made.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*made, value])
