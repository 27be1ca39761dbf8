"""Search a gallery for one query: the templates of every encoder, each under its own certificate.

Scores of different encoders have no common scale; false match rates do. So every encoder's templates are searched
apart, and candidates are ranked by the false match rate at their score.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pkd.serving.core.errors import GalleryConflict
from pkd.serving.core.gallery_schemas import (
    Candidate,
    IdentifyAnswer,
    IdentifyOptions,
    NotSearched,
    NotSearchedReason,
    Searched,
)
from pkd.serving.galleries.store import Gallery, SearchResult
from pkd.serving.inference.registry import Encoders
from pkd.serving.matching.admission import another_space
from pkd.serving.matching.verification import Rank, describe_certificate, rank
from pkd.toolkit.certificates.certificate import Assurance, Certificate, CertificateFile
from pkd.toolkit.certificates.extrapolation import Threshold, threshold_for
from pkd.toolkit.core.encoder_info import short
from pkd.toolkit.core.errors import NotCertified, UnsupportedFmr


@dataclass(frozen=True)
class SearchPlan:
    """Say which templates of a gallery a query may be compared with, and why not the others."""

    files: Mapping[str, CertificateFile]
    """Template encoder → the certificate of the query's encoder against it."""
    not_searched: Mapping[str, NotSearchedReason]
    """Template encoder → why its templates are left out."""


@dataclass(frozen=True)
class MatchRule:
    """Say how far an encoder's scores must reach, and how that is known. ``threshold`` None: nothing to search."""

    file: CertificateFile
    templates: int
    threshold: Threshold | None


def plan_search(encoders: Encoders, gallery: Gallery, query: str, partial: bool) -> SearchPlan:
    """Sort the encoders that have templates in ``gallery`` by whether ``query`` (a full id) may be compared with them.

    While a migration is under way templates of the other space are left out: whoever is not moved is found in the
    first one. Raises SpaceMismatch; NotCertified where something is missing and not ``partial``, and where
    nothing is left to search.
    """
    spaces = [one.id for one in gallery.spaces]
    space = encoders.space_of(query)
    staged = {one for one in gallery.mapping.staged if gallery.templates.get(one)}
    present = sorted(encoder for encoder, count in gallery.templates.items() if count and encoder not in staged)
    apart = gallery.moving_to is not None and space is not None
    wanted = [encoder for encoder in present if not apart or encoders.space_of(encoder) == space]
    works = _works(encoders, gallery, wanted or present)
    if space is not None and space not in spaces:
        raise another_space(gallery, query, space, {"query": query, "space": space}, works)
    files = {one: file for one in present if (file := encoders.files.get((query, one)))}
    reasons: dict[str, NotSearchedReason] = {
        one: "not-certified" if one in wanted else "other-space" for one in present if one not in files
    }
    if staged and not wanted and space is not None and space != gallery.space.id:
        raise being_mapped(gallery, query, works)
    reasons |= dict.fromkeys(sorted(staged), "staged")
    missing = [one for one, reason in reasons.items() if reason == "not-certified"]
    if (missing and not partial) or (wanted and not files) or space is None:
        raise NotCertified(
            f"no certificate covers queries of {short(query)} against the templates of "
            f"{', '.join(map(short, missing or present)) or 'any encoder'} in the gallery {gallery.name!r}. "
            "Measure the pair with pkd-evaluate, use an encoder in `works`, or send partial=true to search the rest.",
            details={
                "expected": [{"query": query, "gallery": one} for one in missing or present],
                "got": {"query": query, "galleries": present},
                "works": works,
            },
        )
    return SearchPlan(files, reasons)


def being_mapped(gallery: Gallery, query: str, works: Mapping[str, Any]) -> GalleryConflict:
    """Make the error of a search among mapped templates that are not all there yet."""
    return GalleryConflict(
        f"the templates of gallery {gallery.name!r} are being mapped, and are searched once all are there. Search with "
        "an encoder of its first space until then.",
        details={"expected": {"space": gallery.space.id}, "got": {"query": query}, "works": works},
    )


def per_comparison(fpir: float, templates: int) -> float:
    """Solve for the FMR at which a search for a stranger among ``templates`` finds somebody with rate ``fpir``.

    FPIR = 1 − (1 − FMR)^N, solved for FMR, as if comparisons erred independently of one another.
    """
    return -math.expm1(math.log1p(-fpir) / templates)


