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
from tests.support.server_process import Server, serving, with_gallery
from tests.support.spot_detector import picture, write_spot_detector

MINUTES = 30
WARM_UP = 1 / 5
"""Share of the time in which caches and pools fill."""
SLOPE = 5.0
"""MB an hour that memory may grow by, judged by the upper end of the 95 % interval of a straight line."""
PEAK = 1000
"""MB that no moment may take."""
REFUSED = ("bad-image", "unknown-subject", "not-aligned", "no-face", "multiple-faces", "too-many-faces", "too-large")


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
        stop, answers = threading.Event(), Counter[str]()
        clients = [threading.Thread(target=visit, args=(server.url, fleet, n, stop, answers)) for n in range(4)]
        for thread in clients:
            thread.start()
        times, sizes, first = [], [], 0
        began = time.monotonic()
        while (passed := time.monotonic() - began) < seconds:
            time.sleep(min(1, seconds / 300))
            if passed > seconds * WARM_UP:
                first = first or server.descriptors()
                times.append(passed / 3600)
                sizes.append(server.resident_mb())
        last = descriptors_at_rest(server, stop, clients)
        peak = server.peak_mb()
        server.stop()
    print(f"{sum(answers.values()):,} requests in {seconds} s: {dict(answers)}")
    assert {"embed", "enrol", "identify", "verify", "delete", "bad-image", "unknown-subject"} <= answers.keys(), answers
    assert not soak or {*REFUSED, "crowd", "broken body"} <= answers.keys(), answers
    assert last <= first, f"{first} descriptors after the warm-up, {last} at rest afterwards"
    slope, high = growth(np.array(times), np.array(sizes))
    print(
        f"resident size {sizes[0]:.0f} → {sizes[-1]:.0f} MB, at most {peak:.0f}, slope {slope:+.2f} MB/h, "
        f"95 % upper bound {high:+.2f}"
    )
    assert peak < PEAK
    if soak:  # in seconds, no slope of MB an hour can be told from noise
        assert high < SLOPE


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


def visit(url: str, fleet: made.Fleet, number: int, stop: threading.Event, answers: Counter[str]) -> None:
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
            f"{url}/v1/embed", content=chance.choice(BODIES), headers={"content-type": chance.choice(TYPES)}
        ),
    }
    for name, act in costly.items():
        deeds[name] = lambda client, *_, act=act: act(client)  # type: ignore[misc]
    weights = [1.0 if name not in costly else 0.04 for name in deeds]
    with Client(url) as client:
        while not stop.is_set():
            (deed,) = chance.choices(list(deeds), weights)
            try:
                deeds[deed](client, f"s{chance.randrange(200)}", chance.choice(crops))
                answers[deed] += 1
            except Refused as refused:
                assert refused.type in REFUSED, refused
                answers[refused.type] += 1


def descriptors_at_rest(server: Server, stop: threading.Event, clients: list[threading.Thread]) -> int:
    """Once every client has gone and the server has closed their connections."""
    stop.set()
    for client in clients:
        client.join(30)
        assert not client.is_alive()
    time.sleep(1)
    return server.descriptors()


def growth(hours: np.ndarray, sizes: np.ndarray) -> tuple[float, float]:
    """Slope in MB an hour and the upper end of its 95 % interval, over 20 parts: neighbours depend on each other.

    Of each part the lower quartile counts, what stays while no large photograph is in work: those take 100 MB each.
    """
    times = np.array([part.mean() for part in np.array_split(hours, 20)])
    low = np.array([np.quantile(part, 0.25) for part in np.array_split(sizes, 20)])
    line = stats.linregress(times, low)
    return line.slope, line.slope + stats.t.ppf(0.975, len(times) - 2) * line.stderr
