"""What serving costs: CPU milliseconds per request of pkd-serve beside the same work in one process, and beside a peer.

Run as: python benchmarks/serving_cost.py                     (about 8 minutes on two cores)
        python benchmarks/serving_cost.py --requests 100 --rounds 1

Encoder: the EdgeFace-XS teacher in onnxruntime, one thread a session. Aligned crops are sent as raw JPEG bodies and
answered as ``b64_f16``; whole photographs are detected (YuNet), aligned and embedded. In-process: the same decoder,
detector and encoder in a loop, no HTTP, once on one thread and once on as many as the servers have workers. "uvicorn
alone" is the same behind an ASGI function without framework, checks, limits or metrics: what HTTP and threads cost by
themselves. pkd-serve measures how sharp each face is, too, which the others do not. Peers, where they are
installed: LitServe with the same decoder and encoder and JSON with base64, its own way of taking bytes; deepface's API
with the same detector and encoder, but its own alignment and session options (benchmarks/peers/). All take turns in
every round, so that they see the same machine; the client is another process, and only the server's CPU time counts.
Needs the faces and teachers of PKD_SHARED (or ../shared). Writes benchmarks/results/serving_cost.json.

InsightFace-REST cannot be a peer: each of its detectors is a download. InsightFace Server is on no package index.
"""

from __future__ import annotations

import argparse
import base64
import http.client
import importlib.util
import itertools
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import cv2
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("PKD_SHARED") or ROOT.parent / "shared")
RESULTS = ROOT / "benchmarks" / "results" / "serving_cost.json"
TEACHER = "teacher_edgeface_xs_512.onnx"
DETECTOR = SHARED / "models" / "yunet_n_dynamic.onnx"
IMAGES = 64
CONCURRENCIES = (1, 8, 32)
WORKERS = 2
"""Worker threads of pkd-serve, worker processes of LitServe."""
WARM_UP = 300
"""Requests to a new server that are not counted: the first ones cost more, of every server."""
BARE = "uvicorn alone"
PEERS = {"crops": (BARE, "LitServe"), "photographs": (BARE, "deepface")}
"""What a peer can do: LitServe has no detection, deepface always detects."""
Figures = dict[str, float]
Form = Callable[[bytes], tuple[str, bytes]]


