"""Mixed load: embeddings, enrolments, searches, comparisons, deletions, crowds, refusals of every costly kind.

Memory and descriptors stay level.
"""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import cv2
import httpx
import numpy as np
import pytest
from scipy import stats

from pkd.serving.client import Client, Embedding, Enrolled, Refused
from tests.support import gallery_fixtures as made
from tests.support.server_process import Server, serving, until, with_gallery
from tests.support.spot_detector import picture, write_spot_detector

MINUTES = 60
WARM_UP = 1 / 4
"""Share of the time in which caches, pools and the allocator's free lists fill: it is not counted."""
SHARE = 0.25
"""Share of a core that server and clients take together in the long form: more only adds noise of other processes."""
EVERY = 30
"""Seconds between two rests, at which no request is under way and memory is read."""
PARTS = 12
"""Parts of the counted time. Of each the least that was read at a rest counts."""
SLOPE = 5.0
"""MB an hour that memory may grow by, judged by the upper end of a 95 % interval."""
PEAK = 1000
"""MB that no moment may take."""
PATIENCE = 120
"""Seconds that a client waits: a busy machine is slow, and nothing is concluded from that."""
REFUSED = ("bad-image", "unknown-subject", "not-aligned", "no-face", "multiple-faces", "too-many-faces", "too-large")
ALWAYS = {"embed", "enrol", "identify", "verify", "delete", "bad-image", "unknown-subject"}
"""Kinds of requests that a short run sends, too, however slow the machine is."""


class Pace:
    """Let clients go on while server and clients have used less than their share of a core; let all rest at times."""

    def __init__(self, server: Server, share: float) -> None:
        """Keep to ``share`` of a core, counted from now on."""
        self.server, self.share = server, share
        self.began, self.spent = time.monotonic(), self._cpu_seconds()
        self.go, self.stopped = threading.Event(), threading.Event()
        self.lock, self.busy = threading.Lock(), 0

    def _cpu_seconds(self) -> float:
        return self.server.cpu_seconds() + time.process_time()

    def passed(self) -> float:
        """Seconds since the beginning."""
        return time.monotonic() - self.began

    def steer(self) -> None:
        """Open or shut the way, by what was used so far."""
        below = self._cpu_seconds() - self.spent < self.share * self.passed()
        (self.go.set if below else self.go.clear)()

    def enter(self) -> bool:
        """Wait for the way to be open. False when all is over."""
        while not self.stopped.is_set():
            if self.go.wait(0.2):
                with self.lock:
                    self.busy += 1
                return True
        return False

    def leave(self) -> None:
        """Count a request as answered."""
        with self.lock:
            self.busy -= 1

    def rest(self) -> float:
        """Wait until no request is under way, and a second more; what the server then holds, in MB."""
        self.go.clear()
        until(lambda: self.busy == 0, PATIENCE)
        held = []
        for _ in range(4):
            time.sleep(0.3)
            held.append(self.server.own_mb())
        return min(held)


@pytest.mark.soak
def test_memory_and_descriptors_stay_level(tmp_path: Path, soak: bool) -> None:
    seconds = 60 * MINUTES if soak else 8
    fleet = made.fleet(tmp_path)
    limits = (
        "--threads",
        "2",
        "--enrol-sharpness",
        "0",
        "--detector",
        write_spot_detector(tmp_path / "d.onnx", "yunet"),
    )
    with serving(*fleet.folders, *with_gallery(tmp_path), *limits) as server:
        with Client(server.url) as client:
            client.create_gallery("staff")
        answers = Counter[str]()
        pace = Pace(server, SHARE if soak else 16)
        clients = [threading.Thread(target=visit, args=(server.url, fleet, n, pace, answers)) for n in range(4)]
        for thread in clients:
            thread.start()
        times, sizes, first, due = [], [], 0, 0.0
        while (passed := pace.passed()) < seconds or not answers.keys() >= ALWAYS:
            assert passed < seconds + 120, answers
            time.sleep(0.05)
            pace.steer()
            if passed > seconds * WARM_UP and passed > due:
                due = passed + (EVERY if soak else 1)
                first = first or server.descriptors()
                sizes.append(pace.rest())
                times.append(pace.passed() / 3600)
                print(f"{pace.passed():.0f} s: {sizes[-1]:.1f} MB, {sum(answers.values()):,} requests", flush=True)
        last = descriptors_at_rest(server, pace, clients)
        peak = server.peak_mb()
        server.stop()
    print(f"{sum(answers.values()):,} requests in {seconds} s: {dict(answers)}")
    assert not soak or {*REFUSED, "crowd", "broken body"} <= answers.keys(), answers
    assert last <= first, f"{first} descriptors after the warm-up, {last} at rest afterwards"
    assert peak < PEAK
    if soak:  # in seconds, no slope of MB an hour can be told from noise
        slope, high = growth(np.array(times), np.array(sizes))
        print(
            f"held at rest {sizes[0]:.0f} → {sizes[-1]:.0f} MB ({min(sizes):.0f} to {max(sizes):.0f}), "
            f"at most {peak:.0f} while working, slope {slope:+.2f} MB/h, 95 % upper bound {high:+.2f}"
        )
        assert high < SLOPE