def resolve_thresholds(
    plan: SearchPlan,
    found: Mapping[str, SearchResult],
    fmr: float | None,
    threshold: float | None,
    assurance: Assurance = "point",
) -> tuple[dict[str, MatchRule], dict[str, NotSearchedReason]]:
    """Give the match rule of every encoder that was searched, and the encoders that no threshold can be given for."""
    rules: dict[str, MatchRule] = {}
    refused: dict[str, NotSearchedReason] = {}
    for encoder, file in plan.files.items():
        certificate, searched = file.certificate, found[encoder].searched
        if not searched:
            rules[encoder] = MatchRule(file, 0, None)
        elif threshold is not None:
            rules[encoder] = MatchRule(file, searched, Threshold(threshold, _resolved(certificate, threshold)))
        else:
            assert fmr is not None
            try:
                rules[encoder] = MatchRule(file, searched, threshold_for(certificate, fmr, assurance))
            except UnsupportedFmr:
                refused[encoder] = "unsupported-fmr"
    return rules, refused


def candidates(rules: Mapping[str, MatchRule], found: Mapping[str, SearchResult]) -> list[Candidate]:
    """List every subject once, by the template that speaks most for them; matches first, then the smallest rates.

    Equal rates, as past the last resolved score, are ranked by the margin over the threshold. Matches come before
    rates because one certificate resolves smaller rates than another: 1e-4 past its end may match where 5e-5 does not.
    """
    best: dict[str, tuple[Rank, Candidate]] = {}
    for encoder, rule in rules.items():
        if rule.threshold is None:
            continue
        for hit in found[encoder].hits:
            rate = rule.file.certificate.fmr_at(hit.score)
            order = rank(hit.score, rule.threshold.score, rate.fmr)
            if hit.subject not in best or order < best[hit.subject][0]:
                best[hit.subject] = (
                    order,
                    Candidate(
                        subject=hit.subject,
                        template=hit.template,
                        encoder=encoder,
                        score=hit.score,
                        fmr_at_score=rate.fmr,
                        fmr_is_upper_bound=rate.is_upper_bound,
                        threshold=rule.threshold.score,
                        match=hit.score >= rule.threshold.score,
                    ),
                )
    return [one for _, one in sorted(best.values(), key=lambda entry: (entry[0], entry[1].subject))]


def describe_search(
    encoders: Encoders,
    gallery: Gallery,
    query: str,
    plan: SearchPlan,
    found: Mapping[str, SearchResult],
    options: IdentifyOptions,
    default_fpir: float,
    default_assurance: Assurance = "point",
) -> IdentifyAnswer:
    """Answer a search. ``found``: template encoder → what its search found."""
    searched = sum(found[encoder].searched for encoder in plan.files)
    fpir = None if options.threshold is not None else options.target_fpir or default_fpir
    fmr = per_comparison(fpir, searched) if fpir is not None and searched else None
    assurance = options.assurance or default_assurance
    rules, refused = resolve_thresholds(plan, found, fmr, options.threshold, assurance)
    ranked = candidates(rules, found)
    matching = sum(one.match for one in ranked)
    described = [_describe(encoders, encoder, rule) for encoder, rule in rules.items()]
    not_searched = {**plan.not_searched, **refused}
    return IdentifyAnswer(
        gallery=gallery.name,
        decision="no_match" if not matching else "match" if matching == 1 else "ambiguous",
        candidates=ranked[: options.top_k],
        query_encoder=query,
        target_fpir=fpir,
        target_fmr=fmr,
        assurance=None if fpir is None else assurance,
        templates=searched,
        calibrated=all(one.calibrated for one in described),
        searched=described,
        not_searched=[
            NotSearched(encoder=encoder, templates=gallery.templates[encoder], reason=reason)
            for encoder, reason in not_searched.items()
        ],
    )


def _describe(encoders: Encoders, encoder: str, rule: MatchRule) -> Searched:
    threshold = rule.threshold
    return Searched(
        encoder=encoder,
        templates=rule.templates,
        threshold=threshold.score if threshold else None,
        calibrated=threshold is None or threshold.calibrated,
        certificate=describe_certificate(encoders, rule.file),
    )


def _resolved(certificate: Certificate, score: float) -> bool:
    low, high = certificate.resolved_scores
    return low <= score <= high


def _works(encoders: Encoders, gallery: Gallery, present: Sequence[str]) -> dict[str, Any]:
    """List query encoders that reach every template, and for each encoder of the gallery those that reach its own."""
    each = {one: sorted(q for q, g in encoders.files if g == one) for one in present}
    if not present:
        spaces = {one.id for one in gallery.spaces}
        return {"queries": sorted({q for q, _ in encoders.files if encoders.space_of(q) in spaces}), "templates": {}}
    return {"queries": sorted(set.intersection(*(set(one) for one in each.values()))), "templates": each}
