"""Watch certificates through simulated months: false alarms while they hold, and how soon drift is noticed.

Run as: python benchmarks/drift.py

People, cameras and visits are made up; the certificate, its intervals and the monitor are the product's own. A month is
people who visit a gallery day by day, the same ones again and again, as real visitors are. Drift is another camera
(images carry more of what all of its images share) or another population (people who look more alike). Writes
benchmarks/results/drift.json, docs/images/drift.svg and the table of docs/operations.md.
"""

from __future__ import annotations

import argparse
import json
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pkd.toolkit.certificates import drift
from pkd.toolkit.certificates.certificate import Certificate
from pkd.toolkit.core.encoder_info import describe
from pkd.toolkit.core.preprocess import Preprocess
from pkd.toolkit.encoders.base import unit_rows
from pkd.toolkit.evaluation.metrics.operating_points import measure
from pkd.toolkit.evaluation.metrics.pair_scores import score_pairs
from pkd.toolkit.evaluation.metrics.pairing import Pairing

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "drift.json"
PAGE = ROOT / "docs" / "operations.md"
BEGIN, END = "<!-- figures: benchmarks/drift.py -->\n", "<!-- end of figures -->\n"
PICTURE = ROOT / "docs" / "images" / "drift.svg"
DIM = 64
DAYS = 30
NOISE = 0.45
"""Share of an image that is not the person."""
FMRS = (1e-2, 1e-3, 1e-4)
VERIFIED_FMR = 1e-3
Floats = NDArray[np.float32]
Report = dict[str, Any]


def main() -> int:
    """Simulate, and write the JSON and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--months", type=int, default=100, help="months of each row")
    parser.add_argument("--evaluations", type=int, default=25, help="certificates, each used for some of the months")
    parser.add_argument("--certified", type=int, default=800, help="people of an evaluation")
    args = parser.parse_args()
    rows: list[Report] = []
    curves: dict[str, list[list[float]]] = {}
    certificates = [certify(np.random.default_rng([7, i]), args.certified) for i in range(args.evaluations)]
    for people in (100, 400):
        for name, camera, alike, strangers in (
            ("the certificate holds", 0.0, 0.0, 0.3),
            ("the certificate holds, few strangers", 0.0, 0.0, 0.02),
            ("another camera", 0.2, 0.0, 0.3),
            ("another camera, worse", 0.35, 0.0, 0.3),
            ("another population", 0.0, 0.2, 0.3),
            ("another population, closer", 0.0, 0.35, 0.3),
        ):
            months = args.months if not camera and not alike else args.months // 4
            found = [
                month(np.random.default_rng([people, i]), c, people, camera, alike, strangers)
                for i, c in zip(range(months), cycle(certificates), strict=False)
            ]
            alarms = [one["day"] for one in found if one["day"] is not None]
            row: Report = {
                "people": people, "what": name, "months": months, "alarms": len(alarms),
                "share": len(alarms) / months, "median_day": float(np.median(alarms)) if alarms else None,
                "median_searches": float(np.median([one["searches"] for one in found if one["day"] is not None]))
                if alarms else None,
                "fmr_ratio": float(np.mean([one["fmr_ratio"] for one in found])),
            }  # fmt: skip
            rows.append(row)
            curves[f"{people}, {name}"] = [one["evidence"] for one in found[:20]]
            print(json.dumps(row), flush=True)
    results = {"alpha": drift.ALPHA, "days": DAYS, "rows": rows}
    RESULTS.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    draw(curves)
    write_table(results)
    print(f"wrote {RESULTS.relative_to(ROOT)}")
    return 0


class World:
    """Make people and their images: unit vectors of a person, plus what an image adds."""

    def __init__(self, random: np.random.Generator, camera: float = 0.0, alike: float = 0.0) -> None:
        """``camera``: share that all of a camera's images have in common. ``alike``: the same of all people."""
        self.random, self.camera, self.alike = random, camera, alike
        shared = random.normal(size=(2, DIM)) / np.sqrt(DIM)
        self.look, self.origin = shared

    def people(self, count: int) -> NDArray[np.float64]:
        """Draw people, N×D."""
        own = self.random.normal(size=(count, DIM)) / np.sqrt(DIM)
        return np.sqrt(1 - self.alike**2) * own + self.alike * self.origin

    def images(self, people: NDArray[np.float64]) -> Floats:
        """Photograph each of these people once."""
        noise = self.random.normal(size=people.shape) / np.sqrt(DIM)
        made = np.sqrt(1 - NOISE**2) * people + NOISE * noise
        return unit_rows((np.sqrt(1 - self.camera**2) * made + self.camera * self.look).astype(np.float32))


