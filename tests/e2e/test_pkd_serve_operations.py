"""pkd-serve as those who run it see it: workers, reloads, drains, clocks, and a configuration that is checked first."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from pkd.serving.galleries.crypto import MasterKey
from pkd.toolkit.bundle.bundle import Golden
from tests.support import serving_bundles as made
from tests.support.server_process import serving, until

COMMAND = str(Path(sys.executable).parent / "pkd-serve")
CROPS = made.crops(3, seed=3)
CROP = made.png(CROPS[0])
PNG = {"content-type": "image/png"}
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs POSIX signals")


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return made.family(tmp_path_factory.mktemp("bundles"))


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "Z" not in Path(f"/proc/{pid}/stat").read_text().split(")")[1][:3]


@pytest.fixture(scope="module")
def two(family: made.Family, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Two workers on one SQLite gallery, configured by variables."""
    folder = tmp_path_factory.mktemp("two")
    MasterKey.create(folder / "master")
    line = f"{hashlib.sha256(b'first').hexdigest()} first embed,verify,enrol,delete,admin"
    (folder / "keys").write_text(f"{line}\n{hashlib.sha256(b'slow').hexdigest()} slow - rate=5/s\n")
    with serving(
        "--workers",
        2,
        "--log",
        "json",
        PKD_BUNDLES=os.pathsep.join(map(str, family.folders[:2])),
        PKD_GALLERY=folder / "galleries",
        PKD_MASTER_KEY_FILE=folder / "master",
        PKD_API_KEYS_FILE=folder / "keys",
        PKD_LOG_REQUESTS=1,
        PKD_HEADER_SECONDS=0.5,
        PKD_ENROL_SHARPNESS=0,
        PKD_SWEEP_SECONDS=0.2,
    ) as server:
        server.headers = {"authorization": "Bearer first"}
        server.folder = folder  # type: ignore[attr-defined]
        yield server
        server.stop()


def identify(server: Any, vector: Any, student: Any) -> Any:
    body = {"query": {"embedding": vector.tolist(), "encoder": student}}
    answer = server.ask("POST", "/v1/galleries/staff/identify", json=body)
    assert answer.status_code == 200, answer.text
    return [one["subject"] for one in answer.json()["candidates"]]


def test_workers_see_each_other_s_enrolments_and_deletions_within_a_second(two: Any, family: made.Family) -> None:
    student, vector = family.student.info.id, family.student.embed(CROPS[:1])[0]
    assert two.ask("PUT", "/v1/galleries/staff", json={}).status_code == 201
    for _ in range(3):
        enrolled = two.ask("POST", "/v1/galleries/staff/subjects/ann/templates?aligned=true", content=CROP, headers=PNG)
        assert enrolled.status_code == 201, enrolled.text
        time.sleep(1)
        before = len(two.requests())
        assert all(identify(two, vector, student) == ["ann"] for _ in range(12))
        assert two.ask("DELETE", "/v1/galleries/staff/subjects/ann").status_code == 200
        time.sleep(1)
        assert all(identify(two, vector, student) == [] for _ in range(12))
        until(lambda before=before: len(two.requests()) >= before + 25)  # type: ignore[misc]
        if len({entry["process"] for entry in two.requests()[before:]}) == 2:
            break  # both were asked; new connections go to whichever worker is first
    else:
        pytest.fail("one worker answered everything")


def test_every_line_of_a_json_log_is_json_from_the_first_on(two: Any) -> None:
    until(lambda: two.find("(listening on)"))
    assert [line for line in two.said if not isinstance(json.loads(line), dict)] == []
    assert two.find("(no --trust-key)")
    answer = two.ask("GET", "/v1/spaces", headers={"x-request-id": "from-the-proxy"})
    assert answer.headers["x-request-id"] == "from-the-proxy"
    until(lambda: [entry for entry in two.requests() if entry["request"] == "from-the-proxy"])


def test_metrics_are_the_sum_over_workers_whichever_is_asked(two: Any) -> None:
    sent = 10
    series = 'pkd_requests_total{method="GET",route="/v1/spaces",status="200"}'
    before = value(two, series)
    for _ in range(sent):
        assert two.ask("GET", "/v1/spaces").status_code == 200
    until(lambda: value(two, series) == before + sent)
    for _ in range(4):
        until(lambda: value(two, series) == before + sent)  # a worker brings its numbers up to date ten times a second
    assert value(two, "pkd_ready_workers") == 2


