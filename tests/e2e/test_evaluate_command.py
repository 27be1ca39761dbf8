"""pkd-evaluate as a user runs it: on image files, with a teacher from ONNX and a student from a bundle."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pkd.toolkit.certificates.certificate import read_certificate
from pkd.toolkit.cli.evaluate import main
from pkd.toolkit.core.preprocess import Preprocess
from pkd.toolkit.evaluation.results.schema import Evaluation
from tests.support.evaluation_faces import PREPROCESS, teacher_info, write_people, write_student, write_teacher

COMMAND = Path(sys.executable).with_name("pkd-evaluate")
IMAGES = [3] * 48 + [1, 2]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """faces/, probe/, teacher.onnx, student/, alone/ (a student of its own space)."""
    folder = tmp_path_factory.mktemp("evaluate")
    write_people(folder / "faces", IMAGES)
    write_people(folder / "probe", [4] * 30, seed=0, noise=50)
    write_teacher(folder)
    (folder / "teacher.preprocess.json").write_text(Preprocess.parse(PREPROCESS).model_dump_json())
    write_student(folder, teacher_info(folder / "teacher.onnx").space)
    write_student(folder, None, noise=5.0, name="alone")
    return folder


def arguments(world: Path, out: Path, *more: str | Path) -> list[str]:
    teacher = ["--teacher", world / "teacher.onnx", "--teacher-preprocess", PREPROCESS]
    rest = ["--bootstrap", "100", "--cache", world / "cache", "--jobs", "1", "--out", out]
    return [str(a) for a in (*teacher, *more, *rest)]


def evaluate(world: Path, out: Path, *more: str | Path) -> Evaluation:
    """Run in this process and read report.json back."""
    assert main(arguments(world, out, *more)) == 0
    return Evaluation.model_validate_json((out / "report.json").read_bytes())


def test_the_command_measures_certifies_and_reports(world: Path, tmp_path: Path) -> None:
    out = tmp_path / "eval"
    more = ("--student", world / "student", "--faces", world / "faces", "--synthetic", "--json")
    done = subprocess.run(
        [COMMAND, *arguments(world, out, *more)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    printed: dict[str, Any] = json.loads(done.stdout)
    made = Evaluation.model_validate_json((out / "report.json").read_bytes())
    assert printed["data"]["images"] == made.data.images == sum(IMAGES)
    assert made.data.identities == 50 and made.data.single_image_identities == 1

    names = [c.name for c in made.comparisons]
    assert names == ["T–T", "S–T", "S–S"]
    images = sum(IMAGES)
    genuine = 48 * 3 + 1
    for comparison, ordered in zip(made.comparisons, (1, 2, 1), strict=True):
        assert comparison.genuine_pairs == ordered * genuine
        assert comparison.impostor_pairs == ordered * (images * (images - 1) // 2 - genuine)
        assert comparison.identity_pairs == 50 * 49 // 2
        assert [p.fmr for p in comparison.points] == [0.01]
        assert [r.fmr for r in comparison.refused] == [1e-3, 1e-4, 1e-5]
        point = comparison.points[0]
        assert point.tar_balanced_ci95[0] <= point.tar_balanced <= point.tar_balanced_ci95[1]
        assert point.fmr_ci95[0] < 0.01 < point.fmr_ci95[1]
    teacher, mixed, _ = made.comparisons
    assert teacher.points[0].tar_balanced > 0.5
    assert teacher.points[0].threshold != mixed.points[0].threshold
    assert made.agreement is not None and 0.5 < made.agreement.mean < 1

    files = {path.name for path in (out / "certificates").iterdir()}
    assert files == {c.certificate for c in made.comparisons} and len(files) == 3
    for comparison in made.comparisons:
        certificate = read_certificate(out / "certificates" / str(comparison.certificate))
        assert (certificate.query, certificate.gallery) == (comparison.query, comparison.gallery)
        point = comparison.points[0]
        assert point.as_point and certificate.threshold(0.01) == point.as_point.threshold > point.threshold
        assert certificate.synthetic and certificate.data_digest == made.data.content_digest
        assert certificate.space == made.teacher.space.id
    assert "Synthetic faces" in (out / "report.html").read_text(encoding="utf-8")


def test_numbers_repeat_and_stale_certificates_go(world: Path, tmp_path: Path) -> None:
    more = ("--student", world / "student", "--faces", world / "faces")
    first = evaluate(world, tmp_path / "eval", *more)
    second = evaluate(world, tmp_path / "other", *more)
    assert first.model_dump(exclude={"created"}) == second.model_dump(exclude={"created"})
    evaluate(world, tmp_path / "eval", "--faces", world / "faces")
    assert len(list((tmp_path / "eval/certificates").iterdir())) == 1


def test_gallery_and_probe_sets_measure_both_directions(world: Path, tmp_path: Path) -> None:
    made = evaluate(
        world, tmp_path / "e", "--student", world / "student", "--gallery", world / "faces", "--probe", world / "probe"
    )
    assert [c.name for c in made.comparisons] == ["T–T", "S–T", "T–S", "S–S"]
    assert {c.genuine_pairs for c in made.comparisons} == {30 * 3 * 4}
    assert {c.identity_pairs for c in made.comparisons} == {50 * 30 - 30 - 30 * 29 // 2}
    assert made.comparisons[1].eer != made.comparisons[2].eer
    assert len(list((tmp_path / "e/certificates").iterdir())) == 4


def test_identical_files_on_both_sides_are_left_out(world: Path, tmp_path: Path) -> None:
    made = evaluate(world, tmp_path / "e", "--gallery", world / "faces", "--probe", world / "faces")
    assert made.comparisons[0].genuine_pairs == 2 * (48 * 3 + 1)


def test_a_control_is_measured_but_not_certified(world: Path, tmp_path: Path) -> None:
    more = ("--student", world / "alone", "--faces", world / "faces")
    assert main(arguments(world, tmp_path / "no", *more)) == 2
    made = evaluate(world, tmp_path / "e", *more, "--any-space")
    assert [bool(c.certificate) for c in made.comparisons] == [True, False, True]
    assert len(list((tmp_path / "e/certificates").iterdir())) == 2
    assert any("different spaces" in note for note in made.notes)


def test_a_control_of_another_size_is_measured_alone(world: Path, tmp_path: Path) -> None:
    write_teacher(tmp_path, dim=24)
    write_student(tmp_path, None, name="small")
    given = arguments(world, tmp_path / "e", "--student", tmp_path / "small", "--faces", world / "faces", "--any-space")
    given[given.index(str(world / "teacher.onnx"))] = str(tmp_path / "teacher.onnx")
    assert main(given) == 0
    made = Evaluation.model_validate_json((tmp_path / "e/report.json").read_bytes())
    assert [c.name for c in made.comparisons] == ["T–T", "S–S"] and made.agreement is None
    assert "24 and 16 numbers have no cosine" in made.notes[0]


def test_mirror_sums_get_no_certificate(world: Path, tmp_path: Path) -> None:
    made = evaluate(world, tmp_path / "e", "--faces", world / "faces", "--flip")
    assert made.flip and made.comparisons[0].points and not list((tmp_path / "e/certificates").iterdir())


def test_pair_list_with_folds_and_without(world: Path, tmp_path: Path) -> None:
    folds = "".join(
        "".join(f"p{k + i:03d}\t1\t2\n" for i in range(4))
        + "".join(f"p{k + i:03d}\t1\tp{k + i + 1:03d}\t1\n" for i in range(4))
        for k in (0, 10, 20)
    )
    (tmp_path / "pairs.txt").write_text("3\t4\n" + folds)
    more: tuple[str | Path, ...] = ("--pairs", tmp_path / "pairs.txt", "--faces", world / "faces")
    made = evaluate(world, tmp_path / "view2", *more, "--student", world / "student", "--flip")
    assert [a.name for a in made.pair_accuracies] == ["T–T", "S–T", "S–S"]
    best = made.pair_accuracies[0]
    assert best.accuracy > 0.7 and len(best.fold_accuracy) == 3 and best.fold_std is not None
    assert best.ci95[0] <= best.accuracy <= best.ci95[1]

    (tmp_path / "one.txt").write_text("12\n" + "".join(sorted(folds.splitlines(True), key=lambda x: x.count("\t"))))
    own = evaluate(world, tmp_path / "one", "--pairs", tmp_path / "one.txt", "--faces", world / "faces")
    assert "the same pairs" in own.pair_accuracies[0].threshold_from and own.pair_accuracies[0].fold_std is None
    more = ("--pairs", tmp_path / "one.txt", "--threshold-pairs", tmp_path / "pairs.txt", "--faces", world / "faces")
    tuned = evaluate(world, tmp_path / "tuned", *more)
    assert tuned.pair_accuracies[0].threshold_from == "pairs.txt"


def _unreadable(folder: Path) -> None:
    write_people(folder, [2, 2])
    (folder / "p000/p000_0002.png").write_bytes((folder / "p000/p000_0001.png").read_bytes()[:400])


def _large(folder: Path) -> None:
    from pkd.toolkit.images.codec import read_rgb, write_rgb

    write_people(folder, [2, 2])
    write_rgb(folder / "p001/p001_0001.png", read_rgb(folder / "p001/p001_0001.png")[:100])


BAD_SETS = {
    "missing": (lambda folder: None, "no such folder or list file"),
    "empty": (lambda folder: folder.mkdir(), "holds no image"),
    "singles": (lambda folder: write_people(folder, [1, 1, 1]), "no genuine pair: every identity has one image"),
    "one": (lambda folder: write_people(folder, [4]), "holds one identity"),
    "corrupt": (_unreadable, "p000_0002.png"),
    "uncropped": (_large, "112×100 pixels, expected an aligned 112×112 crop"),
}


@pytest.mark.parametrize("name", BAD_SETS)
def test_a_bad_set_is_one_clear_line(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    make, message = BAD_SETS[name]
    make(tmp_path / name)
    refused(arguments(world, tmp_path / "e", "--faces", tmp_path / name), message, capsys)


def test_images_without_identity_are_refused(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(arguments(world, tmp_path / "e", "--faces", world / "faces/p000"), "they have no identity", capsys)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--faces", "{}/faces", "--fmr", "1e-2", "1e-4"], "FMR 0.0001 is not resolved"),
        (["--faces", "{}/faces", "--fmr", "2"], "--fmr 2: a false match rate lies between 0 and 1"),
        (["--faces", "{}/faces", "--bootstrap", "10"], "--bootstrap 10"),
        (["--faces", "{}/faces", "--student", "{}/alone"], "their vectors cannot be compared"),
        (["--faces", "{}/faces", "--student", "{}/nothing"], "no such file"),
        (["--faces", "{}/faces", "--student", "{}/teacher.onnx"], "given twice"),
        (["--faces", "{}/faces", "--probe", "{}/probe"], "what to compare?"),
        (["--gallery", "{}/faces"], "what to compare?"),
        ([], "what to compare?"),
        (["--pairs", "{}/none.txt", "--faces", "{}/faces"], "none.txt: No such file"),
        (["--pairs", "{}/none.txt"], "Give LFW's pairs.txt, CFP's"),
        (["--faces", "{}/faces", "--threshold-pairs", "{}/x"], "--threshold-pairs goes with --pairs"),
        (["--faces", "{}/faces", "--out", "{}/teacher.onnx"], "is a file"),
    ],
)
def test_bad_usage_is_one_clear_line(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    filled = [a.format(world) for a in more]
    given = arguments(world, tmp_path / "e", *filled)
    if "--out" in more or "--bootstrap" in more:  # the last one given counts
        given += filled[2:]
    refused(given, message, capsys)


def test_a_gallery_of_other_people_is_refused(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for person in write_people(tmp_path / "others", [2, 2]).iterdir():
        person.rename(person.with_name(f"other-{person.name}"))
    given = arguments(world, tmp_path / "e", "--gallery", world / "faces", "--probe", tmp_path / "others")
    refused(given, "no identity has different images on both sides", capsys)


def refused(given: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(given) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error and error.startswith("pkd-evaluate: ")


@pytest.mark.shared
def test_a_real_teacher_keeps_its_published_accuracy(shared: Path, tmp_path: Path) -> None:
    """LFW's 1,000 DevTest pairs, threshold from the same pairs. View 2 is known to give 99.4–99.65 %."""
    protocol = shared / "faces/lfw/protocol"
    given = ["--teacher", shared / "models/teacher_edgeface_xs_512.onnx", "--teacher-preprocess", PREPROCESS]
    given += ["--pairs", protocol / "pairsDevTest.txt", "--faces", shared / "faces/lfw/aligned"]
    given += ["--cache", tmp_path / "cache", "--out", tmp_path / "e"]
    assert main([str(a) for a in given]) == 0
    (found,) = Evaluation.model_validate_json((tmp_path / "e/report.json").read_bytes()).pair_accuracies
    assert found.accuracy >= 0.99 and found.ci95[0] > 0.98
