"""Measure what one hostile or unlucky request costs a running server: CPU, memory while and after, and who else waits.

Run as: python benchmarks/abuse.py           (two minutes; needs the real detector and teacher of PKD_SHARED)

Each attack is sent to a fresh pkd-serve of two threads. Meanwhile /healthz is asked every 20 ms: its worst answer shows
whether the event loop was blocked. CPU is the process's own, user and system; memory its resident size above what it
was before, at most and five seconds after the last answer. Baselines in docs/security.md are of the code before the
limits. Writes benchmarks/results/abuse.json.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import httpx
import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "abuse.json"
SHARED = Path(os.environ.get("PKD_SHARED", ROOT / ".." / "shared"))
JSON = {"content-type": "application/json"}
Attack = Callable[[httpx.Client], list[int]]


def main() -> int:
    """Run every attack against a server of its own and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", help="names of attacks, a part of each; by default all")
    args = parser.parse_args()
    detector = SHARED / "models/yunet_n_dynamic.onnx"
    if not detector.is_file():
        print(f"{detector}: not there. Name the folder of real models by PKD_SHARED.", file=sys.stderr)
        return 2
    found: dict[str, Any] = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.is_file() and args.only else {}
    with tempfile.TemporaryDirectory() as folder:
        bundle = Path(folder) / "teacher"
        model = str(SHARED / "models/teacher_edgeface_xs_512.onnx")
        command = [command_of("pkd-export"), "--teacher", model, "--teacher-preprocess", "mean=127.5,std=127.5"]
        subprocess.run([*command, "--out", str(bundle)], check=True, capture_output=True)
        for name, attack in ATTACKS.items():
            if not args.only or any(part in name for part in args.only):
                found[name] = measure(attack(), bundle, detector)
                print(f"{name}: {found[name]}", flush=True)
                RESULT.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(table(found))
    return 0


def table(results: dict[str, Any]) -> str:
    """Lay the results out as docs/security.md has them."""
    lines = [
        "| attack | answers | CPU s | MB at most | MB that stay | worst /healthz, ms |",
        "|---|---|---|---|---|---|",
    ]
    for name, one in results.items():
        answers = ", ".join(f"{count} × {status}" for status, count in one["answers"].items())
        lines.append(
            f"| {name} | {answers} | {one['cpu_s']:.1f} | {one['peak_mb']:.0f} | {one['kept_mb']:.0f} | "
            f"{one['healthz_ms']:.0f} |"
        )
    return "\n".join(lines)


def command_of(name: str) -> str:
    """Return the command beside this Python."""
    return str(Path(sys.executable).with_name(name))


