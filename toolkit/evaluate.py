"""Protocols: the cross matrix over all pairs of a set (or of a gallery and a probe set), and official pair lists.

"S–T" reads: the query embedded by the student, the gallery by the teacher.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TypedDict

import numpy as np

from pkd.toolkit.certificate import Certificate
from pkd.toolkit.command import tool_version
from pkd.toolkit.embed import embed_faces
from pkd.toolkit.errors import InputError
from pkd.toolkit.evaluation import Agreement, Comparison, Data, Evaluation, PairAccuracy
from pkd.toolkit.faces import FaceSet
from pkd.toolkit.measure import certify, histogram, measure
from pkd.toolkit.pair_list import PairList
from pkd.toolkit.pairs import Floats, Ints, Pairing, score_pairs
from pkd.toolkit.runtime import Embeddings, Encoder, unit_rows
from pkd.toolkit.space import EncoderInfo, combine, require_same_space
from pkd.toolkit.statistics import accuracy_interval, best_threshold, out_of_fold, require_resolved

FMRS = (1e-2, 1e-3, 1e-4, 1e-5)
"""False match rates that are reported where the set resolves them."""

Bar = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]
"""Opens a progress bar: (label, total) → a function that is told how many more are done."""


@dataclass(frozen=True)
class Options:
    """How to evaluate. The only defaults."""

    fmrs: tuple[float, ...] | None = None
    """Target false match rates; None: those of ``FMRS`` that the set resolves. Asked-for ones must be resolved."""
    flip: bool = False
    """Embed image and mirror image and add the two. Such scores get no certificate."""
    any_space: bool = False
    """Compare encoders of different spaces all the same (a control); no certificate joins them."""
    synthetic: bool = False
    """The faces are procedural."""
    resamples: int = 1000
    seed: int = 0
    cache: Path | None = None
    jobs: int | None = None


def cross_matrix(
    faces: FaceSet,
    name: str,
    teacher: Encoder,
    student: Encoder | None,
    options: Options,
    bar: Bar,
    *,
    probe: FaceSet | None = None,
) -> tuple[Evaluation, list[Certificate]]:
    """Every pair of ``faces``, or every image of ``probe`` against every image of the gallery ``faces``.

    Raises InputError for a set without genuine pairs or identities, SpaceMismatch, UnsupportedFmr.
    """
    cells = _cells(teacher, student, options, with_probe=probe is not None)
    query = faces if probe is None else probe
    data, plain = _pair_up(faces, query, name, options.cache)
    pairings = {True: plain, False: plain}
    if probe is None:
        pairings[True] = Pairing(
            plain.query, plain.gallery, plain.query_file, plain.gallery_file, plain.identities, unordered=True
        )
    for fmr in options.fmrs or ():
        require_resolved(plain, fmr)

    vectors: dict[tuple[str, bool], Embeddings] = {}
    for letter, encoder in _encoders(teacher, student):
        vectors[letter, False] = _embed(encoder, faces, options, bar)
        vectors[letter, True] = vectors[letter, False] if probe is None else _embed(encoder, probe, options, bar)

    comparisons: list[Comparison] = []
    certificates: list[Certificate] = []
    by_letter = dict(_encoders(teacher, student))
    for q, g in cells:
        label = f"{q}–{g}"
        pairing = pairings[q == g]
        with bar(f"scoring {label}", 2 * len(query)) as advance:
            scores = score_pairs(pairing, vectors[q, True], vectors[g, False], seed=options.seed, advance=advance)
        with bar(f"intervals {label}", options.resamples) as advance:
            comparison = measure(
                scores,
                label,
                by_letter[q].info,
                by_letter[g].info,
                fmrs=options.fmrs or FMRS,
                resamples=options.resamples,
                seed=options.seed,
                advance=advance,
            )
        same_space = by_letter[q].info.space == by_letter[g].info.space
        if comparison.points and same_space and not options.flip:
            certificate = certify(comparison, by_letter[g].info.space, data, synthetic=options.synthetic)
            certificates.append(certificate)
            comparison = comparison.model_copy(update={"certificate": certificate.file_name})
        comparisons.append(comparison)

    agreement = None
    if student and teacher.info.space.dim == student.info.space.dim:
        agreement = _agree(vectors["T", False], vectors["S", False])
    return (
        Evaluation(
            protocol="all pairs of one set" if probe is None else "probe images against gallery images",
            data=data,
            comparisons=tuple(comparisons),
            agreement=agreement,
            notes=_notes(teacher, student, options, comparisons),
            **_common(teacher, student, options),
        ),
        certificates,
    )


def pair_list_accuracy(
    pairs: PairList,
    name: str,
    teacher: Encoder,
    student: Encoder | None,
    options: Options,
    bar: Bar,
    *,
    threshold_pairs: PairList | None = None,
    threshold_name: str = "",
) -> Evaluation:
    """Accuracy on an official pair list: each fold at the threshold that is best on the others.

    A list of one fold takes its threshold from ``threshold_pairs``, or else from the same pairs (and says so).
    """
    cells = _cells(teacher, student, options, with_probe=False)
    encoders = dict(_encoders(teacher, student))
    vectors = {letter: _embed(encoder, pairs.faces, options, bar) for letter, encoder in encoders.items()}
    other = threshold_pairs and {
        letter: _embed(encoder, threshold_pairs.faces, options, bar) for letter, encoder in encoders.items()
    }
    found = []
    for q, g in cells:
        scores = _pair_scores(pairs, vectors[q], vectors[g])
        if threshold_pairs and other:
            source = threshold_name
            tuned = best_threshold(_pair_scores(threshold_pairs, other[q], other[g]), threshold_pairs.same)
        elif pairs.folds == 1:
            source = "the same pairs: the accuracy is slightly too high"
            tuned = best_threshold(scores, pairs.same)
        else:
            source, tuned = "the other folds", None
        if tuned is None:
            right, thresholds = out_of_fold(scores, pairs.same, pairs.fold)
        else:
            right, thresholds = (scores >= tuned) == pairs.same, np.full(pairs.folds, tuned)
        labels = pairs.faces.labels
        per_fold = np.bincount(pairs.fold, right) / np.bincount(pairs.fold)
        found.append(
            PairAccuracy(
                name=f"{q}–{g}",
                query=encoders[q].info.id,
                gallery=encoders[g].info.id,
                accuracy=float(per_fold.mean()),
                fold_std=float(per_fold.std()) if pairs.folds > 1 else None,
                ci95=accuracy_interval(
                    right,
                    pairs.same,
                    labels[pairs.first],
                    labels[pairs.second],
                    resamples=options.resamples,
                    seed=options.seed,
                ),
                fold_accuracy=tuple(per_fold.tolist()),
                fold_threshold=tuple(thresholds.tolist()),
                threshold_from=source,
                genuine_pairs=int(pairs.same.sum()),
                impostor_pairs=int((~pairs.same).sum()),
            )
        )
    agreement = None
    if student and teacher.info.space.dim == student.info.space.dim:
        agreement = _agree(vectors["T"], vectors["S"])
    return Evaluation(
        protocol=f"pair list of {pairs.folds} folds" if pairs.folds > 1 else "pair list",
        data=_describe(name, pairs.faces.digest(), pairs.faces.labels),
        pair_accuracies=tuple(found),
        agreement=agreement,
        notes=_notes(teacher, student, options, []),
        **_common(teacher, student, options),
    )


def _cells(teacher: Encoder, student: Encoder | None, options: Options, *, with_probe: bool) -> list[tuple[str, str]]:
    """Query and gallery letter of each comparison. Over one set T–S is S–T transposed."""
    if student is None:
        return [("T", "T")]
    if student.info.id == teacher.info.id:
        raise InputError(f"student and teacher are one encoder, {teacher.info.name}. Leave --student out.")
    if not options.any_space:
        require_same_space(teacher.info, student.info)
    if teacher.info.space.dim != student.info.space.dim:
        return [("T", "T"), ("S", "S")]
    return [("T", "T"), ("S", "T"), *([("T", "S")] if with_probe else []), ("S", "S")]


def _pair_up(gallery: FaceSet, query: FaceSet, name: str, cache: Path | None) -> tuple[Data, Pairing]:
    """Number the identities and files of both sides alike. Raises InputError where nothing can be measured."""
    for faces in (gallery, query):
        if len(faces.identities) == 0 or (faces.labels < 0).any():
            raise InputError(f"{name}: holds images without identity. Give a folder per identity, or a list of such.")
    names = sorted({*gallery.identities, *query.identities})
    place = {identity: i for i, identity in enumerate(names)}
    owners = [np.array([place[x] for x in faces.identities], np.int64)[faces.labels] for faces in (query, gallery)]
    one_set = query is gallery
    digests = np.concatenate([query.digests(cache)[:], gallery.digests(cache)[:]])
    codes = np.unique(digests.view("V32").ravel(), return_inverse=True)[1].astype(np.int64)
    files = codes[: len(query)], codes[len(query) :]
    pairing = Pairing(owners[0], owners[1], files[0], files[1], len(names), unordered=False)
    if len(names) < 2:
        raise InputError(f"{name}: holds one identity ({names[0]}). Impostor pairs need at least two.")
    if pairing.genuine_pairs == 0:
        why = (
            "every identity has one image"
            if one_set
            else f"no identity has different images on both sides (gallery: {gallery.identities[0]} …, probe: "
            f"{query.identities[0]} …)"
        )
        raise InputError(f"{name}: no genuine pair: {why}. Add images of the same people.")
    if pairing.impostor_pairs == 0:
        raise InputError(f"{name}: no impostor pair. Add images of other people.")
    digest = gallery.digest() if one_set else combine([gallery.digest(), query.digest()])
    labels = owners[1] if one_set else np.concatenate(owners)
    return _describe(name, digest, labels), pairing


def _encoders(teacher: Encoder, student: Encoder | None) -> list[tuple[str, Encoder]]:
    return [("T", teacher), *([("S", student)] if student else [])]


def _embed(encoder: Encoder, faces: FaceSet, options: Options, bar: Bar) -> Embeddings:
    sums = np.zeros((len(faces), encoder.info.space.dim), np.float32)
    for flip in (False, True) if options.flip else (False,):
        label = f"embedding with {encoder.info.name}{', mirrored' if flip else ''}"
        with bar(label, len(faces)) as advance:
            sums += embed_faces(encoder, faces, flip=flip, cache=options.cache, jobs=options.jobs, advance=advance)
    return unit_rows(sums, encoder.info.name)


def _pair_scores(pairs: PairList, query: Embeddings, gallery: Embeddings) -> Floats:
    scores: Floats = np.einsum("nd,nd->n", query[pairs.first], gallery[pairs.second])
    return scores


def _agree(teacher: Embeddings, student: Embeddings) -> Agreement:
    cosine = np.einsum("nd,nd->n", teacher, student)
    low, median = np.percentile(cosine, (5, 50))
    return Agreement(
        mean=float(cosine.mean(dtype=np.float64)),
        std=float(cosine.std(dtype=np.float64)),
        low=float(low),
        median=float(median),
        histogram=histogram(cosine),
    )


def _describe(name: str, digest: str, labels: Ints) -> Data:
    counts = np.bincount(labels)
    return Data(
        name=name,
        content_digest=digest,
        images=len(labels),
        identities=int((counts > 0).sum()),
        single_image_identities=int((counts == 1).sum()),
    )


class _Common(TypedDict):
    tool: str
    created: str
    synthetic: bool
    flip: bool
    resamples: int
    seed: int
    teacher: EncoderInfo
    student: EncoderInfo | None


def _common(teacher: Encoder, student: Encoder | None, options: Options) -> _Common:
    return _Common(
        tool=tool_version(),
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        synthetic=options.synthetic,
        flip=options.flip,
        resamples=options.resamples,
        seed=options.seed,
        teacher=teacher.info,
        student=student.info if student else None,
    )


def _notes(
    teacher: Encoder, student: Encoder | None, options: Options, comparisons: list[Comparison]
) -> tuple[str, ...]:
    notes = []
    if student and student.info.space != teacher.info.space:
        compared = teacher.info.space.dim == student.info.space.dim
        notes.append(
            "Teacher and student embed into different spaces (a control): no certificate joins them"
            + (
                "."
                if compared
                else f", and {teacher.info.space.dim} and {student.info.space.dim} numbers have no cosine."
            )
        )
    if options.flip and comparisons:
        notes.append("Embeddings are sums over image and mirror image, which no server computes: no certificate.")
    if uncertified := [c.name for c in comparisons if not c.points]:
        notes.append(f"No certificate for {', '.join(uncertified)}: the set resolves none of the false match rates.")
    return tuple(notes)
