"""The connection to Milvus: rows that are written, queried by a filter and searched by a vector, within a deadline.

Each read states its consistency level, in Milvus' terms:

- ``bounded``: it misses nothing that this process wrote, and nothing older than half a second that another one did.
  Milvus brings its query nodes up to date every 200 ms, so this waits for nothing unless this process wrote just now.
- ``strong``: it misses nothing that was acknowledged before the call. It waits for the next tick: 200 to 400 ms.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pkd.serving.core.errors import StoreUnavailable
from pkd.toolkit.core.errors import MissingExtra

Row = dict[str, Any]
Consistency = Literal["bounded", "strong"]

STALE_SECONDS = 0.5
"""Greatest age of another process's write that may be missed, seconds. Clocks must agree better than that: use NTP."""
PAGE = 1_000
"""Rows that a query answers at a time."""
MAX_ROWS = 16_384
"""Largest number of rows that Milvus gives for one query or search."""
SLOW_SECONDS = 30.0
"""Longest time to load or flush a collection, seconds; nobody waits for an answer meanwhile."""
RETRY_SECONDS = 1.0
NO_COLLECTION = 100
"""Milvus' code for a missing collection since 2.3. The code of before, 4, now says that there are too many requests."""
NOT_CONNECTED = 2
"""pymilvus' code for a connection that was not made, or not let in."""
REMEDY = "Is it up, and are address, TLS and token right?"
NO_VECTOR: list[float] = [0.0, 0.0]
"""The vector of plain rows: every collection must have one."""


class NoCollection(Exception):
    """The collection does not exist (any more)."""