def measure(attack: Attack, bundle: Path, detector: Path) -> dict[str, Any]:
    """Start a server, ask it something ordinary, attack it, and say what that cost."""
    command = [command_of("pkd-serve"), str(bundle), "--detector", str(detector), "--threads", "2", "--port", "0"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    try:
        url = next(line.split()[-1] for line in server.stderr if line.startswith("listening on"))
        threading.Thread(target=server.stderr.read, daemon=True).start()
        with httpx.Client(base_url=url, timeout=600) as client:
            client.post("/embed?aligned=true", content=jpeg(112, 112), headers={"content-type": "image/jpeg"})
            Path(f"/proc/{server.pid}/clear_refs").write_text("5")  # the peak counts from here
            before = status(server.pid, "VmRSS")
            worst, stop = [0.0], threading.Event()
            watcher = threading.Thread(target=watch, args=(url, worst, stop))
            watcher.start()
            while not worst[0]:  # its own first connection is no answer of a busy server
                time.sleep(0.01)
            worst[0], cpu = 0.0, cpu_seconds(server.pid)
            answers = attack(client)
            spent, peak = cpu_seconds(server.pid) - cpu, status(server.pid, "VmHWM")
            time.sleep(0.2)
            stop.set()
            watcher.join()
            time.sleep(5)
            kept = status(server.pid, "VmRSS")
    finally:
        server.terminate()
        server.wait(60)
    return {
        "answers": dict(Counter(map(str, answers))),
        "cpu_s": round(spent, 2),
        "peak_mb": round(peak - before, 1),
        "kept_mb": round(kept - before, 1),
        "healthz_ms": round(worst[0], 1),
    }


def watch(url: str, worst: list[float], stop: threading.Event) -> None:
    """Ask /healthz again and again on a connection of its own."""
    with httpx.Client(base_url=url, timeout=600) as client:
        while not stop.is_set():
            begun = time.perf_counter()
            client.get("/healthz")
            worst[0] = max(worst[0], 1e3 * (time.perf_counter() - begun))
            time.sleep(0.02)


def status(pid: int, field: str) -> float:
    """Read a size of /proc/PID/status, MB."""
    found = re.search(rf"{field}:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


def cpu_seconds(pid: int) -> float:
    """Read the user and system time of a process, seconds."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def jpeg(height: int, width: int) -> bytes:
    """Encode a smooth picture."""
    ramp = np.linspace(0, 255, width, dtype=np.uint8)
    return bytes(cv2.imencode(".jpg", np.repeat(np.repeat(ramp[None], height, 0)[..., None], 3, 2))[1].tobytes())


def many_scans() -> bytes:
    """Make 139 kB of a progressive JPEG of 6304×6304 pixels with 1,000 empty scans."""
    file = io.BytesIO()
    Image.fromarray(np.full((6304, 6304), 128, np.uint8)).save(file, "JPEG", progressive=True)
    tables = b"\xff\xc4\x00\x14\x10" + bytes([1]) + bytes(15) + b"\x00"
    return file.getvalue()[:-2] + tables + b"\xff\xda\x00\x08\x01\x01\x00\x01\x3f\x00\x00\x00" * 1000 + b"\xff\xd9"


def swelling_png(place: str) -> bytes:
    """Make a PNG of 16×16 pixels: 6 MB of texts that swell to 6 GB, or 1 MB behind its last row, to 1 GB."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 16, 16, 8, 2, 0, 0, 0))
    text = zlib.compress(bytes(7_000_000), 9)
    if place == "texts":
        data = chunk(b"IDAT", zlib.compress(bytes(16 * 49))) + chunk(b"zTXt", b"a\0\0" + text) * 900
    else:
        deflate = zlib.compressobj(9)
        data = chunk(b"IDAT", b"".join(deflate.compress(bytes(1 << 20)) for _ in range(1000)) + deflate.flush())
    return head + data + chunk(b"IEND", b"")


def crowd(count: int) -> bytes:
    """Tile one real photograph into a picture of that many faces."""
    one = next((SHARED / "faces/lfw/raw-devtest").glob("*/*_0001.jpg"))
    face = cv2.resize(np.asarray(cv2.imread(str(one)))[60:190, 60:190], (48, 48), interpolation=cv2.INTER_AREA)
    side = int(np.ceil(np.sqrt(count)))
    return bytes(cv2.imencode(".jpg", np.tile(face, (side, side, 1)), [cv2.IMWRITE_JPEG_QUALITY, 85])[1].tobytes())


def photograph(
    data: Callable[[], bytes], times: int = 1, query: str = "", kind: str = "image/jpeg"
) -> Callable[[], Attack]:
    """Send a photograph, which is made beforehand, to /embed that many times."""

    def attack(image: bytes, client: httpx.Client) -> list[int]:
        said = {"content-type": kind}
        return [client.post(f"/embed{query}", content=image, headers=said).status_code for _ in range(times)]

    return lambda: partial(attack, data())


def headers(client: httpx.Client) -> list[int]:
    """Send 40 MB of header lines, or as many as are taken."""
    address = client.base_url
    with socket.create_connection((address.host, address.port or 80)) as connection:
        connection.settimeout(60)
        try:
            connection.sendall(b"POST /embed HTTP/1.1\r\nhost: localhost\r\n")
            block = b"".join(b"x-%07d: %s\r\n" % (n, b"y" * 100) for n in range(3500))
            for _ in range(100):
                connection.sendall(block)
        except OSError:  # cut off, as it should be
            pass
        try:
            return [int(connection.recv(64).split()[1])]
        except (OSError, IndexError):
            return [0]


def unknown_keys(client: httpx.Client) -> list[int]:
    """Send a JSON object of 131,000 keys that nobody knows, and the same as lines."""
    body = json.dumps({f"k{n}": 1 for n in range(131_000)}).encode()
    return [client.post(path, content=body, headers=JSON).status_code for path in ("/embed", "/verify")]


ATTACKS: dict[str, Callable[[], Attack]] = {
    "A1: JPEG of 139 kB, 1,000 empty scans of 40 megapixels": photograph(many_scans),
    "A1: PNG of 6 MB, texts that swell to 6 GB": photograph(lambda: swelling_png("texts"), kind="image/png"),
    "A1: PNG of 1 MB, 1 GB of data behind the last row": photograph(lambda: swelling_png("data"), kind="image/png"),
    "A2: 44 photographs of 12 megapixels, not aligned": photograph(lambda: jpeg(3000, 4000), 44, "?aligned=true"),
    "A2: 5 photographs of 12 megapixels, no face": photograph(lambda: jpeg(3000, 4000), 5),
    "A3: 40 MB of headers": lambda: headers,
    "A4: 1,462 faces, faces=all": photograph(lambda: crowd(1462), 1, "?faces=all"),
    "A4: 240 faces, faces=all": photograph(lambda: crowd(240), 1, "?faces=all"),
    "A5: 131,000 unknown JSON keys, twice": lambda: unknown_keys,
}

if __name__ == "__main__":
    sys.exit(main())
