"""Read base64 as clients write it: plain, in lines, as a data: URI, in the alphabet of URLs, without its padding."""

from __future__ import annotations

import base64
import re
from contextlib import suppress
from urllib.parse import unquote

DATA_URI = re.compile(r"data:[^,]{0,200},", re.IGNORECASE)
"""Beginning of a data: URI, as browsers' FileReader and canvas give images."""
ALPHABET = re.compile("[A-Za-z0-9+/]*")
URL_ALPHABET = str.maketrans("-_", "+/")


def decode_base64(text: str) -> bytes:
    """Decode base64: white space anywhere, ``data:…;base64,`` before it (then ``%2B`` for ``+``), ``-_`` for
    ``+/``, and no padding are taken.

    Raises ValueError, whose text says what is wrong and continues a sentence.
    """
    with suppress(ValueError):  # binascii.Error is one; most clients send it plain
        return base64.b64decode(text, validate=True)
    if found := DATA_URI.match(text):
        if not found[0][:-1].lower().endswith(";base64"):
            raise ValueError("is a data: URI without ;base64. Send base64")
        text = unquote(text[found.end() :])
    text = "".join(text.lstrip("\ufeff").split()).translate(URL_ALPHABET)
    bare = text.rstrip("=")
    if not ALPHABET.fullmatch(bare):
        raise ValueError("is not base64. Send the bytes as base64, without a path or a link")
    if len(bare) % 4 == 1 or len(text) - len(bare) > 2:
        raise ValueError("is not base64: its length does not fit. Send all of it")
    return base64.b64decode(bare + "=" * (-len(bare) % 4))
