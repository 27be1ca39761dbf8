"""Say what to install where a package of the extra ``serve`` is missing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from pkd.toolkit.core.errors import MissingExtra

MODULES = (
    "fastapi", "starlette", "uvicorn", "httptools", "orjson", "prometheus_client", "multipart", "python_multipart",
    "threadpoolctl", "uvloop",
)  # fmt: skip
"""Modules of the extra; who reads access tokens asks for PyJWT itself."""


@contextmanager
def serving_installed() -> Iterator[None]:
    """Raise MissingExtra, which names the extra, where the block imports one of its modules and it is not there."""
    try:
        yield
    except ModuleNotFoundError as missing:
        if missing.name not in MODULES:
            raise
        raise MissingExtra(missing.name, "serve") from None
