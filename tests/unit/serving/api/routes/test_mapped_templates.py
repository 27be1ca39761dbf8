"""Mapped templates over the API: unseen until all are there, and gone once the new teacher enrols their subject."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from pkd.serving.core.options import Settings
from pkd.serving.galleries.sqlite.store import SqliteStore
from pkd.serving.galleries.store import Enrolment, MapOrigin, MappingState, NewTemplate, Space
from pkd.serving.inference.registry import Encoders
from pkd.serving.matching.service import Service
from tests.support import gallery_fixtures as made
from tests.support import serving_bundles
from tests.support.gallery_fixtures import at, enrol, gallery, problem, sent


def test_staged_templates_are_not_searched_and_native_ones_replace_them(tmp_path: Path) -> None:
    fleet = made.fleet(tmp_path / "fleet")
    new = fleet.following.info
    mapped = new.model_copy(update={"id": f"teacher-mapped@sha256:{'a' * 64}", "role": "student"})
    certified = serving_bundles.certificate(new, mapped)
    fleet.following.write(tmp_path / "following", [certified, serving_bundles.certificate(new, new)])
    folders = [*(one for one in fleet.folders if one.name != new.name), tmp_path / "following"]
    store = SqliteStore(tmp_path / "store", made.MASTER)
    service = Service(Encoders.open(folders), Settings(threads=2, enrol_sharpness=0.0), None, store)
    with closing(store), serving_bundles.running(service) as client:
        gallery(client, "staff")
        for i, name in enumerate(("ann", "bob"), 1):
            enrol(client, "staff", name, sent(fleet.teacher, at(0, i)))
        store.begin_migration("staff", Space(new.space.id, new.space.dim), "test")
        state = MappingState(maps={mapped.id: MapOrigin(old=fleet.teacher.info.id, new=new.id)}, staged=(mapped.id,))
        store.set_mapping("staff", lambda _: state, "test")
        people = [
            Enrolment(name, [NewTemplate(mapped.id, new.space.id, at(0, i + 5).astype("float32"))], action="map")
            for i, name in enumerate(("ann", "bob"))
        ]
        store.enrol("staff", people, "test")
        query = {"query": sent(fleet.following, at(0, 5))}
        body = problem(client.post("/v1/galleries/staff/identify", json=query), 409, "gallery-conflict")
        assert "being mapped" in body["detail"]
        old = client.post("/v1/galleries/staff/identify", json={"query": sent(fleet.teacher, at(0, 1))}).json()
        sides = {"a": query["query"], "b": {"gallery": "staff", "subject": "ann"}}
        alone = client.post("/v1/verify", json=sides).json()  # all of this subject's are there: docs/galleries.md
        assert alone["match"] and alone["certificate"]["gallery"] == mapped.id
        assert old["decision"] == "match" and {one["reason"] for one in old["not_searched"]} == {"staged"}
        store.set_mapping("staff", lambda state: state.model_copy(update={"staged": ()}), "test")
        seen = client.post("/v1/galleries/staff/identify", json=query).json()
        assert (seen["decision"], seen["candidates"][0]["subject"]) == ("match", "ann")
        assert client.get("/v1/galleries/staff").json()["maps"][mapped.id]["new"] == new.id
        enrol(client, "staff", "ann", sent(fleet.first, at(0, 1)))
        assert len(store.subject("staff", "ann").templates) == 3  # an old student replaces nothing
        enrol(client, "staff", "ann", sent(fleet.following, at(0.1, 5)))
        encoders = {one.encoder for one in store.subject("staff", "ann").templates}
        assert new.id in encoders and mapped.id not in encoders
        assert {one.encoder for one in store.subject("staff", "bob").templates} == {fleet.teacher.info.id, mapped.id}
