"""The report's section on searches says what report.json holds, and no more."""

from __future__ import annotations

import re

import numpy as np
import pytest

from pkd.toolkit.core.encoder_info import describe
from pkd.toolkit.core.preprocess import Preprocess
from pkd.toolkit.evaluation.metrics.identification import measure_searches, search
from pkd.toolkit.evaluation.report.page import percent
from pkd.toolkit.evaluation.report.plots import open_set_curves
from pkd.toolkit.evaluation.report.reports import render
from pkd.toolkit.evaluation.results.schema import Data, Evaluation, Identification

TEACHER = describe("t", "teacher", "0" * 64, Preprocess(), 8)


def searched(people: int, enrolled: int, name: str = "T–T") -> Identification:
    random = np.random.default_rng(0)
    centres = random.normal(size=(people, 8))
    identity = np.repeat(np.arange(people), 2)
    probe, gallery = (
        (centres[who] + 0.6 * random.normal(size=(len(who), 8))).astype(np.float32)
        for who in (identity, np.arange(enrolled))
    )
    for vectors in (probe, gallery):
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    found, values = measure_searches(
        search(probe, identity, gallery, np.arange(enrolled)),
        name,
        TEACHER,
        TEACHER,
        galleries="all images of the gallery set",
        enrolled=[enrolled],
        identities=people,
        resamples=100,
        seed=0,
    )
    for point in found.points:
        samples = values[f"{name}/fnir_balanced/{point.fpir:g}"]
        assert (
            samples.shape == (100,) and point.fnir_balanced_ci95[0] <= np.median(samples) <= point.fnir_balanced_ci95[1]
        )
    return found


def evaluation(*found: Identification) -> Evaluation:
    return Evaluation(
        tool="pkd test",
        created="2026-01-01T00:00:00+00:00",
        protocol="probe images against gallery images",
        data=Data(name="x", content_digest="0" * 64, images=1, identities=1, single_image_identities=1),
        synthetic=False,
        flip=False,
        resamples=100,
        seed=0,
        teacher=TEACHER,
        student=None,
        identifications=found,
    )


def section(*found: Identification) -> str:
    """Cut the section on searches out of the page; empty where it has none."""
    cut = re.search(r"<section><h2>Finding a person.*?</section>", render(evaluation(*found)), re.DOTALL)
    return cut.group() if cut else ""


def test_the_section_holds_the_measured_rates_and_what_is_not_resolved() -> None:
    found = searched(300, 150)
    assert [point.fpir for point in found.points] == [0.1] and found.unresolved == (0.01, 0.001)
    assert found.min_fpir == 10 / 150
    page = section(found, found.model_copy(update={"name": "S–T"}))
    assert "all images of the gallery set (150 people)" in page
    assert "300 searches by 150 people who are enrolled (mated), 300 by 150 who are not" in page
    assert page.count(f"<b>{percent(found.ranks[0].rate_balanced, 1)}</b>") >= 2
    (point,) = found.points
    for said in (percent(point.fnir_balanced, 1), percent(point.fnir, 1), f"{point.threshold:.4f}"):
        assert said in page
    assert "Not resolved: FPIR 1 %, 0.1 %" in page and page.count("<figure") == 1
    assert re.findall(r'scope="col"[^>]*>([TS]–T)<', page) == ["T–T", "S–T"] * 2


def test_few_people_leave_out_what_means_nothing() -> None:
    found = searched(9, 4)
    assert [point.rank for point in found.ranks] == [1] and found.points == () and found.min_fpir is None
    assert found.curve.fpir == ()
    page = section(found)
    assert "rank 1" in page and "rank 5" not in page and "Open set" not in page
    everyone = searched(6, 6)
    assert everyone.non_mated_identities == 0 and everyone.unresolved == (0.1, 0.01, 0.001)


def test_without_searches_there_is_no_section() -> None:
    page = render(evaluation())
    assert section() == "" and "Rank-k:" not in page and "Rank-k:" in render(evaluation(searched(300, 150)))


def test_the_curve_falls_and_its_band_holds_it() -> None:
    found = searched(300, 150)
    curve = found.curve
    assert curve.fpir[0] == 1 and curve.fpir[-1] == pytest.approx(found.min_fpir)
    assert list(curve.fnir) == sorted(curve.fnir)
    assert all(low <= rate <= high for low, rate, high in zip(curve.low, curve.fnir, curve.high, strict=True))
    assert open_set_curves([found]).name == "identification"
