"""What ten million images cost before the first step: memory and CPU time of the face set and of the key store.

Run as: python benchmarks/image_store.py               (about a minute of one core and 1.5 GB of disk)

A RecordIO of ten million small records is written, with InsightFace's first record, and read as a FaceSet; a store of
as many keys with rows of 8 numbers is searched for a thousand keys and for all of them. Each part is a process of its
own, so that its peak of resident memory is its own; memory-mapped files count only as far as they were touched. The
baselines are what went before: a path object per image, and sorting all keys for every search, the former measured at
a tenth of the size. Writes benchmarks/results/image_store.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from pkd.toolkit.data.face_set import FaceSet
from pkd.toolkit.data.recordio import MAGIC
from pkd.toolkit.data.row_store import KeyedRows, StoredRows

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "image_store.json"
FRAME = 40
"""Bytes of a record: frame, image header, eight bytes in the place of an image."""
WIDTH = 8
Report = dict[str, Any]


def main() -> int:
    """Run every part in a process of its own and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=10_000_000)
    parser.add_argument("--part", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        name, folder = args.part
        print(json.dumps(PARTS[name](Path(folder), args.images)))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        write_recordio(Path(folder), args.images)
        write_store(Path(folder), args.images)
        results: Report = {"images": args.images}
        for name in PARTS:
            command = [sys.executable, __file__, "--images", str(args.images), "--part", name, folder]
            results[name] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(table(results))
    return 0


def write_recordio(folder: Path, images: int) -> None:
    """``train.rec`` and ``train.idx``: ten images an identity."""
    first = np.array([MAGIC, 32, 2, 0, 0, 0, 0, 0, 0, 0], "<u4")
    first[8:] = np.array([images + 1, images + 1], "<f4").view("<u4")
    with (folder / "train.rec").open("wb") as rec, (folder / "train.idx").open("w") as idx:
        rec.write(first.tobytes())
        idx.write("0\t0\n")
        for start in range(1, images + 1, 100_000):
            keys = np.arange(start, min(start + 100_000, images + 1))
            block = np.zeros((len(keys), FRAME // 4), "<u4")
            block[:, :2] = MAGIC, FRAME - 8
            block[:, 3] = ((keys - 1) // 10).astype("<f4").view("<u4")
            block[:, 8] = keys
            rec.write(block.tobytes())
            idx.write("".join(f"{key}\t{key * FRAME}\n" for key in keys.tolist()))


def write_store(folder: Path, images: int) -> None:
    """``keys`` random 64-bit keys with rows, in blocks as a run appends them."""
    store, random = KeyedRows(folder, "store", "f32", WIDTH, np.float32), np.random.default_rng(0)
    for start in range(0, images, 1_000_000):
        count = min(1_000_000, images - start)
        store.append(random.integers(0, 2**64, count, np.uint64), np.ones((count, WIDTH), np.float32))


def nothing(folder: Path, images: int) -> Report:
    """Load the interpreter and the imports alone."""
    return {"peak_mb": _peak(), "kept_mb": _now()}


def face_set(folder: Path, images: int) -> Report:
    """Read the RecordIO and load one record's bytes."""
    kept: list[FaceSet] = []
    seconds = _cpu(lambda: kept.append(FaceSet.read(folder / "train.rec")))
    (faces,) = kept
    assert len(faces) == images
    assert faces.images.read(images - 1)[:4] == np.uint32(images).tobytes()
    return {"cpu_s": seconds, "peak_mb": _peak(), "kept_mb": _now(), "identities": len(faces.identities)}


def paths(folder: Path, images: int) -> Report:
    """Baseline: a Path, a name and a label per image, for a tenth of the images."""
    root = folder / "faces"
    kept: list[Any] = []
    seconds = _cpu(lambda: kept.extend((root / f"{i // 10:08d}/{i:08d}.jpg", f"{i:08d}") for i in range(images // 10)))
    return {"cpu_s": seconds, "peak_mb": _peak(), "images": len(kept)}


def find_few(folder: Path, images: int) -> Report:
    """Look up a thousand keys, half of them stored."""
    return _find(folder, _keys(folder, images)[:: images // 500][:500], fast=True)


def find_few_by_sorting(folder: Path, images: int) -> Report:
    """Baseline: the same, by sorting every key."""
    return _find(folder, _keys(folder, images)[:: images // 500][:500], fast=False)


def find_all(folder: Path, images: int) -> Report:
    """Every key in another order, and 64 rows of the view."""
    keys = np.random.default_rng(1).permutation(_keys(folder, images))
    store = KeyedRows(folder, "store", "f32", WIDTH, np.float32)
    kept = []
    seconds = _cpu(lambda: kept.append(StoredRows(store.rows(), store.find(keys))))
    rows = _cpu(lambda: [kept[0][np.arange(i, images, images // 64)[:64]] for i in range(100)]) / 100
    return {"cpu_s": seconds, "batch_us": rows * 1e6, "peak_mb": _peak()}


PARTS: dict[str, Callable[[Path, int], Report]] = {
    "nothing": nothing,
    "face_set": face_set,
    "paths": paths,
    "find_few": find_few,
    "find_few_by_sorting": find_few_by_sorting,
    "find_all": find_all,
}


def table(results: Report) -> str:
    """Write the results as a Markdown table."""
    base, anonymous, images = results["nothing"]["peak_mb"], results["nothing"]["kept_mb"], results["images"]
    old = (results["paths"]["peak_mb"] - base) * images / results["paths"]["images"]
    sets, few, slow, every = (results[name] for name in ("face_set", "find_few", "find_few_by_sorting", "find_all"))
    return "\n".join(
        [
            f"| {images:,} images | CPU s | peak memory, MB | kept, MB | against |",
            "| --- | --- | --- | --- | --- |",
            f"| RecordIO read as a face set of {sets['identities']:,} identities | {sets['cpu_s']:.1f} "
            f"| {sets['peak_mb'] - base:.0f} | {sets['kept_mb'] - anonymous:.0f} "
            f"| {old:.0f} MB kept with a path object per image (from a tenth of them) |",
            f"| 1,000 keys found in the store | {few['cpu_s']:.2f} | {few['peak_mb'] - base:.0f} | "
            f"| {slow['cpu_s']:.2f} s by sorting all keys: {slow['cpu_s'] / few['cpu_s']:.1f}× |",
            f"| all keys found in the store | {every['cpu_s']:.1f} | {every['peak_mb'] - base:.0f} | "
            f"| then {every['batch_us']:.0f} µs for 64 rows |",
        ]
    )


def _keys(folder: Path, images: int) -> np.ndarray:
    return np.fromfile(folder / "store.keys", np.uint64, images)


def _find(folder: Path, stored: np.ndarray, *, fast: bool) -> Report:
    keys = np.concatenate([stored, np.random.default_rng(9).integers(0, 2**64, 500, np.uint64)])
    store = KeyedRows(folder, "store", "f32", WIDTH, np.float32)
    found = []

    def sort() -> np.ndarray:
        known = np.fromfile(folder / "store.keys", np.uint64)
        order = np.argsort(known, kind="stable")
        place = np.minimum(np.searchsorted(known[order], keys), len(known) - 1)
        return np.where(known[order[place]] == keys, order[place], -1)

    seconds = _cpu(lambda: found.append(store.find(keys) if fast else sort()))
    assert (found[0][:500] >= 0).all()
    assert (found[0][500:] < 0).all()
    return {"cpu_s": seconds, "peak_mb": _peak()}


def _peak() -> float:
    """Most resident memory of this program so far, megabytes; getrusage would count its parent's, too."""
    return _status("VmHWM")


def _now() -> float:
    """Resident memory of now that is no file's, megabytes."""
    return _status("RssAnon")


def _status(field: str) -> float:
    return float(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0]) / 1024


def _cpu(work: Callable[[], object]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


if __name__ == "__main__":
    raise SystemExit(main())
