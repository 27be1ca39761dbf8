"""Place: where galleries are kept, a folder of this machine or a Milvus server, and the store that is there."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pkd.toolkit.core.errors import InputError

if TYPE_CHECKING:
    from pkd.serving.galleries.audit_file import AuditFile
    from pkd.serving.galleries.crypto import MasterKey
    from pkd.serving.galleries.milvus.client import Tables
    from pkd.serving.galleries.store import GalleryStore

MILVUS = re.compile(r"milvus(\+tls)?://([A-Za-z0-9.-]+:\d{1,5})")


@dataclass(frozen=True)
class Place:
    """``where``: DIR, or milvus[+tls]://HOST:PORT; raises InputError for another address."""

    where: str
    audit: str | None = None
    """File of the audit log beside Milvus."""
    token: str | None = None
    """File that holds USER:PASSWORD of Milvus."""
    shards: int = 1
    """Of a new gallery in Milvus."""

    def __post_init__(self) -> None:
        if "://" in self.where and not MILVUS.fullmatch(self.where):
            raise InputError("give a folder, milvus://HOST:PORT, or milvus+tls://HOST:PORT for TLS.")

    @property
    def milvus(self) -> bool:
        """Whether it is a Milvus server."""
        return "://" in self.where

    def open(self, master: MasterKey, *, create: bool = True) -> GalleryStore:
        """The store; without ``create`` there must be one already. Raises InputError or StoreUnavailable."""
        if not self.milvus:
            from pkd.serving.galleries.sqlite.store import SqliteStore

            return SqliteStore(Path(self.where), master, create=create)
        from pkd.serving.galleries.milvus.store import MilvusStore

        return MilvusStore(self.tables(create=create), self.log(create=create), master)

    def tables(self, *, create: bool = True) -> Tables:
        """A connection to Milvus. Without ``create`` an InputError where no galleries are kept there."""
        from pkd.serving.galleries.milvus.catalogue import Catalogue
        from pkd.serving.galleries.milvus.client import Tables

        found = MILVUS.fullmatch(self.where)
        assert found
        tables = Tables(
            f"http{'s' if found[1] else ''}://{found[2]}", _secret(self.token) if self.token else "", shards=self.shards
        )
        if not create and Catalogue(tables).table not in tables.names():
            raise InputError(f"{self.where}: keeps no galleries of pkd's.")
        return tables

    def log(self, *, create: bool = True) -> AuditFile:
        """The audit log beside Milvus."""
        from pkd.serving.galleries.audit_file import AuditFile

        if not self.audit:
            raise InputError(f"{self.where}: Milvus keeps no audit log. Pass --audit FILE.")
        return AuditFile(Path(self.audit), create=create)


def _secret(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: {getattr(error, 'strerror', None) or 'not a text file'}.") from None