def test_a_leak_is_told_from_what_comes_and_goes() -> None:
    chance = np.random.default_rng(0)
    hours = np.linspace(0.25, 1, 90)
    level = 400 + chance.exponential(8, 90) + 60 * (chance.random(90) < 0.1)  # now and then a photograph stays a while
    assert growth(hours, level)[1] < SLOPE
    assert growth(hours, level + 12 * hours)[0] > SLOPE
    steps = 400 + 3 * np.floor(12 * hours)  # 36 MB/h, in steps: neighbours depend on each other
    assert growth(hours, steps)[0] == pytest.approx(36, abs=4)


def jpeg(image: np.ndarray) -> bytes:
    """Encode uint8 H×W×3."""
    return bytes(cv2.imencode(".jpg", image)[1].tobytes())


def crowd(count: int) -> bytes:
    """Draw a photograph of that many faces, as the detector of these tests takes them."""
    places = [(64 * (n % 24) + 8, 64 * (n // 24) + 8) for n in range(count)]
    return jpeg(picture(1600, 64 * (count // 24 + 1) + 64, *places))


CROWD, MASSES = crowd(100), crowd(400)
LARGE, HUGE = jpeg(np.zeros((3000, 4000, 3), np.uint8)), jpeg(np.zeros((8000, 8000, 3), np.uint8))
BODIES = (b"{", b'{"inputs": [{}]}', b"[" * 100_000, b'{"a":1,' * 20_000, b"--x\r\n\r\n", b"\xff" * 1_000_000)
TYPES = ("application/json", "multipart/form-data; boundary=x", "image/jpeg", "application/x-tar")


def visit(url: str, fleet: made.Fleet, number: int, pace: Pace, answers: Counter[str]) -> None:
    """One client that does this and that until it is told to stop; counts what it did and what was refused."""
    chance = random.Random(number)
    crops = [made.made.png(crop) for crop in made.CROPS]
    query = Embedding(fleet.first.embed(made.CROPS[:1])[0], fleet.first.info.id)
    deeds: dict[str, Callable[[Client, str, bytes], object]] = {
        "embed": lambda client, _, crop: client.embed(crop, aligned=True),
        "enrol": lambda client, subject, crop: client.enrol("staff", subject, crop, aligned=True),
        "identify": lambda client, *_: client.identify("staff", query, target_fpir=0.01),
        "verify": lambda client, subject, _: client.verify(query, Enrolled("staff", subject), target_fmr=1e-3),
        "delete": lambda client, subject, _: client.delete_subject("staff", subject),
        "broken": lambda client, _, crop: client.embed(crop[: len(crop) // 2], aligned=True),
    }
    costly: dict[str, Callable[[Client], object]] = {
        "crowd": lambda client: client.embed(CROWD, faces="all"),
        "masses": lambda client: client.embed(MASSES, faces="all"),
        "one of many": lambda client: client.embed(CROWD, faces="exactly_one"),
        "not aligned": lambda client: client.embed(LARGE, aligned=True),
        "no face": lambda client: client.embed(LARGE),
        "cut off": lambda client: client.embed(LARGE[: len(LARGE) // 2]),
        "huge": lambda client: client.embed(HUGE),
        "broken body": lambda client: httpx.post(
            f"{url}/v1/embed",
            content=chance.choice(BODIES),
            headers={"content-type": chance.choice(TYPES)},
            timeout=PATIENCE,
        ),
    }
    for name, act in costly.items():
        deeds[name] = lambda client, *_, act=act: act(client)  # type: ignore[misc]
    weights = [1.0 if name not in costly else 0.04 for name in deeds]
    with Client(url, timeout=PATIENCE) as client:
        while pace.enter():
            (deed,) = chance.choices(list(deeds), weights)
            try:
                deeds[deed](client, f"s{chance.randrange(200)}", chance.choice(crops))
                answers[deed] += 1
            except Refused as refused:
                assert refused.type in REFUSED, refused
                answers[refused.type] += 1
            finally:
                pace.leave()


def descriptors_at_rest(server: Server, pace: Pace, clients: list[threading.Thread]) -> int:
    """Once every client has gone and the server has closed their connections."""
    pace.stopped.set()
    for client in clients:
        client.join(30)
        assert not client.is_alive()
    time.sleep(1)
    return server.descriptors()


def growth(hours: np.ndarray, sizes: np.ndarray) -> tuple[float, float]:
    """Slope in MB an hour and the upper end of its 95 % interval, from what was held at rests.

    The least of each part counts: what stays when no large photograph lies in a free list. The slope is the median of
    all slopes between parts (Theil and Sen). Its interval is made wider by what neighbouring parts have in common.
    """
    times = np.array([part.mean() for part in np.array_split(hours, PARTS)])
    least = np.array([part.min() for part in np.array_split(sizes, PARTS)])
    slope, intercept, _, high = stats.theilslopes(least, times, 0.95)
    rest = least - intercept - slope * times
    rest -= rest.mean()
    alike = float(np.clip((rest[1:] * rest[:-1]).sum() / max((rest**2).sum(), 1e-12), 0, 0.9))
    return float(slope), float(slope + (high - slope) * np.sqrt((1 + alike) / (1 - alike)))
