"""Read data out of a pickle without running what is in it.

A pickle is a program for a small machine, and may call any function it can name (Python's documentation warns of it).
Here it can name only the stand-ins below, which hold data and do nothing: no function of numpy or Python itself is
ever handed to a file.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

NUMPY = ("numpy", "numpy.core.multiarray", "numpy._core.multiarray", "numpy.core.numeric", "numpy._core.numeric")
KINDS = frozenset("bui")
"""Kinds of numpy's that are read: truth values and whole numbers."""


class NotPlain(ValueError):
    """A pickle that is broken, or that holds more than plain data. One sentence, says what."""


class PlainArray:
    """Hold what a pickled numpy array or scalar holds, unread until asked for."""

    def __init__(self) -> None:
        self._shape: tuple[int, ...] = ()
        self._dtype: PlainType | None = None
        self._data: Any = b""

    def __setstate__(self, state: Any) -> None:
        """State as ``ndarray.__reduce__`` writes it: (version, shape, dtype, Fortran order, data)."""
        try:
            _, shape, self._dtype, _, self._data = state
        except (TypeError, ValueError):
            raise NotPlain("a numpy array in it has no readable state.") from None
        if not isinstance(shape, tuple) or not all(isinstance(side, int) and side >= 0 for side in shape):
            raise NotPlain(f"a numpy array in it has {str(shape)[:40]!r} for a shape.")
        self._shape = shape

    def tolist(self) -> list[Any]:
        """Return the items of an array of one dimension, or of objects. Raises NotPlain."""
        if isinstance(self._data, list):
            return self._data
        if len(self._shape) != 1:
            raise NotPlain(f"a numpy array in it has the shape {self._shape}, expected one dimension.")
        found: list[Any] = self._values().tolist()
        return found

    def as_bytes(self) -> bytes:
        """Return the bytes of an array of uint8 in one dimension. Raises NotPlain."""
        values = self._values()
        if values.dtype != np.uint8 or len(self._shape) != 1:
            raise NotPlain(f"a numpy array in it is {values.dtype} {self._shape}, expected encoded bytes.")
        return values.tobytes()

    def item(self) -> Any:
        """Return the number of an array without dimensions."""
        return self._values().item()

    def _values(self) -> np.ndarray[Any, Any]:
        data = self._data.encode("latin1") if isinstance(self._data, str) else self._data
        if not isinstance(self._dtype, PlainType) or not isinstance(data, bytes):
            raise NotPlain("a numpy array in it holds no plain numbers.")
        kind = self._dtype.read()
        try:
            return np.frombuffer(data, kind).reshape(self._shape)
        except (TypeError, ValueError):
            raise NotPlain(f"a numpy array in it has {len(data):,} bytes, which its shape does not fit.") from None


class PlainType:
    """Hold a pickled numpy dtype: its short name, for instance ``u1``, and its byte order."""

    def __init__(self, *args: Any) -> None:
        self._name = _text(args[0]) if args else ""
        self._order = "="

    def __setstate__(self, state: Any) -> None:
        order = _text(state[1]) if isinstance(state, tuple) and len(state) > 1 else "="
        self._order = order if order in "<>=" else "="

    def read(self) -> np.dtype[Any]:
        """Return the numpy dtype. Raises NotPlain for any but truth values and whole numbers."""
        try:
            found = np.dtype(self._order + self._name.lstrip("<>=|"))
        except (TypeError, ValueError):
            found = None
        if found is None or found.kind not in KINDS:
            raise NotPlain(f"a numpy array in it holds {self._name[:20]!r}, not truth values or whole numbers.")
        return found


def load_plain(path: Path) -> Any:
    """Load tuples, lists, bytes, str, numbers and truth values of a pickle; arrays as PlainArray.

    Python 2's str is bytes.

    Raises NotPlain naming whatever else is in it, and OSError.
    """
    with path.open("rb") as file:
        try:
            return _Reader(file, encoding="bytes").load()
        except (NotPlain, OSError, KeyboardInterrupt):
            raise
        except (EOFError, pickle.UnpicklingError) as error:
            raise NotPlain(f"not a pickle, or truncated: {' '.join(str(error).split()).rstrip('.')}.") from None
        except MemoryError:
            raise NotPlain("claims more data than there is memory. It is corrupt.") from None
        except Exception as error:  # a corrupt pickle fails in as many ways as there are operations
            raise NotPlain(f"a corrupt pickle: {type(error).__name__}.") from None


class _Reader(pickle._Unpickler):
    # The one in Python: the one in C makes room for as many memos as a file claims, however small the file.

    def find_class(self, module: str, name: str) -> Any:
        # Each is made anew, so that a file that sets attributes of one changes nothing that outlives it.
        if module in NUMPY:
            makers: dict[str, Callable[..., Any]] = {
                "ndarray": lambda *args: PlainArray(),
                "_reconstruct": lambda *args: PlainArray(),
                "dtype": lambda *args: PlainType(*args),
                "scalar": lambda *args: _scalar(*args),
                "_frombuffer": lambda *args: _from_buffer(*args),
            }
            if name in makers:
                return makers[name]
        if (module, name) == ("_codecs", "encode"):  # how Python 3 writes bytes for Python 2
            return lambda *args: _latin1(*args)
        if module in ("builtins", "__builtin__") and name in ("bytes", "bytearray"):
            return lambda *args: _bytes(*args)
        raise NotPlain(f"names {module}.{name}, which is code and not data; nothing was run.")


def _scalar(kind: Any, data: Any = b"") -> Any:
    value = PlainArray()
    value.__setstate__((1, (), kind, False, data))
    return value.item()


def _from_buffer(data: Any, kind: Any, shape: Any, order: Any) -> PlainArray:
    """How protocol 5 writes an array."""
    value = PlainArray()
    value.__setstate__((1, shape, kind, order == "F", bytes(data) if isinstance(data, bytearray) else data))
    return value


def _latin1(text: Any, encoding: Any = "latin1") -> bytes:
    if not isinstance(text, str) or _text(encoding) not in ("latin1", "latin-1"):
        raise NotPlain("encodes text in it in an unexpected way.")
    return text.encode("latin1")


def _bytes(content: Any = b"", *rest: Any) -> bytes:
    if isinstance(content, bytes) and not rest:
        return content
    if isinstance(content, str) and len(rest) == 1:
        return _latin1(content, *rest)
    raise NotPlain("makes bytes in it from something else.")


def _text(value: Any) -> str:
    return value.decode("latin1") if isinstance(value, bytes) else str(value)
