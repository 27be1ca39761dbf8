"""The frozen head against what it replaces: time and extra memory of one loss and gradient.

Run as: python benchmarks/frozen_head.py                         (about 6 minutes of one core, 8 GB of memory)
        python benchmarks/frozen_head.py --classes 100000 --rounds 5

Random unit embeddings and centres, B=128, D=512, s=64, ArcFace 0.5 (softmax against torch's own), one thread. Times are
CPU time of the thread; contenders take turns within a round and ratios are medians over the rounds' ratios, so that a
busy machine disturbs all of them alike. Every step runs in a forked process; extra memory is its peak above what it
held before the step (head, batch, and the momentum of a trained head not counted). Results of other --classes are kept
in benchmarks/results/frozen_head.json.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear, normalize

from pkd.toolkit.distill.heads.frozen_softmax import frozen_cross_entropy
from pkd.toolkit.distill.heads.margin import Margin, margin_cross_entropy

RESULTS = Path(__file__).resolve().parent / "results" / "frozen_head.json"
BATCH, DIM, SCALE = 128, 512, 64.0
ARCFACE, SOFTMAX = Margin("arcface", 0.5), Margin("softmax")
TRAINED_UP_TO = 500_000
"""A trained head of a million classes and what its step allocates do not fit beside the rest."""
Step = Callable[[], object]


def main() -> int:
    """Measure, write the JSON and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, nargs="+", default=[100_000, 500_000, 1_000_000])
    parser.add_argument("--rounds", type=int, default=0, help="turns of every contender [7 at 100,000, 3 above]")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for classes in args.classes:
        print(f"{classes:,} classes", file=sys.stderr)
        names = [n for n in CONTENDERS if not (n in TRAINED and classes > TRAINED_UP_TO)]
        for turns in rounds_of(names, classes, args.rounds or (7 if classes <= 100_000 else 3)):
            write(classes, turns)  # after every round, so that a stopped run has not measured for nothing
    print(table(json.loads(RESULTS.read_text(encoding="utf-8"))))
    return 0


def batch(classes: int) -> tuple[Tensor, Tensor]:
    """Embeddings B×D that ask for a gradient, and labels B."""
    torch.manual_seed(1)
    return torch.randn(BATCH, DIM, requires_grad=True), torch.randint(0, classes, (BATCH,))


def streaming(head: Tensor) -> Step:
    """Ours."""
    x, labels = batch(len(head))
    return lambda: torch.autograd.grad(frozen_cross_entropy(x, head, labels, ARCFACE, SCALE), x)


def streaming_softmax(head: Tensor) -> Step:
    """Ours without a margin, for torch's own."""
    x, labels = batch(len(head))
    return lambda: torch.autograd.grad(frozen_cross_entropy(x, head, labels, SOFTMAX, SCALE), x)


def plain(head: Tensor) -> Step:
    """Autograd over all logits, the head frozen: this project's reference."""
    x, labels = batch(len(head))
    return lambda: torch.autograd.grad(margin_cross_entropy(x, head, labels, ARCFACE, SCALE), x)


def plain_lean(head: Tensor) -> Step:
    """Autograd over all logits with as few copies as it can do with: no clamp, the scale on the embeddings."""
    x, labels = batch(len(head))
    rows = torch.arange(BATCH)

    def step() -> object:
        unit = normalize(x)
        logits = (SCALE * unit) @ head.T
        target = SCALE * ARCFACE((unit * head[labels]).sum(dim=1))
        return torch.autograd.grad(cross_entropy(logits.index_put_((rows, labels), target), labels), x)

    return step


def by_hand(head: Tensor) -> Step:
    """All logits in one buffer, softmax in place, gradient written by hand: the least that holds B×C."""
    x, labels = batch(len(head))
    rows = torch.arange(BATCH)

    def step() -> object:
        unit = normalize(x)
        cosine = (unit.detach() * head[labels]).sum(dim=1).requires_grad_()
        target = ARCFACE(cosine)
        with torch.no_grad():
            weights = (SCALE * unit.detach()) @ head.T
            weights[rows, labels] = SCALE * target
            torch.softmax(weights, dim=1, out=weights)
            slope = (weights[rows, labels] - 1) * torch.autograd.grad(target, cosine, torch.ones(BATCH))[0]
            weights[rows, labels] = slope
            toward = weights @ head * (SCALE / BATCH)
        return torch.autograd.grad(unit, x, toward)

    return step


