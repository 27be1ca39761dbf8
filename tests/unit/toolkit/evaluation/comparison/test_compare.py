"""Ranking runs: paired differences, refusals of what is not over the same pairs, names, and the page."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest

from pkd.toolkit.cli.compare import main
from pkd.toolkit.core.errors import InputError
from pkd.toolkit.evaluation.comparison.compare import Ranking, rank
from pkd.toolkit.evaluation.comparison.load import read_runs
from pkd.toolkit.evaluation.metrics.paired import paired
from pkd.toolkit.evaluation.metrics.resamples import read_resample_values, write_resample_values
from pkd.toolkit.evaluation.report.page import points
from pkd.toolkit.evaluation.report.reports import render_ranking, verdict
from pkd.toolkit.evaluation.results.schema import Evaluation
from tests.support.evaluation_runs import write_run


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three students of falling quality over the same people, and the best once more under another name."""
    folder = tmp_path_factory.mktemp("runs")
    for name, noise in (("good", 0.5), ("fair", 0.75), ("poor", 1.6), ("twin", 0.5)):
        write_run(folder / name / "evaluation", name=f"net-{'good' if name == 'twin' else name}", noise=noise)
    return folder


def evals(runs: Path, *names: str) -> list[str]:
    return [str(runs / name / "evaluation") for name in names]


def test_runs_are_ranked_with_the_differences_of_their_own_draws(runs: Path) -> None:
    found = rank(read_runs(evals(runs, "poor", "good", "fair")))
    assert [r.name for r in found.runs] == ["good", "fair", "poor"]
    assert (found.cell, found.by, found.target) == ("S–T", "tar", 0.01)
    values = {name: read_resample_values(runs / name / "evaluation").values for name in ("good", "poor")}
    (versus,) = (v for v in found.pairs if (v.a, v.b) == ("good", "poor"))
    observed = found.runs[0].first.value - found.runs[2].first.value
    assert versus.difference.difference == observed
    own = paired(values["good"], values["poor"], ("S–T/tar_balanced/0.01",) * 2, observed=observed)
    assert versus.difference == own and own.ci95[0] > 0
    behind = found.runs[2].behind_best
    assert behind is not None and behind.difference == -observed and behind.ci95[0] == -versus.difference.ci95[1]
    assert found.runs[2].p_adjusted == versus.p_adjusted >= versus.difference.p
    assert found.runs[0].behind_best is None and found.smallest_p == pytest.approx(3 / 5000)
    assert versus.p_adjusted == pytest.approx(found.smallest_p), "far apart: no draw is as large"
    assert "good beats fair" in verdict(found) or "may be chance" in verdict(found)


def test_two_runs_of_one_student_do_not_differ(runs: Path) -> None:
    found = rank(read_runs(evals(runs, "good", "twin", "poor")))
    assert {r.name for r in found.runs} == {"good (good)", "good (twin)", "poor"}
    (same,) = (v for v in found.pairs if "poor" not in (v.a, v.b))
    assert same.difference.difference == 0 and same.p_adjusted == 1 and same.difference.ci95 == (0, 0)
    assert "good (good) and good (twin) are level (0.0 points" in verdict(found)
    assert points(-0.0) == points(1e-5) == points(-1e-5) == "0.0" and points(-0.0123) == "−1.2"


def test_names_can_be_given_and_must_differ(runs: Path) -> None:
    given = evals(runs, "good", "poor")
    named = rank(read_runs([f"plain net={given[0]}", f"other={given[1]}"]))
    assert [r.name for r in named.runs] == ["plain net", "other"]
    for bad, message in (
        ([f"a={given[0]}", f"a={given[1]}"], "the name of 2 runs"),
        ([f"={given[0]}", given[1]], "the name is empty"),
        ([given[0], given[0] + "/"], "given twice"),
        ([given[0]], "needs two evaluations or more"),
        ([given[0], str(runs)], "report.json: No such file"),
    ):
        with pytest.raises(InputError, match=re.escape(message)):
            read_runs(bad)


def test_a_cell_and_a_rate_can_be_chosen_and_are_refused_with_what_there_is(runs: Path) -> None:
    given = read_runs(evals(runs, "good", "fair"))
    assert rank(given, cell="S-S", at=0.01).cell == "S–S"
    same = rank(given, cell="T–T")
    assert {r.first.value for r in same.runs} == {same.runs[0].first.value} and same.pairs[0].p_adjusted == 1
    with pytest.raises(InputError, match=r"has no R–T \(it has T–T, S–T, S–S\)\. Pass --cell T-T"):
        rank(given, cell="R-T")
    with pytest.raises(InputError, match=r"--fmr 1e-05: good was not measured at it\. Measured in every run: 0\.01"):
        rank(given, at=1e-5)
    with pytest.raises(InputError, match="good: nothing in it to rank --by accuracy"):
        rank(given, by="accuracy")


