"""Baselines as a user asks for them: an undistilled control, linear maps, and what is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pkd.toolkit.cli.compare import main as compare
from pkd.toolkit.cli.evaluate import main
from pkd.toolkit.evaluation.results.schema import Evaluation
from tests.support.evaluation_faces import PREPROCESS, teacher_info, write_people, write_student, write_teacher

COMMAND = Path(sys.executable).with_name("pkd-compare")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """faces/, others/ to fit on, teacher.onnx, student/, and control/: a network in a space of its own."""
    folder = tmp_path_factory.mktemp("baselines")
    write_people(folder / "faces", [3] * 50)
    for person in write_people(folder / "others", [4] * 60, seed=9).iterdir():
        person.rename(person.with_name(f"other-{person.name}"))
    write_teacher(folder)
    space = teacher_info(folder / "teacher.onnx").space
    write_student(folder, space)
    write_student(folder, space, noise=1.5, name="worse")
    write_student(folder, None, noise=0.7, name="control", turned=True)
    return folder


def arguments(world: Path, out: Path, *more: str | Path) -> list[str]:
    teacher = ["--teacher", world / "teacher.onnx", "--teacher-preprocess", PREPROCESS]
    rest = ["--bootstrap", "100", "--cache", world / "cache", "--jobs", "1", "--out", out]
    return [str(a) for a in (*teacher, *more, *rest)]


def evaluate(world: Path, out: Path, *more: str | Path) -> Evaluation:
    assert main(arguments(world, out, *more)) == 0
    return Evaluation.model_validate_json((out / "report.json").read_bytes())


def baseline(world: Path) -> list[str | Path]:
    return ["--control", world / "control", "--fit-faces", world / "others"]


@pytest.fixture(scope="module")
def measured(world: Path) -> Path:
    """student-e/ and worse-e/: both students beside control and maps."""
    for name in ("student", "worse"):
        more = ("--student", world / name, "--faces", world / "faces", *baseline(world))
        evaluate(world, world / f"{name}-e", *more)
    return world


def test_control_and_maps_are_measured_told_and_never_certified(measured: Path) -> None:
    out = measured / "student-e"
    made = Evaluation.model_validate_json((out / "report.json").read_bytes())
    cells = {c.name: c for c in made.comparisons}
    assert list(cells) == ["T–T", "S–T", "S–S", "C–T", "C–C", "P–T", "R–T"]
    assert {c.name for c in made.comparisons if c.certificate} == {"T–T", "S–T", "S–S"}
    assert len(list((out / "certificates").glob("*.json"))) == 3
    rate = {name: c.points[0].tar_balanced for name, c in cells.items()}
    assert rate["C–T"] < 0.1 and min(rate["R–T"], rate["P–T"], rate["C–C"]) > 0.3, rate
    assert made.control is not None and made.control.fit is not None
    assert (made.control.fit.images, made.control.fit.identities, made.control.held_out_identities) == (240, 60, 12)
    procrustes, ridge = made.control.maps
    assert (procrustes.letter, procrustes.penalty, ridge.letter) == ("P", None, "R")
    assert (
        min(m.fit_cosine for m in made.control.maps) > 0.7 and min(m.held_out_cosine for m in made.control.maps) > 0.7
    )
    assert procrustes.encoder == cells["P–T"].query and ridge.encoder == cells["R–T"].query
    assert cells["P–T"].gallery == made.teacher.id
    gains = {(g.baseline, g.fmr): g.difference for g in made.gains}
    assert set(gains) == {("R–T", 0.01), ("P–T", 0.01), ("C–T", 0.01)}
    gain = gains["C–T", 0.01]
    assert gain.difference == rate["S–T"] - rate["C–T"] and gain.ci95[0] > 0 and gain.p < 0.05
    page = (out / "report.html").read_text(encoding="utf-8")
    for told in (
        "S–T minus this",
        "240 images of 60 other people",
        f"{ridge.held_out_cosine:.3f} on 12 people",
        "<b>R–T</b>",
    ):
        assert told in page
    assert {p.name for p in (out / "figures").iterdir()} >= {
        "det.png", "distances.png", "agreement.png", "scores-S-T.png", "scores-R-T.png"
    }  # fmt: skip


def test_a_teacher_alone_has_baselines_too(world: Path, tmp_path: Path) -> None:
    made = evaluate(world, tmp_path / "e", "--faces", world / "faces", *baseline(world))
    cells = {c.name: c for c in made.comparisons}
    assert list(cells) == ["T–T", "C–T", "C–C", "P–T", "R–T"]
    assert cells["P–T"].distances.d_prime > cells["C–T"].distances.d_prime + 1


def test_without_maps_or_without_a_control_the_page_says_what_to_pass(world: Path, tmp_path: Path) -> None:
    made = evaluate(world, tmp_path / "c", "--faces", world / "faces", "--control", world / "control")
    assert [c.name for c in made.comparisons] == ["T–T", "C–T", "C–C"] and made.control and not made.control.maps
    assert "Pass <code>--fit-faces DIR</code>" in (tmp_path / "c/report.html").read_text(encoding="utf-8")
    evaluate(world, tmp_path / "n", "--faces", world / "faces")
    assert "Pass <code>--control SPEC</code>" in (tmp_path / "n/report.html").read_text(encoding="utf-8")


def test_a_control_of_another_size_is_mapped(world: Path, tmp_path: Path) -> None:
    """24 numbers against 16: no C–T, but P–T and R–T; the maps are rectangular."""
    write_teacher(tmp_path, dim=24, seed=3)
    more = ("--control", tmp_path / "teacher.onnx", "--control-preprocess", PREPROCESS, "--fit-faces", world / "others")
    made = evaluate(world, tmp_path / "e", "--faces", world / "faces", *more)
    assert [c.name for c in made.comparisons] == ["T–T", "C–C", "P–T", "R–T"]
    assert "there is no C–T" in (tmp_path / "e/report.html").read_text(encoding="utf-8")
    flipped = evaluate(world, tmp_path / "f", "--faces", world / "faces", *more, "--flip")
    assert [c.name for c in flipped.comparisons] == ["T–T", "C–C", "P–T", "R–T"]
    assert flipped.comparisons[3].eer != made.comparisons[3].eer


def test_pair_lists_have_baselines_too(world: Path, tmp_path: Path) -> None:
    lines = [f"p{i:03d}\t1\t2" for i in range(20)] + [f"p{i:03d}\t1\tp{i + 20:03d}\t1" for i in range(20)]
    (tmp_path / "pairs.txt").write_text("20\n" + "\n".join(lines) + "\n")
    made = evaluate(
        world, tmp_path / "e", "--pairs", tmp_path / "pairs.txt", "--faces", world / "faces", *baseline(world)
    )
    assert [a.name for a in made.pair_accuracies] == ["T–T", "C–T", "C–C", "P–T", "R–T"]
    assert "control behind a rotation" in (tmp_path / "e/report.html").read_text(encoding="utf-8")


def test_people_or_images_of_the_evaluated_set_are_refused(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copies = tmp_path / "copies"
    shutil.copytree(world / "others", copies)
    shutil.copyfile(world / "faces/p007/p007_0002.png", copies / "other-p003/other.png")
    for fit, message in (
        (world / "faces", "50 of its 50 people are in the evaluated set, too (first: p000)"),
        (copies, "1 of its images are in the evaluated set, too, byte for byte (first: other-p003/other.png)"),
    ):
        given = ("--faces", world / "faces", "--control", world / "control", "--fit-faces", fit)
        assert main(arguments(world, tmp_path / "e", *given)) == 2
        error = capsys.readouterr().err.strip()
        assert message in error and "\n" not in error
    assert not (tmp_path / "e").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--fit-faces", "{}/others"], "--fit-faces goes with --control"),
        (["--control-preprocess", "mean=0,std=1"], "Give --control, too"),
        (["--control", "{}/student"], "it was distilled from this very teacher, so it is no control"),
        (["--control", "{}/teacher.onnx"], "Pass --control-preprocess"),
        (["--control", "{}/control", "--student", "{}/control", "--any-space"], "given twice"),
        (["--control", "{}/control", "--fit-faces", "{}/others/other-p001"], "no identity"),
    ],
)
def test_bad_usage_is_one_clear_line(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    filled = [a.format(world) for a in more]
    assert main(arguments(world, tmp_path / "e", "--faces", world / "faces", *filled)) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error


def test_evaluations_are_compared_by_the_command(
    measured: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    folders = [str(measured / "worse-e"), str(measured / "student-e")]
    done = subprocess.run(
        [COMMAND, *folders, "--out", out, "--json"], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert [run["name"] for run in told["runs"]] == ["student", "worse"] and told["cell"] == "S–T"
    good, bad = (np.load(measured / f"{name}-e/draws.npz")["S–T/tar_balanced/0.01"] for name in ("student", "worse"))
    found = told["pairs"][0]["difference"]
    low, high = found["ci95"]
    assert low < float(np.median(good - bad)) < high and low < found["difference"] < high
    spread = float(np.subtract(*np.percentile(good - bad, (97.5, 2.5))))
    assert spread / 2 < high - low < 3 * spread
    assert (out / "compare.html").is_file() and (out / "figures/pairwise.png").is_file()
    same = ["--cell", "R-T", "--by", "rank-1", "--json", "--out", str(out)]
    capsys.readouterr()
    assert compare([*folders, *same]) == 0
    assert json.loads(capsys.readouterr().out)["pairs"][0]["p_adjusted"] == 1, "the control is the same in both"


@pytest.mark.shared
@pytest.mark.slow
def test_a_second_real_teacher_is_mapped_well_above_chance(shared: Path, tmp_path: Path) -> None:
    """MobileFaceNet's 128 numbers onto EdgeFace's 512: fitted on 150 people of val, measured on 80 others."""
    people: dict[str, list[str]] = {}
    for line in (shared / "faces/splits/val.txt").read_text(encoding="utf-8").split():
        people.setdefault(Path(line).parent.name, []).append(str(shared / "faces" / line))
    several = sorted(name for name, images in people.items() if len(images) >= 2)
    np.random.default_rng(0).shuffle(several)
    for file, chosen in (("fit.txt", several[:150]), ("test.txt", several[150:230])):
        (tmp_path / file).write_text("\n".join(image for name in chosen for image in people[name][:3]) + "\n")
    models = shared / "models"
    given = ["--teacher", models / "teacher_edgeface_xs_512.onnx", "--teacher-preprocess", PREPROCESS]
    given += ["--control", models / "teacher_mobilefacenet_y1_128.onnx", "--control-preprocess", "mean=0,std=1"]
    given += ["--fit-faces", tmp_path / "fit.txt", "--faces", tmp_path / "test.txt", "--bootstrap", "200"]
    given += ["--cache", tmp_path / "cache", "--jobs", "1", "--out", tmp_path / "e"]
    assert main([str(a) for a in given]) == 0
    made = Evaluation.model_validate_json((tmp_path / "e/report.json").read_bytes())
    points = {c.name: c.points[0] for c in made.comparisons}
    assert "C–T" not in points and points["R–T"].fmr == 0.01
    assert points["R–T"].tar_balanced_ci95[0] > 0.3
    assert points["P–T"].tar_balanced > 0.1
