"""Searches over HTTP go on while writers wait for the disk, and while the database is damaged."""

from __future__ import annotations

import sqlite3
import threading
import time
from contextlib import closing
from pathlib import Path

from pkd.serving.galleries.sqlite.database import NAME
from tests.support import gallery_fixtures as made
from tests.support.disks import damage

WRITERS = 12


def test_an_identification_does_not_wait_for_writers(fleet: made.Fleet, tmp_path: Path) -> None:
    with made.serving(fleet, tmp_path) as client:
        made.gallery(client, "staff")
        made.enrol(client, "staff", "ann", made.embedded(fleet.teacher, 0))
        answers: list[int] = []

        def write(number: int) -> None:
            if number % 3 == 0:
                answers.append(client.put(f"/v1/galleries/g{number}").status_code)
            elif number % 3 == 1:
                answers.append(client.delete(f"/v1/galleries/staff/subjects/s{number}").status_code)
            else:
                body = {"inputs": [made.embedded(fleet.teacher, 1)]}
                path = f"/v1/galleries/staff/subjects/s{number}/templates"
                answers.append(client.post(path, json=body).status_code)

        with closing(sqlite3.connect(tmp_path / NAME, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            writers = [threading.Thread(target=write, args=(number,)) for number in range(WRITERS)]
            for writer in writers:
                writer.start()
            time.sleep(0.5)
            started = time.monotonic()
            answer = client.post("/v1/galleries/staff/identify", json={"query": made.embedded(fleet.teacher, 0)})
            seconds = time.monotonic() - started
            waiting = WRITERS - len(answers)
            other.execute("ROLLBACK")
            for writer in writers:
                writer.join()
    assert answer.json()["candidates"][0]["subject"] == "ann"
    assert waiting == WRITERS  # or it proved nothing
    assert seconds < 2
    assert sorted(set(answers)) == [201, 404]


def test_an_identification_needs_no_list_of_galleries(fleet: made.Fleet, tmp_path: Path) -> None:
    with made.serving(fleet, tmp_path) as client:
        made.gallery(client, "staff")
        made.enrol(client, "staff", "ann", made.embedded(fleet.teacher, 0))
        damage(tmp_path, "galleries")
        answer = client.post("/v1/galleries/staff/identify", json={"query": made.embedded(fleet.teacher, 0)})
        assert answer.json()["candidates"][0]["subject"] == "ann"
        body = {"inputs": [made.embedded(fleet.teacher, 1)]}
        refusal = client.post("/v1/galleries/staff/subjects/bo/templates", json=body)
        assert made.problem(refusal, 503, "store-unavailable")["detail"]
