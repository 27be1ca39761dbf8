"""The page: one file, no network, no script, no face, every number from the Evaluation."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
import pytest

from pkd.toolkit.core.encoder_info import describe
from pkd.toolkit.core.errors import MissingExtra
from pkd.toolkit.core.preprocess import Preprocess
from pkd.toolkit.evaluation.metrics.operating_points import histogram, measure
from pkd.toolkit.evaluation.metrics.pair_scores import score_pairs
from pkd.toolkit.evaluation.metrics.pairing import Pairing
from pkd.toolkit.evaluation.report.drawing import require_plots
from pkd.toolkit.evaluation.report.reports import render, render_worst, verdicts
from pkd.toolkit.evaluation.results.schema import (
    Agreement,
    Comparison,
    Control,
    Data,
    Evaluation,
    LinearMap,
    PairAccuracy,
    PairOfFiles,
    Worst,
)
from pkd.toolkit.images.codec import read_rgb

TEACHER = describe("teacher", "teacher", "1" * 64, Preprocess(), 8)
STUDENT = describe("student", "student", "2" * 64, Preprocess(), 8, space=TEACHER.space)


@cache
def comparison(name: str, seed: int, identities: int = 60) -> Comparison:
    random = np.random.default_rng(seed)
    labels = np.repeat(np.arange(identities), 3)
    vectors = random.normal(size=(identities, 8))[labels] + 0.6 * random.normal(size=(len(labels), 8))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    files = np.arange(len(labels))
    scores = score_pairs(Pairing(labels, labels, files, files, identities, unordered=name != "S–T"), vectors, vectors)
    query, gallery = ({"T": TEACHER, "S": STUDENT}[letter] for letter in name.split("–"))
    return measure(scores, name, query, gallery, fmrs=(0.01, 1e-3), resamples=100, seed=0)[0]


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


CONTROL = Control(
    encoder=describe("plain", "student", "3" * 64, Preprocess(), 8),
    fit=Data(name="others", content_digest="e" * 64, images=1234, identities=567, single_image_identities=0),
    held_out_identities=113,
    maps=(
        LinearMap(
            letter="R",
            kind="affine ridge",
            encoder="plain-ridge",
            penalty=0.00125,
            fit_cosine=0.4567,
            held_out_cosine=0.321,
        ),
    ),
)


@pytest.fixture(scope="module")
def plain() -> str:
    """Render a page without extras once."""
    return render(evaluation())


def test_the_page_needs_nothing_from_outside_and_shows_no_picture(plain: str) -> None:
    outside = re.sub(r'xmlns(:xlink)?="[^"]*"', "", plain)
    assert not re.search(r"https?:|src=|@import|<script|<link|<img|<image|<iframe|data:", outside)
    assert plain.count("<svg") == 8 and plain.count('role="img" aria-label=') == 8


def test_the_page_is_well_formed_with_unique_ids_that_resolve(plain: str) -> None:
    body = plain.removeprefix("<!doctype html>").replace('<meta charset="utf-8">', "").replace("<br>", "<br/>")
    body = re.sub(r'<meta name="viewport"[^>]*>', "", body).replace("class=small", 'class="small"')
    ElementTree.fromstring(body)
    ids = re.findall(r'\bid="([^"]+)"', plain)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r"url\(#([^)]+)\)", plain)) <= set(ids)
    assert set(re.findall(r'href="#([^"]+)"', plain)) <= set(ids)


def test_every_operating_point_and_refusal_is_on_the_page(plain: str) -> None:
    made = evaluation()
    for found in made.comparisons:
        point = found.points[0]
        for number in (f"{100 * point.tar_balanced:.1f} %", f"{100 * point.tar:.1f} %", f"{point.threshold:.4f}"):
            assert number in plain
        assert "not resolved" in plain and f"{found.impostor_pairs:,} impostor pairs" in plain
        assert made.teacher.id in plain
    assert "What is not claimed" in plain and "FMR 0.001 is not resolved" in plain
    assert "&lt;b&gt;set&lt;/b&gt;" in plain and "<b>set</b>" not in plain


def test_the_page_repeats_and_leaves_matplotlib_as_it_was(plain: str) -> None:
    before = dict(matplotlib.rcParams)
    assert render(Evaluation.model_validate_json(evaluation().model_dump_json())) == plain
    assert dict(matplotlib.rcParams) == before


def numbers_of(value: object) -> list[float]:
    """Every number in report.json but the curves and histograms, which are drawn, and digests."""
    if isinstance(value, bool) or value is None:
        return []
    if isinstance(value, (int, float)):
        return [float(value)]
    if isinstance(value, str):
        return [float(n) for n in re.findall(r"(?<![0-9a-f])\d+(?:\.\d+)?(?:e-?\d+)?", value.replace(",", ""))]
    if isinstance(value, dict):
        curves = ("det", "calibration", "genuine", "impostor", "histogram", "curve")
        return [n for key, part in value.items() if key not in curves for n in numbers_of(part)]
    assert isinstance(value, list)
    return [n for part in value for n in numbers_of(part)]


METHOD = {95, 100, 2020, 2, 1.41, 1, 0, 3, 112}
"""Numbers of the method: 95 % intervals, √(2 − 2 · cosine), a figure and its year …"""


def test_no_number_on_the_page_is_missing_in_report_json() -> None:
    """Rendered from the file as a reader has it; each number must be one of the file's, rounded, or 100 times one."""
    made = evaluation(control=CONTROL, training={"S": {"method": "l2kd", "steps": 4711}})
    text = made.model_dump_json()
    page = render(Evaluation.model_validate_json(text))
    told = re.sub(r"<svg.*?</svg>|<style>.*?</style>|<code>.*?</code>|<[^>]*>", " ", page, flags=re.DOTALL)
    known = numbers_of(json.loads(text))
    wanted = re.findall(r"(?<![\w.@:-])[−-]?\d[\d,]*(?:\.\d+)?(?:e-?\d+)?", told)
    assert len(wanted) > 100
    for word in wanted:
        number = float(word.replace(",", "").replace("−", "-"))
        half = 0.5 * 10.0 ** -len(word.partition(".")[2].partition("e")[0]) if "e" not in word else 0.05 * number
        near = [abs(scale * n - number) <= half * (1 + 1e-9) for n in known for scale in (1, 100)]
        inverse = [abs(1 / n - number) <= half for n in known if n]
        assert any(near) or any(inverse) or abs(number) in METHOD, f"{word} is not in report.json"
    for figure in ("4,711", "1,234", "0.457", "0.321", "0.00125"):
        assert figure in told