def certify(random: np.random.Generator, count: int) -> Certificate:
    """Evaluate people of the first world, two images each, and certify."""
    world = World(random)
    people = world.people(count)
    labels = np.repeat(np.arange(count), 2)
    rows = world.images(people[labels])
    files = np.arange(len(labels))
    pairing = Pairing(labels, labels, files, files, count, unordered=True)
    info = describe("encoder", "teacher", "00", Preprocess(), DIM)
    scores = score_pairs(pairing, rows, rows, seed=0)
    c, _ = measure(scores, "T–T", info, info, fmrs=FMRS, resamples=100, seed=int(random.integers(2**31)))
    return Certificate(
        query=info.id, query_role="teacher", gallery=info.id, gallery_role="teacher", space=info.space.id,
        protocol="simulation", points=c.points, calibration=c.calibration,
        resolved_scores=c.calibration.resolved_scores, min_fmr=c.min_fmr, identities=count,
        genuine_identities=count, identity_pairs=c.identity_pairs, images=len(labels), genuine_pairs=c.genuine_pairs,
        impostor_pairs=c.impostor_pairs, data_name="made up", data_digest="0", synthetic=True, intervals="",
        resamples=100, seed=0, tool="benchmark", created="2026-01-01T00:00:00+00:00",
    )  # fmt: skip


def month(
    random: np.random.Generator, certificate: Certificate, count: int, camera: float, alike: float, strangers: float
) -> Report:
    """Enrol people, and let them come for a month; say on which day the alarm came, if it did."""
    world = World(random, camera, alike)
    people = world.people(count)
    gallery = world.images(people)
    others = world.people(max(1, count))
    verify_at = certificate.threshold(VERIFIED_FMR)
    logs: dict[tuple[str, float], list[float]] = {}
    evidence: list[float] = []
    searches, day = 0, None
    for now in range(1, DAYS + 1):
        known = random.permutation(count)[: count // 2]
        away = random.permutation(len(others))[: max(1, round(strangers * count / 2))]
        queries = world.images(np.concatenate([people[known], others[away]]))
        scores = queries @ gallery.T
        order = np.argsort(-scores, axis=1)[:, :2]
        for row, (_, second) in enumerate(order):
            # The runner-up is an impostor where the best was found, and no better than the best impostor elsewhere.
            _add(logs, "identify", drift.searched(certificate, float(scores[row, second]), count, count))
        claimed = random.permutation(count)[: count // 4]
        own = random.random(len(claimed)) > 0.1
        images = world.images(np.where(own[:, None], people[claimed], people[random.integers(0, count, len(claimed))]))
        for one, image in zip(claimed, images, strict=True):
            score = float(image @ gallery[one])
            _add(logs, "verify", drift.verified(certificate, score, verify_at, 1, count))
        searches += len(queries)
        evidence.append(drift.evidence(certificate, list(logs.values())))
        if day is None and evidence[-1] >= drift.alarm_at():
            day = now
    apart = ~np.eye(count, dtype=bool)
    reached = (world.images(people) @ gallery.T)[apart] >= certificate.points[0].threshold
    at = searches if day is None else round(searches * day / DAYS)
    return {"day": day, "searches": at, "evidence": evidence, "fmr_ratio": float(reached.mean() / FMRS[0])}


def _add(logs: dict[tuple[str, float], list[float]], kind: str, seen: list[drift.Observation]) -> None:
    for one in seen:
        sums = logs.setdefault((kind, one.fmr), [0.0] * len(drift.RATIOS))
        for i, value in enumerate(one.logs):
            sums[i] += value


def write_table(results: Report) -> None:
    """Put the figures between the marks of docs/operations.md."""
    lines = [
        "| people in the gallery | what happens | FMR at 1e-2, times promised | months | with an alarm | alarm after |",
        "| ---: | --- | ---: | ---: | ---: | --- |",
    ]
    for row in results["rows"]:
        when = f"day {row['median_day']:.0f}, {row['median_searches']:.0f} searches" if row["alarms"] else ""
        lines.append(
            f"| {row['people']} | {row['what']} | {row['fmr_ratio']:.1f} | {row['months']} "
            f"| {100 * row['share']:.0f} % | {when} |"
        )
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    after = rest.split(END, 1)[1]
    PAGE.write_text(before + BEGIN + "\n".join(lines) + "\n" + END + after, encoding="utf-8")


def draw(curves: dict[str, list[list[float]]]) -> None:
    """Draw the evidence of some months of each row, day by day."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "pkd"
    import matplotlib.pyplot as plt

    names = [name for name in curves if name.startswith("100,")]
    figure, panels = plt.subplots(1, len(names), figsize=(3 * len(names), 3.2), sharey=True, layout="constrained")
    for axes, name in zip(panels, names, strict=True):
        for one in curves[name]:
            axes.plot(range(1, DAYS + 1), np.clip(one, 1e-3, 1e6), lw=0.8, color="#0b63c5", alpha=0.6)
        axes.axhline(drift.alarm_at(), color="#be123c", lw=1.2)
        axes.set_yscale("log")
        axes.set_title(name.partition(", ")[2], fontsize=9)
        axes.set_xlabel("day")
    panels[0].set_ylabel("evidence against the certificate")
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PICTURE, metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    raise SystemExit(main())
