"""Train students of the shared teacher by pkd-distill, measure them on val.txt and test.txt, and write their tables.

The benchmarks of adopted students (adopted_methods.py, ablation.py, sizes.py) share it. Options are chosen on val.txt.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from adoption import Bench
from numpy.typing import NDArray
from real_faces import ROOT, SHARED, markdown_table

from pkd.toolkit.cli.distill import main as distill
from pkd.toolkit.core.preprocess import Preprocess
from pkd.toolkit.data.face_set import FaceSet
from pkd.toolkit.distill.models.adopted import adopt
from pkd.toolkit.distill.models.student import load_student
from pkd.toolkit.encoders.base import Embeddings, Encoder, open_onnx
from pkd.toolkit.encoders.embed import embed_stored

PAGE = ROOT / "docs" / "adoption.md"
TEACHER = ("teacher_edgeface_xs_512.onnx", "mean=127.5,std=127.5")
STUDENT = ("teacher_mobilefacenet_y1_128.onnx", "mean=0,std=1")
SHRINK = ("--method", "map", "--shrink", "390000", "--map-rank", "96", "--threads", "1")
Report = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """Hold one training: its options of pkd-distill, the images, and what is changed while it runs."""

    options: tuple[str, ...]
    faces: Callable[[Path], Path] = field(default=lambda runs: everybody())
    seeds: int = 1
    """Number of seeds."""
    changed: Callable[[], AbstractContextManager[object]] = nullcontext


def arguments(doc: str | None, rows: Iterable[str]) -> argparse.Namespace | None:
    """Read the command line of one of the benchmarks; None where the shared photographs are missing."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    runs = ROOT / "runs" / "students"
    parser.add_argument("runs", type=Path, nargs="?", default=runs, help="folder of the trainings, kept and used again")
    parser.add_argument("--page", action="store_true", help="write the table of the last figures, and measure nothing")
    parser.add_argument("--rows", nargs="+", default=list(rows), choices=list(rows), metavar="NAME")
    parser.add_argument("--seeds", type=int, default=3, help="most seeds of a row")
    parser.add_argument("--missing", action="store_true", help="leave out what the last figures have")
    parser.add_argument("--train-only", action="store_true", help="train, and measure later")
    parser.add_argument("--no-training", action="store_true", help="measure the runs that are there alone")
    args = parser.parse_args()
    if not args.page and not (SHARED / "faces").is_dir():
        print(f"skipped: no photographs in {SHARED}. Set PKD_SHARED to the folder that holds faces/ and models/.")
        return None
    return args


def trained(
    args: argparse.Namespace, rows: Mapping[str, Row], source: tuple[str, ...], known: Collection[tuple[str, int]] = ()
) -> dict[tuple[str, int], Path]:
    """Train the rows that are not there yet, each from ``source``; the runs by row and seed. ``known``: left out."""
    runs = {}
    for seed in range(args.seeds):
        for name in args.rows:
            row = rows[name]
            if seed >= row.seeds or (name, seed) in known:
                continue
            run = args.runs / f"{name.replace(', ', '-').replace(' ', '-')}-s{seed}"
            if not (run / "student.pt").is_file():
                if args.no_training:
                    continue
                with row.changed():
                    train(run, (*source, "--seed", str(seed), *row.options), row.faces(args.runs))
            runs[name, seed] = run
    return runs


def train(run: Path, options: tuple[str, ...], faces: Path) -> None:
    """Run pkd-distill."""
    teacher = ("--teacher", str(SHARED / "models" / TEACHER[0]), "--teacher-preprocess", TEACHER[1])
    if distill([*teacher, "--faces", str(faces), *options, "--out", str(run)]):
        raise SystemExit(f"pkd-distill failed for {run.name}")


def shrunk(runs: Path) -> tuple[str, ...]:
    """Make the start of most rows, MobileFaceNet Y1 shrunk to 0.39 M parameters behind its map; its options."""
    start = runs / "start"
    if not (start / "student.pt").is_file():
        train(start, (*adopted(), *SHRINK), everybody())
    return ("--student", str(start))


def adopted() -> tuple[str, ...]:
    """Return the options that adopt MobileFaceNet Y1."""
    return ("--student", str(SHARED / "models" / STUDENT[0]), "--student-preprocess", STUDENT[1])


def everybody() -> Path:
    """Find the list of all training images."""
    return SHARED / "faces" / "splits" / "train.txt"


def drawn(count: int, seed: int) -> Callable[[Path], Path]:
    """Make what writes the list of ``count`` images, a draw of train.txt, into the folder of the runs."""

    def write_list(runs: Path) -> Path:
        faces = FaceSet.read(everybody())
        return listed(faces, np.random.default_rng(seed).choice(len(faces), count, replace=False), runs, f"{count}.txt")

    return write_list


def listed(faces: FaceSet, rows: NDArray[np.int64], runs: Path, name: str) -> Path:
    """Write the list of these images into the folder of the runs."""
    path = runs / name
    path.write_text("".join(f"{faces.path(int(i))}\n" for i in np.sort(rows)), encoding="utf-8")
    return path


