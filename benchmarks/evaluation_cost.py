"""A whole evaluation of 100,000 images: time and memory beside the code before the intervals for people who differ.

Run as: python benchmarks/evaluation_cost.py                       (20 minutes of one core)
        python benchmarks/evaluation_cost.py --images 20000 --teacher-only --turns 3

Each is a process of its own, one thread, in CPU time: from embeddings, which neither version computes faster, to
certificates, report, pictures and resamples on disk. The older version is ``BASE``, the last commit before those
intervals, checked out into a temporary git worktree. Both see the same embeddings and take turns; memory is the peak of
the resident set.
Writes benchmarks/results/evaluation_cost.json.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "evaluation_cost.json"
BASE = "f8257a112b98354a8c5715f25c054f7aa976ee26"
DIM, PER_PERSON = 64, 4


def main() -> int:
    """Measure both versions in turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--turns", type=int, default=1)
    parser.add_argument("--resamples", type=int, default=1000)
    parser.add_argument("--teacher-only", action="store_true", help="one pair of encoders, T–T, instead of three")
    parser.add_argument("--only", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        print(json.dumps(measure(args.only, args.images, args.resamples, student=not args.teacher_only)))
        return 0
    threads = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    turns: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base"
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", str(base), BASE], check=True)
        try:
            for turn in range(args.turns):
                both = {}
                for name, tree in (("before", base), ("now", ROOT)):
                    command = [sys.executable, __file__, *sys.argv[1:], "--only", str(tree)]
                    environment = {**os.environ, **dict.fromkeys(threads, "1")}
                    made = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, cwd=folder)
                    both[name] = json.loads(made.stdout)
                    print(f"turn {turn + 1}, {name}: {both[name]}", flush=True)
                turns.append(both)
        finally:
            subprocess.run([*git, "remove", "--force", str(base)], check=True)
    found = {"images": args.images, "resamples": args.resamples, "student": not args.teacher_only, "turns": turns}
    RESULTS.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(table(found))
    return 0


class Faces:
    """Stand for a set of images whose embeddings are known."""

    def __init__(self, images: int) -> None:
        people = images // PER_PERSON
        self.identities = tuple(f"{one:06d}" for one in range(people))
        self.labels = np.arange(images) * people // images

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        """Name an image."""
        return f"{index}.png"

    def digests(self, cache: Path | None = None) -> np.ndarray[Any, Any]:
        """Give every image a digest of its own."""
        found = np.zeros((len(self), 32), np.uint8)
        found[:, :8] = np.arange(len(self), dtype=np.uint64)[:, None].view(np.uint8)
        return found

    def digest(self) -> str:
        """Give the set a digest."""
        return "0" * 64


def measure(tree: Path, images: int, resamples: int, *, student: bool) -> dict[str, float]:
    """Evaluate with the pkd of a source tree → CPU seconds and peak memory in MB."""
    sys.path.insert(0, str(tree))
    from pkd.toolkit.cli import evaluate
    from pkd.toolkit.core.encoder_info import describe
    from pkd.toolkit.core.preprocess import Preprocess
    from pkd.toolkit.core.progress import no_progress
    from pkd.toolkit.evaluation.protocols import all_pairs
    from pkd.toolkit.evaluation.protocols.common import EncoderSet, EvaluationOptions

    assert str(evaluate.__file__).startswith(str(tree)), evaluate.__file__
    faces, random = Faces(images), np.random.default_rng(0)
    own = random.standard_normal((len(faces.identities), DIM), dtype=np.float32)[faces.labels]
    own += 0.8 * random.standard_normal((images, DIM), dtype=np.float32)

    def encoder(name: str, **more: Any) -> Any:
        info = describe(name, preprocess=Preprocess(), dim=DIM, weights_digest=name[0] * 64, **more)
        return type("Encoder", (), {"info": info})()

    teacher = encoder("a-teacher", role="teacher")
    encoders = EncoderSet(teacher, encoder("b-student", role="student", space=teacher.info.space) if student else None)

    def embed(one: Any, *_: object) -> np.ndarray[Any, Any]:
        noise = np.random.default_rng(len(one.info.name)).standard_normal(own.shape, dtype=np.float32)
        vectors = own + 0.2 * noise
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        return vectors

    setattr(all_pairs, "embed", embed)  # noqa: B010 - mypy would have it another function
    before = time.process_time()
    found = all_pairs.cross_matrix(
        faces,  # type: ignore[arg-type]
        "people",
        encoders,
        EvaluationOptions(resamples=resamples, synthetic=True),
        no_progress,
    )
    with tempfile.TemporaryDirectory() as folder:
        evaluate._write(Path(folder), found, None)
    seconds = time.process_time() - before
    return {"seconds": seconds, "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def table(found: dict[str, Any]) -> str:
    """Write the table in Markdown."""
    turns = found["turns"]
    ratio = statistics.median(t["now"]["seconds"] / t["before"]["seconds"] for t in turns)
    memory = {name: max(t[name]["peak_mb"] for t in turns) for name in ("before", "now")}
    encoders = "three pairs of encoders" if found["student"] else "one pair of encoders"
    lines = [
        f"{found['images']:,} images, {PER_PERSON} a person, of {DIM} numbers, {encoders}, {found['resamples']:,} "
        f"resamples, {len(turns)} turn(s), one thread. Now over before: **{ratio:.2f}** in CPU time, "
        f"**{memory['now'] / memory['before']:.2f}** in peak memory.",
        "",
        "| | CPU seconds | peak memory |",
        "| --- | ---: | ---: |",
    ]
    for key, name in (("before", f"before (`{BASE[:7]}`)"), ("now", "now")):
        seconds = statistics.median(t[key]["seconds"] for t in turns)
        lines.append(f"| {name} | {seconds:,.0f} | {memory[key]:,.0f} MB |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
