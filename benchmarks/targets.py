"""What each target of one student costs on this machine, and what it loses against the teacher's gallery.

Run as: python benchmarks/targets.py --run runs/student            (about 15 minutes of one core)

It runs the commands that a user runs, and skips what its output folder already holds. Ranges of INT8 come from
train.txt, the gate judges on val.txt, and each target is evaluated once on test.txt. It needs the photographs and
teachers of PKD_SHARED (or ../shared), a student of EdgeFace-XS, and the extras of every CPU format. Writes
benchmarks/results/targets.json.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from real_faces import EDGEFACE, ROOT, SHARED, Report, command, markdown_table, prose, teacher_options

from pkd.export.formats.registry import FORMATS
from pkd.export.options import PRECISIONS
from pkd.toolkit.bundle.bundle import Bundle

RESULTS = ROOT / "benchmarks" / "results" / "targets.json"
CPU = [name for name in FORMATS if name != "npu" and not name.startswith("trt")]
FMR = 1e-3
PLAIN, REWRITTEN = "encoder.onnx", "onnxruntime-fp32"


def main() -> int:
    """Export, evaluate every target, compare them with fp32, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=ROOT / "runs" / "student", help="a pkd-distill run (runs/student)")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "targets", help="bundle and evaluations")
    parser.add_argument("--max-tar-drop", default="0.05", help="of the gate; its verdict is in the results (0.05)")
    args = parser.parse_args()
    if not (SHARED / "faces").is_dir():
        print(f"skipped: no photographs in {SHARED}. Set PKD_SHARED to the folder that holds faces/ and models/.")
        return 0
    bundle = export(args.run, args.out / "bundle", args.max_tar_drop)
    names = [target.name for target in bundle.manifest.targets]
    reports = {name: evaluate(bundle, number, args.out) for number, name in enumerate(names)}
    lost = compare(args.out, names)
    found = {
        "training": bundle.manifest.training,
        "gate": bundle.manifest.gate,
        "data": reports[REWRITTEN]["data"],
        "bench": json.loads(bundle.read("bench.json")),
        "settings": {target.name: target.settings for target in bundle.manifest.targets},
        "accuracy": {name: at(report) for name, report in reports.items()},
        "lost": lost,
    }
    RESULTS.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(f"wrote {RESULTS.relative_to(ROOT)}")
    return 0


def export(run: Path, folder: Path, drop: str) -> Bundle:
    """Make the bundle with every target of a CPU format, gated and measured, unless it is there."""
    splits, teacher = SHARED / "faces/splits", SHARED / "models" / EDGEFACE[0]
    if not folder.is_dir():
        command(
            "pkd-export", str(run), "-o", str(folder), "--format", *CPU, "--precision", *PRECISIONS,
            "--calib", str(splits / "train.txt"), "--gate", str(splits / "val.txt"), "--max-tar-drop", drop,
            "--gate-teacher", str(teacher), "--gate-teacher-preprocess", EDGEFACE[1], "--bench",
        )  # fmt: skip
    return Bundle.open(folder)


def evaluate(bundle: Bundle, number: int, out: Path) -> Report:
    """Measure a target against the teacher's gallery on test.txt.

    Rewrites of fp32 share an encoder id, so that one would be answered from the other's cache: the second has another.
    """
    target, before = bundle.manifest.targets[number], bundle.manifest.targets[:number]
    cache = f"cache-{sum(other.encoder.id == target.encoder.id for other in before)}"
    folder = out / "evaluations" / target.name
    if not (folder / "report.json").is_file():
        command(
            "pkd-evaluate", *teacher_options(EDGEFACE), "--student", str(bundle.path / "targets" / target.name),
            "--faces", str(SHARED / "faces/splits/test.txt"), "--cache", str(out / cache), "--out", str(folder),
        )  # fmt: skip
    report: Report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    return report


def compare(out: Path, names: list[str]) -> Report:
    """Name → what the target loses beside onnxruntime-fp32, paired over the same people."""
    folder = out / "comparison"
    runs = [f"{name}={out / 'evaluations' / name}" for name in names]
    command("pkd-compare", *runs, "--cell", "S-T", "--fmr", f"{FMR:g}", "--out", str(folder))
    lost = {}
    for pair in json.loads((folder / "compare.json").read_text(encoding="utf-8"))["pairs"]:
        if REWRITTEN not in (pair["a"], pair["b"]):
            continue
        sign = 1 if pair["a"] == REWRITTEN else -1
        difference = pair["difference"]
        lost[pair["b"] if sign == 1 else pair["a"]] = {
            "difference": sign * difference["difference"],
            "ci95": sorted(sign * end for end in difference["ci95"]),
        }
    return lost


