"""What verifying finds in Milvus, and keys wrapped anew."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any

import pytest

from pkd.serving.core.errors import StoreUnavailable, UnknownGallery
from pkd.serving.galleries.audit import AuditFile
from pkd.serving.galleries.crypto import DecryptionError, MasterKey
from pkd.serving.galleries.milvus.client import MilvusConnection
from pkd.serving.galleries.milvus.commit import write_journal
from pkd.serving.galleries.milvus.records import COMMIT, RECORD_FIELDS, TEMPLATE_FIELDS
from pkd.serving.galleries.milvus.store import MilvusOptions, MilvusStore
from tests.support.gallery_examples import ALICE, ENCODER, NEW, NEXT, OLD, enrolled, one, refused, unit
from tests.support.milvus_server import MilvusServer
from tests.support.milvus_stores import MASTER, Backdoor, HookedConnection, Open

OTHER = MasterKey(bytes(32))
SUBJECTS = 40
QUICK = MilvusOptions(recheck_seconds=0.3)


class Thief:
    """Who may write to Milvus, and has no key, but knows whose rows are whose, say by when they came."""

    def __init__(self, backdoor: Backdoor) -> None:
        self._connection, row = backdoor.connection, backdoor.row()
        self.table, self.records, self.pseudonym = row.tables[OLD.id], backdoor.gallery().records, backdoor.pseudonym

    def of(self, subject: str) -> str:
        return f'subject == "{self.pseudonym(subject)}"'

    def rows(self, table: str, where: str) -> list[dict[str, Any]]:
        fields = [*(TEMPLATE_FIELDS if table == self.table else RECORD_FIELDS), "vector"]
        found = self._connection.query(table, where, fields, "strong")
        assert found
        return found

    def change(self, table: str, where: str, **columns: object) -> None:
        self._connection.upsert(table, [{**row, **columns} for row in self.rows(table, where)])

    def delete(self, table: str, where: str) -> None:
        self._connection.delete(table, [row["id"] for row in self.rows(table, where)])

    def swap(self, column: str, one: str, other: str) -> None:
        first, second = (self.rows(self.table, self.of(subject))[0] for subject in (one, other))
        first[column], second[column] = second[column], first[column]
        self._connection.upsert(self.table, [first, second])


@pytest.fixture
def connection(connect: Callable[[], HookedConnection]) -> HookedConnection:
    """Return the connection of ``store``."""
    return connect()


@pytest.fixture
def store(milvus_opened: Open, connection: HookedConnection) -> MilvusStore:
    """Make a gallery of 41 subjects that is being migrated."""
    store = milvus_opened(QUICK, connection)
    store.create("staff", OLD, None, ALICE)
    many = [
        one(f"s{i:03d}", unit(i)[0], attributes={"site": "north"}, key=f"k{i}", digest="d") for i in range(SUBJECTS)
    ]
    enrolled(store.enrol("staff", [*many, one("ann", unit(1)[0], expires=4e9), one("ann", unit(2)[0])], ALICE))
    store.begin_migration("staff", NEW, ALICE)
    enrolled(store.enrol("staff", [one("ann", unit(3)[0], encoder=NEXT, space=NEW)], ALICE))
    return store


def under(milvus_server: MilvusServer, log: AuditFile, master: MasterKey) -> MilvusStore:
    """Open a store that has another master key."""
    return MilvusStore(MilvusConnection(milvus_server.uri), AuditFile(log.path), master, QUICK)


def test_what_is_whole_passes_and_what_was_changed_is_named(
    store: MilvusStore, backdoor: Backdoor, log: AuditFile
) -> None:
    steps: list[tuple[str, int | None, list[int]]] = []

    @contextmanager
    def progress(label: str, total: int | None = None, /) -> Iterator[Callable[..., None]]:
        steps.append((label, total, []))
        yield lambda done, note="": steps[-1][2].append(done)

    before = log.head()
    found = store.verify(before, progress)
    assert found.wrong == []
    assert (found.galleries, found.subjects, found.templates) == (1, SUBJECTS + 1, SUBJECTS + 3)
    ((_, total, done),) = steps
    assert sum(done) == total == SUBJECTS + 3
    assert found.head == before

    thief = Thief(backdoor)
    table, records, of = thief.table, thief.records, thief.of
    thief.swap("vector", "s001", "s002")
    thief.swap("subject", "s003", "s004")
    thief.change(table, of("s005"), encoder="0" * 32)
    thief.change(table, of("s006"), tags={})
    thief.delete(table, of("s007"))
    thief.delete(records, f"kind == {COMMIT} and {of('s008')}")
    thief.delete(records, f'id like "~subject/{thief.pseudonym("s009")}%"')
    thief.change(records, f"kind == {COMMIT} and {of('s010')}", expires=5)
    thief.change(records, f"kind == {COMMIT} and {of('s011')}", key="1")
    thief.change(records, f"kind == {COMMIT} and {of('s012')}", subject="1")
    thief.change(records, f"kind == {COMMIT} and {of('s013')}", data="AAAA" * 20)
    thief.change(table, of("s014"), vector=[0.0] * OLD.dim)
    # As a process that has died leaves a deletion, until it is swept: no fault.
    thief.delete(records, f"kind == {COMMIT} and {of('s015')}")
    write_journal(backdoor.gallery(), [thief.pseudonym("s015")], [])
    lines = store.verify().wrong
    for subject, said in (
        *((name, ("has another vector",)) for name in ("s001", "s002", "s014")),
        *((name, ("is missing", "belongs to no enrolment")) for name in ("s003", "s004")),
        ("s005", ("is not beside the encoder",)),
        ("s006", ("is not found by the subject's attributes",)),
        ("s007", ("is missing",)),
        ("s009", ("is counted wrongly",)),
        ("s010", ("the expires beside",)),
        ("s011", ("the key beside",)),
        ("s012", ("the subject beside",)),
    ):
        of_subject = [line for line in lines if line.startswith(f"gallery staff, subject {subject}: ")]
        assert len(of_subject) == len(said), (subject, lines)
        for line, part in zip(of_subject, said, strict=True):
            assert part in line
            lines.remove(line)
    for part in (f"pseudonym {thief.pseudonym('s008')}: template", "its record does not decrypt"):
        (line,) = (line for line in lines if part in line)
        lines.remove(line)
    assert lines == []


def test_keys_collections_and_the_log_are_looked_at(
    store: MilvusStore, backdoor: Backdoor, milvus_server: MilvusServer, log: AuditFile
) -> None:
    with closing(under(milvus_server, log, OTHER)) as other:
        assert "gallery staff: does not decrypt" in other.verify().wrong[0]
    with closing(sqlite3.connect(log.path)) as db:
        db.execute("UPDATE audit SET actor = 'eve' WHERE sequence = 3")
        db.commit()
    assert "audit record 3: was changed" in store.verify().wrong[0]
    backdoor.connection.drop(Thief(backdoor).table)
    assert "is not there" in store.verify().wrong[1]
    with refused(UnknownGallery):
        store.subject("staff", "ann")
    assert store.delete("staff", ALICE).templates == 1
    assert len(store.verify().wrong) == 1


def test_keys_are_wrapped_anew_also_after_an_interruption(
    store: MilvusStore, connection: HookedConnection, milvus_server: MilvusServer, backdoor: Backdoor, log: AuditFile
) -> None:
    store.create("guests", OLD, None, ALICE)

    def once(operation: str, name: str, rows: Sequence[Any]) -> None:
        connection.after = None
        raise KeyboardInterrupt

    connection.after = once
    with pytest.raises(KeyboardInterrupt):
        store.rekey(OTHER)
    with closing(under(milvus_server, log, MASTER)) as operator:
        assert operator.rekey(OTHER) == 1
        assert operator.verify().wrong == []
    with closing(under(milvus_server, log, MASTER)) as late:
        with pytest.raises(DecryptionError):
            late.rekey(MasterKey(bytes([7] * 32)))
        assert late.rekey(OTHER) == 0
    with closing(under(milvus_server, log, OTHER)) as again:
        (found,) = again.search("staff", ENCODER, unit(5), 1)
        assert found.hits[0].subject == "s005"
        with closing(under(milvus_server, log, MASTER)) as old, refused(StoreUnavailable):  # it decrypts nothing
            old.search("staff", "x", unit(5), 1)
        assert again.rekey(MASTER) == 2
        assert again.verify().wrong == []
