"""Map an adopted student's features into the teacher's space by one linear layer, fitted in closed form.

With f the features, m their usual length and z = [f, m] / ‖[f, m]‖, ridge regression of the teacher's unit embedding on
z gives zW. An embedding has no length of its own, so that fW₁ + m·W₂, one plain layer, is the same embedding: the rows
are normalised for the fit, and the graph needs no operator for it. Everything comes from sums over images that are
gathered in one pass: memory does not grow with their number.

A map that predicts the teacher alone forgets some of what the model knows by itself: two of its own embeddings tell
people apart less well than before. So a share of the model's own embedding, rotated into the teacher's space by
orthogonal Procrustes, is added (``keep``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pkd.toolkit.core.errors import InputError
from pkd.toolkit.data.face_set import FaceSet
from pkd.toolkit.data.row_store import Rows
from pkd.toolkit.distill.models.adopted import Adopted
from pkd.toolkit.distill.training.setup import Measure
from pkd.toolkit.encoders.base import Embeddings, unit_rows
from pkd.toolkit.encoders.embed import embed_stored
from pkd.toolkit.encoders.linear_maps import BLOCK, Moments, fit_procrustes, fit_ridge, moments

Doubles = NDArray[np.float64]
Ints = NDArray[np.int64]
PENALTIES = tuple(float(p) for p in np.geomspace(1e-6, 1e-2, 9))
"""Ridge weights tried; z has unit length, so that they go from none to all of its variance."""
HELD_OUT = 0.2
"""Share of the people, or of the images where nobody is known, that weight and layer are chosen on."""
MOST_HELD_OUT = 4000
"""Images at most that are held out: more cost memory and tell no more."""
FEWEST_PEOPLE = 10
"""People with two images from which on people are held out, not images."""
AMOUNTS = (100, 300, 1000, 3000, 10_000, 30_000, 100_000, 300_000, 1_000_000)
"""Images after which the map is fitted on the way, for the curve."""
LAYERS = {True: "layer in front of the embedding", False: "embedding"}


@dataclass(frozen=True)
class LinearMap:
    """Hold a fitted map of the features. ``weight``: float64 width×D. ``bias``: float64 D. ``report``: plain values.

    ``own``: weight and bias that make the model's own embedding, rotated into the teacher's space; None where none of
    it is kept.
    """

    weight: Doubles
    bias: Doubles
    report: dict[str, Any]
    own: tuple[Doubles, Doubles] | None


@dataclass
class _Candidate:
    """Hold the sums of one layer's rows: ``weight`` and ``bias`` make that layer of the features."""

    front: bool
    weight: Doubles | None
    bias: Doubles | None
    length: float = 1.0
    seen: Moments | None = None
    held: Moments | None = None

    @property
    def usual(self) -> float:
        """Return the usual length of [f, m]."""
        return float(np.sqrt(2)) * self.length

    def everything(self) -> Moments:
        """Add up what was held out and what was not."""
        assert self.seen is not None and self.held is not None
        return self.seen + self.held

    def rows(self, features: Embeddings) -> Embeddings:
        """Compute z of raw features, float32 N×(d+1) of unit length."""
        values: Any = features
        if self.weight is not None and self.bias is not None:
            values = features @ self.weight.astype(np.float32) + self.bias.astype(np.float32)
        column = np.full((len(values), 1), self.length, np.float32)
        return unit_rows(np.concatenate([values, column], axis=1), "the student's features")

    def set_length(self, features: Embeddings) -> None:
        """Choose m: the root mean square of the rows' lengths."""
        self.length = 1.0
        rows = self.rows(features)
        lengths = np.sqrt(np.maximum(1 / rows[:, -1].astype(np.float64) ** 2 - 1, 0))
        self.length = float(np.sqrt(np.mean(lengths**2)))

    def layer(self, weight: Doubles) -> tuple[Doubles, Doubles]:
        """Turn a map of z, (d+1)×D, into weight and bias on the raw features."""
        inner, bias = weight[:-1], self.length * weight[-1]
        if self.weight is None or self.bias is None:
            return inner, bias
        return self.weight @ inner, self.bias @ inner + bias


