"""Base64 as browsers, shells and mail programs write it."""

from __future__ import annotations

import base64
import textwrap
from urllib.parse import quote

import pytest

from pkd.serving.core.embedding_codec import decode_base64

DATA = bytes(range(256)) + b"\xfb\xff\xfe"
PLAIN = base64.b64encode(DATA + b"!").decode()


@pytest.mark.parametrize(
    "text",
    [
        PLAIN,
        f"data:image/png;base64,{PLAIN}",
        f"DATA:image/jpeg;charset=utf-8;BASE64,{PLAIN}",
        f"data:;base64,\n{PLAIN}",
        "\n".join(textwrap.wrap(PLAIN, 76)),
        "\r\n".join(textwrap.wrap(PLAIN, 64)) + "\r\n",
        f"  {PLAIN}\t\n",
        base64.urlsafe_b64encode(DATA + b"!").decode(),
        PLAIN.rstrip("="),
        f"data:image/png;name=a.png;base64,{quote(PLAIN, safe='')}",
        f"\ufeff{PLAIN}",
    ],
)
def test_every_usual_form_is_read(text: str) -> None:
    assert decode_base64(text) == DATA + b"!"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("data:image/svg+xml,%3Csvg", "without ;base64"),
        ("/home/ann/photo.jpg!", "without a path or a link"),
        ("https://example.org/a/b.png", "without a path or a link"),
        ("AAAAA", "length"),
        ("AAAAA===", "length"),
        ("ünïcode!", "not base64"),
    ],
)
def test_what_is_something_else_is_refused_with_a_remedy(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        decode_base64(text)
