"""The page: one file, no network, no script, no face, every number from the Evaluation."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree

import matplotlib
import numpy as np
import pytest

from pkd.toolkit.errors import MissingExtra
from pkd.toolkit.evaluation.drawing import require_plots
from pkd.toolkit.evaluation.measure import histogram, measure
from pkd.toolkit.evaluation.pairs import Pairing
from pkd.toolkit.evaluation.report import render
from pkd.toolkit.evaluation.results import Agreement, Comparison, Data, Evaluation, PairAccuracy
from pkd.toolkit.evaluation.scores import score_pairs
from pkd.toolkit.preprocess import Preprocess
from pkd.toolkit.space import describe

TEACHER = describe("teacher", "teacher", "1" * 64, Preprocess(), 8)
STUDENT = describe("student", "student", "2" * 64, Preprocess(), 8, space=TEACHER.space)


def comparison(name: str, seed: int, identities: int = 60) -> Comparison:
    random = np.random.default_rng(seed)
    labels = np.repeat(np.arange(identities), 3)
    vectors = random.normal(size=(identities, 8))[labels] + 0.6 * random.normal(size=(len(labels), 8))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    files = np.arange(len(labels))
    scores = score_pairs(Pairing(labels, labels, files, files, identities, unordered=name != "S–T"), vectors, vectors)
    query, gallery = ({"T": TEACHER, "S": STUDENT}[letter] for letter in name.split("–"))
    return measure(scores, name, query, gallery, fmrs=(0.01, 1e-3), resamples=100, seed=0)


def evaluation(**changes: object) -> Evaluation:
    fields = {
        "tool": "pkd test",
        "created": "2026-01-02T03:04:05+00:00",
        "protocol": "all pairs of one set",
        "data": Data(name="<b>set</b>", content_digest="d" * 64, images=180, identities=60, single_image_identities=0),
        "synthetic": False,
        "flip": False,
        "resamples": 100,
        "seed": 0,
        "teacher": TEACHER,
        "student": STUDENT,
        "comparisons": tuple(comparison(name, i) for i, name in enumerate(("T–T", "S–T", "S–S"))),
        "agreement": Agreement(
            mean=0.71, std=0.1, low=0.5, median=0.72, histogram=histogram(np.linspace(0.4, 0.9, 50, dtype=np.float32))
        ),
    }
    return Evaluation(**{**fields, **changes})  # type: ignore[arg-type]


PAGE = render(evaluation())


def test_the_page_needs_nothing_from_outside_and_shows_no_picture() -> None:
    outside = re.sub(r'xmlns(:xlink)?="[^"]*"', "", PAGE)
    assert not re.search(r"https?:|src=|@import|<script|<link|<img|<image|<iframe|data:", outside)
    assert PAGE.count("<svg") == 5 and PAGE.count('role="img" aria-label=') == 5


def test_the_page_is_well_formed_with_unique_ids_that_resolve() -> None:
    body = PAGE.removeprefix("<!doctype html>").replace('<meta charset="utf-8">', "").replace("<br>", "<br/>")
    body = re.sub(r'<meta name="viewport"[^>]*>', "", body).replace("class=small", 'class="small"')
    ElementTree.fromstring(body)
    ids = re.findall(r'\bid="([^"]+)"', PAGE)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r"url\(#([^)]+)\)", PAGE)) <= set(ids)
    assert set(re.findall(r'href="#([^"]+)"', PAGE)) <= set(ids)


def test_every_operating_point_and_refusal_is_on_the_page() -> None:
    made = evaluation()
    for found in made.comparisons:
        point = found.points[0]
        for number in (f"{100 * point.tar_balanced:.1f} %", f"{100 * point.tar:.1f} %", f"{point.threshold:.4f}"):
            assert number in PAGE
        assert "not resolved" in PAGE and f"{found.impostor_pairs:,} impostor pairs" in PAGE
        assert made.teacher.id in PAGE
    assert "What is not claimed" in PAGE and "FMR 0.001 is not resolved" in PAGE
    assert "&lt;b&gt;set&lt;/b&gt;" in PAGE and "<b>set</b>" not in PAGE


def test_the_page_repeats_and_leaves_matplotlib_as_it_was() -> None:
    before = dict(matplotlib.rcParams)
    assert render(Evaluation.model_validate_json(evaluation().model_dump_json())) == PAGE
    assert dict(matplotlib.rcParams) == before


def test_synthetic_faces_are_said_loudly() -> None:
    assert "Synthetic faces" not in PAGE
    assert 'class="banner"' in render(evaluation(synthetic=True))


def test_a_teacher_alone_and_a_set_that_resolves_nothing() -> None:
    alone = render(evaluation(student=None, agreement=None, comparisons=(comparison("T–T", 0, identities=5),)))
    assert "not resolved" in alone and "Teacher and student on the same image" not in alone
    tiny = comparison("T–T", 0, identities=3)
    assert not tiny.points and not tiny.det.fmr
    assert "Detection error" not in render(evaluation(student=None, agreement=None, comparisons=(tiny,)))


def test_a_pair_list_page() -> None:
    found = PairAccuracy(
        name="T–T",
        query=TEACHER.id,
        gallery=TEACHER.id,
        accuracy=0.9955,
        fold_std=0.0027,
        ci95=(0.993, 0.997),
        fold_accuracy=(0.99, 1.0),
        fold_threshold=(0.25, 0.26),
        threshold_from="the other folds",
        genuine_pairs=3000,
        impostor_pairs=3000,
    )
    page = render(evaluation(comparisons=(), pair_accuracies=(found,)))
    for text in ("99.55 %", "99.30 to 99.70 %", "0.27 points", "0.250 to 0.260", "certifies nothing"):
        assert text in page


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(MissingExtra, match=r"pip install 'pkd\[evaluate\]'"):
        require_plots()