@dataclass(frozen=True)
class _Found:
    candidate: _Candidate
    kind: str
    penalty: float | None
    weight: Doubles
    score: float


def fit_map(
    student: Adopted,
    targets: Rows,
    faces: FaceSet,
    *,
    cache: Path,
    measure: Measure,
    refit: bool,
    rank: int | None = None,
    keep: float = 0.0,
    seed: int = 0,
    jobs: int | None = None,
    advance: Callable[[int], None] = lambda done: None,
) -> LinearMap:
    """Fit the map on ``faces``, whose teacher embeddings are ``targets``, N×D unit rows.

    Layer, kind and ridge weight are those that do best on people who are held out (or on held-out images, where fewer
    than ``FEWEST_PEOPLE`` are known). ``refit``: then fit once more on everybody. The report says how the map did on
    the held-out ones without having seen them, and how it would have done with fewer images. ``rank``: of the map, for
    a smaller student. ``keep``: length of the model's own embedding that is added to a teacher's
    of length 1. Raises InputError for fewer than 20 images.
    """
    if len(faces) < 20:
        raise InputError(f"--method map: {len(faces)} images are too few to fit a map on. Give 100 or more.")
    most = min(student.width, targets.shape[1]) - 1
    if rank is not None and rank > most:
        raise InputError(f"--map-rank {rank}: saves nothing from {most + 1} on. Leave it out, or give less.")
    features = embed_stored(student.features, faces, cache=cache, jobs=jobs, advance=advance)
    random = np.random.default_rng(seed)
    held, by_people = hold_out(faces.labels, random)
    order = random.permutation(np.setdiff1d(np.arange(len(faces)), held))
    head = student.weight.shape[0] != student.weight.shape[1] or not np.allclose(student.weight, np.eye(student.width))
    candidates = [_Candidate(head, None, None)]
    if head:
        candidates.append(_Candidate(False, student.weight, student.bias))
    x, y = features[held], targets[held]
    for candidate in candidates:
        candidate.set_length(features[order[:BLOCK]])
        candidate.held = moments(candidate.rows(x), y)

    curve: list[dict[str, Any]] = []
    found: list[_Found] = []
    start = 0
    for stop in [*(n for n in AMOUNTS if n < 0.9 * len(order)), len(order)]:
        for first in range(start, stop, BLOCK):
            rows = order[first : min(first + BLOCK, stop)]
            f, t = features[rows], targets[rows]
            for candidate in candidates:
                gathered = moments(candidate.rows(f), t)
                candidate.seen = gathered if candidate.seen is None else candidate.seen + gathered
        start = stop
        found = [each for candidate in candidates for each in _fits(candidate, last=stop == len(order))]
        best = max(found, key=lambda each: each.score)
        if rank is not None:
            best = _of_rank(best, rank)
        weight, bias, own = _layer(best, candidates[-1], keep)
        mapped = unit_rows((x @ weight + bias).astype(np.float32), "the map")
        curve.append({"images": stop, **_described(best), "cosine": _cosine(mapped, y)})
    measured = measure(mapped, y, faces.labels[held])
    if refit:
        best = _refitted(best)
        best = best if rank is None else _of_rank(best, rank)
        for candidate in candidates:
            candidate.seen = candidate.everything()
        weight, bias, own = _layer(best, candidates[-1], keep)
    report = {
        **_described(best),
        "images": len(faces),
        "held_out": {
            "by": "people" if by_people else "images",
            "people": len(np.unique(faces.labels[held][faces.labels[held] >= 0])),
            "images": len(held),
            "cosine": curve[-1]["cosine"],
            **measured,
        },
        "tried": [{**_described(each), "score": each.score} for each in found],
        "curve": curve,
    }
    return LinearMap(weight, bias, report, own)