def value(server: Any, series: str) -> Any:
    page = server.ask("GET", "/metrics").text
    return next((float(line.split(" ")[-1]) for line in page.splitlines() if line.startswith(f"{series} ")), 0.0)


def test_what_has_expired_is_deleted_and_counted_once(two: Any) -> None:
    assert two.ask("PUT", "/v1/galleries/short", json={"retention_seconds": 1}).status_code == 201
    made_ = two.ask("POST", "/v1/galleries/short/subjects/bob/templates?aligned=true", content=CROP, headers=PNG)
    assert made_.status_code == 201
    until(lambda: two.ask("GET", "/v1/galleries/short/subjects/bob").status_code == 404)
    until(lambda: value(two, "pkd_templates_expired_total") == 1)
    until(lambda: value(two, "pkd_galleries") == 2)
    assert value(two, "pkd_store_up") == 1


def test_a_rate_holds_over_all_workers(two: Any) -> None:
    slow = {"authorization": "Bearer slow"}
    begun = time.monotonic()
    statuses = [two.ask("GET", "/v1/spaces", headers=slow).status_code for _ in range(30)]
    assert set(statuses) == {200, 429}
    assert 5 <= statuses.count(200) <= 5 + 5 * (time.monotonic() - begun) + 1


def test_a_new_key_is_taken_without_a_restart_and_at_once_on_sighup(two: Any) -> None:
    new = {"authorization": "Bearer second"}
    assert two.ask("GET", "/v1/spaces", headers=new).status_code == 401
    done = subprocess.run([COMMAND, "--new-api-key", "extra", "--json"], capture_output=True, text=True, check=True)
    with (two.folder / "keys").open("a") as file:
        file.write(json.loads(done.stdout)["line"] + "\n")
        file.write(f"{hashlib.sha256(b'second').hexdigest()} second -\n")
    two.process.send_signal(signal.SIGHUP)
    until(lambda: sum("read again" in line for line in two.said) >= 2)
    for _ in range(6):
        assert two.ask("GET", "/v1/spaces", headers=new).status_code == 200
    key = {"authorization": f"Bearer {json.loads(done.stdout)['key']}"}
    assert two.ask("POST", "/v1/embed?aligned=true", content=CROP, headers={**PNG, **key}).status_code == 200


