"""GET /v1/devices/{class}/latest, and the reference client that installs, refuses, rolls back and waits."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import pytest

from pkd.serving.core import watched_file
from pkd.serving.core.options import Settings
from pkd.serving.core.schemas import DeviceLatest
from pkd.serving.galleries.sqlite.store import SqliteStore
from pkd.serving.inference.artifacts import Artifacts
from pkd.serving.inference.device_classes import DeviceClasses
from pkd.serving.inference.registry import Encoders
from pkd.serving.matching.service import Service
from pkd.toolkit.core.errors import InputError
from tests.support import gallery_fixtures as made
from tests.support.gallery_fixtures import problem

EXAMPLES = Path(__file__).resolve().parents[5] / "examples" / "python"


@dataclass
class Shop:
    """A server whose file of device classes can be changed."""

    client: httpx.Client
    classes: Path
    fleet: made.Fleet

    def release(self, **classes: dict[str, str]) -> None:
        self.classes.write_text(json.dumps(classes))

    def phone(self, name: str) -> None:
        self.release(phone={"encoder": name})


@pytest.fixture
def update(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """Import the reference client as a stranger does."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield importlib.import_module("pkd_update")
    for name in ("pkd_update", "pkd_device"):
        sys.modules.pop(name, None)


@pytest.fixture
def shop(fleet: made.Fleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Shop]:
    monkeypatch.setattr(watched_file, "LOOK_SECONDS", 0.0)
    classes = tmp_path / "classes.json"
    classes.write_text('{"phone": {"encoder": "first"}}')
    store = SqliteStore(tmp_path / "store", made.MASTER)
    settings = Settings(threads=1, **made.ANYTHING)  # type: ignore[arg-type]
    service = Service(Encoders.open(fleet.folders), settings, None, store, device_classes=classes)
    with made.made.running(service) as client:
        yield Shop(client, classes, fleet)
    store.close()


def latest(shop: Shop, **headers: str) -> httpx.Response:
    return shop.client.get("/v1/devices/phone/latest", headers=headers)


def test_the_answer_names_files_that_can_be_downloaded(shop: Shop) -> None:
    answer = latest(shop)
    body = DeviceLatest.model_validate_json(answer.content)
    first = shop.fleet.first.info
    assert (body.encoder, body.bundle_encoder, body.target, body.runtime) == (first.id, first.id, None, "onnxruntime")
    assert body.certified_against == sorted([first.id, shop.fleet.teacher.info.id])
    names = [file.name for file in body.files]
    assert names[:3] == ["encoder.onnx", "manifest.json", "golden.npz"]
    assert len([name for name in names if name.startswith("certificates/")]) == 2
    for file in body.files:
        got = shop.client.get(f"/v1/encoders/{first.id}/artifact", params={"file": file.name})
        assert got.headers["etag"] == f'"{file.sha256}"'
    assert latest(shop, **{"if-none-match": answer.headers["etag"]}).status_code == 304
    shop.phone("second")
    assert latest(shop, **{"if-none-match": answer.headers["etag"]}).json()["encoder"] == shop.fleet.second.info.id
    unknown = problem(shop.client.get("/v1/devices/watch/latest"), 404, "not-found")
    assert unknown["classes"] == ["phone"] and "'watch' here; there are: phone." in unknown["detail"]
    assert "route" not in unknown["title"]


def test_a_broken_file_leaves_the_classes_as_they_were(shop: Shop) -> None:
    before = latest(shop).json()
    for text in ("{", "[]", '{"phone": {"encoder": "nobody"}}', '{"phone": {"encoder": "first", "target": "x"}}'):
        shop.classes.write_text(text)
        assert latest(shop).json() == before
    artifacts = Artifacts(Encoders.open(shop.fleet.folders))
    for text, said in (
        ("{", "Give a JSON object"),
        ('{"a b": {"encoder": "first"}}', "pattern"),
        ('{"phone": {"encoder": "nobody"}}', "phone: no loaded bundle holds the encoder 'nobody'"),
        ('{"phone": {"encoder": "first", "target": "litert-int8"}}', "it holds none"),
        ('{"phone": {"enc": "first"}}', r"phone\.encoder: Field required"),
    ):
        shop.classes.write_text(text)
        with pytest.raises(InputError, match=said):
            DeviceClasses(artifacts, shop.classes)