def trained(head: Tensor) -> Step:
    """Take a step of a trained head the way arcface_torch does it. Leaves ``head`` changed.

    Unit rows anew, arccos and cos of every logit without autograd, gradient of C×D, SGD with momentum and weight decay.
    """
    x, labels = batch(len(head))
    weight = torch.nn.Parameter(head)
    optimiser = torch.optim.SGD([weight], lr=1e-6, momentum=0.9, weight_decay=5e-4)
    rows = torch.arange(BATCH)

    def step() -> object:
        logits = linear(normalize(x), normalize(weight)).clamp(-1, 1)
        with torch.no_grad():
            logits.arccos_()
            logits[rows, labels] += 0.5
            logits.cos_()
        loss = cross_entropy(logits * SCALE, labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        return x.grad

    return step


def torchs_own(head: Tensor) -> Step:
    """torch.nn.functional.linear_cross_entropy (2.13): chunked, no margin."""
    x, labels = batch(len(head))
    peer = torch.nn.functional.linear_cross_entropy
    return lambda: torch.autograd.grad(peer(SCALE * normalize(x), head, labels), x)


def products(head: Tensor) -> Step:
    """Compute the floor: the two bare products, logits and weighted centres, in chunks that suit the cache."""
    queries = torch.randn(BATCH, DIM).to(head.dtype)
    logits = torch.empty(BATCH, 1024, dtype=head.dtype)
    total = torch.empty(BATCH, DIM, dtype=head.dtype)

    def step() -> object:
        for start in range(0, len(head), 1024):
            rows = head[start : start + 1024]
            part = logits[:, : len(rows)]
            torch.mm(queries, rows.T, out=part)
            torch.mm(part, rows, out=total)
        return total

    return step


CONTENDERS: dict[str, tuple[Callable[[Tensor], Step], torch.dtype]] = {
    "streaming fp32": (streaming, torch.float32),
    "streaming bf16 head": (streaming, torch.bfloat16),
    "two bare products fp32": (products, torch.float32),
    "two bare products bf16": (products, torch.bfloat16),
    "materialising, plain": (plain, torch.float32),
    "materialising, fewest copies": (plain_lean, torch.float32),
    "materialising, by hand in place": (by_hand, torch.float32),
    "trained head": (trained, torch.float32),
    "streaming fp32, no margin": (streaming_softmax, torch.float32),
    "linear_cross_entropy, no margin": (torchs_own, torch.float32),
}
TRAINED = {"trained head"}
NAIVE = ("materialising, plain", "materialising, fewest copies")


def make_head(classes: int, dtype: torch.dtype) -> Tensor:
    """Random unit rows, made in parts so that the making leaves no large peak behind."""
    torch.manual_seed(0)
    head = torch.empty(classes, DIM, dtype=dtype)
    for start in range(0, classes, 10_000):
        part = head[start : start + 10_000]
        part.copy_(normalize(torch.randn(len(part), DIM)))
    return head


@dataclass(frozen=True)
class Turn:
    """One step: CPU seconds of its thread, and MB of resident memory above the level before it, at most."""

    seconds: float
    extra_mb: float


def rounds_of(names: list[str], classes: int, rounds: int) -> Iterator[dict[str, list[Turn]]]:
    """Every contender in turn, ``rounds`` times; yields all turns so far after each round."""
    heads = {dtype: make_head(classes, dtype) for dtype in (torch.float32, torch.bfloat16)}
    for make, dtype in CONTENDERS.values():
        make(heads[dtype][:2048].clone())()  # what the libraries keep for themselves
    turns: dict[str, list[Turn]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            turns[name].append(forked(name, heads[CONTENDERS[name][1]]))
        yield turns


def write(classes: int, turns: dict[str, list[Turn]]) -> None:
    """Put the figures of so many classes into the JSON beside the others."""
    found = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {"classes": {}}
    found |= {"torch": torch.__version__, "batch": BATCH, "dim": DIM, "scale": SCALE, "threads": 1}
    found["classes"][str(classes)] = {
        name: {
            "seconds": [turn.seconds for turn in each],
            "median_seconds": statistics.median(turn.seconds for turn in each),
            "extra_mb": statistics.median(turn.extra_mb for turn in each),
        }
        for name, each in turns.items()
    }
    found["classes"] = dict(sorted(found["classes"].items(), key=lambda item: int(item[0])))
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def forked(name: str, head: Tensor) -> Turn:
    """``one_turn`` in a process of its own that sees the same head."""
    ours, theirs = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=lambda: theirs.send(one_turn(name, head)))
    process.start()
    theirs.close()
    turn: Turn = ours.recv()
    process.join()
    return turn


def one_turn(name: str, head: Tensor) -> Turn:
    """Take a step, after one before it where that is what makes the gradient and the momentum of a trained head."""
    make, _ = CONTENDERS[name]
    make(head[:2048].clone())()  # a forked process reads the libraries' pages anew
    step = make(head)
    if name in TRAINED:
        step()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # freed memory that the step could take again would not be seen
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak counts from here
    held, before = status("VmRSS"), time.thread_time()
    step()
    return Turn(time.thread_time() - before, round((status("VmHWM") - held) / 1024, 1))


def status(field: str) -> int:
    """Read a figure of this process in kB."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))


def ratio(part: dict[str, Any], name: str, baseline: str) -> float:
    """Median over the rounds of the time of ``name`` as a share of that of ``baseline``."""
    pairs = zip(part[name]["seconds"], part[baseline]["seconds"], strict=True)
    return statistics.median(a / b for a, b in pairs)


def best_naive(part: dict[str, Any]) -> str:
    """Time the faster of the two materialising versions that autograd differentiates."""
    return min(NAIVE, key=lambda name: float(part[name]["median_seconds"]))


def table(results: dict[str, Any]) -> str:
    """Markdown: every contender, its time as a share of the best materialising version, and its extra memory."""
    text = [
        f"B={results['batch']}, D={results['dim']}, one thread, torch {results['torch']}. Time as a share of the best "
        "materialising version that autograd differentiates (bold); extra memory is the peak above head and batch.",
        "",
        "| C | version | CPU seconds | of the best materialising | extra MB |",
        "| --- | --- | --- | --- | --- |",
    ]
    for classes, part in results["classes"].items():
        best = best_naive(part)
        for name, row in part.items():
            shown = f"**{name}**" if name == best else name
            text.append(
                f"| {int(classes):,} | {shown} | {row['median_seconds']:.3f} | {ratio(part, name, best):.2f}× "
                f"| {row['extra_mb']:,.0f} |"
            )
    text += ["", "| C | claim | ratio |", "| --- | --- | --- |"]
    for classes, part in results["classes"].items():
        claims = [
            ("streaming fp32 over its two bare products", "streaming fp32", "two bare products fp32"),
            ("streaming bf16 over its two bare products", "streaming bf16 head", "two bare products bf16"),
            ("streaming fp32 over the plain materialising version", "streaming fp32", "materialising, plain"),
            ("trained head over streaming fp32", "trained head", "streaming fp32"),
            ("trained head over streaming bf16", "trained head", "streaming bf16 head"),
            (
                "linear_cross_entropy over streaming, no margin",
                "linear_cross_entropy, no margin",
                "streaming fp32, no margin",
            ),
        ]
        for claim, name, baseline in claims:
            if name in part:
                text.append(f"| {int(classes):,} | {claim} | {ratio(part, name, baseline):.2f}× |")
    return "\n".join(text)


if __name__ == "__main__":
    sys.exit(main())
