"""pkd-serve as an operator runs it: a process, a port, signals, and one clear line where it cannot start."""

from __future__ import annotations

import base64
import hashlib
import json
import os
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
import numpy as np
import pytest

from pkd.serving.cli.serve import main
from pkd.toolkit.bundle.bundle import Golden
from tests.support import serving_bundles as made
from tests.support.server_process import COMMAND, serving

CROP = made.png(made.crops(1, seed=3)[0])
PNG = {"content-type": "image/png"}


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return made.family(tmp_path_factory.mktemp("bundles"))


def refused(*arguments: Any) -> Any:
    done = subprocess.run([COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=240)
    assert done.stdout == "" and "Traceback" not in done.stderr
    return done.returncode, done.stderr.strip().splitlines()[-1]


def test_a_device_and_a_server_agree(family: made.Family) -> None:
    """The student's graph runs here, as on a device, with onnxruntime alone; the teacher's gallery is an image."""
    with serving(*family.folders[:2], "--threads", "1") as server:
        vector = family.student.embed(made.crops(1, seed=3))[0].astype("<f2")
        query = {
            "embedding": base64.b64encode(vector.tobytes()).decode(),
            "encoding": "b64_f16",
            "encoder": family.student.info.id,
            "space": family.student.info.space.id,
        }
        gallery = {"image_b64": base64.b64encode(CROP).decode(), "aligned": True}
        answer = httpx.post(
            f"{server.url}/verify", json={"a": query, "b": gallery, "policy": {"target_fmr": 1e-4}}
        ).json()
        assert answer["match"] and answer["threshold"] == 0.7
        assert answer["certificate"]["gallery"] == family.teacher.info.id
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(20) == 0


def test_two_at_once_and_json(family: made.Family) -> None:
    with serving(family.folders[0]) as one, serving(family.folders[0], "--json") as two:
        assert one.url != two.url
        for server in (one, two):
            assert httpx.get(f"{server.url}/readyz").json()["status"] == "ready"
        two.process.send_signal(signal.SIGINT)
        assert two.process.wait(20) == 0
        assert json.loads(two.stop()) == {"url": two.url, "encoders": [family.teacher.info.id]}


def test_answers_on_a_kept_connection_do_not_wait_for_a_delayed_acknowledgement(family: made.Family) -> None:
    """With Nagle's algorithm on, not one of them comes in under 40 ms."""
    with serving(family.folders[0]) as server, httpx.Client(base_url=server.url) as client:
        seconds = [client.get("/v1/encoders").elapsed.total_seconds() for _ in range(60)]
    assert min(seconds[40:]) < 0.03  # the first ones are acknowledged at once in any case


def test_sigterm_lets_a_request_in_progress_finish(family: made.Family) -> None:
    with serving(family.folders[0]) as server:
        begun = threading.Event()

        def slowly() -> Iterator[Any]:
            yield CROP[:200]
            begun.set()
            time.sleep(0.7)
            yield CROP[200:]

        answers = []
        thread = threading.Thread(
            target=lambda: answers.append(httpx.post(f"{server.url}/embed?aligned=true", content=slowly(), headers=PNG))
        )
        thread.start()
        assert begun.wait(10)
        time.sleep(0.2)  # the server has the first bytes by now; were it slower, the answer below would be a refusal
        server.process.send_signal(signal.SIGTERM)
        thread.join(20)
        assert [answer.status_code for answer in answers] == [200]
        assert server.process.wait(20) == 0
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{server.url}/healthz")


def test_beyond_loopback_only_with_keys(family: made.Family, tmp_path: Path) -> None:
    code, line = refused(family.folders[0], "--host", "0.0.0.0")
    assert code == 2 and "--api-keys" in line and "--insecure-no-keys" in line
    (tmp_path / "keys").write_text(hashlib.sha256(b"secret").hexdigest() + "  -\n")
    with serving(family.folders[0], "--host", "0.0.0.0", "--api-keys", tmp_path / "keys") as server:
        assert httpx.get(f"{server.url}/v1/encoders").status_code == 401
        assert httpx.get(f"{server.url}/v1/encoders", headers={"authorization": "Bearer secret"}).status_code == 200
    with serving(family.folders[0], "--host", "0.0.0.0", "--insecure-no-keys") as server:
        assert httpx.get(f"{server.url}/v1/encoders").status_code == 200


def test_a_taken_port(family: made.Family) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, line = refused(family.folders[0], "--port", port)
    assert code == 1 and f"127.0.0.1:{port}" in line and "in use" in line
    assert "--port" in line


def test_what_cannot_be_served(family: made.Family, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One as a process, the rest through the same entry point in this one: a start costs a second of CPU."""
    images = made.crops(4, seed=99)
    family.teacher.write(tmp_path / "wrong", golden=Golden(images, family.student.embed(images)))
    family.teacher.write(tmp_path / "changed")
    with (tmp_path / "changed" / "encoder.onnx").open("ab") as file:
        file.write(b"x")
    (tmp_path / "text.onnx").write_text("hello")
    teacher = family.folders[0]
    for arguments, said in (
        ([tmp_path / "nothing"], "no manifest.json"),
        ([tmp_path / "changed"], "SHA-256"),
        ([teacher, teacher], "Pass one of them"),
        ([teacher, "--detector", tmp_path / "no.onnx"], "No such file"),
        ([teacher, "--detector", tmp_path / "text.onnx"], "not an ONNX file"),
        ([teacher, "--target-fmr", "2"], "--target-fmr 2.0: must lie between 1e-12 and 1"),
        ([teacher, "--threads", "0"], "--threads 0: must lie between 1 and 1024"),
        ([teacher, "--port", "99999"], "--port 99999"),
        ([teacher, "--host", "no.such.host.invalid", "--insecure-no-keys"], "no such address"),
        ([teacher, "--api-keys", tmp_path / "none"], "No such file"),
    ):
        assert main([str(argument) for argument in arguments]) == 2, arguments
        printed = capsys.readouterr()
        assert printed.out == "" and "Traceback" not in printed.err
        assert said in printed.err.strip().splitlines()[-1], (arguments, printed.err)
    code, line = refused(tmp_path / "wrong", "--port", "0")
    assert code == 2 and "golden crops come out" in line


def test_a_default_that_no_certificate_covers_is_said_at_the_start(family: made.Family) -> None:
    with serving(family.folders[1], "--target-fmr", "1e-6") as server:
        assert any("FMR 1e-06 as a point not covered" in line and "0.0001 to 0.01" in line for line in server.said)


@pytest.mark.shared
def test_a_real_photograph(family: made.Family, shared: Path) -> None:
    """The real detector on a real photograph; the encoder is the small one of these tests."""
    detector = shared / "models" / "yunet_n_dynamic.onnx"
    photograph = next((shared / "faces/lfw/raw-devtest").rglob("*.jpg"))
    with serving(family.folders[0], "--detector", detector) as server:
        answer = httpx.post(f"{server.url}/embed", files={"image": photograph.read_bytes()})
        assert answer.status_code == 200, answer.text
        (one,) = answer.json()["data"]
        box, points = np.array(one["box"]), np.array(one["landmarks"])
        assert one["detection_score"] > 0.5
        assert (points > box[:2]).all() and (points < box[2:]).all()
        assert 0 < box[0] < box[2] < 250


@pytest.mark.parametrize("package", ["orjson", "uvicorn", "prometheus_client"])
@pytest.mark.parametrize("arguments", [["--help"], ["bundle"]])
def test_without_its_extra_the_command_says_what_to_install(package: str, arguments: Any, tmp_path: Path) -> None:
    program = f"import sys; sys.modules[{package!r}] = None; from pkd.serving.cli.serve import main; sys.exit(main())"
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, cwd=tmp_path)
    assert "Traceback" not in done.stderr
    if arguments == ["bundle"]:
        assert done.returncode == 2
        assert done.stderr.splitlines()[-1].endswith("pip install 'pkd[serve]'")


NEVER = """
import sys
from pkd.serving.cli.serve import main
from pkd.serving.inference.pipeline import Pipeline

def run(self, *arguments):
    while True:
        pass

Pipeline.run = run
sys.exit(main(sys.argv[1:]))
"""


def test_a_thread_that_never_ends_does_not_keep_the_process(family: made.Family) -> None:
    """SIGTERM had no effect while a decoder or a runtime was busy for hours."""
    arguments = [str(family.folders[0]), "--port", "0", "--drain-seconds", "1", "--request-seconds", "0.5"]
    process = subprocess.Popen([sys.executable, "-c", NEVER, *arguments], stderr=subprocess.PIPE, text=True)
    try:
        url = next(line.split()[-1] for line in process.stderr if line.startswith("listening"))  # type: ignore[union-attr]
        answer = httpx.post(f"{url}/embed?aligned=true", content=CROP, headers=PNG)
        assert answer.status_code == 429
        process.terminate()
        begun = time.monotonic()
        assert process.wait(20) == 1
        assert time.monotonic() - begun < 8
        assert "a thread did not end" in process.stderr.read()  # type: ignore[union-attr]
    finally:
        process.kill()
        process.stderr.close()  # type: ignore[union-attr]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs POSIX signals")
def test_a_second_signal_does_not_wait(family: made.Family) -> None:
    with serving(family.folders[0]) as server:
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as stuck:
            stuck.sendall(
                b"POST /embed HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\nContent-Length: 99\r\n\r\nabc"
            )
            time.sleep(0.3)
            server.process.send_signal(signal.SIGTERM)
            time.sleep(0.3)
            assert server.process.poll() is None
            server.process.send_signal(signal.SIGTERM)
            assert server.process.wait(10) == 0