class MilvusConnection:
    """Connect to Milvus when it is first needed, and make every call within ``timeout`` seconds.

    ``prefix``: of the names of all collections. ``stale_seconds``: what a bounded read may miss of others. ``shards``:
    of a new collection. ``client``: makes pymilvus' client from ``uri``, ``token`` and ``timeout``.

    Raises StoreUnavailable for whatever Milvus cannot do in time, and NoCollection.
    """

    def __init__(
        self,
        uri: str,
        token: str = "",
        prefix: str = "pkd",
        timeout: float = 5.0,
        shards: int = 1,
        stale_seconds: float = STALE_SECONDS,
        client: Callable[..., Any] | None = None,
    ) -> None:
        self.prefix, self.timeout = prefix, timeout
        self._uri, self._token, self._shards, self._stale = uri, token, shards, stale_seconds
        self._make_client = client
        self._client: Any = None
        self._connecting = threading.Lock()
        self._retry = 0.0
        self._written: dict[str, float] = {}

    def create(self, name: str, fields: Mapping[str, int], dim: int = 0, indexed: Sequence[str] = ()) -> None:
        """Create and load a collection, unless it is there.

        ``fields``: name → longest text, 0 for a number and -1 for a dictionary; the first one is the primary key.
        ``dim`` 0: rows without a vector of their own.
        """
        try:
            self._create(name, fields, dim, indexed)
        except NoCollection:
            raise StoreUnavailable("A new collection was dropped by others at once. Try again.") from None

    def _create(self, name: str, fields: Mapping[str, int], dim: int, indexed: Sequence[str]) -> None:
        self.names()  # says so where pymilvus is missing
        from pymilvus import DataType, MilvusClient

        schema = MilvusClient.create_schema(auto_id=False, enable_dynamic_field=False)
        for number, (field, length) in enumerate(fields.items()):
            if length > 0:
                schema.add_field(field, DataType.VARCHAR, max_length=length, is_primary=number == 0)
            else:
                schema.add_field(field, DataType.JSON if length else DataType.INT64)
        schema.add_field("vector", DataType.FLOAT_VECTOR, dim=dim or len(NO_VECTOR))
        # FLAT compares with every row: an approximate index would miss people who are enrolled.
        indexes = MilvusClient.prepare_index_params()
        indexes.add_index("vector", index_type="FLAT", metric_type="IP")
        for field in indexed:
            indexes.add_index(field, index_type="Trie")
        # Looked for first: once restarted, Milvus 2.3 takes the same schema for another one, and refuses it.
        if name not in self.names():
            self._call("create_collection", name, schema=schema, num_shards=self._shards)
        if not self._call("list_indexes", name):
            self._call("create_index", name, indexes, sync=False)
        self._call("load_collection", name, _async=True)
        deadline = time.monotonic() + SLOW_SECONDS
        while self._call("get_load_state", name)["state"].name != "Loaded":
            if time.monotonic() > deadline:
                raise StoreUnavailable(f"Milvus did not load a new collection in {SLOW_SECONDS:g} s.")
            time.sleep(0.03)

    def names(self) -> Sequence[str]:
        """List every collection with this store's prefix."""
        return [name for name in self._call("list_collections") if name.startswith(f"{self.prefix}_")]

    def drop(self, name: str) -> None:
        """Remove a collection; none is no error. Milvus deletes its files later (its setting gc.dropTolerance)."""
        self._call("drop_collection", name)

    def insert(self, name: str, rows: Sequence[Row]) -> None:
        """Add rows. Their keys must be new: Milvus does not look."""
        self._write("insert", name, rows)

    def upsert(self, name: str, rows: Sequence[Row]) -> None:
        """Add rows, each in place of the one with its key."""
        self._write("upsert", name, rows)

    def delete(self, name: str, keys: Sequence[str]) -> None:
        """Delete the rows with these primary keys, the first field, which every collection calls ``id``."""
        for start in range(0, len(keys), PAGE):
            self._write("delete", name, list(keys[start : start + PAGE]))

    def query(
        self, name: str, where: str, fields: Sequence[str], consistency: Consistency, limit: int = MAX_ROWS
    ) -> list[Row]:
        """Return up to ``limit`` rows, in the order of their primary keys."""
        found = self._call(
            "query", name, filter=where, output_fields=list(fields), limit=limit, **self._level(name, consistency)
        )
        return sorted((dict(row) for row in found), key=lambda row: str(row["id"]))

    def pages(
        self, name: str, where: str, fields: Sequence[str], consistency: Consistency, after: str = ""
    ) -> Iterator[Row]:
        """Yield all rows, in the order of their primary keys, asked for in pages."""
        while True:
            rows = self.query(name, f'{where} and id > "{after}"', fields, consistency, PAGE)
            yield from rows
            if len(rows) < PAGE:
                return
            after = rows[-1]["id"]

    def count(self, name: str, where: str, consistency: Consistency) -> int:
        """Count the rows that the filter takes."""
        found = self._call("query", name, filter=where, output_fields=["count(*)"], **self._level(name, consistency))
        return int(found[0]["count(*)"])

    def search(
        self, name: str, queries: NDArray[np.float32], where: str, fields: Sequence[str], limit: int
    ) -> list[list[Row]]:
        """Find for each of the rows Q×D the nearest rows by inner product, best first, with ``score``."""
        found = self._call(
            "search",
            name,
            data=list(queries),
            filter=where,
            limit=limit,
            output_fields=list(fields),
            search_params={"metric_type": "IP"},
            **self._level(name, "bounded"),
        )
        return [[{"id": hit["id"], "score": hit["distance"], **hit["entity"]} for hit in hits] for hits in found]

    def holds_deleted(self, name: str) -> bool:
        """Tell whether Milvus may hold more rows than it gives: deleted ones that are in its files still.

        The answer is right as of the call, but what others write meanwhile may make it True.
        """
        given = self.count(name, 'id > ""', "strong")
        self._call("flush", name, seconds=SLOW_SECONDS)  # now all rows that were counted are in its statistics
        return int(self._call("get_collection_stats", name)["row_count"]) > given

    def compact(self, name: str) -> None:
        """Ask Milvus to write a collection's files anew, without what was flushed as deleted.

        It does so in its own time, or not at all: by itself it waits until a fifth is deleted. 2.3 compacts all other
        collections, too.
        """
        self._call("compact", name)

    def close(self) -> None:
        """Close the connection."""
        with self._connecting:
            if self._client is not None:
                self._client.close()
                self._client = None

    def _level(self, name: str, consistency: Consistency) -> dict[str, Any]:
        # Milvus' own level for reading what one wrote, Session, overlooks deletions (2.3.5).
        if consistency == "strong" or time.monotonic() - self._written.get(name, -self._stale) <= self._stale:
            return {"consistency_level": "Strong"}
        oldest = int((time.time() - self._stale) * 1000)
        return {"consistency_level": "Customized", "guarantee_timestamp": oldest << 18}

    def _write(self, operation: str, name: str, rows: Sequence[Any]) -> None:
        if rows:
            try:
                self._call(operation, name, rows)
            finally:  # a write that was given up may still take place
                self._written[name] = time.monotonic()

    def _call(self, operation: str, *args: Any, seconds: float | None = None, **kwargs: Any) -> Any:
        try:
            import grpc
            from pymilvus import MilvusException
        except ImportError:
            raise MissingExtra("pymilvus", "milvus") from None
        try:
            method: Callable[..., Any] = getattr(self._connected(), operation)
            return method(*args, timeout=seconds or self.timeout, **kwargs)
        except MilvusException as error:
            if error.code == NO_COLLECTION or "collection not found" in str(error):
                raise NoCollection(str(args[0] if args else "")) from None
            if error.code == NOT_CONNECTED:
                raise StoreUnavailable(f"Milvus cannot be reached to {operation}. {REMEDY}") from error
            raise StoreUnavailable(f"Milvus does not {operation}: code {error.code}.") from error
        except (grpc.RpcError, ValueError) as error:  # ValueError: the channel was closed under it
            raise StoreUnavailable(f"Milvus cannot be reached to {operation}. {REMEDY}") from error

    def _connected(self) -> Any:
        with self._connecting:
            if self._client is not None:
                return self._client
            if time.monotonic() < self._retry:  # for those who waited here while another one failed
                raise StoreUnavailable("Milvus could not be reached a moment ago.")
            from pymilvus import MilvusClient

            make = self._make_client or MilvusClient
            logging.getLogger("pymilvus").setLevel(logging.CRITICAL)  # it prints every error that it raises, too
            try:
                self._client = make(self._uri, token=self._token, timeout=self.timeout)
            finally:
                self._retry = 0.0 if self._client is not None else time.monotonic() + RETRY_SECONDS
            return self._client
