"""Map a gallery of an old teacher into a new one's space: what it costs on real faces, and how fast it goes.

Run as: python benchmarks/migration.py

Real faces come from PKD_SHARED (or ../shared), for research only and not part of the project; without them that part is
skipped. The map is fitted on train.txt and val.txt; half of the people of test.txt certify it, the other half are
enrolled under the old teacher only, mapped in a real gallery, and searched for. The second part maps 100,000 made-up
templates in a process that is killed half-way and started again. Writes benchmarks/results/migration.json and the
table of docs/galleries.md.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pkd.serving.galleries.crypto import MasterKey
from pkd.serving.galleries.mapping import map_gallery
from pkd.serving.galleries.sqlite.store import SqliteStore
from pkd.serving.galleries.store import Enrolled, Enrolment, NewTemplate, Space
from pkd.toolkit.core.encoder_info import EncoderInfo, describe
from pkd.toolkit.core.preprocess import Preprocess
from pkd.toolkit.data.face_set import FaceSet
from pkd.toolkit.distill.models.adopted import adopt
from pkd.toolkit.distill.training.closed_form import fit_map
from pkd.toolkit.encoders.base import Embeddings, open_onnx, unit_rows
from pkd.toolkit.encoders.embed import default_cache, embed_stored
from pkd.toolkit.encoders.space_map import SpaceMap, fit_space_map
from pkd.toolkit.evaluation.metrics.operating_points import measure
from pkd.toolkit.evaluation.metrics.pair_scores import score_pairs
from pkd.toolkit.evaluation.metrics.pairing import Pairing
from pkd.toolkit.evaluation.results.schema import Comparison

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("PKD_SHARED") or ROOT.parent / "shared")
RESULTS = ROOT / "benchmarks" / "results" / "migration.json"
PAGE = ROOT / "docs" / "galleries.md"
BEGIN, END = "<!-- figures: benchmarks/migration.py -->\n", "<!-- end of figures -->\n"
FMR = 1e-3
MASTER = MasterKey(bytes(range(32)))
Report = dict[str, Any]
Ints = NDArray[np.int64]


def main() -> int:
    """Measure both parts, and write the JSON and the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--templates", type=int, default=100_000)
    parser.add_argument("--dim", type=int, default=512, help="numbers of a template, in both spaces")
    parser.add_argument(
        "--only", choices=("real", "speed"), help="measure one part, and keep what is known of the other"
    )
    parser.add_argument("--map", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.map:
        return _map_in_this_process(args.map)
    found: Report = {}
    if args.only != "speed" and (SHARED / "faces").is_dir():
        found["real"] = real_faces()
    elif args.only != "speed":
        print(f"skipped: no photographs in {SHARED}. Set PKD_SHARED to the folder that holds faces/ and models/.")
    if args.only != "real":
        found["speed"] = killed_and_resumed(args.templates, args.dim)
    results: Report = (json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}) | found
    RESULTS.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    write_table(results)
    print(f"wrote {RESULTS.relative_to(ROOT)}")
    return 0