def _layer(best: _Found, embedding: _Candidate, keep: float) -> tuple[Doubles, Doubles, tuple[Doubles, Doubles] | None]:
    """Make weight and bias on raw features of a map, with the own embedding added; and those of the own one alone."""
    (weight, bias), inner = best.candidate.layer(best.weight), embedding.seen
    if not keep or inner is None:
        return weight, bias, None
    turned = _procrustes(inner)
    own = embedding.layer(turned)
    # at features of the usual length the map predicts a teacher's embedding of length 1, and the own one has ``keep``
    usual = np.sqrt(np.vdot(turned, inner.xx @ turned) / inner.n) * embedding.usual
    share = keep * best.candidate.usual / usual
    return weight + share * own[0], bias + share * own[1], own


def hold_out(labels: Ints, random: np.random.Generator, share: float = HELD_OUT) -> tuple[Ints, bool]:
    """Choose images to hold out, and tell whether they are all those of some people."""
    people, counts = np.unique(labels[labels >= 0], return_counts=True)
    if (counts > 1).sum() < FEWEST_PEOPLE:
        count = min(MOST_HELD_OUT, max(1, round(share * len(labels))))
        return np.sort(random.choice(len(labels), count, replace=False)), False
    order = random.permutation(len(people))
    most = np.searchsorted(np.cumsum(counts[order]), MOST_HELD_OUT, side="right")
    chosen = people[order[: max(2, min(round(share * len(people)), int(most)))]]
    return np.flatnonzero(np.isin(labels, chosen)), True


def _fits(candidate: _Candidate, *, last: bool) -> list[_Found]:
    """Fit every ridge weight, and return the best; and, at the ``last`` amount, Procrustes where the sizes allow."""
    seen, held = candidate.seen, candidate.held
    assert seen is not None and held is not None
    values, vectors = np.linalg.eigh(seen.xx / seen.n)
    turned = vectors.T @ seen.xy / seen.n
    gram = (vectors.T @ held.xx @ vectors).astype(np.float32)  # enough to compare by, at half the time
    cross = vectors.T @ held.xy
    scored = []
    for penalty in PENALTIES:
        inner = turned / (np.maximum(values, 0) + penalty)[:, None]
        length = np.vdot(inner, gram @ inner.astype(np.float32))
        score = float(np.vdot(inner, cross) / np.sqrt(held.n * length))
        scored.append((score, penalty, inner))
    score, penalty, inner = max(scored, key=lambda each: each[0])
    made = [_Found(candidate, "ridge", penalty, vectors @ inner, score)]
    width, dim = len(seen.x) - 1, len(seen.y)
    if last and width <= dim:
        weight = _procrustes(seen)
        length = np.vdot(weight, held.xx @ weight)
        score = float(np.vdot(weight, held.xy) / np.sqrt(held.n * length))
        made.append(_Found(candidate, "procrustes", None, weight, score))
    return made


def _procrustes(m: Moments) -> Doubles:
    """Fit an orthogonal map of the rows without their constant."""
    weight, _ = fit_procrustes(Moments(m.n, m.x[:-1], m.y, m.xx[:-1, :-1], m.xy[:-1]))
    return np.concatenate([weight, np.zeros((1, weight.shape[1]))])


def _refitted(found: _Found) -> _Found:
    """Fit the same kind with the same weight on everybody."""
    m = found.candidate.everything()
    if found.penalty is None:
        weight = _procrustes(m)
    else:
        weight, _ = fit_ridge(m, found.penalty, affine=False)
    return _Found(found.candidate, found.kind, found.penalty, weight, found.score)


def _of_rank(found: _Found, rank: int) -> _Found:
    """Reduce a map to the rank-``rank`` one whose results differ least (reduced-rank regression, Izenman 1975)."""
    assert found.candidate.seen is not None
    _, axes = np.linalg.eigh(found.weight.T @ found.candidate.seen.xx @ found.weight)
    kept = axes[:, -rank:]
    return replace(found, weight=found.weight @ kept @ kept.T)


def _cosine(a: Embeddings, b: Embeddings) -> float:
    return float(np.einsum("nd,nd->n", a, b).mean(dtype=np.float64))


def _described(found: _Found) -> dict[str, Any]:
    return {"layer": LAYERS[found.candidate.front], "kind": found.kind, "penalty": found.penalty}
