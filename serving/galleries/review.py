"""Compare everybody in a gallery: find subjects who look like one person, and templates that look like another's.

Each pair of subjects is scored by its best pair of templates. Beside the score stands what chance would do: the number
of pairs of different people, among all that were compared here, that reach such a score, which is the false match rate
at the score times the pairs of templates. So a list that ends at one expected false pair holds one by chance, however
large the gallery is.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from pkd.serving.core.gallery_schemas import DoubtfulPair, Outlier, Review
from pkd.serving.galleries.store import Subject
from pkd.toolkit.certificates.certificate import Certificate
from pkd.toolkit.certificates.extrapolation import threshold_for
from pkd.toolkit.core.errors import InputError, UnsupportedFmr
from pkd.toolkit.core.progress import Progress, no_progress

Certificates = Mapping[tuple[str, str], Certificate]
"""Ordered pair of encoders → its certificate."""
BLOCK = 1024
"""Templates that are compared with all others at once."""
MOST_PAIRS = 100_000
"""Most doubtful pairs that are kept: a list of more tells that the threshold is wrong for these people."""
Floats = NDArray[np.float32]


@dataclass
class _Rows:
    subjects: list[int] = field(default_factory=list)
    templates: list[str] = field(default_factory=list)
    vectors: list[Floats] = field(default_factory=list)


def review(
    subjects: Iterable[Subject],
    certificates: Certificates,
    *,
    expected_false: float = 1.0,
    own_fmr: float = 1e-3,
    progress: Progress = no_progress,
) -> Review:
    """Look at everybody. ``expected_false``: how many pairs of different people the list may hold by chance.

    ``own_fmr``: a template below the threshold for this rate against all others of its subject is an outlier. Raises
    InputError where more pairs than ``MOST_PAIRS`` are doubtful.
    """
    names: list[str] = []
    rows: dict[str, _Rows] = defaultdict(_Rows)
    for subject in subjects:
        for template in subject.templates:
            if template.vector is not None:
                of = rows[template.encoder]
                of.subjects.append(len(names))
                of.templates.append(template.id)
                of.vectors.append(template.vector)
        names.append(subject.id)
    templates = sum(len(of.templates) for of in rows.values())
    made = Review(subjects=len(names), templates=templates, compared=0, pairs=[], outliers=[], not_compared={})
    plan = [(a, b) for i, a in enumerate(sorted(rows)) for b in sorted(rows)[i:]]
    chosen = {pair: known for pair in plan if (known := _certificate(certificates, *pair))}
    covered = {encoder for pair in chosen for encoder in pair}
    made.not_compared = {one: len(of.templates) for one, of in rows.items() if one not in covered}
    stacked = {one: (_unit(np.stack(of.vectors)), np.array(of.subjects)) for one, of in rows.items() if one in covered}
    for a, b in chosen:
        n = len(stacked[a][1]) * len(stacked[b][1])
        made.compared += (n - _same(stacked[a][1], stacked[b][1])) // (2 if a == b else 1)
    best: dict[tuple[int, int], DoubtfulPair] = {}
    own: dict[tuple[str, str], list[tuple[float, float, int, float]]] = defaultdict(list)
    elsewhere: dict[tuple[str, str], tuple[float, str]] = {}
    for (a, b), certificate in chosen.items():
        rate = expected_false / max(made.compared, 1)
        wanted = _threshold(certificate, rate)
        low = _threshold(certificate, own_fmr) or 2.0
        missed = _missed(certificate, own_fmr)
        with progress(f"comparing {len(rows[a].templates):,} templates", len(rows[a].templates)) as advance:
            (x, of_x), (y, of_y) = stacked[a], stacked[b]
            for start in range(0, len(x), BLOCK):
                part = slice(start, start + BLOCK)
                scores = x[part] @ y.T
                same = of_x[part][:, None] == of_y[None, :]
                _look_at_own(rows, a, b, start, scores, same, low, missed, own)
                scores[same] = -2
                if wanted is not None:
                    _look_at_others(
                        rows, names, (a, b), start, scores, wanted, certificate, made.compared, best, elsewhere
                    )
                advance(len(scores))
                if len(best) > MOST_PAIRS:
                    raise InputError(
                        f"over {MOST_PAIRS:,} pairs are doubtful: these people are not like those of the certificate, "
                        "or many are enrolled twice. Allow fewer expected false pairs, or evaluate on people like them."
                    )
    made.pairs = sorted(best.values(), key=lambda one: (one.expected_false, -one.score, one.subject, one.other))
    owner = {(id, encoder): of.subjects[i] for encoder, of in rows.items() for i, id in enumerate(of.templates)}
    for (encoder, id), found in own.items():
        if all(reached < needed for reached, needed, _, _ in found):
            reached, needed, _, missed = max(found, key=lambda one: one[0] - one[1])
            near = elsewhere.get((encoder, id))
            others, name = sum(one[2] for one in found), names[owner[id, encoder]]
            made.outliers.append(
                Outlier(
                    subject=name,
                    template=id,
                    encoder=encoder,
                    score=reached,
                    threshold=needed,
                    others=others,
                    genuine_below=missed,
                    nearest=near[1] if near else None,
                )
            )
    made.outliers.sort(key=lambda one: (one.score - one.threshold, one.subject, one.template))
    return made


def _look_at_own(
    rows: Mapping[str, _Rows],
    a: str,
    b: str,
    start: int,
    scores: Floats,
    same: NDArray[np.bool_],
    low: float,
    missed: float,
    own: dict[tuple[str, str], list[tuple[float, float, int, float]]],
) -> None:
    """Note for each template its best score against the subject's others, and the threshold that it needs."""
    others = same.copy()
    if a == b:
        at = np.arange(len(scores))
        others[at, start + at] = False
    for i in np.flatnonzero(others.any(axis=1)).tolist():
        best = float(scores[i][others[i]].max())
        own[a, rows[a].templates[start + i]].append((best, low, int(others[i].sum()), missed))
    if a != b:
        for j in np.flatnonzero(others.any(axis=0)).tolist():
            best = float(scores[:, j][others[:, j]].max())
            own[b, rows[b].templates[j]].append((best, low, int(others[:, j].sum()), missed))


