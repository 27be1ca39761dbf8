"""Refuse ONNX files that no runtime should load. Reads protobuf's wire format; needs no onnx.

onnxruntime reads a tensor that is said to lie in another file from the current folder, and older releases allocate what
a tensor declares before they look for its numbers. Field numbers: onnx.proto3 of ONNX 1.17.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pkd.toolkit.core.errors import BundleError, InputError

MAX_PARTS = 2_000_000
"""Fields of all messages together; a real encoder has some ten thousand."""
MAX_DEPTH = 50
"""Messages inside one another; protobuf itself stops at 100."""
PACKED = {21: 2, 22: 2, 23: 2, 25: 4, 26: 4, 27: 2, 28: 2}
"""Most elements of a type that share a byte: of 2, 4 and 6 bits. Any other element takes a byte at least."""

# Message → field → message in it: the ways from a model to its tensors. Everything else is skipped.
INSIDE: dict[str, dict[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
}
SPARSE = {1: "tensor", 2: "tensor"}
ATTRIBUTE_TENSOR = 5
TENSOR_DIMS, TENSOR_TYPE, TENSOR_NAME, TENSOR_EXTERNAL, TENSOR_LOCATION = 1, 2, 8, 13, 14
TENSOR_NUMBERS = {4, 5, 6, 7, 9, 10, 11}
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5


def check_onnx(data: bytes, where: str | Path) -> None:
    """Raise BundleError unless every tensor in ``data`` is dense, in the file, and holds what its shape declares.

    ``where`` is what errors name. Whether the graph makes sense is left to the runtime.
    """
    try:
        _Walk(data).message("model", 0, len(data), 0)
    except _Refused as reason:
        raise BundleError(f"{where}: {reason}. Do not trust it.") from None


def require_one_file(data: bytes, where: str | Path) -> None:
    """Raise InputError where a network keeps weights in another file.

    Its identity is the SHA-256 of its own file, so two networks would be taken for one; and a runtime that is given
    bytes looks for the other file in the current folder. What else is wrong with the file is left to the runtime.
    """
    try:
        _Walk(data, external_only=True).message("model", 0, len(data), 0)
    except _External as found:
        raise InputError(
            f"{where}: keeps the weights of {found} in another file, and an encoder must be one file. Put them inside: "
            f"python -c \"import onnx; onnx.save(onnx.load('{where}'), 'one-file.onnx')\""
        ) from None
    except _Refused:
        return


class _Refused(Exception):
    """Say why the file must not be loaded."""


class _External(_Refused):
    """Name the tensor that lies in another file."""


class _Walk:
    def __init__(self, data: bytes, *, external_only: bool = False) -> None:
        self._data = data
        self._external_only = external_only
        self._parts = 0

    def message(self, kind: str, start: int, end: int, depth: int) -> None:
        if depth > MAX_DEPTH:
            raise _Refused(f"nests graphs more than {MAX_DEPTH} messages deep")
        if kind == "tensor":
            return self._tensor(start, end)
        if kind == "sparse" and not self._external_only:
            raise _Refused("holds a sparse tensor, which swells when it is loaded")
        inside, tensors = SPARSE if kind == "sparse" else INSIDE[kind], 0
        for field, wire, first, last in self._fields(start, end):
            if field in inside and wire == BYTES:
                tensors += kind == "attribute" and field == ATTRIBUTE_TENSOR
                if tensors > 1 and not self._external_only:
                    raise _Refused("gives one attribute two tensors, which a parser would merge into a larger one")
                self.message(inside[field], first, last, depth + 1)
        return None

    def _tensor(self, start: int, end: int) -> None:
        name, count, held, packed = "", 1, 0, 1
        for field, wire, first, last in self._fields(start, end):
            if field == TENSOR_DIMS:
                for size in self._varints(first, last):
                    count = min(count * size, 1 << 64)  # a negative dimension is huge here
            elif field == TENSOR_TYPE and wire == VARINT:
                packed = PACKED.get(self._varint(first, last)[0], 1)
            elif field == TENSOR_NAME and wire == BYTES:
                name = self._data[first:last].decode("utf-8", "replace")[:100]
            elif field == TENSOR_EXTERNAL or (field == TENSOR_LOCATION and any(self._varints(first, last))):
                if self._external_only:
                    raise _External(repr(name) if name else "a tensor")
                raise _Refused(f"keeps the tensor {name!r} in another file; weights must lie inside")
            elif field in TENSOR_NUMBERS:
                held += last - first
        if count > packed * held and not self._external_only:
            raise _Refused(f"the tensor {name!r} declares more elements than its {held:,} bytes can hold")

    def _fields(self, start: int, end: int) -> Iterator[tuple[int, int, int, int]]:
        """Yield number, wire type, and where the value lies, for every field of the message in ``start:end``."""
        place = start
        while place < end:
            self._count()
            tag, place = self._varint(place, end)
            first, wire = place, tag & 7
            if wire == VARINT:
                _, place = self._varint(place, end)
            elif wire == BYTES:
                length, first = self._varint(place, end)
                place = first + length
            elif wire in (FIXED64, FIXED32):
                place += 8 if wire == FIXED64 else 4
            if wire not in (VARINT, BYTES, FIXED64, FIXED32) or tag >= 1 << 32:  # parsers cut a tag to 32 bits
                raise _Refused("is no ONNX file")
            if place > end:
                raise _Refused("ends too early")
            yield tag >> 3, wire, first, place

    def _varints(self, start: int, end: int) -> Iterator[int]:
        place = start
        while place < end:
            self._count()
            value, place = self._varint(place, end)
            yield value

    def _count(self) -> None:
        self._parts += 1
        if self._parts > MAX_PARTS:
            raise _Refused(f"has more than {MAX_PARTS:,} parts")

    def _varint(self, place: int, end: int) -> tuple[int, int]:
        """Read the unsigned value at ``place``, and where it ends."""
        value = 0
        for shift in range(0, 70, 7):
            if place >= end:
                raise _Refused("ends too early")
            byte = self._data[place]
            place += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value, place
        raise _Refused("is no ONNX file")
