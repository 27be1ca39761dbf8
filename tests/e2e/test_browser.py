"""The page and the device in a real browser, before a real server, with a student of real faces."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from pkd.serving.api.api_keys import new_key
from pkd.toolkit.bundle.bundle import Bundle
from pkd.toolkit.device.grading import grade
from pkd.toolkit.device.kit import STEPS, read_kit, read_report, write_kit
from pkd.toolkit.encoders.base import Encoder, open_bundle
from pkd.toolkit.encoders.detector import Detector, choose, open_detector
from pkd.toolkit.images.alignment import warp
from pkd.toolkit.images.codec import decode_rgb, read_rgb
from tests.support import browser_device
from tests.support.browser import Browser, Page, browsing, missing
from tests.support.heif_files import saved
from tests.support.server_process import Server, serving, with_gallery

pytestmark = [pytest.mark.shared, pytest.mark.slow]
TEACHER, STUDENT = "teacher_edgeface_xs_512.onnx", "teacher_mobilefacenet_y1_128.onnx"
ANN, BOB = "ann", "bob"
READY = "document.querySelector('#work')?.hidden === false"
OTHERWISE = {"CMYK JPEG"}
"""Pictures that the browser alone decodes in another way than OpenCV; its colours of CMYK are its own."""


WEBGPU = ("--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader")
"""Chromium's switches for a WebGPU that the processor draws."""
WITH_GPU = """(async (fault, golden) => {
  const ort = await import("/web/vendor/ort.wasm.min.mjs"), artifact = "/v1/encoders/student/artifact";
  const [student, detector] = await Promise.all(
    [artifact, "/v1/detector"].map(async (path) => (await fetch(path)).arrayBuffer()),
  );
  const manifest = await (await fetch(`${artifact}?file=manifest.json`)).json();
  const wrong = async (file) => {
    const session = await ort.InferenceSession.create(file), run = session.run.bind(session);
    session.run = async (feeds) => {
      const { [session.outputNames[0]]: made } = await run(feeds);
      return { [session.outputNames[0]]: { data: made.data.map((value) => value * 7) } };
    };
    return session;
  };
  const load = {
    none: () => import("/web/vendor/ort.jspi.min.mjs"),
    import: () => import("/web/vendor/absent.mjs"),
    driver: async () => ({ env: ort.env, Tensor: ort.Tensor, InferenceSession: { create: wrong } }),
  }[fault];
  const given = { ort, gpu: { load, software: true }, manifest, student, golden: test.bytes(golden).buffer, detector };
  const device = await test.pkd.Device.load(given);
  Object.assign(test, { cpu: test.cpu ?? test.device, device });
  return { runtime: device.runtime, note: device.note, goldenError: device.goldenError };
})"""
"""Move the student to WebGPU; `fault`: "import" has no such build, "driver" gives vectors that are too long."""


@dataclass
class Place:
    """Hold what all tests here share."""

    server: Server
    browser: Browser
    photographs: dict[str, list[Path]]
    student: Path
    encoder: Encoder
    detector: Detector

    def python(self, data: bytes) -> tuple[Any, Any, Any, Any]:
        """Embed as pkd does → pixels, landmarks, crop, embedding."""
        image = decode_rgb(data)
        landmarks = choose(self.detector.detect(image), image).landmarks
        crop = warp(image, landmarks)
        return image, landmarks, crop, self.encoder.embed(crop[None])[0]


