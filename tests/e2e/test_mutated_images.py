"""Thousands of broken, lying and unusual image files: each is answered or refused, and memory stays bounded."""

from __future__ import annotations

import contextlib
import io
import struct
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import httpx
import numpy as np
import pytest
from PIL import Image

from pkd.serving.api.problems import TYPES
from pkd.toolkit.synthetic.faces import face
from tests.support import serving_bundles as made
from tests.support.real_data import HAS_SHARED, SHARED
from tests.support.server_process import Server, serving, with_gallery

DETECTOR = ["--detector", str(SHARED / "models" / "yunet_n_dynamic.onnx")] if HAS_SHARED else []
GROWTH_MB = 250
"""Two decodes of 40 megapixels at once, the largest that is taken, need 240 MB for a moment."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    with serving(made.family(folder).folders[0], *with_gallery(folder), *DETECTOR, "--threads", "2") as started:
        yield started


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


@pytest.mark.soak
def test_mutated_files(server: Server, client: httpx.Client, soak: bool) -> None:
    count, seen = (10_000 if soak else 400), Counter[str]()
    known = dict(unusual())
    seen.update(judge(client, data, aligned) for data in known.values() for aligned in (True, False))
    before = server.peak_mb()
    with ThreadPoolExecutor(4) as pool:
        jobs = [
            pool.submit(judge, client, data, bool(i % 2)) for i, data in enumerate(islice(mutations(known, 7), count))
        ]
        seen.update(job.result() for job in jobs)
    assert server.peak_mb() - before < GROWTH_MB
    assert seen["200"] and seen["bad-image"] and seen["unsupported-media"] and seen["too-large"], seen
    assert client.get("/readyz").status_code == 200


def test_orientations(client: httpx.Client) -> None:
    """One picture stored in all eight EXIF orientations gives one embedding."""
    upright = Image.fromarray(face(seed=5, person=1, image=0))
    undo = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_90"}
    undo |= {7: "TRANSVERSE", 8: "ROTATE_270"}
    rows = []
    for orientation in range(1, 9):
        stored = upright.transpose(Image.Transpose[undo[orientation]]) if orientation in undo else upright
        exif = Image.Exif()
        exif[0x0112] = orientation
        answer = client.post("/embed?aligned=true", content=saved(stored, "JPEG", quality=100, exif=exif), headers=ANY)
        rows.append(answer.json()["data"][0]["embedding"])
    assert np.min(np.array(rows) @ np.array(rows).T) > 0.9999


ANY = {"content-type": "application/octet-stream"}


def judge(client: httpx.Client, data: bytes, aligned: bool) -> str:
    """Status or problem type of the answer; anything undocumented fails."""
    answer = client.post("/embed", params={"aligned": aligned, "encoding": "b64_i8"}, content=data, headers=ANY)
    if answer.status_code == 200:
        return "200"
    problem = answer.json()["type"]
    assert answer.status_code < 500 and TYPES[problem].status == answer.status_code, (answer.text, data[:40])
    return str(problem)


def unusual() -> Iterator[tuple[str, bytes]]:
    """Files that are what they say, but seldom met."""
    rgb = face(seed=5, person=0, image=0)
    image = Image.fromarray(rgb)
    yield "jpeg", saved(image, "JPEG")
    yield "progressive jpeg", saved(image, "JPEG", progressive=True)
    yield "cmyk jpeg", saved(image.convert("CMYK"), "JPEG")
    yield "grey jpeg", saved(image.convert("L"), "JPEG")
    yield "png", saved(image, "PNG")
    yield "palette png", saved(image.convert("P"), "PNG")
    yield "one-bit png", saved(image.convert("1"), "PNG")
    yield "transparent png", saved(image.convert("RGBA"), "PNG")
    yield "16-bit grey png", saved(Image.fromarray(rgb[:, :, 0].astype(np.uint16) * 257), "PNG")
    yield "webp", saved(image, "WEBP")
    yield "bmp", saved(image, "BMP")
    frames = [image.rotate(turn) for turn in (90, 180)]
    for kind in ("GIF", "WEBP", "PNG", "TIFF"):
        yield f"animated {kind.lower()}", saved(image, kind, save_all=True, append_images=frames)
    yield "one pixel", saved(image.resize((1, 1)), "PNG")
    yield "a line", saved(image.resize((6000, 1)), "PNG")
    yield "empty", b""
    for width, height in ((40_000, 40_000), (2**31 - 1, 2**31 - 1), (65_535, 65_535), (0, 5)):
        yield f"png header {width}×{height}", png_header(width, height)
    yield "jpeg that claims 65,535²", with_jpeg_size(saved(image, "JPEG"), 65_535)
    yield "bomb: 20,000² in one colour", png_bomb(20_000)
    yield "heic", b"\0\0\0\x18ftypheic" + bytes(64)
    with contextlib.suppress(KeyError, OSError):  # Pillow's builds differ in it
        yield "avif", saved(image, "AVIF")
    yield "svg", b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>"
    yield "pdf", b"%PDF-1.7\n"


def mutations(known: Mapping[str, bytes], seed: int) -> Iterator[bytes]:
    """Without end: whole files cut short, with bits turned, parts moved, doubled or exchanged, and plain noise."""
    rng = np.random.default_rng(seed)
    whole = [data for data in known.values() if 0 < len(data) < 100_000]
    while True:
        data = bytearray(whole[rng.integers(len(whole))])
        match rng.integers(7):
            case 0:
                del data[rng.integers(len(data)) :]
            case 1:
                for at in rng.integers(len(data), size=rng.integers(1, 60)):
                    data[at] ^= 1 << rng.integers(8)
            case 2:
                for at in rng.integers(min(len(data), 64), size=rng.integers(1, 8)):  # headers
                    data[at] = rng.integers(256)
            case 3:
                start, stop = sorted(rng.integers(len(data), size=2))
                del data[start:stop]
            case 4:
                start, stop = sorted(rng.integers(len(data), size=2))
                data[start:start] = data[start:stop]
            case 5:
                other = whole[rng.integers(len(whole))]
                data = data[: rng.integers(len(data))] + bytearray(other[rng.integers(len(other)) :])
            case _:
                data = bytearray(rng.bytes(rng.integers(1, 4000)))  # type: ignore[arg-type]
        yield bytes(data)


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    """Make a PNG whose header promises a size and whose data hold a few pixels."""
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(bytes(100)))
    )


def png_bomb(side: int) -> bytes:
    """Make a complete PNG of side² grey pixels in a few megabytes."""
    compressor = zlib.compressobj(1)
    packed = b"".join(compressor.compress(bytes(side + 1)) for _ in range(side)) + compressor.flush()
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def with_jpeg_size(data: bytes, side: int) -> bytes:
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + struct.pack(">HH", side, side) + data[at + 4 :]
