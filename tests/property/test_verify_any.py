"""The decision between two subjects, whatever they were enrolled with: as if every two templates were compared."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pkd.serving.core.schemas import ComparedTemplate
from pkd.serving.matching import verification
from pkd.serving.matching.verification import FEW, MatchRule, ProbeVector, decide, is_quick
from pkd.toolkit.certificates.certificate import CertificateFile
from pkd.toolkit.core.errors import BadVector
from tests.support import serving_bundles as made

DIM = 4
KEYLESS = SimpleNamespace(keys=None)
TEACHER = made.encoder("teacher", made.weights(1))
ENCODERS = {name: made.encoder(name, made.weights(seed), TEACHER.info.space) for seed, name in enumerate("pqr", 2)}
SHIFTS = {("p", "p"): 0.0, ("p", "q"): 0.1, ("q", "p"): 0.0, ("q", "q"): -0.3}
"""Permitted pairs, and how much higher their thresholds are; r is in none."""


def terms(pair: Any) -> Any:
    query, gallery = (ENCODERS[one].info for one in pair)
    certificate = made.certificate(query, gallery)
    scores = tuple(score if score < 0 else round(score + SHIFTS[pair], 6) for score in certificate.calibration.score)
    calibration = certificate.calibration.model_copy(update={"score": scores})
    file = CertificateFile(None, b"", certificate.model_copy(update={"calibration": calibration}), None)  # type: ignore[arg-type]
    return MatchRule(file, 0.6 + SHIFTS[pair], 1e-3, "point")


def compared(template: str) -> ComparedTemplate:
    return ComparedTemplate(gallery="g", subject="s", template=template, encoder="p")


RULES = {pair: terms(pair) for pair in SHIFTS}


def one_by_one(rules: Any, a: Any, b: Any) -> Any:
    """Every permitted comparison, in order: the first of the best ones."""
    entries = []
    for one in a:
        for other in b:
            if chosen := rules.get((one.encoder, other.encoder)):
                score = float(np.clip(np.dot(one.vector, other.vector), -1.0, 1.0))
                fmr = chosen.file.certificate.fmr_at(score).fmr
                entries.append(((score < chosen.threshold, fmr, chosen.threshold - score), score, one, other))
    best = min(entries, key=lambda entry: entry[0])
    return best[1], best[2].template, best[3].template, len(entries)


@st.composite
def subjects(draw: Any) -> Any:
    """Draw unit vectors from few directions, some twice, some a rounding error away from one another."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    directions = rng.normal(size=(draw(st.integers(1, 12)), DIM))
    noise = draw(st.sampled_from([0.0, 1e-16, 1e-12, 1e-9, 1e-3]))

    def subject(name: str, encoders: Any) -> Any:
        shown = []
        for number in range(draw(st.integers(1, 30))):
            vector = directions[rng.integers(len(directions))] + noise * rng.normal(size=DIM)
            vector = (vector / np.linalg.norm(vector)).astype(rng.choice([np.float16, np.float64])).astype(float)  # type: ignore[arg-type]
            encoder = encoders[rng.integers(len(encoders))] if number else "p"
            shown.append(ProbeVector(encoder, vector / np.linalg.norm(vector), compared(f"{name}{number}")))
        return shown

    return subject("a", draw(st.sampled_from(["p", "pq", "pqr"]))), subject("b", draw(st.sampled_from(["p", "pqr"])))


@given(subjects(), st.sampled_from([1, 7, 2**20]))
def test_many_templates_are_decided_as_if_each_two_were_compared(two: Any, at_once: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verification, "FEW", 0)
        patch.setattr(verification, "AT_ONCE", at_once)
        decision = decide(KEYLESS, RULES, *two)  # type: ignore[arg-type]
    expected = one_by_one(RULES, *two)
    assert (decision.score, decision.a, decision.b, decision.comparisons) == expected
    assert decision == decide(KEYLESS, RULES, *two) or not is_quick(*two)  # type: ignore[arg-type]


def test_vectors_of_two_sizes_are_refused_however_many_there_are() -> None:
    a = [ProbeVector("p", np.eye(DIM)[0])] * (FEW + 1)
    for many in (a[:1], a):
        with pytest.raises(BadVector, match="a has 4 numbers and b has 5"):
            decide(KEYLESS, RULES, many, [ProbeVector("p", np.eye(DIM + 1)[0])])  # type: ignore[arg-type]


def test_a_vector_that_is_no_number_is_no_answer() -> None:
    a = [ProbeVector("p", np.full(DIM, np.nan))] + [ProbeVector("p", np.eye(DIM)[0])] * FEW
    with pytest.raises(BadVector, match="NaN"):
        decide(KEYLESS, RULES, a, a[1:])  # type: ignore[arg-type]