def test_headers_that_do_not_arrive_close_the_connection(two: Any) -> None:
    host, port = two.url.removeprefix("http://").split(":")
    for sent in (b"", b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nX-Slow: "):
        with socket.create_connection((host, int(port)), timeout=10) as stuck:
            stuck.sendall(sent)
            begun = time.monotonic()
            assert stuck.recv(1) == b""
            assert 0.3 < time.monotonic() - begun < 5


def test_a_worker_that_dies_is_replaced_while_the_other_answers(two: Any) -> None:
    before = until(lambda: len(two.workers()) == 2 and two.workers())
    victim = min(before)  # type: ignore[arg-type]
    os.kill(victim, signal.SIGKILL)
    until(lambda: any("was killed by SIGKILL; another one starts" in line for line in two.said))
    while len(two.workers()) < 2 or value(two, "pkd_ready_workers") < 2:
        assert two.ask("GET", "/readyz").status_code == 200
    assert victim not in two.workers() and before & two.workers()


def test_a_drain_can_be_watched_and_lets_a_request_in_progress_finish(family: made.Family) -> None:
    with serving(family.folders[0], "--workers", 2) as server:
        begun, go_on, answers = threading.Event(), threading.Event(), []
        watch = [httpx.Client(base_url=server.url) for _ in range(8)]
        assert all(one.get("/readyz").status_code == 200 for one in watch)

        def slowly() -> Iterator[Any]:
            yield CROP[:200]
            begun.set()
            assert go_on.wait(20)
            yield CROP[200:]

        def send() -> None:
            answers.append(httpx.post(f"{server.url}/embed?aligned=true", content=slowly(), headers=PNG, timeout=30))

        thread = threading.Thread(target=send)
        thread.start()
        assert begun.wait(10)
        time.sleep(0.3)
        workers = server.workers()
        server.process.send_signal(signal.SIGTERM)

        def draining() -> Any:
            for one in watch:
                try:
                    answer = one.get("/readyz")
                except httpx.TransportError:
                    continue  # the worker that has nothing to finish is gone
                if answer.status_code == 503:
                    return answer.json()["type"]
            return None

        assert until(draining) == "draining"
        assert server.process.poll() is None
        go_on.set()
        thread.join(20)
        assert [answer.status_code for answer in answers] == [200]
        assert server.process.wait(20) == 0
        assert not any(map(alive, workers))
        for one in watch:
            one.close()


def test_workers_do_not_outlive_their_parent(family: made.Family) -> None:
    with serving(family.folders[0], "--workers", 2) as server:
        workers = server.workers()
        assert len(workers) == 2
        server.process.kill()
        until(lambda: not any(map(alive, workers)))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_reload_without_keys_is_no_end(family: made.Family, workers: int) -> None:
    with serving(family.folders[0], "--workers", workers) as server:
        before = server.workers()
        for pid in {server.process.pid, *before}:
            os.kill(pid, signal.SIGHUP)
        time.sleep(0.3)  # the parent looks ten times a second
        assert server.ask("GET", "/readyz").status_code == 200
        assert server.workers() == before and not any("SIGHUP" in line for line in server.said)
        server.stop()


def test_a_worker_that_does_not_reproduce_its_golden_crops(family: made.Family, tmp_path: Path) -> None:
    images = made.crops(4, seed=99)
    bundle, wrong = tmp_path / "bundle", tmp_path / "wrong"
    family.teacher.write(bundle)
    family.teacher.write(wrong, golden=Golden(images, -family.teacher.embed(images)))
    done = subprocess.run(
        [COMMAND, wrong, "--workers", "2", "--port", "0"], capture_output=True, text=True, timeout=240
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"pkd-serve: .*wrong: golden crops come out 2 away.*", done.stderr.strip().splitlines()[-1])
    with serving(bundle, "--workers", 2) as server:
        bundle.rename(tmp_path / "right")
        wrong.rename(bundle)
        os.kill(max(server.workers()), signal.SIGKILL)
        reported = r"(worker . \(process \d+\)) ended with exit code 2: .*golden crops come out 2 away"
        until(lambda: server.find(reported))
        assert server.ask("GET", "/readyz").status_code == 200


def test_what_no_worker_could_serve_ends_the_command_with_its_reason(family: made.Family, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("nonsense\n")
    MasterKey.create(tmp_path / "master")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "galleries.db").write_bytes(os.urandom(9000))
    damaged = ["--gallery", tmp_path / "damaged", "--master-key", tmp_path / "master"]
    away = ["--gallery", "milvus://127.0.0.1:9", "--master-key", tmp_path / "master", "--audit", tmp_path / "audit.db"]
    for arguments, code, said in (
        ([tmp_path / "nothing", "--workers", 2], 2, "no manifest.json"),
        ([family.folders[0], "--api-keys", tmp_path / "keys", "--check-config"], 2, "line 1: no SHA-256"),
        ([family.folders[0], "--check-config"], 0, "the configuration is good"),
        ([family.folders[0], *damaged], 1, "the database is damaged"),
        ([family.folders[0], *damaged, "--workers", 2], 1, "the database is damaged"),
        ([family.folders[0], *away, "--check-config"], 1, "Milvus cannot be reached"),
    ):
        done = subprocess.run(
            [COMMAND, *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=240,
            env={**os.environ, "PKD_PORT": "0"},
        )
        assert done.returncode == code and done.stdout == "", done.stderr
        assert said in done.stderr.strip().splitlines()[-1] and "Traceback" not in done.stderr
    done = subprocess.run([COMMAND, *family.folders[:2], "--check-config"], capture_output=True, text=True, timeout=240)
    for pair in (("teacher", "teacher"), ("student", "teacher")):
        assert re.search(rf"^certified {pair[0]}\S* → {pair[1]}\S*: ", done.stderr, re.MULTILINE)
