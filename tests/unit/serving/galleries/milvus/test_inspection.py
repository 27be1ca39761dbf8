"""What pkd-gallery verify finds in Milvus, and keys wrapped anew."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from pkd.serving.core.errors import StoreUnavailable, UnknownGallery
from pkd.serving.galleries.audit_file import AuditFile
from pkd.serving.galleries.crypto import MasterKey, Sealed
from pkd.serving.galleries.milvus.catalogue import rewrap
from pkd.serving.galleries.milvus.client import Tables
from pkd.serving.galleries.milvus.collection import records_of
from pkd.serving.galleries.milvus.inspection import count_templates, inspect
from pkd.serving.galleries.milvus.records import COMMIT
from pkd.serving.galleries.milvus.store import MilvusStore
from tests.support.gallery_examples import ALICE, ENCODER, NEW, NEXT, OLD, enrolled, one, refused, unit
from tests.support.milvus_server import MilvusServer
from tests.support.milvus_stores import MASTER, Open, milvus_opened  # noqa: F401 - a fixture

OTHER = MasterKey(bytes(32))


class Thief:
    """Who may write to Milvus, and has no key."""

    def __init__(self, store: MilvusStore) -> None:
        self._tables, self.entry = store._tables, store._catalogue.entry("staff", "ALL")
        self.table, self.records = self.entry.tables[OLD.id], records_of(store._tables, self.entry.id)
        self.pseudonym = store._open(self.entry).seal.subject  # knows whose rows are whose, say by when they came

    def of(self, subject: str) -> str:
        return f'subject == "{self.pseudonym(subject)}"'

    def rows(self, table: str, where: str) -> list[dict[str, Any]]:
        client = self._tables._connected()
        return list(client.query(table, filter=where, output_fields=["*"], consistency_level="Strong"))

    def change(self, table: str, where: str, **columns: object) -> None:
        found = self.rows(table, where)
        assert found
        self._tables.upsert(table, [{**row, **columns} for row in found])

    def delete(self, table: str, where: str) -> None:
        found = self.rows(table, where)
        assert found
        self._tables.delete(table, [row["id"] for row in found])

    def swap(self, column: str, one: str, other: str) -> None:
        first, second = (self.rows(self.table, self.of(subject))[0] for subject in (one, other))
        first[column], second[column] = second[column], first[column]
        self._tables.upsert(self.table, [first, second])


@pytest.fixture
def store(milvus_opened: Open) -> MilvusStore:  # noqa: F811
    """A gallery of 301 subjects that is being migrated."""
    store = milvus_opened()
    store.create("staff", OLD, None, ALICE)
    many = [one(f"s{i:03d}", unit(i)[0], attributes={"site": "north"}, key=f"k{i}", digest="d") for i in range(300)]
    enrolled(store.enrol("staff", [*many, one("ann", unit(1)[0], expires=4e9), one("ann", unit(2)[0])], ALICE))
    store.begin_migration("staff", NEW, ALICE)
    enrolled(store.enrol("staff", [one("ann", unit(3)[0], encoder=NEXT, space=NEW)], ALICE))
    return store


def wrong(store: MilvusStore, master: MasterKey = MASTER) -> list[str]:
    return inspect(store._tables, store._log, master).wrong


def test_what_is_whole_passes_and_is_counted(store: MilvusStore) -> None:
    steps: list[int] = []
    before = store._log.head()
    found = inspect(store._tables, store._log, MASTER, before, steps.append)
    assert found.wrong == []
    assert (found.galleries, found.subjects, found.templates) == (1, 301, 303)
    assert sum(steps) == count_templates(store._tables) == 303
    assert found.head == before


def test_what_was_changed_is_named(store: MilvusStore) -> None:
    thief = Thief(store)
    table, records, of = thief.table, thief.records, thief.of
    thief.swap("vector", "s001", "s002")
    thief.swap("subject", "s003", "s004")
    thief.change(table, of("s005"), encoder="0" * 32)
    thief.change(table, of("s006"), tags={})
    thief.delete(table, of("s007"))
    thief.delete(records, f"kind == {COMMIT} and {of('s008')}")
    thief.delete(records, f'id like "~subject/{thief.pseudonym("s009")}%"')
    thief.change(records, of("s010"), expires=5)
    thief.change(records, of("s011"), key="1")
    thief.change(records, of("s012"), subject="1")
    thief.change(records, of("s013"), data="AAAA" * 20)
    thief.change(table, of("s014"), vector=[0.0] * OLD.dim)
    # As a process that has died leaves a deletion, until it is swept: no fault.
    thief.delete(records, f"kind == {COMMIT} and {of('s015')}")
    store._open(thief.entry).note([thief.pseudonym("s015")], [])
    lines = wrong(store)
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


def test_keys_collections_and_the_log_are_looked_at(store: MilvusStore) -> None:
    assert "gallery staff: does not decrypt" in wrong(store, OTHER)[0]
    with closing(AuditFile(store._log.path)) as log:
        log._db.execute("UPDATE audit SET actor = 'eve' WHERE sequence = 3")
    assert "audit record 3: was changed" in wrong(store)[0]
    store._tables.drop(Thief(store).table)
    assert "is not there" in wrong(store)[1]
    with refused(UnknownGallery):
        store.subject("staff", "ann")
    assert store.delete("staff", ALICE).templates == 1
    assert len(wrong(store)) == 1


def test_keys_are_wrapped_anew_also_after_an_interruption(
    store: MilvusStore, milvus_server: MilvusServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.create("guests", OLD, None, ALICE)
    catalogue = store._catalogue
    change = catalogue.change

    def once(entry: Any) -> None:
        change(entry)
        raise KeyboardInterrupt

    monkeypatch.setattr(catalogue, "change", once)
    with pytest.raises(KeyboardInterrupt):
        rewrap(catalogue, MASTER, OTHER)
    monkeypatch.undo()
    assert rewrap(catalogue, MASTER, OTHER) == 1
    assert rewrap(catalogue, MASTER, OTHER) == 0
    with pytest.raises(Sealed):
        rewrap(catalogue, MASTER, MasterKey(bytes([7] * 32)))
    assert wrong(store, OTHER) == []
    with closing(MilvusStore(Tables(milvus_server.uri), AuditFile(tmp_path / "new.db"), OTHER)) as again:
        (found,) = again.search("staff", ENCODER, unit(5), 1)
        assert found.hits[0].subject == "s005"
    with refused(StoreUnavailable):  # the old key opens nothing
        MilvusStore(Tables(milvus_server.uri), AuditFile(tmp_path / "old.db"), MASTER).search("staff", "x", unit(5), 1)
    assert rewrap(catalogue, OTHER, MASTER) == 2
    assert wrong(store) == []
