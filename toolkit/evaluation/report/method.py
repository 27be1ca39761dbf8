"""The end of the report: what is not claimed, where everything comes from, and how it was measured."""

from __future__ import annotations

from html import escape

from pkd.toolkit.core.encoder_info import EncoderInfo, short
from pkd.toolkit.evaluation.report.html import bullets, facts, section
from pkd.toolkit.evaluation.report.identification import how_searched
from pkd.toolkit.evaluation.results.schema import Comparison, Evaluation, TemplateData, Training


def not_claimed(e: Evaluation) -> str:
    """Notes, and the false match rates that the set does not resolve."""
    reasons = sorted({r.reason for c in e.comparisons for r in c.refused})
    lines = bullets(escape(line) for line in (*e.notes, *reasons))
    return section("What is not claimed", lines) if lines else ""


def provenance(e: Evaluation) -> str:
    """The images, the encoders with how they were trained, and the run."""
    single = f"; {e.data.single_image_identities:,} of them with one image" if e.data.single_image_identities else ""
    control = e.control
    rows = [
        ("Images", f"{e.data.images:,} of {e.data.identities:,} identities{single}"),
        ("Set", f"{escape(e.data.name)}{' (synthetic)' if e.synthetic else ''}"),
        *([("Templates", _templates(e.templates))] if e.templates else []),
        ("Digest", f"<code>{e.data.content_digest}</code>"),
        *(
            (name, _encoder(info) + told_training(e.training.get(name[0])))
            for name, info in (("Teacher", e.teacher), ("Student", e.student), ("Control", control and control.encoder))
            if info
        ),
        *(
            [("Maps fitted on", f"{escape(control.fit.name)}<br><code>{control.fit.content_digest}</code>")]
            if control and control.fit
            else []
        ),
        ("Embedding", "image + mirror image" if e.flip else "image as it is"),
        ("Intervals", f"{e.resamples:,} resamples of the identities, seed {e.seed}"),
        ("Certificates", "<br>".join(_certificate(c) for c in e.comparisons) or "none: a pair list certifies nothing"),
        ("Made", f"{escape(e.created)} by {escape(e.tool)}"),
    ]
    return section("Data and encoders", facts(rows))


def _templates(t: TemplateData) -> str:
    loose = "loose crops aligned by the published points" if t.aligned else "aligned crops"
    score = "weighted by the published detector scores" if t.scored else "all alike"
    rebuilt = (
        f"; the subjects of {t.subjects_rebuilt:,} are rebuilt from the pairs that are declared the same"
        if t.subjects_rebuilt
        else ""
    )
    return (
        f"{t.templates:,} of {t.media:,} media: {loose}; faces {score}, averaged within a medium; media summed{rebuilt}"
    )


def told_training(told: Training | None) -> str:
    """What a run or a bundle says of the training; plain where nothing is known."""
    if not told:
        return "<br><small>training unknown: the file does not tell</small>"
    items = ", ".join(
        f"{escape(name.replace('_', ' '))} {escape(_value(value))}" for name, value in told.items() if value is not None
    )
    return f"<br><small>trained: {items}</small>"


def _value(value: str | int | float | bool | None) -> str:
    return short(value) if isinstance(value, str) else f"{value:,}" if type(value) is int else str(value)


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
        "<b>A 95 % interval</b> says how far a rate could lie from the measured one had other people like these been "
        "photographed: of a hundred such intervals about 95 hold the rate over everyone like them. They come from "
        "drawing the <em>identities</em> again with replacement, not the pairs: pairs that share a person are not "
        "independent, and intervals that take them to be are too narrow. Pairs between two copies of one drawn person "
        "are left out. No interval covers people or cameras unlike these.",
    ]
    if e.comparisons:
        lines += [
            "All pairs count, except an image with itself or a byte-identical copy. Over one set, S–T takes every "
            "ordered pair of two images, T–T and S–S every pair once.",
            "FMR (false match rate): how often two different people match, every two people alike however many images "
            "there are of them. TAR (true accept rate): how often a person matches himself, <em>every identity "
            "alike</em>. Thresholds, curves and certificates use these, for they carry over to other people. "
            "<em>Every pair alike</em> is the raw convention of published tables: every pair of images counts once in "
            "the TAR and in the FMR behind its threshold, and few people with many images dominate both.",
            "Each threshold is the smallest at which the measured FMR is no larger than the target. In every resample "
            "it is found again, so a TAR interval includes the uncertainty of the threshold. The intervals of the "
            "false match rates keep the threshold and let the people vary; they are log-normal, and the noise of "
            "single pairs, which drawing people counts three times, is counted once.",
            "<b>New</b> below a threshold is a prediction: the false match rate that a fresh set of as many people "
            "would itself <em>measure</em> at this threshold, in 95 of 100 cases. It is wider than the interval, since "
            "the fresh set has a chance of its own on top of this one’s. Compare your own measurement with it.",
            "A false match rate is reported only where at least ten of the distinct pairs of different people would be "
            "expected to match by chance at it.",
        ]
    if e.pair_accuracies:
        lines.append(
            "Accuracy is the fraction of right decisions. With folds, each is decided at the threshold that is best on "
            "the others. The interval holds the thresholds and varies the people."
        )
    lines += how_searched(e)
    return section("How this was measured", bullets(lines, "small"))
