"""Read text files of other people's making: with or without a byte order mark, as editors of every system save them."""

from __future__ import annotations

import codecs
from pathlib import Path


def encoding_of(start: bytes) -> str:
    """Name the encoding of a text file by its first bytes: UTF-8, or UTF-16 where its byte order mark says so.

    PowerShell's ``>`` and Notepad's "Unicode" write UTF-16. The codecs that are named take the mark away.
    """
    return "utf-16" if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"


def decode_text(data: bytes) -> str:
    """Decode a text file's bytes, without their byte order mark. Raises UnicodeDecodeError for what is no text."""
    return data.decode(encoding_of(data))


def read_text(path: str | Path) -> str:
    """Read a text file whole, as ``decode_text``. Raises OSError and UnicodeDecodeError."""
    return decode_text(Path(path).read_bytes())


def text_encoding(path: str | Path) -> str:
    """Name the encoding of a file that is read line by line. Raises OSError."""
    with Path(path).open("rb") as file:
        return encoding_of(file.read(2))