def at(report: Report) -> Report:
    """Return the balanced TAR of S–T at ``FMR``."""
    (cell,) = (c for c in report["comparisons"] if c["name"] == "S–T")
    (point,) = (p for p in cell["points"] if abs(p["fmr"] / FMR - 1) < 1e-6)
    return {"tar": point["tar_balanced"], "ci95": point["tar_balanced_ci95"], "impostor_pairs": cell["impostor_pairs"]}


def table(found: Report) -> str:
    """Write the section of docs/performance.md."""
    bench, training, data = found["bench"], found["training"], found["data"]
    rows = {row["name"]: row for row in bench["rows"]}
    return "\n\n".join(
        [
            prose(
                f"`pkd-export --bench` of a `{training['backbone']}` ({training['parameters']:,} parameters, "
                f"{training['method']}) on {bench['cpu']}, {bench['cores']} cores, {bench['system']}, on "
                f"{bench['created'][:10]}: CPU milliseconds per image on one thread, medians of {bench['rounds']} "
                "rounds in which all take turns. `encoder.onnx` is the graph as exported, in onnxruntime; "
                "`onnxruntime-fp32` is the same with PRelu rewritten; `insightface` is its own ArcFaceONNX with the "
                "same weights, pixels scaled outside the graph. Memory is the peak of loading and running, above a "
                "process that has only imported the runtime. Runtimes: "
                f"{', '.join(dict.fromkeys(row['runtime'] for row in rows.values()))}."
            ),
            markdown_table(
                ("target", "MB", "of fp32", "peak MB", "ms b1", "ms b8", "ms b32", *RATIOS),
                [cost(row, rows) for row in rows.values()],
            ),
            *(f"Not measured: {name}: {reason}" for name, reason in bench["skipped"].items()),
            prose(
                f"TAR of the target's queries against the teacher's gallery (S–T) at FMR {FMR:g} on test.txt "
                f"({data['images']:,} images of {data['identities']:,} people), every identity weighing the same, with "
                "95 % identity-level bootstrap intervals; what is lost beside `onnxruntime-fp32` is in points, paired "
                "over the same drawn people."
            ),
            markdown_table(
                ("target", "S–T TAR", "lost, points", "calibration"),
                [accuracy(name, found) for name in found["accuracy"]],
            ),
            prose(f"Gate, on other people: {found['gate']}."),
        ]
    )


RATIOS = ("of plain onnxruntime, b1 / b8 / b32", "of onnxruntime-fp32, b1 / b8 / b32")


def cost(row: Report, rows: Report) -> tuple[str, ...]:
    """One line of the first table. The first ratio is of the same rounds, the second of the medians."""
    milliseconds = [f"{time['cpu_ms']:.2f}" for time in row["times"]]
    plain = " / ".join(f"{time['ratio']:.2f}×" for time in row["times"])
    pairs = zip(row["times"], rows[REWRITTEN]["times"], strict=True)
    rewritten = " / ".join(f"{time['cpu_ms'] / other['cpu_ms']:.2f}×" for time, other in pairs)
    size = f"{row['bytes'] / 1e6:.2f}", f"{row['bytes'] / rows[PLAIN]['bytes']:.0%}", f"{row['memory_mb']:.0f}"
    return (row["name"], *size, *milliseconds, plain, rewritten)


def accuracy(name: str, found: Report) -> tuple[str, ...]:
    """One line of the second table."""
    measured, lost, settings = found["accuracy"][name], found["lost"].get(name), found["settings"][name]
    low, high = measured["ci95"]
    change = "reference"
    if lost:
        ends = " to ".join(f"{100 * end:+.2f}" for end in lost["ci95"])
        change = f"{100 * lost['difference']:+.2f} ({ends})"
    return name, f"{measured['tar']:.3f} ({low:.3f}–{high:.3f})", change, str(settings.get("calibration", ""))


if __name__ == "__main__":
    sys.exit(main())