def make_bundles(folder: Path, shared: Path) -> tuple[Path, Path]:
    """Adopt a mobile model behind a map, certify it on other people, and export it beside its teacher."""
    from pkd.export.cli import main as export
    from pkd.toolkit.cli.distill import main as distill
    from pkd.toolkit.cli.evaluate import main as evaluate

    raw = shared / "faces/lfw/raw-devtest"  # those who are shown to the browser

    def link(split: str, images: int, people: int) -> Path:
        taken: dict[str, list[Path]] = {}
        for line in (shared / "faces/splits" / split).read_text(encoding="utf-8").splitlines():
            path = shared / "faces" / line.split()[0]
            if "lfw" in line and not (raw / path.parent.name).is_dir():
                taken.setdefault(path.parent.name, []).append(path)
        kept = [(name, paths[:images]) for name, paths in taken.items() if len(paths) >= images][:people]
        for name, paths in kept:
            (folder / split / name).mkdir(parents=True)
            for path in paths:
                (folder / split / name / path.name).symlink_to(path)
        return folder / split

    models, cache = shared / "models", ["--cache", str(folder / "cache")]
    teacher = ["--teacher", str(models / TEACHER), "--teacher-preprocess", "mean=127.5,std=127.5"]
    student = ["--student", str(models / STUDENT), "--student-preprocess", "mean=0,std=1", "--method", "map"]
    run = str(folder / "run")
    train, test = link("train.txt", 2, 100), link("test.txt", 2, 60)
    student += ["--faces", str(train), "--name", "student", "--threads", "1", "--out", run]
    assert distill([*teacher, *student, *cache]) == 0
    measured = ["--student", run, "--faces", str(test), "--bootstrap", "100", "--out", str(folder / "evaluation")]
    assert evaluate([*teacher, *measured, *cache]) == 0
    evidence = ["--certificates", str(folder / "evaluation")]
    assert export([run, *evidence, "-o", str(folder / "student")]) == 0
    assert export([*teacher, *evidence, "-o", str(folder / "teacher")]) == 0
    return folder / "teacher", folder / "student"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, shared: Path) -> Iterator[Place]:
    """Run a server with one enrolled person, and a browser whose camera shows another picture of them."""
    pytest.importorskip("torch")
    if reason := missing():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("browser")
    raw = shared / "faces/lfw/raw-devtest"
    several = (sorted(one.glob("*.jpg")) for one in sorted(raw.iterdir()))
    photographs = dict(zip((ANN, BOB), (paths for paths in several if len(paths) > 1), strict=False))
    teacher, student = make_bundles(folder, shared)
    detector = shared / "models/yunet_n_640_640.onnx"  # as it is published: the server frees its sizes
    film = np.zeros((480, 640, 3), np.uint8)
    film[15:465, 95:545] = cv2.resize(read_rgb(photographs[ANN][1]), (450, 450), interpolation=cv2.INTER_CUBIC)
    camera = browser_device.motion_jpeg(folder / "film.mjpeg", film)
    options = (teacher, student, "--detector", detector, "--threads", "1", *with_gallery(folder))
    flags = ("--use-fake-device-for-media-stream", f"--use-file-for-fake-video-capture={camera}", *WEBGPU)
    with serving(*options) as server, browsing(folder / "profile", *flags) as browser:
        assert server.ask("PUT", "/v1/galleries/staff").status_code == 201
        path, headers = f"/v1/galleries/staff/subjects/{ANN}/templates", {"content-type": "image/jpeg"}
        answer = server.ask("POST", path, content=photographs[ANN][0].read_bytes(), headers=headers)
        assert answer.status_code in (200, 201), answer.text
        encoder, found = open_bundle(Bundle.open(student)), open_detector(str(detector))
        yield Place(server, browser, photographs, student, encoder, found)


@pytest.fixture(scope="module")
def page(place: Place) -> Page:
    """Open the page, and wait until it can be used."""
    page = place.browser.page()
    page.open(place.server.url)
    page.until(READY)
    return page


@pytest.fixture(scope="module")
def module(place: Place) -> Page:
    """Open the device's module in a tab without the page."""
    page = place.browser.page()
    made = browser_device.open_device(page, place.server.url, "student")
    assert made["goldenError"] < 1e-6
    return page


def take(page: Page, path: Path) -> str:
    """Choose a photograph; the verdict on it."""
    before = page.run("document.documentElement.dataset.embedded ?? 0")
    page.choose_files("#file", path)
    page.until(f"document.documentElement.dataset.embedded > {before}")
    return str(page.until("document.querySelector('.verdict:not(.none)')?.textContent"))


def choose_mode(page: Page, mode: str) -> None:
    """Choose what is compared with."""
    page.run(f"document.querySelector('[name=mode][value={mode}]').click()")


def name_subject(page: Page, subject: str) -> None:
    """Write the id of the person who is asked about."""
    page.run(f"document.querySelector('#subject').value = {json.dumps(subject)}")
    page.run("document.querySelector('#subject').dispatchEvent(new Event('change'))")


