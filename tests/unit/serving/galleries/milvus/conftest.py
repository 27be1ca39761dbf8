"""Stores on a real Milvus server, for every test here."""

from __future__ import annotations

from tests.support.milvus_stores import backdoor, connect, log, milvus_opened

__all__ = ["backdoor", "connect", "log", "milvus_opened"]