def test_a_number_that_report_json_lacks_would_be_found(plain: str) -> None:
    """The page changes wherever the file does: every figure of an operating point, of distances and of a map."""
    made = evaluation(control=CONTROL)
    first = made.comparisons[0]
    point = first.points[0].model_copy(update={"tar_balanced": 0.123, "threshold": 0.9876, "tar": 0.0451})
    distances = first.distances.model_copy(update={"d_prime": 7.89, "genuine_mean": 0.4242})
    changed = first.model_copy(update={"points": (point,), "distances": distances, "eer": 0.3333})
    page = render(made.model_copy(update={"comparisons": (changed, *made.comparisons[1:])}))
    for number in ("12.3 %", "0.9876", "4.5 %", "d′ 7.89", "intra 0.42 ±", "33.33 %"):
        assert number in page and number not in plain


def test_the_worst_pairs_are_told_by_name_and_escaped(plain: str) -> None:
    worst = Worst(
        false_matches=(PairOfFiles(query="a/<i>_1.png", gallery="b/2.png", score=0.876),),
        false_non_matches=(PairOfFiles(query="c/1.png", gallery="c/2.png", score=-0.123),),
    )
    told = [c.model_copy(update={"worst": worst}) for c in evaluation().comparisons]
    made = evaluation(comparisons=tuple(told))
    page, worst_page = render(made), render_worst(made)
    assert worst_page and "a/<wbr>&lt;i&gt;_<wbr>1.png" in worst_page
    assert "0.876" in worst_page and "-0.123" in worst_page and "They may name people" in worst_page
    assert "worst.html" in page and "1.png" not in page, "a report travels in bundles, names must not"
    assert render_worst(evaluation()) is None and "worst.html" not in plain


def test_a_pair_that_is_no_better_than_chance_is_called_so() -> None:
    made = evaluation()
    first = made.comparisons[0]
    assert verdicts(made) == [] or not verdicts(made)[0].startswith("Useless")
    for tar, word in ((0.011, "Useless"), (0.4, "Poor")):
        point = first.points[0].model_copy(update={"tar_balanced": tar, "tar_balanced_ci95": (tar / 2, 2 * tar)})
        changed = made.model_copy(
            update={"comparisons": (first.model_copy(update={"points": (point,)}), *made.comparisons[1:])}
        )
        assert any(line.startswith(f"{word}: T–T accepts {100 * tar:.1f} %") for line in verdicts(changed))
        assert f"{word}: T–T accepts" in render(changed)


def test_pictures_are_written_and_those_of_an_earlier_run_go(tmp_path: Path) -> None:
    (tmp_path / "scores-X-Y.png").write_bytes(b"old")
    render(evaluation(), tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {
        f"{n}.png"
        for n in ("det", "distances", "agreement", "scores-T-T", "scores-S-T", "scores-S-S", "people-fmr", "people-tar")
    }
    height, width, _ = read_rgb(tmp_path / "det.png").shape
    assert width >= 1200 and height >= 800


def test_synthetic_faces_are_said_loudly(plain: str) -> None:
    assert "Synthetic faces" not in plain
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