def table_of_runs(
    doc: str | None,
    rows: Mapping[str, Row],
    source: Callable[[Path], tuple[str, ...]],
    start: str | None,
    file: Path,
    text: Callable[[Report], str],
) -> int:
    """Train what is missing, each row from ``source``, measure, and write the JSON and the table of docs/adoption.md.

    ``start``: run, beside the others, that is measured first. Rows of the last figures that are not measured again
    stay, if they began with the same start.
    """
    args = arguments(doc, rows)
    if args is None:
        return 0
    last = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"rows": []}
    if args.page:
        put(file.stem, text(last))
        return 0
    known = {(row["row"], row["seed"]): row for row in last["rows"]}
    runs = trained(args, rows, source(args.runs), known if args.missing else ())
    if not args.train_only:
        places = Places()
        first = {(start, 0): args.runs / start} if start else {}
        measured = {key: places.run(*key, run) for key, run in {**first, **runs}.items()}
        for key in first.keys() & known.keys():
            same_start(known[key], measured[key])
        order = [start, *rows]
        kept = sorted((known | measured).items(), key=lambda item: (order.index(item[0][0]), item[0][1]))
        write({"rows": [row for _, row in kept], **places.size()}, file, text)
    return 0


def same_start(last: Report, now: Report) -> None:
    """Refuse to put rows of another start beside these."""
    before, here = (each["test"]["S–T"]["tar"]["0.001"] for each in (last, now))
    if abs(before - here) > 0.005:
        raise SystemExit(
            f"The rows of the last figures began with another start (S–T TAR {before:.3f}, here {here:.3f}): delete "
            "the JSON file and measure all rows."
        )


class Places:
    """Measure students on val.txt, on which options are chosen, and on test.txt."""

    def __init__(self) -> None:
        splits = SHARED / "faces" / "splits"
        teacher = open_onnx(SHARED / "models" / TEACHER[0], Preprocess())
        model = adopt(str(SHARED / "models" / STUDENT[0]), STUDENT[1], FaceSet.read(everybody()).load(range(16), 112))
        self.places = {name: Bench(teacher, model, FaceSet.read(splits / f"{name}.txt")) for name in ("val", "test")}

    def run(self, name: str, seed: int, run: Path) -> Report:
        """Measure the student of a training."""
        student = load_student(run)
        report: Report = {"row": name, "seed": seed}
        report |= {key: student.training.get(key) for key in ("method", "images", "identities", "parameters", "steps")}
        report["lost"] = bool(student.training.get("lost"))
        return report | self.encoder(student, name, seed)

    def encoder(self, encoder: Encoder, name: str, seed: int = 0, parts: Sequence[str] = ("val", "test")) -> Report:
        """Measure any encoder of the teacher's space: cosine to the teacher, S–T, and S–S on test.txt."""
        report: Report = {}
        for part in parts:
            place = self.places[part]
            own: Embeddings = embed_stored(encoder, place.test, cache=place.cache)[:]
            cosine = float(np.einsum("nd,nd->n", own, place.expected).mean())
            report[part] = {"cosine": cosine, "S–T": place.rates(own, place.expected)}
            if part == "test":
                report[part]["S–S"] = place.rates(own, own)
        print(name, seed, {part: each["S–T"]["tar"]["0.001"] for part, each in report.items()}, flush=True)
        return report

    def size(self) -> Report:
        """Count the images and people of test.txt."""
        test = self.places["test"].test
        return {"test_images": len(test), "people": len(test.identities)}


def table(rows: Sequence[Report], first: str) -> str:
    """Write a line per row of the benchmark: the mean over its seeds, and their range or one seed's interval."""
    by_name = dict[str, list[Report]]()
    for row in rows:
        by_name.setdefault(row["row"], []).append(row)
    shown = []
    for name, seeds in by_name.items():
        figures = [f"{len(seeds)}"]
        for pair in ("S–T", "S–S"):
            values = np.array([row["test"][pair]["tar"]["0.001"] for row in seeds])
            low, high = seeds[0]["test"][pair]["interval"]["0.001"]
            spread = f"{values.min():.3f}–{values.max():.3f}" if len(seeds) > 1 else f"({low:.3f}–{high:.3f})"
            figures += [f"{values.mean():.3f}", spread]
        figures.append(f"{np.mean([row['test']['cosine'] for row in seeds]):.3f}")
        figures.append(f"{np.mean([row['val']['S–T']['tar']['0.001'] for row in seeds]):.3f}")
        lost = ", lost: the map is kept" if any(row.get("lost") for row in seeds) else ""
        shown.append((f"{name}{lost}", *figures))
    head = (first, "seeds", "S–T", "", "S–S", "", "cosine to the teacher", "S–T on val.txt")
    return markdown_table(head, shown)


def write(results: Report, file: Path, text: Callable[[Report], str]) -> None:
    """Keep the figures, and put the table between the marks of their name in docs/adoption.md."""
    file.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    put(file.stem, text(results))


def put(mark: str, text: str) -> None:
    """Put ``text`` between ``<!-- figures: benchmarks/MARK.py -->`` and the next ``<!-- end of figures -->``."""
    begin, end = f"<!-- figures: benchmarks/{mark}.py -->\n", "<!-- end of figures -->\n"
    before, rest = PAGE.read_text(encoding="utf-8").split(begin)
    after = rest.split(end, 1)[1]
    PAGE.write_text(f"{before}{begin}{text}\n{end}{after}", encoding="utf-8")
