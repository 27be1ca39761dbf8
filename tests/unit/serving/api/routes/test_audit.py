"""The audit log by the API: what was done, by whom, a page at a time, and whether anybody changed it since."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

from pkd.serving.core.gallery_schemas import AuditAnswer, ChainAnswer
from tests.support import gallery_fixtures as made
from tests.support.gallery_fixtures import problem


def test_the_log_is_listed_checked_and_a_change_shows(fleet: Any, tmp_path: Path) -> None:
    with made.serving(fleet, tmp_path) as client:
        made.gallery(client, "g")
        for name in ("ann", "bob"):
            made.enrol(client, "g", name, made.embedded(fleet.first, 0))
        receipt = client.delete("/v1/galleries/g/subjects/ann").json()
        page = AuditAnswer.model_validate_json(client.get("/v1/audit", params={"limit": 3}).content)
        assert [one.action for one in page.records] == ["delete-subject", "enrol", "enrol"] and page.next == 2
        assert (page.records[0].sequence, page.records[0].hash) == (receipt["sequence"], receipt["hash"])
        assert page.records[0].actor == "anonymous" and "ann" not in client.get("/v1/audit").text
        rest = client.get("/v1/audit", params={"before": page.next}).json()
        assert [one["action"] for one in rest["records"]] == ["create"] and rest["next"] is None
        chain = ChainAnswer.model_validate_json(client.get("/v1/audit/check").content)
        assert chain.whole and (chain.sequence, chain.hash) == (receipt["sequence"], receipt["hash"])
        noted = {"noted_sequence": chain.sequence, "noted_hash": chain.hash}
        assert client.get("/v1/audit/check", params=noted).json()["whole"]
        problem(client.get("/v1/audit/check", params={"noted_sequence": 1}), 422, "invalid-request")
        with sqlite3.connect(tmp_path / "galleries.db") as db:
            db.execute("DELETE FROM audit WHERE sequence = 4")
        assert client.get("/v1/audit/check").json()["whole"]  # a cut end shows to whoever noted it
        assert "cut off" in client.get("/v1/audit/check", params=noted).json()["fault"]
        with sqlite3.connect(tmp_path / "galleries.db") as db:
            db.execute("UPDATE audit SET actor = 'nobody' WHERE sequence = 2")
        broken = client.get("/v1/audit/check").json()
        assert not broken["whole"] and broken["fault"].startswith("audit record 2: was changed")