def _look_at_others(
    rows: Mapping[str, _Rows],
    names: Sequence[str],
    pair: tuple[str, str],
    start: int,
    scores: Floats,
    needed: float,
    certificate: Certificate,
    compared: int,
    best: dict[tuple[int, int], DoubtfulPair],
    elsewhere: dict[tuple[str, str], tuple[float, str]],
) -> None:
    """Keep what reaches the threshold, each pair of subjects once, by its most telling pair of templates."""
    a, b = pair
    for i, j in np.argwhere(scores >= np.float32(needed)).tolist():
        if a == b and start + i >= j:
            continue
        score, (p, q) = float(scores[i, j]), (rows[a].subjects[start + i], rows[b].subjects[j])
        rate, calibrated = rate_at(certificate, score)
        one = DoubtfulPair(
            subject=names[p],
            other=names[q],
            template=rows[a].templates[start + i],
            other_template=rows[b].templates[j],
            encoders=pair,
            score=score,
            expected_false=rate * compared,
            calibrated=calibrated,
        )
        for side, template, subject in ((a, one.template, q), (b, one.other_template, p)):
            if score > elsewhere.get((side, template), (-2.0, ""))[0]:
                elsewhere[side, template] = score, names[subject]
        key = (min(p, q), max(p, q))
        if key not in best or one.expected_false < best[key].expected_false:
            best[key] = one


def rate_at(certificate: Certificate, score: float) -> tuple[float, bool]:
    """Return the false match rate at a score, and whether it was measured; beyond it the tail is followed.

    The inverse of ``threshold_for``: log FMR falls by a straight line, with the slope of its last decade.
    """
    found = certificate.fmr_at(score)
    if not found.is_upper_bound:
        return found.fmr, True
    near, far = _threshold(certificate, found.fmr / 10), _threshold(certificate, found.fmr / 100)
    if near is None or far is None or far <= near:
        return found.fmr, False
    return float(min(found.fmr, found.fmr / 10 * 10 ** (-(score - near) / (far - near)))), False


def _certificate(certificates: Certificates, a: str, b: str) -> Certificate | None:
    return certificates.get((a, b)) or certificates.get((b, a))


def _threshold(certificate: Certificate, fmr: float) -> float | None:
    try:
        return threshold_for(certificate, fmr).score
    except UnsupportedFmr:
        return None


def _missed(certificate: Certificate, fmr: float) -> float:
    """Return 1 − TAR at the nearest operating point that is no stricter than ``fmr``."""
    points = [point for point in certificate.points if point.fmr <= fmr * (1 + 1e-9)] or [certificate.points[-1]]
    return 1 - points[0].tar_balanced


def _same(a: NDArray[np.int64], b: NDArray[np.int64]) -> int:
    """Count the pairs of templates that belong to one subject."""
    size = int(max(a.max(initial=0), b.max(initial=0))) + 1
    return int(np.bincount(a, minlength=size) @ np.bincount(b, minlength=size))


def _unit(vectors: Floats) -> Floats:
    unit: Floats = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    return unit
