"""pkd-gallery: keys, checks, copies."""

from __future__ import annotations

import json
import sqlite3
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pkd.serving.api.responses import line
from pkd.serving.cli.gallery import main
from pkd.serving.galleries.crypto import MasterKey
from pkd.serving.galleries.description import of_gallery, of_subject
from pkd.serving.galleries.sqlite.database import NAME
from pkd.serving.galleries.sqlite.store import SqliteStore
from pkd.serving.galleries.store import Consent
from pkd.serving.matching import transfer
from tests.support.gallery_examples import ALICE, ENCODER, NEW, NEXT, OLD, STUDENT, enrolled, one, unit
from tests.support.serving_bundles import certificate, encoder, weights


@pytest.fixture
def key(tmp_path: Path) -> Path:
    """Make a master key by the command."""
    assert main(["new-key", str(tmp_path / "master.key")]) == 0
    return tmp_path / "master.key"


@pytest.fixture
def folder(tmp_path: Path, key: Path) -> Path:
    """Make a store with a gallery that is being migrated."""
    with closing(SqliteStore(tmp_path / "store", MasterKey.read(key))) as store:
        store.create("staff", OLD, None, ALICE)
        consent = Consent("contract", "drawer 3")
        enrolled(
            store.enrol(
                "staff",
                [
                    one("ann", unit(1)[0], attributes={"site": "nörd"}, consent=consent, expires=4e9),
                    one("ann", unit(2)[0], encoder=STUDENT),
                    *(one(f"s{i:03d}", unit(i)[0]) for i in range(300)),
                ],
                ALICE,
            )
        )
        store.begin_migration("staff", NEW, ALICE)
        enrolled(store.enrol("staff", [one("ann", unit(3)[0], encoder=NEXT, space=NEW)], ALICE))
    return tmp_path / "store"


def answered(capsys: pytest.CaptureFixture[str], *argv: object) -> dict[str, Any]:
    """Run a command and read the JSON that it prints."""
    assert main(["--json", *map(str, argv)]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def failed(capsys: pytest.CaptureFixture[str], code: int, *argv: object) -> str:
    """Read the last line, with which a command fails; a server's handler of the log may have written before it."""
    capsys.readouterr()
    assert main(["--json", *map(str, argv)]) == code
    *_, line = capsys.readouterr().err.splitlines()
    return str(line)


def test_verify_passes_and_names_the_head(folder: Path, key: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seen = answered(capsys, "verify", folder, "--master-key", key)
    assert (seen["galleries"], seen["subjects"], seen["templates"]) == (1, 301, 303)
    head = seen["audit_head"]
    assert answered(capsys, "verify", folder, "--master-key", key, "--noted", head)["noted_head_checked"]
    with closing(sqlite3.connect(folder / NAME)) as db:
        db.execute("DELETE FROM audit WHERE sequence > 5")
        db.commit()
    assert answered(capsys, "verify", folder, "--master-key", key)["audit_head"].startswith("5:")
    assert "audit record 6" in failed(capsys, 4, "verify", folder, "--master-key", key, "--noted", head)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("UPDATE audit SET actor = 'eve' WHERE sequence = 3", "audit record 3"),
        (
            "UPDATE templates SET sealed = zeroblob(60) WHERE id = 4",
            "template 000000000004, encoder teacher@sha256:a: does not",
        ),
        ("UPDATE subjects SET name = 'bob' WHERE name = 'ann'", "subject bob: does not decrypt"),
        ("UPDATE galleries SET name = 'guests'", "gallery guests: does not decrypt"),
        ("UPDATE encoders SET templates = 9", "counts 9 templates"),
        ("DELETE FROM templates WHERE id = 10", "s007: has no template"),
    ],
)
def test_verify_names_what_was_changed(
    folder: Path, key: Path, capsys: pytest.CaptureFixture[str], change: str, named: str
) -> None:
    with closing(sqlite3.connect(folder / NAME)) as db:
        db.execute(change)
        db.commit()
    assert named in failed(capsys, 4, "verify", folder, "--master-key", key)