def main() -> int:
    """Measure every contestant in turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=200, help="per contestant, concurrency and round")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--in-process", choices=("crops", "photographs"), help=argparse.SUPPRESS)
    parser.add_argument("--bundle", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.in_process:
        print(json.dumps(in_process(args.in_process, args.bundle, args.requests, args.threads)))
        return 0
    if not (SHARED / "faces").is_dir():
        print(f"skipped: no photographs in {SHARED}. Set PKD_SHARED to the folder that holds faces/ and models/.")
        return 0
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        bundle = Path(folder, "teacher")
        export = ["--teacher", str(SHARED / "models" / TEACHER), "-o", str(bundle)]
        run("pkd-export", *export, "--teacher-preprocess", "channels=rgb,mean=127.5,std=127.5")
        peers = {}
        if importlib.util.find_spec("litserve"):
            peers["LitServe"] = stack.enter_context(litserve_process(bundle))
        if importlib.util.find_spec("deepface"):
            peers["deepface"] = stack.enter_context(deepface_process(bundle, Path(folder, "deepface")))
        cosines: dict[str, Any] = {}
        rounds: list[Any] = []
        for _ in shown(args.rounds):
            # New processes in every round: where their memory happens to lie makes some per cent of difference.
            with pkd_serve(bundle) as ours, bare(bundle) as alone:
                servers = {"pkd-serve": ours, BARE: alone, **peers}
                cosines = cosines or agreement(servers, bundle)
                for new in (ours, alone):
                    load(new, "crops", crop_files(), WARM_UP, WORKERS)
                rounds.append(one_round(servers, bundle, args.requests))
    found = {
        "encoder": TEACHER,
        "cores": len(os.sched_getaffinity(0)),
        "workers": WORKERS,
        "requests": args.requests,
        "cosines": cosines,
        "rounds": rounds,
    }
    RESULTS.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(table(found))
    return 0


def one_round(servers: dict[str, Server], bundle: Path, requests: int) -> dict[str, Any]:
    """``<what>/<contestant>/<concurrency>`` → figures, every contestant once."""
    found: dict[str, Any] = {}
    for what, images in (("crops", crop_files()), ("photographs", photograph_files())):
        many = requests if what == "crops" else max(IMAGES, requests // 4)
        before = {threads: loop(what, bundle, many, threads) for threads in (1, WORKERS)}
        for (name, server), concurrency in itertools.product(servers.items(), CONCURRENCIES):
            if name in ("pkd-serve", *PEERS[what]):
                found[f"{what}/{name}/{concurrency}"] = load(server, what, images, many, concurrency)
        for threads, first in before.items():
            again = loop(what, bundle, many, threads)
            found[f"{what}/in-process/{threads}"] = {key: (first[key] + again[key]) / 2 for key in first}
    return found


def loop(what: str, bundle: Path, requests: int, threads: int) -> Figures:
    """``in_process`` in a process of its own."""
    command = [sys.executable, __file__, "--in-process", what, "--bundle", str(bundle)]
    command += ["--requests", str(requests), "--threads", str(threads)]
    done = subprocess.run(command, env=one_thread(), check=True, stdout=subprocess.PIPE)
    found: Figures = json.loads(done.stdout)
    return found


# What is asked of every contestant


def crop_files() -> list[bytes]:
    """Aligned crops as JPEG files."""
    listed = (SHARED / "faces/splits/test.txt").read_text(encoding="utf-8").split("\n")[:IMAGES]
    return [jpeg(cv2.imread(str(SHARED / "faces" / name))) for name in listed]


def photograph_files() -> list[bytes]:
    """Photographs of 250×250 pixels as JPEG files."""
    return [path.read_bytes() for path in sorted((SHARED / "faces/lfw/raw-devtest").glob("*/*.jpg"))[:IMAGES]]


def jpeg(image: Any) -> bytes:
    """BGR uint8 → JPEG, quality 95."""
    done, data = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 95])
    assert done
    return data.tobytes()


def embedder(bundle: Path) -> Callable[[bytes], bytes]:
    """Do the raw work on a crop: decode, encode, write as ``b64_f16``."""
    from pkd.toolkit.bundle.bundle import Bundle
    from pkd.toolkit.encoders.base import open_bundle
    from pkd.toolkit.images.codec import decode_rgb

    encoder = open_bundle(Bundle.open(bundle))

    def embed(file: bytes) -> bytes:
        (vector,) = encoder.embed(decode_rgb(file)[None])
        return base64.b64encode(vector.astype("<f2").tobytes())

    return embed


def whole(bundle: Path) -> Callable[[bytes], bytes]:
    """Do the raw work on a photograph: decode, detect, align, encode, write."""
    from pkd.toolkit.bundle.bundle import Bundle
    from pkd.toolkit.encoders.base import open_bundle
    from pkd.toolkit.encoders.detector import choose, open_detector
    from pkd.toolkit.images.alignment import warp
    from pkd.toolkit.images.codec import decode_rgb

    encoder, detector = open_bundle(Bundle.open(bundle)), open_detector(str(DETECTOR), 0.5)

    def embed(file: bytes) -> bytes:
        image = decode_rgb(file)
        face = choose(detector.detect(image), image)
        (vector,) = encoder.embed(warp(image, face.landmarks, 112)[None])
        return base64.b64encode(vector.astype("<f2").tobytes())

    return embed


def in_process(what: str, bundle: Path, requests: int, threads: int) -> Figures:
    """CPU ms per image of the bare loop, on one thread or shared by several."""
    cv2.setNumThreads(1)
    embed, images = (embedder(bundle), crop_files()) if what == "crops" else (whole(bundle), photograph_files())
    for image in images[:16]:
        embed(image)
    took = []

    def one(image: bytes) -> None:
        began = time.perf_counter()
        embed(image)
        took.append(time.perf_counter() - began)

    start, begun = time.process_time(), time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(one, itertools.islice(itertools.cycle(images), requests)))
    cpu, seconds = time.process_time() - start, time.perf_counter() - begun
    return {"cpu_ms": 1e3 * cpu / requests, **quantiles(took), "per_second": requests / seconds}


# The servers


class Server:
    """A server process and how it is asked. ``form``: image → content type and body."""

    def __init__(self, process: subprocess.Popen[bytes], url: str, path: str, form: Form) -> None:
        self.process, self.path, self.form = process, path, form
        self.host, self.port = urlsplit(url).hostname or "", urlsplit(url).port or 0

    def path_for(self, what: str) -> str:
        """Path and query."""
        return self.path + ("&aligned=true" if what == "crops" and "?" in self.path else "")

    def connect(self) -> http.client.HTTPConnection:
        """Open a connection that is kept."""
        return http.client.HTTPConnection(self.host, self.port, timeout=120)

    def cpu_seconds(self) -> float:
        """User and system time of the process and all that it started."""
        return sum(_cpu(pid) for pid in [self.process.pid, *_descendants(self.process.pid)])


@contextmanager
def pkd_serve(bundle: Path) -> Iterator[Server]:
    """Start the real command."""
    command = [tool("pkd-serve"), str(bundle), "--detector", str(DETECTOR), "--port", "0", "--threads", str(WORKERS)]
    with started([*command]) as process:
        assert process.stderr is not None
        line = next(line for line in iter(process.stderr.readline, b"") if b"listening on" in line)
        threading.Thread(target=process.stderr.read, daemon=True).start()
        yield Server(process, line.split()[-1].decode(), "/embed?encoding=b64_f16", as_body)


@contextmanager
def bare(bundle: Path) -> Iterator[Server]:
    """Start uvicorn and a thread pool."""
    port = free_port()
    with started(peer("bare_server.py", port, bundle, DETECTOR, WORKERS)) as process:
        yield answering(Server(process, f"http://127.0.0.1:{port}", "/embed?encoding=b64_f16", as_body), "/")


@contextmanager
def litserve_process(bundle: Path) -> Iterator[Server]:
    """LitServe in a process of its own."""
    port = free_port()
    with started(peer("litserve_server.py", port, bundle, WORKERS)) as process:
        yield answering(Server(process, f"http://127.0.0.1:{port}", "/predict", as_json), "/health")


@contextmanager
def deepface_process(bundle: Path, home: Path) -> Iterator[Server]:
    """Start deepface's API in processes of its own."""
    port = free_port()
    with started(peer("deepface_server.py", port, bundle, DETECTOR, WORKERS, home)) as process:
        yield answering(Server(process, f"http://127.0.0.1:{port}", "/represent", as_multipart), "/")


