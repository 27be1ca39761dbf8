"""The catalogue: what may be compared, and the download of a device's encoder."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from pkd.serving.core.options import Settings
from pkd.serving.core.schemas import CertificatesAnswer, EncoderDetail, EncodersAnswer, SpacesAnswer
from pkd.serving.inference.artifacts import Artifacts, needed
from pkd.serving.inference.registry import Encoders
from pkd.serving.matching.service import Service
from pkd.toolkit.bundle.bundle import Bundle, write_bundle
from pkd.toolkit.bundle.target import Target
from pkd.toolkit.core.encoder_info import in_mode, short
from pkd.toolkit.encoders.detector import open_detector
from pkd.toolkit.encoders.yunet_dims import free_dims
from tests.support import serving_bundles as made
from tests.support.gallery_fixtures import problem
from tests.support.spot_detector import write_spot_detector

XML, BIN = b"<net/>" * 1000, bytes(range(256)) * 40


def with_targets(folder: Path, encoder: Any) -> Any:
    """Write the bundle of ``encoder`` again, with an int8 form for OpenVINO, an unbuilt engine and its own rewrite."""
    bundle = encoder.write(folder / "plain", [made.certificate(encoder.info, encoder.info)])
    files = {name: bundle.read(name) for name in bundle.manifest.files}
    int8 = in_mode(encoder.info, "int8-qdq-0123456789abcdef")
    own = {"golden_tolerance": 0.1, "checked_with": "test", "made_with": "test"}
    place = "targets/openvino-int8"
    files |= {f"{place}/graph.onnx": encoder.model, f"{place}/encoder.xml": XML, f"{place}/encoder.bin": BIN}
    targets = (
        Target(
            runtime="openvino",
            precision="int8",
            encoder=int8,
            graph=f"{place}/graph.onnx",
            file=f"{place}/encoder.xml",
            **own,  # type: ignore[arg-type]
        ),
        Target(runtime="tensorrt", precision="int8", encoder=int8, graph=f"{place}/graph.onnx", file=None, **own),  # type: ignore[arg-type]
        Target(
            runtime="onnxruntime",
            precision="fp32",
            encoder=encoder.info,
            graph="encoder.onnx",
            file="encoder.onnx",
            **own,  # type: ignore[arg-type]
        ),
    )
    manifest = bundle.manifest.model_copy(update={"targets": targets})
    return write_bundle(folder / "bundle", files, manifest), int8


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Any:
    encoder = made.encoder("device", made.weights(8))
    return with_targets(tmp_path_factory.mktemp("device"), encoder)


@pytest.fixture(scope="module")
def client(family: made.Family, bundle: Any) -> Iterator[Any]:
    service = Service(Encoders.open([*family.folders, bundle[0].path]), Settings(threads=1))
    with made.running(service) as client:
        yield client


def test_encoders_spaces_certificates(client: httpx.Client, family: made.Family, bundle: Any) -> None:
    encoders = EncodersAnswer.model_validate_json(client.get("/v1/encoders").content).encoders
    assert [(one.name, one.default) for one in encoders] == [
        ("teacher", True), ("student", False), ("stranger", False), ("device", False),
    ]  # fmt: skip
    spaces = SpacesAnswer.model_validate_json(client.get("/v1/spaces").content).spaces
    assert [len(one.encoders) for one in spaces] == [2, 1, 1]
    teacher, student, device = family.teacher.info.id, family.student.info.id, bundle[0].manifest.encoder.id
    for params, pairs in (
        ({}, {(teacher, teacher), (student, teacher), (device, device)}),
        ({"gallery": teacher}, {(teacher, teacher), (student, teacher)}),
        ({"gallery": "teacher", "query": short(student)}, {(student, teacher)}),
        ({"query": "stranger"}, set()),
    ):
        answer = CertificatesAnswer.model_validate_json(client.get("/v1/certificates", params=params).content)
        assert {(one.query, one.gallery) for one in answer.certificates} == pairs


def test_one_encoder(client: httpx.Client, family: made.Family, bundle: Any) -> None:
    body = EncoderDetail.model_validate_json(client.get("/v1/encoders/student").content)
    assert (body.id, body.loaded, body.default) == (family.student.info.id, True, False)
    assert body.certificates.as_query_against == [family.teacher.info.id] and not body.certificates.as_gallery_for
    assert body.artifact.name == "encoder.onnx" and body.artifact.bytes == len(family.student.model)
    assert body.artifact.sha256 == hashlib.sha256(family.student.model).hexdigest()

    device, int8 = bundle
    body = EncoderDetail.model_validate_json(client.get(f"/v1/encoders/{device.manifest.encoder.id}").content)
    assert [(one.name, [file.name for file in one.files]) for one in body.targets] == [
        ("onnxruntime-fp32", ["encoder.onnx"])
    ]
    for spec in (int8.id, short(int8.id)):
        body = EncoderDetail.model_validate_json(client.get(f"/v1/encoders/{spec}").content)
        assert (body.id, body.loaded, body.numeric_mode) == (int8.id, False, int8.numeric_mode)
        place = "targets/openvino-int8"
        assert [(one.name, [file.name for file in one.files]) for one in body.targets] == [
            ("openvino-int8", [f"{place}/encoder.xml", f"{place}/encoder.bin"]), ("tensorrt-int8", []),
        ]  # fmt: skip
        assert body.artifact.name == f"{place}/encoder.xml"
    body = problem(client.get("/v1/encoders/nobody"), 404, "unknown-encoder")  # type: ignore[assignment]
    assert int8.id in body["encoders"]  # type: ignore[index]


def test_the_etag_is_the_hash_of_the_file(client: httpx.Client, family: made.Family) -> None:
    url = "/v1/encoders/student/artifact"
    answer = client.get(url)
    assert answer.content == family.student.model
    etag = f'"{hashlib.sha256(family.student.model).hexdigest()}"'
    assert answer.headers["etag"] == etag
    assert answer.headers["content-disposition"].startswith("attachment;")
    for sent in (etag, f"W/{etag}", f'"other", {etag}', "*"):
        known = client.get(url, headers={"if-none-match": sent})
        assert (known.status_code, known.content, known.headers["etag"]) == (304, b"", etag)
    assert client.get(url, headers={"if-none-match": '"other"'}).status_code == 200


def test_a_download_that_broke_off_goes_on(client: httpx.Client, family: made.Family) -> None:
    url, whole = "/v1/encoders/student/artifact", family.student.model
    etag = client.get(url).headers["etag"]
    for sent, expected in (
        ("bytes=0-99", whole[:100]),
        ("bytes=100-", whole[100:]),
        ("bytes=-10", whole[-10:]),
        (f"bytes=5-{len(whole) + 99}", whole[5:]),
    ):
        for extra in ({}, {"if-range": etag}):
            part = client.get(url, headers={"range": sent, **extra})
            assert (part.status_code, part.content, part.headers["etag"]) == (206, expected, etag)
    for other in ('"another"', f"W/{etag}", "Thu, 01 Jan 1970 00:00:00 GMT"):
        for sent in ("bytes=100-", f"bytes={len(whole)}-"):
            changed = client.get(url, headers={"range": sent, "if-range": other})
            assert (changed.status_code, changed.content) == (200, whole)


LONG = "9" * 5000
"""More digits than int() reads."""


@pytest.mark.parametrize("sent", ["bytes={size}-", f"bytes={LONG}-", "bytes=-0", f"bytes={LONG}-{LONG},-00"])
def test_a_range_that_the_file_has_not_got(client: httpx.Client, family: made.Family, sent: Any) -> None:
    url, size = "/v1/encoders/student/artifact", len(family.student.model)
    whole = client.get(url)
    for extra in ({}, {"if-range": whole.headers["etag"]}, {"if-range": whole.headers["last-modified"]}):
        answer = client.get(url, headers={"range": sent.format(size=size), **extra})
        assert problem(answer, 416, "range")["bytes"] == size
        assert answer.headers["content-range"] == f"bytes */{size}"


@pytest.mark.parametrize(
    "sent",
    [
        "bytes=5-3", f"bytes={LONG}-3", f"bytes=0-1,{LONG}-8", "bytes=9-x", "bytes=", "bytes=-", "bytes=,", "bytes",
        "items=0-5", "x", "lines=1-2", "bytes=0-1;2-3", "bytes=+1-2", "bytes=1_0-20", "bytes=" + "0-1," * 101,
    ],
)  # fmt: skip
def test_a_range_that_is_none_is_ignored(client: httpx.Client, family: made.Family, sent: Any) -> None:
    """RFC 9110, 14.2."""
    answer = client.get("/v1/encoders/student/artifact", headers={"range": sent})
    assert (answer.status_code, answer.content) == (200, family.student.model)


@pytest.mark.parametrize(
    ("sent", "first", "last"),
    [
        (f"bytes=0-{LONG}", 0, None),
        (f"bytes=-{LONG}", 0, None),
        ("bytes=0-1,999999999-", 0, 1),
        ("bytes=99999999-,7-9,-0", 7, 9),
        ("BYTES = 007-0009", 7, 9),
        ("bytes=, 1-2 ,", 1, 2),
    ],
)
def test_a_range_is_answered_as_far_as_there_is_something(
    client: httpx.Client, family: made.Family, sent: Any, first: Any, last: Any
) -> None:
    whole = family.student.model
    answer = client.get("/v1/encoders/student/artifact", headers={"range": sent})
    last = len(whole) - 1 if last is None else last
    assert (answer.status_code, answer.content) == (206, whole[first : last + 1])
    assert answer.headers["content-range"] == f"bytes {first}-{last}/{len(whole)}"


def test_several_ranges_at_once(client: httpx.Client, family: made.Family) -> None:
    answer = client.get("/v1/encoders/student/artifact", headers={"range": "bytes=0-9,50-59"})
    assert answer.status_code == 206 and answer.headers["content-type"].startswith("multipart/byteranges")
    assert family.student.model[:10] in answer.content and family.student.model[50:60] in answer.content


def test_files_of_a_target(client: httpx.Client, bundle: Any) -> None:
    device, int8 = bundle
    url = f"/v1/encoders/{device.manifest.encoder.id}/artifact"
    place = "targets/openvino-int8"
    for address in (url, f"/v1/encoders/{int8.id}/artifact"):
        assert client.get(address, params={"target": "openvino-int8"}).content == XML
        answer = client.get(address, params={"target": "openvino-int8", "file": f"{place}/encoder.bin"})
        assert answer.content == BIN and answer.headers["etag"] == f'"{hashlib.sha256(BIN).hexdigest()}"'
    assert client.get(f"/v1/encoders/{int8.id}/artifact").content == XML
    for name in ("golden.npz", "manifest.json"):
        answer = client.get(url, params={"file": name})
        assert answer.content == (device.path / name).read_bytes()
        assert answer.headers["etag"] == f'"{hashlib.sha256(answer.content).hexdigest()}"'
    body = problem(client.get(url, params={"target": "openvino-int4"}), 404, "not-found")
    assert "openvino-int8" in body["targets"]
    problem(client.get(url, params={"target": "tensorrt-int8"}), 404, "not-found")
    problem(client.get(url, params={"target": "openvino-int8", "file": "golden.npz"}), 404, "not-found")


@pytest.mark.parametrize(
    "name", ["../plain/encoder.onnx", "/etc/passwd", "", ".", "targets", "encoder.onnx\0", "a" * 401]
)
def test_only_files_of_the_bundle(client: httpx.Client, bundle: Any, name: str) -> None:
    answer = client.get(f"/v1/encoders/{bundle[0].manifest.encoder.id}/artifact", params={"file": name})
    assert (answer.status_code, answer.json()["type"]) in ((404, "not-found"), (422, "invalid-request"))


def test_the_whole_bundle(client: httpx.Client, bundle: Any, tmp_path: Path) -> None:
    device, _ = bundle
    url = f"/v1/encoders/{device.manifest.encoder.id}/artifact"
    answer, again = (client.get(url, params={"as": "bundle"}) for _ in range(2))
    assert answer.headers["content-type"] == "application/zip" and answer.content == again.content
    with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
        archive.extractall(tmp_path / "unpacked")
    (tmp_path / "device.zip").write_bytes(answer.content)
    for opened in (tmp_path / "unpacked", tmp_path / "device.zip"):
        assert Bundle.open(opened).manifest == device.manifest
    etag = answer.headers["etag"]
    assert etag == f'"{hashlib.sha256(answer.content).hexdigest()}"'
    part = client.get(url, params={"as": "bundle"}, headers={"range": "bytes=1000-", "if-range": etag})
    assert (part.status_code, part.content) == (206, answer.content[1000:])
    assert client.get(url, params={"as": "bundle"}, headers={"if-none-match": etag}).status_code == 304
    problem(client.get(url, params={"as": "bundle", "target": "openvino-int8"}), 422, "invalid-request")
    problem(client.get(url, params={"as": "tar"}), 422, "invalid-request")
    body = problem(client.get(url, params={"taget": "openvino-int8"}), 422, "invalid-request")
    assert body["detail"] == "taget: no such query parameter; this route takes as, file, target."


def test_a_file_that_changed_on_the_disk_is_not_given_out(tmp_path: Path) -> None:
    family = made.family(tmp_path)
    with made.running(Service(Encoders.open(family.folders), Settings(threads=1))) as client:
        url = "/v1/encoders/student/artifact"
        assert client.get(url).status_code == 200
        (family.folders[1] / "encoder.onnx").write_bytes(family.stranger.model)
        (family.folders[0] / "encoder.onnx").unlink()
        for encoder, params in (("student", {}), ("student", {"as": "bundle"}), ("teacher", {})):
            answer = client.get(f"/v1/encoders/{encoder}/artifact", params=params)
            assert answer.status_code == 500 and answer.json()["type"] == "internal"
            assert str(tmp_path) not in answer.text


@pytest.mark.parametrize("gone", ["the file", "the folder", "the file's end"])
def test_a_copy_that_a_cleaner_took_is_made_again(
    bundle: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gone: Any
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    device, int8 = bundle
    service = Service(Encoders.open([device.pack(tmp_path / "device.zip")]), Settings(threads=1))
    with made.running(service) as client:
        url = f"/v1/encoders/{int8.id}/artifact"
        for params in ({"as": "bundle"}, {}):
            first = client.get(url, params=params)
            (folder,) = tmp_path.glob("pkd-artifacts-*")
            copy = folder / first.headers["etag"].strip('"')
            assert copy.stat().st_size == len(first.content)
            if gone == "the file":
                copy.unlink()
            elif gone == "the folder":
                shutil.rmtree(folder)
            else:
                copy.write_bytes(first.content[:-1])
            again = client.get(url, params=params)
            assert (again.status_code, again.content, again.headers["etag"]) == (
                200, first.content, first.headers["etag"],
            )  # fmt: skip
    assert not list(tmp_path.glob("pkd-artifacts-*"))


@pytest.mark.skipif(not hasattr(os, "symlink"), reason="needs links")
def test_a_folder_that_somebody_made_in_its_place_is_not_written_to(
    bundle: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    packed = bundle[0].pack(tmp_path / "device.zip")
    artifacts = Artifacts(Encoders.open([packed]))
    opened = artifacts.find(bundle[1].id).bundle
    folder = artifacts.get(opened, "golden.npz").path.parent
    shutil.rmtree(folder)
    (tmp_path / "theirs").mkdir()
    folder.symlink_to(tmp_path / "theirs")
    assert artifacts.get(opened, "golden.npz").path.parent not in (folder, tmp_path / "theirs")
    assert not list((tmp_path / "theirs").iterdir())
    artifacts.close()


def test_a_bundle_that_is_a_zip_and_a_target_that_is_served(bundle: Any, tmp_path: Path) -> None:
    device, int8 = bundle
    packed = device.pack(tmp_path / "device.zip")
    with made.running(Service(Encoders.open([packed]), Settings(threads=1))) as client:
        url = f"/v1/encoders/{int8.id}/artifact"
        assert client.get(url).content == XML
        assert client.get(url, params={"as": "bundle"}).content == packed.read_bytes()
        manifest = client.get(url, params={"file": "manifest.json"})
        assert manifest.content == (device.path / "manifest.json").read_bytes()
    served = device.path / "targets" / "onnxruntime-fp32"
    with made.running(Service(Encoders.open([served]), Settings(threads=1))) as client:
        body = client.get(f"/v1/encoders/{device.manifest.encoder.id}").json()
        assert body["loaded"] and body["default"] and body["artifact"]["name"] == "encoder.onnx"


def test_what_a_device_needs(bundle: Any) -> None:
    device, _ = bundle
    openvino, engine, rewrite = device.manifest.targets
    assert [len(needed(device, one)) for one in (openvino, engine, rewrite)] == [2, 0, 1]


@pytest.fixture(scope="module")
def detecting(family: made.Family, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[httpx.Client, bytes]]:
    """Run a server with a detector; yield a client and the file that it is to give out."""
    file = write_spot_detector(tmp_path_factory.mktemp("spots") / "yunet.onnx", "yunet")
    service = Service(Encoders.open(family.folders[:1]), Settings(threads=1), open_detector(str(file)))
    with made.running(service) as client:
        yield client, free_dims(file.read_bytes())


class TestDetector:
    """The download of the detector."""

    def test_is_given_out_with_its_sizes_free(self, detecting: tuple[httpx.Client, bytes]) -> None:
        client, wanted = detecting
        answer = client.get("/v1/detector")
        assert answer.content == wanted
        assert answer.headers["etag"] == f'"{hashlib.sha256(wanted).hexdigest()}"'
        assert answer.headers["cache-control"] == "private, no-cache"

    def test_is_not_sent_again_to_who_has_it(self, detecting: tuple[httpx.Client, bytes]) -> None:
        client, _ = detecting
        etag = client.get("/v1/detector").headers["etag"]
        again = client.get("/v1/detector", headers={"if-none-match": f'"other", W/{etag}'})
        assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", etag)
        assert client.get("/v1/detector", headers={"if-none-match": '"other"'}).status_code == 200

    def test_of_a_server_without_one(self, client: httpx.Client) -> None:
        assert "--detector yunet.onnx" in problem(client.get("/v1/detector"), 404, "not-found")["detail"]