def choose_rate(page: Page, rate: str) -> None:
    """Choose how often the answer may be wrong."""
    page.run(f"document.querySelector('#rate').value = '{rate}'")
    page.run("document.querySelector('#rate').dispatchEvent(new Event('change'))")


def offline(page: Page, off: bool) -> None:
    """Take the network away, or give it back."""
    rates = {"latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
    page.send("Network.emulateNetworkConditions", offline=off, **rates)


def test_match_and_non_match_are_right(place: Place, page: Page, tmp_path: Path) -> None:
    assert page.run("crossOriginIsolated") is True
    assert "WebGPU is drawn by the processor here" in page.text("#about") or "no WebGPU here" in page.text("#about")
    assert take(page, place.photographs[ANN][1]) == f"This is {ANN}."
    assert page.run("document.querySelector('.verdict').className") == "verdict match"
    assert "measured on 60 people" in page.text("#evidence")
    choose_rate(page, "0.0001")  # rarer than 60 people can resolve
    page.until("document.querySelector('#evidence').className.includes('amber')")
    assert "extrapolated: its rate was not measured" in page.text("#evidence")
    choose_rate(page, "0.01")
    assert take(page, place.photographs[BOB][0]) == "Nobody in staff."
    choose_mode(page, "claim")
    name_subject(page, "<b>ann")
    page.until("document.querySelector('.verdict.unsure')?.textContent.startsWith('An id begins with a letter')")
    name_subject(page, ANN)
    page.until(f"document.querySelector('.verdict.no')?.textContent === 'No, this is not {ANN}.'")
    avif = tmp_path / "ann.avif"
    avif.write_bytes(saved(Image.fromarray(read_rgb(place.photographs[ANN][1])), "AVIF"))
    assert take(page, avif) == f"Yes, this is {ANN}."
    assert page.run("document.querySelector('#needle title').textContent").startswith("similarity 0.")
    assert page.run("getComputedStyle(document.querySelector('#needle')).display") != "none"
    assert not [line for line in page.said if "Error" in line], page.said


def test_verify_alone_is_asked_after_loading_and_without_a_pixel(place: Place, page: Page) -> None:
    page.requests.clear()
    take(page, place.photographs[ANN][1])
    asked = [(one["method"], one["url"].removeprefix(place.server.url)) for one in page.requests]
    assert asked == [("POST", "/v1/verify")]
    (request,) = page.requests
    assert len(request["postData"]) < 2000
    body = json.loads(request["postData"])
    assert set(body) == {"a", "b", "policy"} and set(body["a"]) == {"embedding", "encoding", "encoder"}
    sent = np.frombuffer(base64.b64decode(body["a"]["embedding"]), "<f2").astype(np.float64)
    wanted = place.python(place.photographs[ANN][1].read_bytes())[3]
    assert 1 - sent @ wanted / np.linalg.norm(sent) < 1e-5
    rows = page.run("[...document.querySelectorAll('#ledger tr')].map((row) => row.innerText)")
    assert rows[0].startswith("POST /v1/verify") and f"{len(request['postData']) / 1000:.1f} kB" in rows[0]
    assert "None carried a picture." in page.text("#total")
    loaded = "[...document.querySelectorAll('#ledger tr')].find((row) => row.innerText.includes('.wasm'))"
    assert "MB" in page.until(f"{loaded}?.children[2].innerText"), "the runtime came over the network"


def test_without_a_network_everything_but_the_question_works(place: Place, page: Page) -> None:
    page.requests.clear()
    offline(page, True)
    try:
        said = take(page, place.photographs[BOB][0])
        assert "cannot be reached" in said and "embedded here all the same" in said
        assert [one["method"] for one in page.requests] == ["POST"]
    finally:
        offline(page, False)
    assert take(page, place.photographs[ANN][1]) == f"Yes, this is {ANN}."


def test_a_reference_is_sent_once_and_marked(place: Place, page: Page) -> None:
    choose_mode(page, "reference")
    page.requests.clear()
    page.choose_files("#reference", place.photographs[ANN][0])
    assert page.until("document.querySelector('.verdict.match')?.textContent") == "The same person."
    assert take(page, place.photographs[BOB][0]) == "Different people."
    paths = [one["url"].removeprefix(place.server.url) for one in page.requests]
    assert paths == ["/v1/embed?encoding=b64_f16", "/v1/verify", "/v1/verify"]
    assert page.run("document.querySelectorAll('#ledger tr.pixels').length") == 1
    assert "1 carried a reference picture" in page.text("#total")
    choose_mode(page, "search")


def test_the_camera_finds_the_person_and_stops(place: Place, page: Page) -> None:
    page.run("document.querySelector('#camera').click()")
    assert page.until("document.querySelector('.verdict.match')?.textContent") == f"This is {ANN}."
    assert page.run("getComputedStyle(document.querySelector('#video')).transform") == "matrix(-1, 0, 0, 1, 0, 0)"
    page.run("document.querySelector('#camera').click()")
    page.requests.clear()
    assert page.until("document.querySelector('#video').srcObject === null")
    page.run("new Promise((done) => setTimeout(done, 300))")
    count = page.run("document.documentElement.dataset.embedded")
    page.run("new Promise((done) => setTimeout(done, 1500))")
    assert page.run("document.documentElement.dataset.embedded") == count


def test_what_is_no_face_and_no_picture_is_told(place: Place, page: Page, tmp_path: Path) -> None:
    Image.new("RGB", (300, 200), (90, 90, 90)).save(tmp_path / "wall.png")
    (tmp_path / "film.jpg").write_bytes(place.photographs[ANN][0].read_bytes()[:300])
    (tmp_path / "text.png").write_bytes(b"hello")
    (tmp_path / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(99))
    (tmp_path / "half.avif").write_bytes(saved(Image.new("RGB", (300, 200)), "AVIF")[:300])
    faults = {
        "wall.png": "No face was found",
        "film.jpg": "truncated or corrupt",
        "text.png": "is no JPEG",
        "phone.heic": "This is a HEIC picture",
        "half.avif": "This avif file is truncated or corrupt",
    }
    for name, said in faults.items():
        page.choose_files("#file", tmp_path / name)
        page.until(f"document.querySelector('#hint').textContent.includes('{said}')")


def test_the_module_passes_the_conformance_kit(place: Place, module: Page, tmp_path: Path) -> None:
    write_kit(place.encoder, tmp_path / "kit", place.detector)
    (tmp_path / "report.json").write_text(browser_device.report_kit(module, tmp_path / "kit"))
    grades = grade(read_kit(tmp_path / "kit"), read_report(tmp_path / "report.json"), place.encoder)
    assert {one.step for one in grades} == set(STEPS)
    assert [one for one in grades if one.result != "ok"] == []
    assert all(one.deviation == 0 for one in grades if one.step == "decode"), "every decoded pixel is equal"


def test_awkward_files_are_decoded_and_embedded_as_in_python(place: Place, module: Page) -> None:
    """Each form of one photograph: the same pixels, landmarks, crop and embedding; large ones are the benchmark's."""
    files = browser_device.awkward(read_rgb(place.photographs[BOB][0]), large=False)
    assert len(files) > 35
    for name, data in files.items():
        pixels, landmarks, crop, embedding = place.python(data)
        made = browser_device.embed(module, data, pixels=True)
        assert "error" not in made, (name, made)
        off = np.abs(made["rgb"].astype(int) - pixels)
        far = np.linalg.norm(made["landmarks"] - landmarks, axis=1).max()
        apart = 1 - made["embedding"].astype(np.float64) @ embedding
        figures = f"{name}: pixels {off.max()}, landmarks {far:.1e}, 1 − cosine {apart:.1e}"
        if name in OTHERWISE:
            assert apart <= 1e-3, figures
            continue
        assert off.max() == 0 and far <= 1e-3 and apart <= 1e-5, figures
        assert np.abs(made["crop"].astype(int) - crop).max() <= 1, name


def test_a_changed_student_stops_everything(place: Place, module: Page) -> None:
    """A student that computes something else is noticed before anything is asked."""
    said = module.run(
        """(async () => {
          const { readNpz } = await import("/web/device/npz.js");
          const golden = await (await fetch("/v1/encoders/student/artifact?file=golden.npz")).arrayBuffer();
          const arrays = await readNpz(golden);
          arrays.crops.data.fill(7, 0, 5000);
          return test.device.selfTest(arrays, 1e-4).then(() => "passed", (error) => `${error.name}: ${error.message}`);
        })()"""
    )
    assert said.startswith("SelfTestFailed: the student computes something else here") and "Nothing is sent" in said


@pytest.mark.parametrize("fault", ["none", "import", "driver"])
def test_webgpu_is_used_only_where_it_computes_the_student(place: Place, module: Page, fault: str) -> None:
    """The student moves to the GPU; where that has no such build, or computes something else, it stays where it was."""
    if not module.run("navigator.gpu ? navigator.gpu.requestAdapter().then(Boolean) : false"):
        pytest.skip("this browser has no WebGPU adapter, not even one that the processor draws")
    data = place.photographs[BOB][0].read_bytes()
    wanted = place.python(data)[3].astype(np.float64)
    golden, buffer = np.load(place.student / "golden.npz"), io.BytesIO()
    np.savez(buffer, **{name: golden[name][:1] for name in ("crops", "embeddings")})  # the processor draws one in 4 s
    try:
        opened = module.run(f'{WITH_GPU}("{fault}", "{base64.b64encode(buffer.getvalue()).decode()}")')
        made = browser_device.embed(module, data)
    finally:
        module.run("test.device = test.cpu ?? test.device")
    assert opened["goldenError"] < 1e-5 and 1 - made["embedding"] @ wanted < 1e-5
    if fault == "none":
        assert (opened["runtime"], opened["note"]) == ("WebGPU", "")
        return
    assert opened["runtime"] == "WebAssembly"
    said = {"import": "dynamically imported module", "driver": "the student computes something else here"}
    assert opened["note"].startswith("WebGPU was tried and is not used: ") and said[fault] in opened["note"]


def test_a_token_in_the_fragment_opens_the_page_and_leaves_the_address(
    place: Place, shared: Path, tmp_path: Path
) -> None:
    made = new_key("desk", "mint,verify,embed,enrol")
    (tmp_path / "keys.txt").write_text(made["line"])
    options = (place.student.parent / "teacher", place.student, "--detector", shared / "models/yunet_n_dynamic.onnx")
    with serving(*options, "--threads", "1", *with_gallery(tmp_path), "--api-keys", tmp_path / "keys.txt") as server:
        server.headers = {"authorization": f"Bearer {made['key']}"}
        assert server.ask("PUT", "/v1/galleries/guests").status_code == 201
        body = {"scopes": ["verify"], "gallery": "guests", "seconds": 600}
        answer = server.ask("POST", "/v1/tokens", json=body).json()
        page = place.browser.page()
        page.open(server.url)
        page.until("document.querySelector('#ask-token')?.hidden === false")
        assert "asks for a token" in page.text("#start-says")
        page.open("about:blank")
        page.until("location.href === 'about:blank'")
        page.open(f"{server.url}/{answer['fragment']}")
        page.until(READY)
        assert page.run("location.href") == f"{server.url}/"
        assert answer["token"] not in page.run("document.documentElement.outerHTML")
        listed = page.run("[...document.querySelector('#gallery').options].map((one) => one.value)")
        assert listed == ["guests"]
        assert page.run("document.querySelector('[name=mode][value=reference]').disabled") is True
        assert take(page, place.photographs[ANN][0]) == "guests is empty."
        kept = "Object.keys(localStorage).length + Object.keys(sessionStorage).length + document.cookie.length"
        assert page.run(kept) == 0
        again = server.ask("POST", "/v1/tokens", json=body).json()
        page.run(f"location.hash = {json.dumps(again['fragment'])}")
        page.until("location.hash === '' && document.querySelector('#work').hidden")
        page.until(READY)
        page.requests.clear()
        assert take(page, place.photographs[ANN][0]) == "guests is empty."
        headers = {name.lower(): value for name, value in page.requests[0]["headers"].items()}
        assert headers["authorization"] == f"Bearer {again['token']}"