@pytest.mark.parametrize("plain", [True, False])
def test_a_copy_holds_everything_and_can_be_taken_in_twice(
    folder: Path, key: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], plain: bool
) -> None:
    file, other = tmp_path / "staff.jsonl", tmp_path / "other.key"
    main(["new-key", str(other)])
    capsys.readouterr()
    flags = ["--plain"] if plain else []
    assert answered(capsys, "export", folder, "staff", file, "--master-key", key, *flags)["subjects"] == 301
    assert (b'"s007"' in file.read_bytes()) == plain  # with its quotes, which chance cannot write in base64
    assert file.stat().st_mode & 0o077 == 0
    copy, into = tmp_path / "copy", ["--master-key", other, "--sealed-with", key]
    lines = file.read_bytes().splitlines(keepends=True)
    cut = tmp_path / "cut.jsonl"
    cut.write_bytes(b"".join(lines[:280]))
    assert "is cut off after 279 subjects" in failed(capsys, 2, "import", copy, cut, *into)
    done = answered(capsys, "import", copy, file, *into)
    assert done["templates"] + done["there_already"] == 303
    assert done["there_already"] >= 256
    assert answered(capsys, "import", copy, file, *into)["templates"] == 0
    with (
        closing(SqliteStore(folder, MasterKey.read(key))) as store,
        closing(SqliteStore(copy, MasterKey.read(other))) as again,
    ):
        first, second = store.get("staff"), again.get("staff")
        assert (first.spaces, first.subjects, first.templates) == (second.spaces, second.subjects, second.templates)
        for before, after in zip(store.export("staff"), again.export("staff"), strict=True):
            assert (before.id, before.attributes, before.consent) == (after.id, after.attributes, after.consent)
            for a, b in zip(
                sorted(before.templates, key=lambda one: one.encoder),
                sorted(after.templates, key=lambda one: one.encoder),
                strict=True,
            ):
                assert (a.encoder, a.space, a.expires) == (b.encoder, b.space, b.expires)
                np.testing.assert_array_equal(a.vector, b.vector)  # type: ignore[arg-type]
    if not plain:
        assert "given is" in failed(capsys, 2, "import", copy, file, "--master-key", other)
        swapped = tmp_path / "swapped.jsonl"
        swapped.write_bytes(b"".join([lines[0], lines[2], lines[1], *lines[3:]]))
        assert "does not decrypt" in failed(capsys, 4, "import", copy, swapped, *into)


