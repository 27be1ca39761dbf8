"""The operator's console in a real browser, on a real server with keys: what it shows, does, and does not keep."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from pkd.serving.api.api_keys import ApiKeys, new_key
from tests.support import gallery_fixtures as made
from tests.support.browser import Page, browsing, missing
from tests.support.gallery_fixtures import CROPS, Fleet, at, sent

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing() or "")
OPERATOR = new_key("operator", "embed,verify,enrol,delete,admin")
WATCHER = new_key("watcher", "verify")
ASKED = "document.querySelector('#ask')?.hidden === false"
SHOWN = "document.querySelectorAll('#matrix td').length"


@dataclass
class Place:
    """Hold what all tests here share."""

    client: httpx.Client
    page: Page
    crop: Path
    fleet: Fleet

    def enter(self, key: str) -> None:
        """Open the console anew, and give a key."""
        self.page.run("window.left = true")
        self.page.open(f"{self.client.base_url}/console")
        self.page.until(f"!window.left && {ASKED}")
        self.fill("#key", key)
        self.click("#ask-form button")

    def fill(self, selector: str, text: str) -> None:
        """Put text into a field."""
        self.page.run(f"document.querySelector({json.dumps(selector)}).value = {json.dumps(text)}")

    def click(self, selector: str) -> None:
        """Click what a selector finds first."""
        self.page.run(f"document.querySelector({json.dumps(selector)}).click()")

    def open_gallery(self) -> None:
        """Open the only gallery."""
        self.page.until(SHOWN)
        self.click("[data-tab=galleries]")
        self.page.until("!!document.querySelector('#gallery-list button')")
        self.click("#gallery-list button")

    def faults(self) -> list[str]:
        """List what the tab complained of, but for refusals that the server answered."""
        return [line for line in self.page.said if "Failed to load resource" not in line]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("console")
    (folder / "keys.txt").write_text(f"{OPERATOR['line']}\n{WATCHER['line']}\n")
    (folder / "crop.png").write_bytes(made.made.png(CROPS[0]))
    keys = ApiKeys.read(folder / "keys.txt")
    fleet = made.fleet(folder / "bundles")
    with made.serving(fleet, folder / "store", keys) as client:
        client.headers["authorization"] = f"Bearer {OPERATOR['key']}"
        client.put("/v1/galleries/staff")
        with browsing(folder / "profile") as browser:
            yield Place(client, browser.page(), folder / "crop.png", fleet)


def test_encoders_are_a_matrix_and_the_key_is_kept_nowhere(place: Place) -> None:
    page = place.page
    place.enter("pkd_wrong")
    page.until("document.querySelector('#ask-says').textContent.includes('key that this server knows')")
    assert page.run("document.querySelector('#work').hidden")
    place.enter(OPERATOR["key"])
    page.until(SHOWN)
    certificates = place.client.get("/v1/certificates").json()["certificates"]
    cells = page.run("[...document.querySelectorAll('#matrix td')].map((one) => one.className)")
    assert len(certificates) == len(cells) - cells.count("none") > 0
    for words in ("90.0 %", "500 people", "says nothing about people"):
        assert words in page.text("#matrix td.good")
    stored = "localStorage.length, sessionStorage.length, document.cookie"
    found = page.run(f"[{stored}, location.href, document.documentElement.outerHTML]")
    assert found[:3] == [0, 0, ""] and OPERATOR["key"] not in json.dumps(found)
    assert page.run("document.querySelector('#key').value") == ""
    place.click("#leave")
    page.until(f"{ASKED} && document.querySelector('#work').hidden")


def test_each_pair_says_in_words_whether_its_certificate_holds(place: Place) -> None:
    page, teacher, student = place.page, place.fleet.teacher, place.fleet.first
    points = {one["query"]: one["points"] for one in place.client.get("/v1/certificates").json()["certificates"]}
    just_missed = points[teacher.info.id][-1]["threshold"] - 0.005  # reaches every point but the strictest
    for query, cosine, times in ((teacher, just_missed, 60), (student, 0.0, 1)):
        body = {"a": sent(query, at(1, 1)), "b": sent(teacher, at(cosine, 2)), "policy": {"target_fmr": 1e-4}}
        for _ in range(times):
            assert place.client.post("/v1/verify", json=body).json()["match"] is False
    place.enter(OPERATOR["key"])
    page.until("document.querySelectorAll('#drift-list td').length")
    rows = page.run("[...document.querySelectorAll('#drift-list tbody tr')].map((one) => one.innerText)")
    assert len(rows) == len(place.client.get("/v1/certificates").json()["certificates"])
    assert sorted("broken" in row for row in rows)[-2:] == [False, True] and "broken" in rows[0]
    assert "60 of 60 verifications" in rows[0] and "people enrolled twice" in rows[0]
    held = [row for row in rows if "holds so far" in row]
    assert len(held) == 1 and "0 of 1 verification;" in held[0] and "an alarm from 40 on" in held[0]
    assert all("nothing seen yet" in row for row in rows if row not in [rows[0], *held]) and len(rows) > 2
    assert place.faults() == []


def test_somebody_is_enrolled_found_and_deleted_with_a_receipt(place: Place) -> None:
    page, client = place.page, place.client
    place.enter(OPERATOR["key"])
    place.open_gallery()
    page.until("document.querySelector('#gallery').hidden === false")
    place.fill("#enrol-subject", "ann")
    place.fill("#enrol-basis", "<img src=x onerror=document.title='run'>")
    page.choose_files("#enrol-files", place.crop)
    page.run("document.querySelector('#enrol-aligned').checked = true")
    place.click("#enrol button[type=submit]")
    page.until("!!document.querySelector('#enrolled .verdict')")
    assert client.get("/v1/galleries/staff/subjects/ann").json()["consent"]["basis"].startswith("<img")
    page.choose_files("#search-file", place.crop)
    page.run("document.querySelector('#search-aligned').checked = true")
    place.click("#search button")
    page.until("!!document.querySelector('#found .verdict')")
    assert "somebody enrolled" in page.text("#found") and "ann" in page.text("#found table")
    page.until("!!document.querySelector('#subject-list button')")
    place.click("#subject-list button")
    page.until("document.querySelector('#subject').hidden === false")
    assert "<img" in page.text("#subject") and not page.run("!!document.querySelector('#subject img')")
    assert page.run("document.title") == "pkd console"

    made.enrol(client, "staff", "ann2", made.image(0))
    page.run("window.confirm = () => true")
    place.click("#doubts")
    page.until("!!document.querySelector('#review button')")
    place.click("#review button")
    page.until("document.querySelector('#receipt').textContent.includes('ann’s now')")
    assert client.get("/v1/galleries/staff/subjects").json()["subjects"] == ["ann"]

    page.until("document.querySelectorAll('#subject-list button').length === 2")
    page.run("window.confirm = (words) => !(window.asked = words)")
    place.click("#subject-list button.danger")
    assert page.run("window.asked").startswith("Delete ann from staff, with all templates and the key?")
    assert client.get("/v1/galleries/staff/subjects/ann").status_code == 200
    page.run("window.confirm = () => true")
    place.click("#subject-list button.danger")
    page.until("document.querySelector('#receipt').textContent.includes('is deleted')")
    newest = client.get("/v1/audit").json()["records"][0]
    assert (newest["action"], newest["actor"]) == ("delete-subject", "operator")
    assert newest["hash"] in page.text("#receipt")
    assert client.get("/v1/galleries/staff/subjects/ann").status_code == 404
    place.click("[data-tab=audit]")
    page.until("document.querySelectorAll('#record-list td').length > 1")
    place.click("#check")
    page.until("!!document.querySelector('#chain.match')")
    assert newest["hash"] in page.text("#chain")
    place.fill("#noted-sequence", "1")
    place.fill("#noted-hash", "0" * 64)
    place.click("#check")
    page.until("!!document.querySelector('#chain.warn')")
    assert page.text("#chain").startswith("Broken: ")
    place.click("[data-tab=now]")
    page.until("document.querySelectorAll('#gauges div').length")
    assert "workers that answer" in page.text("#gauges") and place.faults() == []


def test_a_key_that_may_not_is_told_so_and_a_phone_shows_everything(place: Place) -> None:
    page = place.page
    page.send("Emulation.setDeviceMetricsOverride", width=390, height=844, deviceScaleFactor=1, mobile=True)
    place.enter(WATCHER["key"])
    place.open_gallery()
    page.until("document.querySelector('#subject-list').innerText.includes('may not list')")
    place.fill("#create-name", "mine")
    place.click("#create button")
    page.until("document.querySelector('#fault').hidden === false")
    assert "lacks the scope enrol" in page.text("#fault")
    assert page.run("document.documentElement.scrollWidth - innerWidth") <= 0
    shown = "[...document.querySelectorAll('#work button')].filter((one) => one.offsetParent)"
    assert min(page.run(f"{shown}.map((one) => one.offsetHeight)")) >= 44 and place.faults() == []