def test_install_update_and_roll_back(shop: Shop, update: ModuleType, tmp_path: Path) -> None:
    fleet, server = shop.fleet, update.Server(str(shop.client.base_url))

    def students() -> Any:
        return update.Students(tmp_path / "phone", server, "phone", None)

    def running() -> str:
        """Load what is installed as the device does → its encoder."""
        return str(update.Device(students().current, None).encoder)

    assert students().current is None
    assert students().update() and running() == fleet.first.info.id
    assert not students().update()
    shop.phone("second")
    assert students().update() and running() == fleet.second.info.id
    students().roll_back()
    assert running() == fleet.first.info.id
    assert not students().update(), "what was rolled back from stays away until the server names another"
    shop.phone("first")  # the operator rolls back, too
    assert not students().update() and running() == fleet.first.info.id
    shop.phone("second")
    assert students().update() and running() == fleet.second.info.id
    assert len([one for one in (tmp_path / "phone").iterdir() if one.is_dir()]) == 2


def test_a_student_that_is_not_certified_against_the_gallery_is_refused(
    shop: Shop, update: ModuleType, tmp_path: Path
) -> None:
    fleet, server = shop.fleet, update.Server(str(shop.client.base_url))
    made.gallery(shop.client, "staff")
    made.enrol(shop.client, "staff", "ann", made.embedded(fleet.first, 0))
    students = update.Students(tmp_path / "phone", server, "phone", "staff")
    assert students.update()
    before = students.current
    shop.phone("rogue")
    for _ in range(2):  # asked anew every time: the gallery may change, too
        with pytest.raises(update.Refused, match=f"no certificate covers {fleet.rogue.info.id} against"):
            students.update()
    assert students.current == before
    shop.phone("second")
    assert students.update()
    shop.phone("first")
    assert students.update()
    made.enrol(shop.client, "staff", "bob", made.embedded(fleet.second, 1))  # of which first has no certificate
    shop.release(phone={"encoder": "first"}, watch={"encoder": "first"})
    with pytest.raises(update.Refused, match="no certificate covers"):
        update.Students(tmp_path / "watch", server, "watch", "staff").update()


def test_what_arrives_damaged_is_not_installed(shop: Shop, update: ModuleType, tmp_path: Path) -> None:
    class Damaging(update.Server):  # type: ignore[name-defined, misc]
        """Change one byte of the graph on its way."""

        def ask(self, path: str, *given: Any, **named: Any) -> Any:
            status, etag, body = super().ask(path, *given, **named)
            return status, etag, body[:-1] + bytes([body[-1] ^ 1]) if "encoder.onnx" in path else body

    url = str(shop.client.base_url)
    students = update.Students(tmp_path / "phone", Damaging(url), "phone")
    with pytest.raises(update.Refused, match=r"encoder\.onnx: does not arrive as the server states it"):
        students.update()
    assert students.current is None
    assert update.Students(tmp_path / "phone", update.Server(url), "phone").update()


def test_requests_wait_for_the_network(shop: Shop, update: ModuleType, tmp_path: Path) -> None:
    fleet, server = shop.fleet, update.Server(str(shop.client.base_url))
    made.gallery(shop.client, "staff")
    made.enrol(shop.client, "staff", "ann", made.embedded(fleet.teacher, 0))
    queue = update.Queue(tmp_path / "queue.jsonl", longest=100)
    side = {"gallery": "staff", "subject": "ann"}
    for made_at, encoder in ((0.0, fleet.first), (950.0, fleet.first), (960.0, fleet.rogue), (970.0, fleet.first)):
        queue.put({"a": made.embedded(encoder, 0), "b": side}, now=made_at)
    assert queue.send(update.Server("http://127.0.0.1:9"), now=1000) == [
        {"body": {"a": made.embedded(fleet.first, 0), "b": side}, "dropped": "too old"}
    ]
    found = queue.send(server, now=1000)
    assert [one.get("dropped") or one["answer"]["match"] for one in found] == [True, "not-certified", True]
    assert queue.send(server, now=1000) == []


def test_offline_everything_stays(shop: Shop, update: ModuleType, tmp_path: Path) -> None:
    url = str(shop.client.base_url)
    students = update.Students(tmp_path / "phone", update.Server(url), "phone")
    assert students.update()
    lost = update.Students(tmp_path / "phone", update.Server("http://127.0.0.1:9"), "phone")
    with pytest.raises(update.Offline):
        lost.update()
    assert lost.current == students.current