def test_files_of_the_api_and_of_the_command_are_the_same_format(
    folder: Path, key: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ours, theirs = tmp_path / "ours.jsonl", tmp_path / "theirs.jsonl"
    answered(capsys, "export", folder, "staff", ours, "--master-key", key, "--plain")
    for row in ours.read_bytes().splitlines():
        transfer.ExportLine.model_validate_json(row)
    with closing(SqliteStore(folder, MasterKey.read(key))) as store:
        subjects = [line(of_subject(subject)) for subject in store.export("staff")]
        head = line(of_gallery(store.get("staff")))
    theirs.write_bytes(b"".join([head, *subjects, line({"end": True, "subjects": len(subjects)})]))
    done = answered(capsys, "import", tmp_path / "copy", theirs, "--master-key", key)
    assert (done["subjects"], done["templates"]) == (301, 303)
    assert answered(capsys, "import", tmp_path / "copy", ours, "--master-key", key)["there_already"] == 303


def test_rekey_changes_what_opens_the_store(
    folder: Path, key: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["new-key", str(tmp_path / "new.key")])
    capsys.readouterr()
    with closing(sqlite3.connect(folder / NAME)) as db:
        (wrapped,) = db.execute("SELECT key FROM galleries").fetchone()
    assert answered(capsys, "rekey", folder, "--master-key", key, "--new-key", tmp_path / "new.key")["galleries"] == 1
    assert "written with master key" in failed(capsys, 2, "verify", folder, "--master-key", key)
    seen = answered(capsys, "verify", folder, "--master-key", tmp_path / "new.key")
    assert seen["templates"] == 303
    assert wrapped not in b"".join(path.read_bytes() for path in folder.iterdir())


def test_mistakes_are_one_line(folder: Path, key: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "never replaced" in failed(capsys, 2, "new-key", key)
    assert "no such database" in failed(capsys, 2, "verify", tmp_path / "none", "--master-key", key)
    assert "No gallery is called guests" in failed(
        capsys, 2, "export", folder, "guests", tmp_path / "x", "--master-key", key
    )
    assert "SEQUENCE:HASH" in failed(capsys, 2, "verify", folder, "--master-key", key, "--noted", "7")
    assert "exists already" in failed(capsys, 2, "export", folder, "staff", key, "--master-key", key)
    (tmp_path / "junk").write_text('{"format": "other"}\n')
    assert "has format other" in failed(capsys, 2, "import", folder, tmp_path / "junk", "--master-key", key)
    head = {"format": "pkd-gallery-1", "gallery": "staff", "space": {"id": OLD.id, "dim": OLD.dim}}
    (tmp_path / "junk").write_text(json.dumps(head) + '\n{"subject": "x", "templates": [{}]}\n')
    assert "line 2" in failed(capsys, 2, "import", folder, tmp_path / "junk", "--master-key", key)
    (tmp_path / "junk").write_text("junk\n")
    assert "line 1" in failed(capsys, 2, "import", folder, tmp_path / "junk", "--master-key", key)
    assert "No such file" in failed(capsys, 2, "import", folder, tmp_path / "none", "--master-key", key)
    assert not list(tmp_path.glob("*.part"))


def test_verify_holds_while_a_server_writes(folder: Path, key: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import threading

    stop = threading.Event()

    def write() -> None:
        with closing(SqliteStore(folder, MasterKey.read(key))) as store:
            while not stop.is_set():
                enrolled(store.enrol("staff", [one("busy", unit(1)[0], encoder=ENCODER)], ALICE))
                time.sleep(0.02)

    thread = threading.Thread(target=write)
    thread.start()
    try:
        for _ in range(3):
            answered(capsys, "verify", folder, "--master-key", key)
    finally:
        stop.set()
        thread.join(10)


def test_who_is_enrolled_twice_is_found_and_merged(
    folder: Path, key: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with closing(SqliteStore(folder, MasterKey.read(key))) as store:
        enrolled(store.enrol("staff", [one("ann-2", unit(1)[0]), one("s007", unit(900)[0])], ALICE))
    info = encoder("teacher", weights(1)).info.model_copy(update={"id": ENCODER})
    evidence = tmp_path / "certificate.json"
    evidence.write_text(certificate(info, info).model_dump_json())
    asked = (folder, "staff", "--master-key", key)
    file = tmp_path / "doubts.csv"
    found = answered(capsys, "review", *asked, "--certificates", evidence, "--csv", file)
    # s001 has the same vector as ann by this fixture's making.
    assert {frozenset((pair["subject"], pair["other"])) for pair in found["pairs"]} >= {frozenset(("ann", "ann-2"))}
    assert {outlier["subject"] for outlier in found["outliers"]} == {"s007"} and found["not_compared"]
    rows = file.read_text().splitlines()
    assert len(rows) == 1 + len(found["pairs"]) + len(found["outliers"]) and rows[0].startswith("kind,subject")
    assert file.stat().st_mode & 0o077 == 0
    moved = answered(capsys, "move", *asked, "ann-2", "ann")
    assert moved["receipt"]["templates"] == 1
    again = answered(capsys, "review", *asked, "--certificates", evidence)
    assert not {"ann-2"} & {name for pair in again["pairs"] for name in (pair["subject"], pair["other"])}
    assert "has no subject nemo" in failed(capsys, 2, "move", *asked, "ann", "nemo")
    assert "no certificates there" in failed(capsys, 2, "review", *asked, "--certificates", folder)
    assert answered(capsys, "verify", folder, "--master-key", key)["subjects"] == 301
