"""The server's own pipeline passes the conformance kit that devices are measured by, and takes the kit's requests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from pkd.toolkit.bundle.bundle import Bundle
from pkd.toolkit.device.grading import Grade, grade
from pkd.toolkit.device.kit import DeviceCase, DeviceReport, OpenKit, read_kit, write_kit
from pkd.toolkit.encoders.base import Encoder, open_bundle
from pkd.toolkit.encoders.detector import open_detector
from tests.support import gallery_fixtures as made


@pytest.fixture(scope="module")
def student(fleet: made.Fleet) -> Encoder:
    return open_bundle(Bundle.open(next(path for path in fleet.folders if path.name == "first")))


def graded(kit: OpenKit, student: Encoder, report: Callable[[Any], DeviceCase]) -> list[Grade]:
    cases = {case.name: report(case) for case in kit.kit.cases}
    return grade(kit, DeviceReport(device="pkd-serve", encoder=student.info.id, cases=cases), student)


def face(client: httpx.Client, data: bytes, **options: str) -> dict[str, Any]:
    """Return the one face of an image, as /v1/embed answers."""
    answer = client.post("/v1/embed", content=data, params=options, headers={"content-type": "image/png"})
    assert answer.status_code == 200, answer.text
    (found,) = answer.json()["data"]
    return dict(found)


def test_crops_that_are_sent_and_the_requests_of_devices(
    client: httpx.Client, student: Encoder, tmp_path: Path
) -> None:
    write_kit(student, tmp_path)
    kit = read_kit(tmp_path)

    def report(case: Any) -> DeviceCase:
        crop = np.frombuffer(kit.read(case.crop), np.uint8).reshape(kit.kit.size, kit.kit.size, 3)
        found = face(client, made.made.png(crop), aligned="true", encoder=student.info.id)
        return DeviceCase(embedding=tuple(found["embedding"]))

    grades = graded(kit, student, report)
    assert [one.result for one in grades if one.step == "embedding"] == ["ok"] * len(kit.kit.cases)
    made.gallery(client, "GALLERY")
    first, other = kit.kit.cases[0], kit.kit.cases[1]
    made.enrol(client, "GALLERY", "SUBJECT", dict(first.request["a"]))  # type: ignore[call-overload]
    same, different = (client.post("/v1/verify", json=one.request) for one in (first, other))
    assert same.status_code == 200, same.text
    assert same.json()["score"] == pytest.approx(1, abs=1e-3) and same.json()["match"]
    assert different.json()["score"] < same.json()["score"]


@pytest.mark.shared
def test_photographs_that_are_sent(fleet: made.Fleet, student: Encoder, shared: Path, tmp_path: Path) -> None:
    detector = open_detector(str(shared / "models" / "yunet_n_dynamic.onnx"))
    write_kit(student, tmp_path / "kit", detector)
    kit = read_kit(tmp_path / "kit")
    with made.serving(fleet, tmp_path / "store", detector=detector) as client:

        def report(case: Any) -> DeviceCase:
            found = face(client, kit.read(case.photograph), encoder=student.info.id)
            return DeviceCase(landmarks=tuple(map(tuple, found["landmarks"])), whole=tuple(found["embedding"]))

        grades = graded(kit, student, report)
    reported = [one for one in grades if one.result != "not reported"]
    assert {one.step for one in reported} == {"landmarks", "whole"}
    assert [(one.case, one.step) for one in reported if one.result != "ok"] == []
    assert len(reported) == 2 * len(kit.kit.cases)