def peer(script: str, *options: object) -> list[str]:
    """Return the command that starts a peer."""
    return [sys.executable, str(Path(__file__).with_name("peers") / script), *map(str, options)]


def answering(server: Server, path: str) -> Server:
    """Wait until a peer answers."""
    assert server.process.stderr is not None
    threading.Thread(target=server.process.stderr.read, daemon=True).start()
    for _ in range(120):
        time.sleep(0.5)
        try:
            connection = server.connect()
            connection.request("GET", path)
            if connection.getresponse().status == 200:
                return server
        except OSError:
            continue
    raise TimeoutError(f"{server.process.args!r}: did not start within a minute")


def as_body(image: bytes) -> tuple[str, bytes]:
    """Send the file itself."""
    return "image/jpeg", image


def as_json(image: bytes) -> tuple[str, bytes]:
    """Send a JPEG inside JSON."""
    return "application/json", json.dumps({"image": base64.b64encode(image).decode()}).encode()


def as_multipart(image: bytes) -> tuple[str, bytes]:
    """Send a form as deepface takes it."""
    fields = {"model_name": "ArcFace", "detector_backend": "yunet"}
    parts = [f'--part\r\nContent-Disposition: form-data; name="{k}"\r\n\r\n{v}\r\n' for k, v in fields.items()]
    head = '--part\r\nContent-Disposition: form-data; name="img"; filename="a.jpg"\r\nContent-Type: image/jpeg\r\n\r\n'
    return "multipart/form-data; boundary=part", "".join([*parts, head]).encode() + image + b"\r\n--part--\r\n"


def agreement(servers: dict[str, Server], bundle: Path) -> dict[str, float]:
    """Cosine of each contestant's first embedding to the one made in-process: who does the same work."""
    cosines = {}
    for what, images, embed in (
        ("crops", crop_files(), embedder(bundle)),
        ("photographs", photograph_files(), whole(bundle)),
    ):
        expected = np.frombuffer(base64.b64decode(embed(images[0])), "<f2").astype(np.float64)
        for name in servers.keys() & {"pkd-serve", *PEERS[what]}:
            answer = json.loads(ask(servers[name].connect(), servers[name], what, images[0]))
            found = answer.get("embedding") or (answer.get("data") or answer["results"])[0]["embedding"]
            vector = np.frombuffer(base64.b64decode(found), "<f2") if isinstance(found, str) else np.asarray(found)
            vector = vector.astype(np.float64)
            cosine = vector @ expected / np.linalg.norm(vector) / np.linalg.norm(expected)
            cosines[f"{what}/{name}"] = round(float(cosine), 4)
    return cosines


def ask(connection: http.client.HTTPConnection, server: Server, what: str, image: bytes) -> bytes:
    """One request; anything but 200 ends the benchmark."""
    kind, body = server.form(image)
    connection.request("POST", server.path_for(what), body, {"Content-Type": kind})
    answer = connection.getresponse()
    content = answer.read()
    assert answer.status == 200, content[:300]
    return content


