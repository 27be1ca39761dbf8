"""The URL of a store, a folder of this machine or a Milvus server, and how the store that is there is opened."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pkd.toolkit.core.errors import InputError
from pkd.toolkit.core.text import read_text

if TYPE_CHECKING:
    from pkd.serving.galleries.crypto import MasterKey
    from pkd.serving.galleries.store import GalleryStore

MILVUS = re.compile(r"milvus(\+tls)?://([A-Za-z0-9.-]+:\d{1,5})")


@dataclass(frozen=True)
class StoreUrl:
    """Say where galleries are kept: ``url`` is DIR, or milvus[+tls]://HOST:PORT. Raises InputError for another."""

    url: str
    audit: str | None = None
    """File of the audit log beside Milvus."""
    token: str | None = None
    """File that holds USER:PASSWORD of Milvus."""
    shards: int = 1
    """Number of shards of a new gallery in Milvus."""

    def __post_init__(self) -> None:
        if "://" in self.url and not MILVUS.fullmatch(self.url):
            raise InputError("give a folder, milvus://HOST:PORT, or milvus+tls://HOST:PORT for TLS.")

    @property
    def milvus(self) -> bool:
        """Tell whether it is a Milvus server's."""
        return "://" in self.url

    def open(self, master: MasterKey, *, create: bool = True, load: bool = True) -> GalleryStore:
        """Open the store; without ``create`` there must be one already.

        ``load`` False: SQLite reads templates into memory only when they are searched, as commands do not. Raises
        InputError or StoreUnavailable.
        """
        found = MILVUS.fullmatch(self.url)
        if not found:
            from pkd.serving.galleries.sqlite.store import SqliteStore

            return SqliteStore(Path(self.url), master, create=create, load=load)
        from pkd.serving.galleries.audit import AuditFile
        from pkd.serving.galleries.milvus.catalogue import Catalogue
        from pkd.serving.galleries.milvus.client import MilvusConnection
        from pkd.serving.galleries.milvus.store import MilvusStore

        if not self.audit:
            raise InputError(f"{self.url}: Milvus keeps no audit log. Pass --audit FILE.")
        address = f"http{'s' if found[1] else ''}://{found[2]}"
        connection = MilvusConnection(address, _secret(self.token) if self.token else "", shards=self.shards)
        if not create and Catalogue(connection).table not in connection.names():
            raise InputError(f"{self.url}: keeps no galleries of pkd's.")
        return MilvusStore(connection, AuditFile(Path(self.audit), create=create), master)


def _secret(path: str) -> str:
    try:
        return read_text(path).strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: {getattr(error, 'strerror', None) or 'not a text file'}.") from None