def test_a_run_without_student_is_named(runs: Path, tmp_path: Path) -> None:
    write_run(tmp_path / "alone", name=None, noise=1.0)
    with pytest.raises(InputError, match=r"teacher: has no S–T \(it has T–T\)\. Pass --cell T-T"):
        rank(read_runs([*evals(runs, "good"), str(tmp_path / "alone")]))
    write_run(tmp_path / "second", name=None, noise=1.0)
    found = rank(read_runs([str(tmp_path / "alone"), str(tmp_path / "second")]))
    assert found.cell == "T–T" and [r.name for r in found.runs] == ["teacher (alone)", "teacher (second)"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, r"seed 0 against 1\. .* the same --seed"),
        ({"resamples": 150}, r"resamples 200 against 150\. .* the same --bootstrap"),
        ({"people": 60}, r"data [0-9a-f]{10}… against [0-9a-f]{10}…\. .* the same --faces"),
        ({"protocol": "probe images against gallery images"}, "protocol all pairs of one set against probe"),
    ],
)
def test_what_is_not_over_the_same_pairs_is_refused_saying_what_differs(
    runs: Path, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    write_run(tmp_path / "other", name="net-other", noise=0.5, **change)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=message):
        read_runs([*evals(runs, "good"), str(tmp_path / "other")])


def test_older_damaged_and_mixed_up_folders_are_refused(runs: Path, tmp_path: Path) -> None:
    folder = tmp_path / "e"
    write_run(folder, name="net-x", noise=0.5)
    pair = [*evals(runs, "good"), str(folder)]
    kept = read_resample_values(folder)
    write_resample_values(folder, dataclasses.replace(kept, source={**kept.source, "seed": "5"}))
    with pytest.raises(InputError, match=r"draws.npz and report.json are of two evaluations"):
        read_runs(pair)
    write_resample_values(folder, dataclasses.replace(kept, values={}))
    with pytest.raises(InputError, match=r"its draws.npz holds no S–T/tar_balanced/0.01"):
        rank(read_runs(pair))
    (folder / "draws.npz").unlink()
    with pytest.raises(InputError, match=r"draws.npz: no such file. Run pkd-evaluate again"):
        read_runs(pair)
    (folder / "report.json").write_text(json.dumps({"tool": "old"}))
    with pytest.raises(InputError, match=r"report.json: .*Run pkd-evaluate again with this pkd"):
        read_runs(pair)


def test_the_command_writes_page_json_and_pictures_from_one_ranking(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main([*evals(runs, "good", "fair", "poor"), "--out", str(out), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    stored = Ranking.model_validate_json((out / "compare.json").read_bytes())
    assert [r["name"] for r in printed["runs"]] == [r.name for r in stored.runs] == ["good", "fair", "poor"]
    page = (out / "compare.html").read_text(encoding="utf-8")
    assert render_ranking(stored) == page
    assert not re.search(r"<script|<link|<img|src=|@import", page) and len(page) < 1_000_000
    assert {p.name for p in (out / "figures").iterdir()} == {
        "ranking.png", "pairwise.png", "det.png", "distances.png"
    }  # fmt: skip
    for r in stored.runs:
        assert f"{100 * r.first.value:.1f} %" in page and r.encoder.id in page
    assert "training unknown" not in page and page.count("method l2kd") == 3
    assert main([*evals(runs, "good", "fair"), "--out", evals(runs, "poor")[0]]) == 2
    assert "is the folder of an evaluation" in capsys.readouterr().err


def test_a_name_is_data_and_many_runs_fit(runs: Path, tmp_path: Path) -> None:
    arguments = []
    for i in range(12):
        shutil.copytree(runs / ("good", "fair", "poor")[i % 3] / "evaluation", tmp_path / f"r{i}")
        arguments.append(f"<b>$x_{i}$</b>={tmp_path / f'r{i}'}")
    found = rank(read_runs(arguments))
    page = render_ranking(found)
    assert "<b>$x" not in page and "&lt;b&gt;$x_3$&lt;/b&gt;" in page
    assert found.smallest_p == pytest.approx(66 / 5000) and "no adjusted p-value" not in page
    many = rank(read_runs(arguments[:2])).model_copy(update={"smallest_p": 0.06})
    assert "no adjusted p-value can be below 0.06: compare fewer runs" in render_ranking(many)


def test_pair_lists_are_ranked_by_accuracy(tmp_path: Path) -> None:
    made = [
        write_run(tmp_path / name, name=f"net-{name}", noise=n, accuracy=True) for name, n in (("a", 2), ("b", 0.4))
    ]
    assert all(isinstance(e, Evaluation) and e.pair_accuracies for e in made)
    found = rank(read_runs([str(tmp_path / "a"), str(tmp_path / "b")]))
    assert found.by == "accuracy" and found.target is None and [r.name for r in found.runs] == ["b", "a"]
    assert found.runs[0].raw is None and "DET" not in render_ranking(found)
    with pytest.raises(InputError, match="the accuracy has no such target"):
        rank(read_runs([str(tmp_path / "a"), str(tmp_path / "b")]), at=0.01)