def free_port() -> int:
    """Find a port of this machine that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def started(command: Sequence[str]) -> Iterator[subprocess.Popen[bytes]]:
    """Run a process in a group of its own, ended with all that it started."""
    process = subprocess.Popen(
        command, env=one_thread(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
    )
    try:
        yield process
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


# The client


def load(server: Server, what: str, images: Sequence[bytes], requests: int, concurrency: int) -> Figures:
    """Send ``requests`` over ``concurrency`` kept connections, all answered with 200."""
    took: list[float] = []
    begun: list[tuple[float, float]] = []
    numbers = iter(range(requests))
    gate = threading.Barrier(concurrency)

    def client() -> None:
        connection = server.connect()
        for number in range(4):
            ask(connection, server, what, images[number])
        if gate.wait() == 0:  # nothing is under way: what the server spends from here on is spent on what is counted
            begun.append((time.perf_counter(), server.cpu_seconds()))
        gate.wait()
        for number in numbers:
            start = time.perf_counter()
            ask(connection, server, what, images[number % len(images)])
            took.append(time.perf_counter() - start)

    threads = [threading.Thread(target=client) for _ in range(concurrency)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ((start, cpu),) = begun
    seconds, spent = time.perf_counter() - start, server.cpu_seconds() - cpu
    assert len(took) == requests
    return {"cpu_ms": 1e3 * spent / requests, **quantiles(took), "per_second": requests / seconds}


def quantiles(took: Sequence[float]) -> Figures:
    """Median and 99th percentile, ms."""
    return {f"p{q}_ms": float(1e3 * np.percentile(took, q)) for q in (50, 99)}


def table(results: dict[str, Any]) -> str:
    """Markdown: medians over the rounds, ratios within each round."""
    rounds = results["rounds"]
    lines = [
        f"Encoder {results['encoder']} in onnxruntime, {results['workers']} workers on {results['cores']} cores, "
        f"{len(rounds)} rounds. Ratio: server CPU per request over the in-process loop of the same round, median and "
        f"quartiles; the loop on one thread for one connection, on {results['workers']} for more. "
        "Cosine of the answered embedding to the in-process one: "
        + ", ".join(f"{key.replace('/', ', ')} {cosine:.2f}" for key, cosine in results["cosines"].items())
        + ".",
        "",
        "| input | contestant | concurrency | CPU ms | of in-process | more, ms | p50 ms | p99 ms | requests/s |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for key in sorted(rounds[0], key=_order):
        what, name, concurrency = key.split("/")
        plain = f"{what}/in-process/{1 if concurrency == '1' else results['workers']}"
        ratios = [one[key]["cpu_ms"] / one[plain]["cpu_ms"] for one in rounds]
        low, ratio, high = np.percentile(ratios, [25, 50, 75])
        spread = "" if name == "in-process" else f" ({low:.2f}–{high:.2f})"
        more = statistics.median(one[key]["cpu_ms"] - one[plain]["cpu_ms"] for one in rounds)
        mid = {figure: statistics.median(one[key][figure] for one in rounds) for figure in rounds[0][key]}
        lines.append(
            f"| {what} | {name} | {concurrency} | {mid['cpu_ms']:.2f} | {ratio:.2f}×{spread} | {more:+.2f} "
            f"| {mid['p50_ms']:.1f} | {mid['p99_ms']:.1f} | {mid['per_second']:.0f} |"
        )
    return "\n".join(lines)


def _order(key: str) -> tuple[str, int, int]:
    """Crops first; the loop, pkd-serve, then the others."""
    what, name, concurrency = key.split("/")
    names = ["in-process", "pkd-serve", BARE, "LitServe", "deepface"]
    return what, names.index(name), int(concurrency)


def shown(count: int) -> Iterator[int]:
    """0 … count − 1, each announced."""
    for number in range(count):
        print(f"round {number + 1} of {count}", flush=True)
        yield number


def one_thread() -> dict[str, str]:
    """Return the environment with every thread pool at one thread."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def run(name: str, *options: str) -> None:
    """One of pkd's commands."""
    subprocess.run([tool(name), *options], check=True, stderr=subprocess.DEVNULL)


def tool(name: str) -> str:
    """Return a command of this environment."""
    return str(Path(sys.executable).with_name(name))


def _cpu(pid: int) -> float:
    """As ``clock_getcpuclockid`` would have it: to the nanosecond, where /proc counts hundredths of a second."""
    try:
        return time.clock_gettime((~pid << 3) | 2)
    except OSError:  # it ended meanwhile
        return 0.0


def _descendants(pid: int) -> list[int]:
    parents: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[1])
        except (OSError, ValueError):
            continue
        parents.setdefault(parent, []).append(int(stat.parent.name))
    found = list(parents.get(pid, []))
    for child in found:
        found += parents.get(child, [])
    return found


if __name__ == "__main__":
    sys.exit(main())
