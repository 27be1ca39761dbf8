"""Keep the sums of a certificate's observations, of all processes and over restarts, and neither scores nor names."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import httpx
import numpy as np
import pytest

from pkd.serving.core.gallery_schemas import Candidate, IdentifyAnswer
from pkd.serving.core.options import Settings
from pkd.serving.galleries.sqlite.store import SqliteStore
from pkd.serving.galleries.store import Enrolment, Gallery, Hit, NewTemplate, SearchResult, Space
from pkd.serving.inference.registry import Encoders
from pkd.serving.matching.drift import REPEAT_SECONDS, DriftMonitor
from pkd.serving.matching.service import Service
from pkd.serving.observability.drift import DriftLedger
from pkd.serving.observability.metrics import Metrics
from pkd.toolkit.certificates.drift import Observation, alarm_at
from pkd.toolkit.core.encoder_info import short
from pkd.toolkit.core.errors import InputError
from tests.support import gallery_fixtures as made
from tests.support.gallery_fixtures import at, enrol, gallery, sent

YES, NO = (Observation(1e-3, reached, 0.1, 0.2) for reached in (True, False))


def test_processes_add_up_and_restarts_go_on(tmp_path: Path) -> None:
    file = tmp_path / "drift.db"
    with closing(DriftLedger(file)) as one, closing(DriftLedger(file)) as other:
        one.observe("c", "identify", [YES, NO])
        other.observe("c", "identify", [YES])
        other.observe("d", "verify", [NO])
        assert other.flush() == {"c", "d"} and other.flush() == set()
        one.flush()
        sums = other.watched("c").sums["identify", 1e-3]
        assert (sums.observed, sums.exceeded) == (3, 2) and sums.promised == pytest.approx(0.6)
        assert sums.logs == pytest.approx([2 * a + b for a, b in zip(YES.logs, NO.logs, strict=True)])
        one.raise_peak("c", 50)
        one.raise_peak("c", 2)
    with closing(DriftLedger(file)) as again:
        assert again.watched("c").peak == 50 and again.watched("c").since is not None
        assert again.watched("none").since is None
    assert file.stat().st_mode & 0o077 == 0
    with pytest.raises(InputError, match="drift"):
        DriftLedger(tmp_path / "none" / "drift.db")


def test_a_ledger_that_is_locked_loses_nothing(tmp_path: Path) -> None:
    file = tmp_path / "drift.db"
    with closing(DriftLedger(file)) as ledger, closing(sqlite3.connect(file)) as other:
        ledger.observe("c", "identify", [YES])
        other.execute("ALTER TABLE drift RENAME TO away")
        assert ledger.flush() == set()
        other.execute("ALTER TABLE away RENAME TO drift")
        assert ledger.flush() == {"c"}


@pytest.fixture
def served(fleet: made.Fleet, tmp_path: Path) -> tuple[Service, SqliteStore, Path]:
    """Open a service on an empty store, and name the file of its ledger."""
    store = SqliteStore(tmp_path / "store", made.MASTER)
    file = tmp_path / "drift.db"
    settings = Settings(threads=2, enrol_sharpness=0.0)
    return Service(Encoders.open(fleet.folders), settings, None, store, ledger=DriftLedger(file)), store, file


def test_impostors_that_reach_too_much_raise_an_alarm(
    served: tuple[Service, SqliteStore, Path], fleet: made.Fleet
) -> None:
    service, store, file = served
    now = 0.0
    service.drift.close()
    service.drift = DriftMonitor(service.encoders, service.state.metrics, DriftLedger(file), clock=lambda: now)
    with closing(store), made.made.running(service) as client:
        gallery(client, "staff")
        _crowd(store, fleet)
        for i in range(1, 9):
            enrol(client, "staff", f"person-{i}", sent(fleet.teacher, at(0.92, i)))
        pair = f"{short(fleet.teacher.info.id)}__{short(fleet.teacher.info.id)}"
        quiet = client.get(f"/v1/certificates/{pair}/drift").json()
        assert (quiet["alarm"], quiet["evidence"], quiet["observed"]) == (False, 1, [])
        for i in range(40):
            now += REPEAT_SECONDS + 1  # the same people, hours apart
            query = sent(fleet.teacher, at(0.9, i % 8 + 1))
            answer = client.post("/v1/galleries/staff/identify", json={"query": query, "threshold": 1})
            assert answer.json()["decision"] == "no_match"
        loud = client.get(f"/v1/certificates/{pair}/drift").json()
        assert loud["alarm"] and loud["evidence"] >= loud["alarm_at"] == alarm_at()
        (seen,) = loud["observed"]  # at larger rates somebody among so many always reaches the point
        assert (seen["fmr"], seen["reached"], seen["observations"]) == (1e-4, 40, 40) and seen["at_most"] < 30
        metrics = client.get("/metrics").text
        labels = f'gallery="{short(fleet.teacher.info.id)}",query="{short(fleet.teacher.info.id)}"'
        assert f"pkd_drift_alarm{{{labels}}} 1.0" in metrics and "pkd_drift_at_most" in metrics
        assert client.get("/v1/certificates/none/drift").status_code == 404
        before = loud["observed"]
        query = sent(fleet.teacher, at(0.9, 1))
        for _ in range(3):  # at once: counted once
            client.post("/v1/galleries/staff/identify", json={"query": query, "threshold": 1})
        after = client.get(f"/v1/certificates/{pair}/drift").json()["observed"]
        assert {b["observations"] - a["observations"] for a, b in zip(before, after, strict=True)} <= {0, 1}
        _verifications_count(client, fleet)
    kept = file.read_bytes() + b"".join(p.read_bytes() for p in file.parent.glob("drift.db-*"))
    assert b"person" not in kept and b"staff" not in kept


def _crowd(store: SqliteStore, fleet: made.Fleet) -> None:
    """Enrol people who look like nobody: of few, a certificate promises too little to be contradicted."""
    vectors = np.random.default_rng(0).normal(size=(300, made.made.DIM)).astype(np.float32)
    vectors[:, 0] = 0
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    info = fleet.teacher.info
    people = [Enrolment(f"p{i}", [NewTemplate(info.id, info.space.id, row)]) for i, row in enumerate(vectors)]
    store.enrol("staff", people, "test")


def _verifications_count(client: httpx.Client, fleet: made.Fleet) -> None:
    pair = f"{short(fleet.first.info.id)}__{short(fleet.teacher.info.id)}"
    body = {
        "a": sent(fleet.first, at(1, 1)),
        "b": sent(fleet.teacher, at(0.55, 1)),
        "policy": {"target_fmr": 1e-3},
    }
    assert client.post("/v1/verify", json=body).json()["match"] is False
    (seen,) = client.get(f"/v1/certificates/{pair}/drift").json()["observed"]
    assert (seen["kind"], seen["fmr"], seen["observations"], seen["reached"]) == ("verify", 1e-2, 1, 1)


def test_the_answer_of_a_search_is_no_impostor(fleet: made.Fleet) -> None:
    encoders = Encoders.open(fleet.folders)
    id = fleet.teacher.info.id
    monitor = DriftMonitor(encoders, Metrics())
    space = fleet.teacher.info.space
    staff = Gallery("staff", Space(space.id, space.dim), None, 0.0, None, 1000, {id: 10})
    hits = (Hit("ann", "1", 0.9), Hit("bob", "2", 0.2))

    def answer(decision: str, candidate: Candidate) -> IdentifyAnswer:
        return IdentifyAnswer.model_construct(decision=decision, candidates=[candidate])

    def observed(name: str, decision: str, match: bool) -> list[bool]:
        candidate = Candidate.model_construct(subject=name, match=match)
        found = {id: SearchResult(tuple(Hit(name, "1", h.score) if h.subject == "ann" else h for h in hits), 10)}
        monitor.identified(staff, id, found, answer(decision, candidate))
        return [one.exceeded > 0 for one in monitor.find(f"{short(id)}__{short(id)}").watched.sums.values()]

    assert not any(observed("ann", "match", True))  # bob is the impostor, at 0.2
    assert not any(observed("eve", "no_match", False))  # eve may be the person, missed: bob again
    monitor.close()
