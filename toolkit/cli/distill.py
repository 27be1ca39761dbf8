"""pkd-distill: train a student into a teacher's embedding space, or a teacher with its classifier."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from pkd.toolkit.cli.student_check import check_student, map_lines, student_report
from pkd.toolkit.core import cli_support
from pkd.toolkit.core.cli_options import add_options, flag, validate_options
from pkd.toolkit.core.encoder_info import check_name
from pkd.toolkit.core.errors import InputError, MissingExtra
from pkd.toolkit.core.tables import shared_prefix, show_table
from pkd.toolkit.data.seen import write_seen
from pkd.toolkit.distill.models.open_encoder import open_encoder
from pkd.toolkit.encoders.base import Embeddings
from pkd.toolkit.encoders.embed import default_cache

if TYPE_CHECKING:
    from pkd.toolkit.distill.heads.audit import Audit
    from pkd.toolkit.distill.training.distributed import DistributedContext

EXAMPLES = """
  pkd-distill --teacher teacher.onnx --teacher-preprocess mean=127.5,std=127.5 --faces crops/ --out runs/student
  pkd-distill --teacher insightface:buffalo_l --faces list.txt --unlabelled u/ --method l2kd --max-minutes 60 --out RUN
  pkd-distill --teacher teacher.onnx --teacher-preprocess mean=127.5,std=127.5 --faces crops/ --out runs/adopted \\
      --student mobile.onnx --student-preprocess mean=0,std=1 --method map              (an existing model, in a minute)
  pkd-distill --method none --faces crops/ --student iresnet18 --out runs/teacher     (a teacher with its classifier)
  pkd-distill --teacher runs/teacher --method proxylesskd --faces crops/ --out RUN    (inherits that classifier)
  pkd-distill --resume --out runs/student
  torchrun --nproc_per_node 2 -m pkd.toolkit.cli.distill OPTIONS                      (over several processes or GPUs)
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    for package in ("torch", "tensorboard"):  # looked for, not imported: --help and refusals need neither
        if importlib.util.find_spec(package) is None:
            print(f"pkd-distill: {MissingExtra(package, 'train')}", file=sys.stderr)
            return MissingExtra.exit_code
    return cli_support.run(_parser(), _run, argv)


def _parser() -> argparse.ArgumentParser:
    from pkd.toolkit.distill.config import DistillConfig

    parser = cli_support.make_parser("pkd-distill", __doc__ or "", EXAMPLES)
    add_options(parser, DistillConfig)
    parser.add_argument("--resume", action="store_true", help="continue the run in --out from its last checkpoint")
    return parser


def _run(args: argparse.Namespace, console: Console) -> Mapping[str, Any]:
    from pkd.toolkit.distill.training.distributed import join_processes

    with join_processes() as context:
        if not context.is_rank_zero:  # rank 0 alone prints
            args.json, console.quiet = False, True
        return _distill(args, console, context)


def _distill(args: argparse.Namespace, console: Console, context: DistributedContext) -> Mapping[str, Any]:
    from pkd.toolkit.distill.training.loop import distill
    from pkd.toolkit.distill.training.setup import prepare

    config = _config(args)
    context.batch_share(config.batch)
    if (config.run / "student.pt").is_file():
        raise InputError(f"{config.out}: holds a finished run. Choose another --out, or delete it.")
    teacher = open_encoder(config.teacher, config.teacher_preprocess) if config.teacher else None

    def measure(student: Embeddings, expected: Embeddings, labels: NDArray[np.int64]) -> Mapping[str, Any]:
        assert teacher is not None
        return check_student(student, expected, labels, teacher.info)

    prepared = context.rank_zero_first(lambda: prepare(config, teacher, console, measure))
    if prepared.audit:
        show_table(console, _audit_table(prepared.audit))
        if prepared.audit.fault:  # the method does not classify by these labels, or it would have been refused
            console.print(f"warning: {prepared.audit.fault}")
    if prepared.start:
        for line in map_lines(prepared.start.report):
            console.print(line)
    if config.method == "map":
        config = config.model_copy(update={"steps": 0, "max_minutes": None, "precision": "fp32"})
    summary = distill(config, prepared, teacher, console, context)
    if context.is_rank_zero:
        write_seen(config.run, prepared.faces)
    console.print(f"wrote {config.out}: {summary['encoder']}, {summary['parameters']:,} parameters")
    if teacher is None or not context.is_rank_zero:
        return summary
    cache = Path(config.cache) if config.cache else default_cache()
    report = student_report(config.run, prepared.start, prepared.held_out, teacher, cache)
    for line in report.lines:
        console.print(line)
    return {**summary, **report.content}