def real_faces() -> Report:
    """Certify on half of the test people, and enrol, map and search the other half."""
    cache, faces = default_cache(), SHARED / "faces" / "splits"
    old = open_onnx(SHARED / "models" / "teacher_mobilefacenet_y1_128.onnx", Preprocess.parse("mean=0,std=1"))
    new = open_onnx(SHARED / "models" / "teacher_edgeface_xs_512.onnx", Preprocess())
    fit = FaceSet.read(faces / "train.txt", faces / "val.txt")
    test = FaceSet.read(faces / "test.txt")
    x, y = (embed_stored(encoder, fit, cache=cache)[:] for encoder in (old, new))
    began = time.process_time()
    made = fit_space_map(old.info, new.info, x, y, fit.labels, data="train, val", data_digest=fit.digest())
    seconds = time.process_time() - began
    own, native = (embed_stored(encoder, test, cache=cache)[:] for encoder in (old, new))
    student = _student(old.info.name, new.info, fit, y, test, cache)
    people = np.random.default_rng(0).permutation(len(test.identities))
    certified = np.isin(test.labels, people[: len(people) // 2])
    mapped, _ = made.map(own)
    report: Report = {"map": made.report.model_dump(), "fit_seconds": round(seconds, 2), "pairs": {}}
    thresholds: dict[tuple[str, str], Comparison] = {}
    for name, query in (("teacher", native), ("student", student)):
        for kind, gallery in (("native", native), ("mapped", mapped)):
            there = _compare(query[certified], gallery[certified], test.labels[certified])
            elsewhere = _compare(query[~certified], gallery[~certified], test.labels[~certified])
            whole = _compare(query, gallery, test.labels)
            point = there.points[0]
            rate = _rate_at(query[~certified], gallery[~certified], test.labels[~certified], point.threshold)
            report["pairs"][f"{name} against {kind}"] = {
                "certified_tar": point.tar_balanced, "certified_ci95": point.tar_balanced_ci95,
                "threshold": point.threshold, "prediction95": point.prediction95,
                "fmr_on_others": rate[0], "tar_on_others": rate[1],
                "tar_all": whole.points[0].tar_balanced, "tar_all_ci95": whole.points[0].tar_balanced_ci95,
                "tar_own_threshold_others": elsewhere.points[0].tar_balanced,
            }  # fmt: skip
            thresholds[name, kind] = there
    report["gallery"] = _gallery(made, own, native, student, test, ~certified, thresholds)
    return report


def _student(name: str, teacher: EncoderInfo, fit: FaceSet, y: Embeddings, test: FaceSet, cache: Path) -> Embeddings:
    """Adopt the old network as the new teacher's student (pkd-distill --method map), and embed the test people."""
    source = str(SHARED / "models" / "teacher_mobilefacenet_y1_128.onnx")
    student = adopt(source, "mean=0,std=1", fit.load(np.arange(16), 112))
    some = np.arange(0, len(fit), 4)
    fitted = fit_map(student, y[some], fit.select(some), cache=cache, measure=lambda *rows: {}, refit=True)
    features = embed_stored(student.features, test, cache=cache)[:]
    return unit_rows((features @ fitted.weight + fitted.bias).astype(np.float32))


def _compare(query: Embeddings, gallery: Embeddings, labels: Ints) -> Comparison:
    _, people = np.unique(labels, return_inverse=True)
    files = np.arange(len(labels))
    pairing = Pairing(people, people, files, files, int(people.max()) + 1, unordered=False)
    info = describe("any", "teacher", "00", Preprocess(), query.shape[1])
    made, _ = measure(
        score_pairs(pairing, query, gallery, seed=0), "T–M", info, info, fmrs=(FMR,), resamples=100, seed=0
    )
    return made


def _rate_at(query: Embeddings, gallery: Embeddings, labels: Ints, threshold: float) -> tuple[float, float]:
    """Rates of other people at a certificate's threshold: false matches of two people, and people accepted."""
    _, people, counts = np.unique(labels, return_inverse=True, return_counts=True)
    hits = (query @ gallery.T >= threshold).astype(np.float64)
    np.fill_diagonal(hits, 0)
    to = np.zeros((len(counts), len(counts)))
    np.add.at(to, (people[:, None], people[None, :]), hits)
    pairs = np.outer(counts, counts).astype(np.float64)
    apart = ~np.eye(len(counts), dtype=bool)
    several = counts > 1
    same = np.diag(to)[several] / (counts[several] * (counts[several] - 1))
    return float((to / pairs)[apart].mean()), float(same.mean())


def _gallery(
    made: SpaceMap,
    own: Embeddings,
    native: Embeddings,
    student: Embeddings,
    test: FaceSet,
    chosen: NDArray[np.bool_],
    certified: dict[tuple[str, str], Comparison],
) -> Report:
    """Enrol people under the old teacher, map, and search for them by images that are not enrolled."""
    rows = np.flatnonzero(chosen)
    last = {int(label): row for row, label in zip(rows, test.labels[rows], strict=True)}
    several = {int(one) for one in np.flatnonzero(np.bincount(test.labels[rows]) > 1)}
    probes = np.array([row for label, row in last.items() if label in several])
    enrolled = np.setdiff1d(rows, probes)
    space = Space(made.old.space.id, made.old.space.dim)
    found: Report = {"people": len(last), "templates": len(enrolled), "searches": len(probes)}
    with tempfile.TemporaryDirectory() as folder, closing(SqliteStore(Path(folder), MASTER)) as store:
        store.create("lfw", space, None, "benchmark")
        _enrol(store, made.old, space, own, enrolled, test)
        done = map_gallery(store, "lfw", [made], "benchmark")
        assert done.templates == len(enrolled) and done.unmoved == 0
        store.create("native", Space(made.new.space.id, made.new.space.dim), None, "benchmark")
        _enrol(store, made.new, Space(made.new.space.id, made.new.space.dim), native, enrolled, test, "native")
        for name, query in (("teacher", native), ("student", student)):
            accepted = {}
            for kind, gallery, encoder in (("native", "native", made.new.id), ("mapped", "lfw", made.info.id)):
                hits = store.search(gallery, encoder, query[probes], 2)
                point = certified[name, kind].points[0]
                best = [next((h.score for h in one.hits if h.subject == test.identities[test.labels[row]]), -1.0)
                        for one, row in zip(hits, probes, strict=True)]  # fmt: skip
                first = [one.hits[0].subject == test.identities[test.labels[row]]
                         for one, row in zip(hits, probes, strict=True)]  # fmt: skip
                accepted[kind] = np.array(best) >= point.threshold
                found[f"{name}, {kind}"] = {
                    "tar": float(accepted[kind].mean()), "rank1": float(np.mean(first)),
                    "certified_ci95": point.tar_balanced_ci95,
                }  # fmt: skip
            found[f"{name}, ratio"] = _ratio(accepted["mapped"], accepted["native"])
    return found


def _enrol(
    store: SqliteStore,
    encoder: EncoderInfo,
    space: Space,
    vectors: Embeddings,
    rows: Ints,
    test: FaceSet,
    gallery: str = "lfw",
) -> None:
    people = [
        Enrolment(test.identities[test.labels[row]], [NewTemplate(encoder.id, space.id, vectors[row])]) for row in rows
    ]
    assert all(isinstance(one, Enrolled) for one in store.enrol(gallery, people, "benchmark"))


def _ratio(mapped: NDArray[np.bool_], native: NDArray[np.bool_]) -> Report:
    """Share of the native TAR that mapped templates reach, with an interval over the same resampled people."""
    random = np.random.default_rng(0)
    drawn = random.integers(0, len(native), (2000, len(native)))
    ratios = mapped[drawn].mean(axis=1) / native[drawn].mean(axis=1)
    low, high = np.percentile(ratios, (2.5, 97.5))
    return {"ratio": float(mapped.mean() / native.mean()), "ci95": [float(low), float(high)]}


def killed_and_resumed(count: int, dim: int) -> Report:
    """Map made-up templates in a process that is killed when half are done, and in another that goes on."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        old, new = (
            describe("old", "teacher", "aa", Preprocess(), dim),
            describe("new", "teacher", "bb", Preprocess(), dim),
        )
        random = np.random.default_rng(0)
        x = unit_rows(random.normal(size=(4 * dim, dim)).astype(np.float32))
        y = unit_rows((x @ np.linalg.qr(random.normal(size=(dim, dim)))[0]).astype(np.float32))
        fit_space_map(old, new, x, y, np.full(len(x), -1), data="made up", data_digest="0").write(folder / "map.npz")
        mapped = SpaceMap.read(folder / "map.npz").info.id
        with closing(SqliteStore(folder / "store", MASTER)) as store:
            space = Space(old.space.id, dim)
            store.create("staff", space, None, "benchmark")
            for start in range(0, count, 10_000):
                rows = unit_rows(random.normal(size=(min(10_000, count - start), dim)).astype(np.float32))
                people = [
                    Enrolment(f"s{start + i:06d}", [NewTemplate(old.id, space.id, row)]) for i, row in enumerate(rows)
                ]
                store.enrol("staff", people, "benchmark")
        command = [sys.executable, __file__, "--map", str(folder)]
        before = _children()
        began = time.monotonic()
        first = subprocess.Popen(command)
        with closing(SqliteStore(folder / "store", MASTER, load=False)) as watch:
            while watch.get("staff").templates.get(mapped, 0) < count // 2 and first.poll() is None:
                time.sleep(0.05)
            first.send_signal(signal.SIGKILL)
            first.wait()
            there = watch.get("staff")
            killed_after = time.monotonic() - began
            visible = mapped not in there.mapping.staged
        began = time.monotonic()
        subprocess.run(command, check=True)
        resumed = time.monotonic() - began
        with closing(SqliteStore(folder / "store", MASTER)) as store:
            after = store.get("staff")
            ended = store.end_migration("staff", "benchmark")
            looked = store.verify()
            report = {
                "templates": count, "dim": dim, "killed_with": there.templates.get(mapped, 0), "visible_then": visible,
                "killed_after_seconds": round(killed_after, 1), "resumed_seconds": round(resumed, 1),
                "total_seconds": round(killed_after + resumed, 1),
                "cpu_seconds": round(_children() - before, 1), "mapped": after.templates[mapped],
                "lost": count - after.templates[mapped], "staged_after": list(after.mapping.staged),
                "deleted": ended.templates, "subjects": store.get("staff").subjects, "wrong": looked.wrong,
            }  # fmt: skip
    print(json.dumps(report))
    return report


def _children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _map_in_this_process(folder: Path) -> int:
    with closing(SqliteStore(folder / "store", MASTER, load=False)) as store:
        map_gallery(store, "staff", [SpaceMap.read(folder / "map.npz")], "benchmark")
    return 0


def write_table(results: Report) -> None:
    """Put the figures between the marks of docs/galleries.md."""
    if "real" not in results or not PAGE.is_file() or BEGIN not in PAGE.read_text(encoding="utf-8"):
        return
    real, speed = results["real"], results.get("speed")
    lines = [
        "| query | pairs: native → mapped | people: native → mapped | share kept | FMR promised, measured on others |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name in ("teacher", "student"):
        pairs = [real["pairs"][f"{name} against {kind}"] for kind in ("native", "mapped")]
        people = [real["gallery"][f"{name}, {kind}"]["tar"] for kind in ("native", "mapped")]
        ratio = real["gallery"][f"{name}, ratio"]
        low, high = pairs[1]["prediction95"]
        lines.append(
            f"| {name} | {pairs[0]['tar_all']:.3f} → {pairs[1]['tar_all']:.3f} | {people[0]:.3f} → {people[1]:.3f} "
            f"| {100 * ratio['ratio']:.1f} % ({100 * ratio['ci95'][0]:.1f}–{100 * ratio['ci95'][1]:.1f}) "
            f"| {low:.1e}–{high:.1e}, {pairs[1]['fmr_on_others']:.1e} |"
        )
    if speed:
        lines += [
            "",
            f"{speed['templates']:,} templates of {speed['dim']} numbers took {speed['cpu_seconds']:.0f} s of one core "
            f"and {speed['total_seconds']:.0f} s by the clock, on two cores that others used: killed "
            f"after {speed['killed_with']:,}, of which no search had seen any, and resumed; {speed['lost']} were lost.",
        ]
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    after = rest.split(END, 1)[1]
    PAGE.write_text(before + BEGIN + "\n".join(lines) + "\n" + END + after, encoding="utf-8")


if __name__ == "__main__":
    raise SystemExit(main())
