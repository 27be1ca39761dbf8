"""The end of the report: what is not claimed, where everything comes from, and how it was measured."""

from __future__ import annotations

from html import escape

from pkd.toolkit.evaluation.page import bullets, facts, section
from pkd.toolkit.evaluation.results import Comparison, Evaluation
from pkd.toolkit.space import EncoderInfo, short


def not_claimed(e: Evaluation) -> str:
    """Notes, and the false match rates that the set does not resolve."""
    reasons = sorted({r.reason for c in e.comparisons for r in c.refused})
    lines = bullets(escape(line) for line in (*e.notes, *reasons))
    return section("What is not claimed", lines) if lines else ""


def provenance(e: Evaluation) -> str:
    """The images, the encoders and the run."""
    single = f"; {e.data.single_image_identities:,} of them with one image" if e.data.single_image_identities else ""
    rows = [
        ("Images", f"{e.data.images:,} of {e.data.identities:,} identities{single}"),
        ("Set", f"{escape(e.data.name)}{' (synthetic)' if e.synthetic else ''}"),
        ("Digest", f"<code>{e.data.content_digest}</code>"),
        ("Teacher", _encoder(e.teacher)),
        *([("Student", _encoder(e.student))] if e.student else []),
        ("Embedding", "image + mirror image" if e.flip else "image as it is"),
        ("Intervals", f"{e.resamples:,} resamples of the identities, seed {e.seed}"),
        ("Certificates", "<br>".join(_certificate(c) for c in e.comparisons) or "none: a pair list certifies nothing"),
        ("Made", f"{escape(e.created)} by {escape(e.tool)}"),
    ]
    return section("Data and encoders", facts(rows))


def _certificate(c: Comparison) -> str:
    return f"{c.name}: " + (f"<code>{escape(c.certificate)}</code>" if c.certificate else "none")


def _encoder(info: EncoderInfo) -> str:
    return (
        f"<code>{escape(info.id)}</code><br>{info.space.dim} numbers, {escape(info.numeric_mode)}, "
        f"{escape(info.preprocess.name)}, space <code>{escape(short(info.space.id))}</code>"
    )


def how_measured(e: Evaluation) -> str:
    """What the words and the intervals mean."""
    lines = [
        "The score of a pair is the cosine of the two embeddings; it matches when the score is at or above the "
        "threshold.",
        "Intervals come from drawing the <em>identities</em> again with replacement, not the pairs: pairs that share a "
        "person are not independent. Pairs between two copies of one drawn person are left out.",
    ]
    if e.comparisons:
        lines += [
            "All pairs count, except an image with itself or a byte-identical copy. Over one set, S–T takes every "
            "ordered pair of two images, T–T and S–S every pair once.",
            "FMR (false match rate): the fraction of pairs of different people that match. TAR (true accept rate): the "
            "fraction of pairs of the same person that match. <em>Every identity alike</em> averages over people, so "
            "that no one with many images dominates; <em>every pair alike</em> is the raw fraction.",
            "Each threshold is the smallest at which the measured FMR is no larger than the target. In every resample "
            "it is found again, so a TAR interval includes the uncertainty of the threshold. The false match "
            "rates below the thresholds keep the threshold and let the people vary.",
            "A false match rate is reported only where at least ten of the distinct pairs of different people would be "
            "expected to match by chance at it.",
        ]
    if e.pair_accuracies:
        lines.append(
            "Accuracy is the fraction of right decisions. With folds, each is decided at the threshold that is best on "
            "the others. The interval holds the thresholds and varies the people."
        )
    return section("How this was measured", bullets(lines, "small"))
