"""Run pkd-gallery review and move: find people under two names or two under one, and put it right."""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field
from rich.console import Console
from rich.table import Table

from pkd.serving.cli.gallery_store import GalleryOptions
from pkd.toolkit.core.cli_options import Argument
from pkd.toolkit.core.cli_support import Result
from pkd.toolkit.core.errors import InputError
from pkd.toolkit.core.progress import ConsoleProgress
from pkd.toolkit.core.tables import show_table

if TYPE_CHECKING:
    from pkd.serving.core.gallery_schemas import Review
    from pkd.toolkit.certificates.certificate import Certificate


class ReviewOptions(GalleryOptions):
    """Hold what ``pkd-gallery review`` was asked for."""

    certificates: Annotated[tuple[Path, ...], Argument("BUNDLE|EVAL|FILE", repeatable=True)]
    """Bundle, evaluation or certificate that covers the gallery's templates against one another; repeatable."""
    expected_false: float = Field(default=1.0, gt=0, le=1e6)
    """Pairs of different people that the list may hold by chance."""
    own_fmr: float = Field(default=1e-3, gt=0, lt=1)
    """False match rate, a fraction, of the threshold below which a template is no match of its subject's others."""
    limit: int = Field(default=50, ge=1)
    """Lines of each table that are printed; --csv and --json have all."""
    csv: Annotated[Path | None, Argument("FILE.csv")] = None
    """Write pairs and outliers to this file, too; it names people, so it is made with mode 600."""


class MoveOptions(GalleryOptions):
    """Hold what ``pkd-gallery move`` was asked for."""

    subject: Annotated[str, Argument("FROM", positional=True)]
    """Subject whose templates are moved."""
    into: Annotated[str, Argument("INTO", positional=True)]
    """Subject who has them then."""
    template: Annotated[tuple[str, ...], Argument("ID", repeatable=True)] = ()
    """Template to move; repeatable. Without it all are, and FROM is gone: the two are merged."""
    new: bool = False
    """INTO is made by this: some templates of FROM are another person's."""


def review_gallery(options: ReviewOptions, console: Console) -> Result:
    """Compare everybody with everybody and print what is doubtful; returns what ``--json`` prints."""
    from pkd.serving.galleries.review import review

    certificates = {(c.query, c.gallery): c for c in _certificates(options.certificates)}
    with closing(options.open()) as store:
        store.get(options.gallery)
        found = review(
            store.export(options.gallery),
            certificates,
            expected_false=options.expected_false,
            own_fmr=options.own_fmr,
            progress=ConsoleProgress(console),
        )
    if options.csv:
        _write_csv(options.csv, found)
    _show(console, found, options)
    return {"gallery": options.gallery, **found.model_dump()}


def move(options: MoveOptions, console: Console) -> Result:
    """Move templates from one subject to another; returns the receipt."""
    with closing(options.open()) as store:
        there = store.subject(options.gallery, options.subject)
        done = store.move(
            options.gallery, options.subject, options.into, "pkd-gallery", templates=options.template, new=options.new
        )
        left = len(done.templates) < len(there.templates)
    console.print(
        f"{len(done.templates):,} templates of {options.subject} belong to {options.into} now"
        f"{'' if left else f', and {options.subject} is gone'}. Audit record {done.receipt.sequence}: "
        f"{done.receipt.hash}",
        markup=False,
        soft_wrap=True,
    )
    return done.model_dump()


def _certificates(sources: Sequence[Path]) -> list[Certificate]:
    from pkd.toolkit.bundle.bundle import Bundle, is_bundle
    from pkd.toolkit.certificates.certificate import read_certificate

    found: list[Certificate] = []
    for source in sources:
        if is_bundle(source):
            found += Bundle.open(source).certificates()
            continue
        folder = source / "certificates" if (source / "certificates").is_dir() else source
        paths = sorted(folder.glob("*.json")) if folder.is_dir() else [folder]
        if not paths:
            raise InputError(f"{source}: no certificates there. Give a bundle, or the --out folder of pkd-evaluate.")
        found += [read_certificate(path) for path in paths]
    return found


def _show(console: Console, found: Review, options: ReviewOptions) -> None:
    kinds: tuple[tuple[Literal["pairs", "outliers"], str], ...] = (
        ("pairs", "Subjects who may be one person"),
        ("outliers", "Templates that match none of their subject's others"),
    )
    for kind, title in kinds:
        listed = getattr(found, kind)
        table = Table(title=f"{title}: {len(listed):,}", title_justify="left")
        heads = (
            ("subject", "subject", "score", "false pairs by chance")
            if kind == "pairs"
            else ("subject", "template", "score", "needed", "genuine so low", "matches")
        )
        for head in heads:
            table.add_column(head)
        for one in listed[: options.limit]:
            if kind == "pairs":
                mark = "" if one.calibrated else " (extrapolated)"
                table.add_row(one.subject, one.other, f"{one.score:.3f}", f"{one.expected_false:.2g}{mark}")
            else:
                table.add_row(
                    one.subject, one.template, f"{one.score:.3f}", f"{one.threshold:.3f}",
                    f"{100 * one.genuine_below:.1f} %", one.nearest or "nobody",
                )  # fmt: skip
        show_table(console, table)
    console.print(
        f"{found.subjects:,} subjects, {found.templates:,} templates, {found.compared:,} pairs of templates compared; "
        f"{options.expected_false:g} false pairs expected by chance",
        soft_wrap=True,
    )
    for encoder, count in found.not_compared.items():
        console.print(
            f"{count:,} templates of {encoder} were not compared: no certificate covers them.", soft_wrap=True
        )


def _write_csv(path: Path, found: Review) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(handle, "w", newline="", encoding="utf-8") as file:
        write = csv.writer(file).writerow
        write(("kind", "subject", "other", "template", "other_template", "score", "rate", "calibrated"))
        for pair in found.pairs:
            write(
                ("pair", pair.subject, pair.other, pair.template, pair.other_template, f"{pair.score:.6f}",
                 f"{pair.expected_false:.6g}", pair.calibrated)
            )  # fmt: skip
        for one in found.outliers:
            write(
                ("outlier", one.subject, one.nearest or "", one.template, "", f"{one.score:.6f}",
                 f"{one.genuine_below:.6g}", True)
            )  # fmt: skip
