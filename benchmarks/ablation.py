"""Compare ways of training an adopted student, one change a row, all from the same start at equal budget.

Run as: python benchmarks/ablation.py [RUNS] [--rows NAME ...]

RUNS is the folder of the trainings (runs/students); one that is there is measured and not trained again. The start is
MobileFaceNet Y1 behind its map. Every row trains all of it by l2kd for 100 steps of 64 of 4,000 images of train.txt, so
that images come about twice; but for the change all options are the defaults. Nobody is held out, so that a training
which loses against the map is kept, too. Four to eight minutes of one core a row. It needs PKD_SHARED, and writes
benchmarks/results/ablation.json and the table of docs/adoption.md; --page writes the table alone.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from unittest import mock

from real_faces import ROOT, prose
from students import Report, Row, adopted, drawn, table, table_of_runs

from pkd.toolkit.distill.models.adopted import AdoptedNetwork

RESULTS = ROOT / "benchmarks" / "results" / "ablation.json"
BUDGET = (
    "--method", "l2kd", "--steps", "100", "--batch", "64", "--threads", "1",
    "--held-out", "0",
)  # fmt: skip


SOME = drawn(4000, seed=0)


def folded() -> AbstractContextManager[object]:
    """Leave batch normalisation folded into the convolutions."""
    return mock.patch.object(AdoptedNetwork, "restore_batch_norm", lambda self, batches: None)


def row(*options: str, freeze: str = "0") -> Row:
    """Make a row on the drawn images."""
    return Row(("--freeze", freeze, *options), SOME)


ROWS = {
    "map alone": Row(("--method", "map"), SOME),
    "defaults, all layers": row(),
    "batch normalisation left folded": Row(("--freeze", "0"), SOME, changed=folded),
    "trunk at the rate of the last layer": row("--trunk-lr", "1"),
    "live teacher": row("--teacher-live"),
    "moving average of the weights, 0.97": row("--ema", "0.97"),
    "two stored views": row("--views", "2"),
    "SGD": row("--optimizer", "sgd"),
    "last tenth of the arithmetic alone": row(freeze="0.9"),
    "ten times the rate": row("--lr", "1e-2"),
    "ten times the rate, batch normalisation left folded": Row(("--freeze", "0", "--lr", "1e-2"), SOME, changed=folded),
    "gradients clipped at 1": row("--clip-norm", "1"),
    "trunk at a hundredth of the rate": row("--trunk-lr", "0.01"),
    "no augmentation": row("--augment", "0"),
    "live teacher, a third mixed": row("--teacher-live", "--mix", "0.33"),
}


def main() -> int:
    """Train what is missing, measure, and write the JSON and the table."""
    return table_of_runs(__doc__, ROWS, lambda runs: (*adopted(), *BUDGET), None, RESULTS, text)


def text(results: Report) -> str:
    """Write what the rows are, and the rows."""
    rows = results["rows"]
    one = rows[1]
    said = prose(
        "The start is MobileFaceNet Y1 behind its map. Every row trains all layers "
        f"({one['parameters']:,} parameters) by `l2kd` for {one['steps']:,} steps of 64 of {one['images']:,} images of "
        f"{one['identities']:,} people; everything but the change is as pkd-distill does it unless told otherwise: "
        "AdamW, rate 1e-3, a tenth of it for the trunk, augmented crops taught by the embedding of the clean image. "
        "Nobody is held out, so that a training that loses against the map is shown, too. TAR at FMR 1e-3, as above; "
        "one seed."
    )
    return f"{said}\n\n{table(rows, 'change')}"


if __name__ == "__main__":
    raise SystemExit(main())