def _config(args: argparse.Namespace) -> Any:
    from pkd.toolkit.distill.config import DistillConfig
    from pkd.toolkit.distill.training.loop import CHECKPOINT, CONFIG

    given = {name: value for name, value in vars(args).items() if name in DistillConfig.model_fields}
    run = Path(args.out)
    if not args.resume:
        if (run / CHECKPOINT).is_file():
            raise InputError(f"{run}: holds an unfinished run. Pass --resume to continue it, or choose another --out.")
        return _validated(given)
    try:
        stored = json.loads((run / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise InputError(f"{run}: nothing to resume, it holds no {CONFIG}. Start it without --resume.") from None
    for name, value in given.items():
        free = {"out", "cache", "checkpoint_seconds", "max_minutes"}
        if name not in free and _plain(value) != stored.get(name):
            raise InputError(
                f"{flag(name)} {value}: the run in {run} was started with {stored.get(name)}. "
                "Leave the option out to resume, or choose another --out."
            )
    return _validated(stored | {n: v for n, v in given.items() if n in {"out", "cache", "checkpoint_seconds"}})


def _validated(values: Mapping[str, Any]) -> Any:
    from pkd.toolkit.distill.config import DistillConfig
    from pkd.toolkit.distill.heads.margin import Margin
    from pkd.toolkit.distill.heads.resolve import HeadChoice
    from pkd.toolkit.distill.losses.registry import WeightedSum
    from pkd.toolkit.distill.models.backbones import parse

    config = validate_options(DistillConfig, values)
    if not config.adopts:
        parse(config.student)
    if config.name:
        check_name(config.name)
    Margin.parse(config.margin)
    WeightedSum.parse(config.method)
    HeadChoice.parse(config.head, config.teacher)
    return config


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple | list) else value


def _audit_table(audit: Audit) -> Table:
    def shown(value: float | None, form: str) -> str:
        return "not measurable: every class has one image" if value is None else format(value, form)

    table = Table(title=f"head audit: {audit.source}, {audit.classes:,} classes", show_header=False)
    table.add_row("mean cosine to the own centre", shown(audit.mean_cosine, ".3f"))
    table.add_row("nearest centre is the own", shown(audit.top1, ".1%"))
    sample = f", nearest centre of {audit.top1_images:,}" if audit.top1_images < audit.audited_images else ""
    table.add_row("images audited", f"{audit.audited_images:,} of {audit.images:,}{sample}")
    if audit.misplaced_classes:
        table.add_row("classes with no image nearest to their centre", f"{audit.misplaced_classes:,}")
    if audit.empty_classes:
        table.add_row("classes without an image", f"{audit.empty_classes:,}")
    alike = audit.duplicates.nearest[:5] if audit.duplicates else ()
    names = [one.identity for one in audit.worst[:5]] + [name for pair in alike for name in pair.identities]
    if common := shared_prefix(names):
        table.add_row("these names begin with", common)
    for worst in audit.worst[:5]:
        table.add_row(f"worst: {worst.identity.removeprefix(common)}", f"{worst.cosine:.3f} over {worst.images} images")
    if same := audit.duplicates:
        table.add_row(f"pairs of classes at {same.threshold:g} or more", _duplicates(audit))
        for pair in alike:
            first, second = (name.removeprefix(common) for name in pair.identities)
            images = " and ".join(f"{count:,}" for count in pair.images)
            table.add_row(f"alike: {first}, {second}", f"{pair.cosine:.3f}, {images} images")
    return table


def _duplicates(audit: Audit) -> str:
    same = audit.duplicates
    assert same is not None
    if same.left_apart is None:
        remedy = f": probably the same, --merge-duplicates {same.threshold:g} merges them" if same.pairs else ""
        return f"{same.pairs:,}{remedy}"
    gone = sum(len(m.others) for m in audit.merged)
    return f"{same.pairs:,}: {gone:,} classes merged into {len(audit.merged):,}; {same.left_apart:,} pairs left apart"


if __name__ == "__main__":
    sys.exit(main())
