"""pkd-evaluate on every protocol other than all pairs of a set, as a user runs it, on fixtures written here."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pkd.toolkit.cli.evaluate import main
from pkd.toolkit.evaluation.datasets.lfw import read_lfw
from pkd.toolkit.evaluation.metrics.resamples import read_resample_values
from pkd.toolkit.evaluation.results.schema import Evaluation
from pkd.toolkit.images.codec import read_rgb
from tests.support.evaluation_faces import PREPROCESS, teacher_info, write_people, write_student, write_teacher
from tests.support.ijb_files import write_ijb

COMMAND = Path(sys.executable).with_name("pkd-evaluate")
PEOPLE = 40


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """faces/ (40 people, 6 images each), teacher.onnx, student/, pairs.txt, set.bin, cfp/, ijb/."""
    folder = tmp_path_factory.mktemp("protocols")
    faces = write_people(folder / "faces", [6] * PEOPLE)
    write_student(folder, teacher_info(write_teacher(folder)).space)
    pairs = "".join(
        "".join(f"p{4 * k + i:03d}\t1\t2\n" for i in range(4))
        + "".join(f"p{4 * k + i:03d}\t1\tp{4 * k + (i + 1) % 4:03d}\t3\n" for i in range(4))
        for k in range(10)
    )
    (folder / "pairs.txt").write_text("10\t4\n" + pairs)
    listed = read_lfw(folder / "pairs.txt", faces)
    images = [listed.faces.images.read(int(i)) for pair in zip(listed.first, listed.second, strict=True) for i in pair]
    (folder / "set.bin").write_bytes(pickle.dumps((images, listed.same.tolist()), 2))
    _cfp(folder, faces)
    write_ijb(
        folder / "ijb",
        {f"p{i:03d}": [read_rgb(path) for path in sorted((faces / f"p{i:03d}").iterdir())] for i in range(PEOPLE)},
    )
    return folder


def _cfp(folder: Path, faces: Path) -> None:
    """Of each person images 1 and 2 are frontal and 3 is profile; four folds."""
    lists: dict[str, list[str]] = {"F": [], "P": []}
    for person in range(PEOPLE):
        for kind, name, numbers in (("F", "frontal", (1, 2)), ("P", "profile", (3,))):
            for number in numbers:
                image = f"{person:03d}/{name}/{number:02d}"
                lists[kind].append(f"{len(lists[kind]) + 1} ../Data/Images/{image}.jpg\n")
                crop = folder / "cfp/crops" / f"{image}.png"
                crop.parent.mkdir(parents=True, exist_ok=True)
                crop.write_bytes((faces / f"p{person:03d}/p{person:03d}_{number:04d}.png").read_bytes())
    protocol = folder / "cfp/Protocol"
    for fold in range(4):
        of = protocol / f"Split/FP/{fold + 1:02d}"
        of.mkdir(parents=True)
        people = range(10 * fold, 10 * fold + 10)
        (of / "same.txt").write_text("".join(f"{2 * p + 1},{p + 1}\n" for p in people))
        (of / "diff.txt").write_text("".join(f"{2 * p + 2},{10 * fold + (p + 1) % 10 + 1}\n" for p in people))
    for kind, lines in lists.items():
        (protocol / f"Pair_list_{kind}.txt").write_text("".join(lines))


def arguments(world: Path, out: Path, *more: str | Path) -> list[str]:
    given = ["--teacher", world / "teacher.onnx", "--teacher-preprocess", PREPROCESS, *more, "--bootstrap", "100"]
    return [str(a) for a in (*given, "--cache", world / "cache", "--jobs", "1", "--out", out)]


def evaluate(world: Path, out: Path, *more: str | Path, student: bool = True) -> Evaluation:
    """Run in this process, with the student or without, and read report.json back."""
    assert main(arguments(world, out, *(["--student", world / "student"] if student else []), *more)) == 0  # type: ignore[arg-type]
    return Evaluation.model_validate_json((out / "report.json").read_bytes())


def test_a_bin_has_the_accuracy_of_its_list(world: Path, tmp_path: Path) -> None:
    listed = evaluate(world, tmp_path / "list", "--pairs", world / "pairs.txt", "--faces", world / "faces")
    packed = evaluate(world, tmp_path / "bin", "--pairs", world / "set.bin")
    assert [a.name for a in listed.pair_accuracies] == ["T–T", "S–T", "S–S"]
    assert [a.name for a in packed.pair_accuracies] == ["T–T", "S–T", "T–S", "S–S"]
    found = {a.name: a for a in packed.pair_accuracies}
    for one in listed.pair_accuracies:
        assert 0.5 < one.accuracy < 1
        assert found[one.name].fold_accuracy == one.fold_accuracy
        assert found[one.name].fold_threshold == one.fold_threshold
    assert "names no people" in packed.notes[0] and packed.data.images == listed.data.images
    assert "names no people" in (tmp_path / "bin/report.html").read_text(encoding="utf-8")
    kept = read_resample_values(tmp_path / "bin")
    drawn = {name.rpartition("/")[0] if name.count("/") > 1 else name for name in kept.values}
    assert {f"{name}/accuracy" for name in found} == drawn
    assert kept.key != read_resample_values(tmp_path / "list").key
    assert not list((tmp_path / "bin/certificates").iterdir())


def test_frontal_against_profile_is_measured_in_both_directions(world: Path, tmp_path: Path) -> None:
    split = world / "cfp/Protocol/Split/FP"
    made = evaluate(world, tmp_path / "e", "--pairs", split, "--faces", world / "cfp/crops")
    assert [a.name for a in made.pair_accuracies] == ["T–T", "S–T", "T–S", "S–S"]
    assert made.data.name == "Split/FP" and made.data.identities == PEOPLE
    assert {len(a.fold_accuracy) for a in made.pair_accuracies} == {4}
    _, one, other, _ = made.pair_accuracies
    assert one.fold_threshold != other.fold_threshold
    assert "frontal" in made.notes[0]


def test_templates_are_verified_and_searched(world: Path, tmp_path: Path) -> None:
    out = tmp_path / "e"
    more = ("--student", world / "student", "--templates", world / "ijb/meta", "--faces", world / "ijb/loose_crop")
    done = subprocess.run(
        [COMMAND, *arguments(world, out, *more, "--json")], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    made = Evaluation.model_validate_json((out / "report.json").read_bytes())
    printed = json.loads(done.stdout)
    assert printed["templates"] == {
        "templates": 3 * PEOPLE, "media": 5 * PEOPLE, "aligned": True, "scored": True, "subjects_rebuilt": 0,
    }  # fmt: skip
    assert "curve" not in printed["identifications"][0]
    names = ["T–T", "S–T", "T–S", "S–S"]
    assert [c.name for c in made.comparisons] == [i.name for i in made.identifications] == names
    for comparison, identification in zip(made.comparisons, made.identifications, strict=True):
        assert (comparison.genuine_pairs, comparison.impostor_pairs) == (2 * PEOPLE, 2 * PEOPLE * (PEOPLE - 1))
        assert comparison.identity_pairs == PEOPLE * (PEOPLE - 1) // 2
        assert comparison.certificate is None and comparison.worst is not None
        assert comparison.worst.false_matches[0].query.startswith("template ")
        assert identification.enrolled == (20, 20)
        assert identification.mated_searches == identification.non_mated_searches == 2 * PEOPLE
        assert identification.mated_identities == identification.non_mated_identities == PEOPLE
        assert [point.rank for point in identification.ranks] == [1, 5, 10]
        assert identification.points == () and identification.min_fpir == 0.25
    assert made.comparisons[1].eer != made.comparisons[2].eer
    assert made.identifications[0].ranks[0].rate_balanced > 0.8
    assert "nothing is certified" in made.notes[0]
    values = read_resample_values(out).values
    assert {f"{name}/rank_balanced/1" for name in names} <= set(values)
    assert {f"{name}/tar_balanced/0.1" for name in names} & set(values) == set()
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "Finding a person in a gallery" in page and "Open set" not in page
    plain = evaluate(world, tmp_path / "plain", *more[2:], "--no-detector-score", student=False)
    assert plain.templates is not None and not plain.templates.scored
    assert plain.comparisons[0].eer != made.comparisons[0].eer


def test_face_sets_are_searched_in_two_halves(world: Path, tmp_path: Path) -> None:
    made = evaluate(world, tmp_path / "e", "--faces", world / "faces")
    assert [i.name for i in made.identifications] == ["T–T", "S–T", "T–S", "S–S"]
    for found in made.identifications:
        assert found.enrolled == (20, 20) and "seed 0" in found.galleries
        assert (found.mated_searches, found.non_mated_searches) == (5 * PEOPLE, 6 * PEOPLE)
        assert found.unresolved == (0.1, 0.01, 0.001) and found.min_fpir == 10 / PEOPLE
        for point in found.ranks:
            assert point.rate_balanced_ci95[0] <= point.rate_balanced <= point.rate_balanced_ci95[1]
            assert point.rate == pytest.approx(point.rate_balanced)  # as many images of everyone
        assert np.isclose(found.curve.fpir[-1], 0.25) and list(found.curve.fnir) == sorted(found.curve.fnir)
    other = evaluate(world, tmp_path / "o", "--faces", world / "faces", "--seed", "1", student=False)
    assert other.identifications[0].ranks != made.identifications[0].ranks


def test_probe_people_who_are_not_enrolled_are_searched_without_a_mate(world: Path, tmp_path: Path) -> None:
    for side, people in (("gallery", range(20)), ("probe", range(8, 40))):
        for person in people:
            of = tmp_path / side / f"p{person:03d}"
            of.mkdir(parents=True)
            for number in (1, 2, 3) if side == "gallery" else (3, 4, 5):
                name = f"p{person:03d}_{number:04d}.png"
                (of / name).write_bytes((world / "faces" / of.name / name).read_bytes())
    made = evaluate(world, tmp_path / "e", "--gallery", tmp_path / "gallery", "--probe", tmp_path / "probe")
    for found in made.identifications:
        assert found.enrolled == (20,) and found.galleries == "all images of the gallery set"
        assert (found.mated_identities, found.mated_searches) == (12, 24)  # their third images are enrolled, too
        assert (found.non_mated_identities, found.non_mated_searches) == (20, 60)
    assert "12 searches with an image that is itself enrolled were left out." in made.notes


def test_without_a_probe_that_is_not_enrolled_itself_nobody_is_searched(world: Path, tmp_path: Path) -> None:
    made = evaluate(world, tmp_path / "e", "--gallery", world / "faces", "--probe", world / "faces", student=False)
    assert made.identifications == () and made.notes[-1].startswith("No identification rates")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--pairs", "{}/set.bin", "--faces", "{}/faces"], "set.bin: holds its own images. Drop --faces"),
        (["--pairs", "{}/pairs.txt"], "pairs.txt: names images that it does not hold"),
        (["--pairs", "{}/cfp/Protocol", "--faces", "{}/cfp/crops"], "cfp/Protocol: no pair list"),
        (["--pairs", "{}/cfp/Protocol/Split/FP", "--faces", "{}/faces"], "images of FP are missing"),
        (["--pairs", "{}/pairs.txt", "--faces", "{}/cfp/crops"], "images of pairs.txt are missing"),
        (["--pairs", "{}/teacher.onnx", "--faces", "{}/faces"], "teacher.onnx: not a text file"),
        (["--pairs", "{}/set.bin", "--probe", "{}/faces"], "drop --gallery and --probe"),
        (["--templates", "{}/ijb/meta"], "--templates META takes its images from --faces DIR"),
        (["--templates", "{}/ijb/meta", "--faces", "{}/faces"], "images of ijbc_face_tid_mid.txt are missing"),
        (["--templates", "{}/faces", "--faces", "{}/faces"], "holds 0 files *_face_tid_mid.txt"),
        (["--templates", "{}/ijb/meta", "--pairs", "{}/set.bin"], "goes with no --pairs"),
        (["--templates", "{}/ijb/meta", "--faces", "{}/ijb/loose_crop", "--fmr", "1e-6"], "FMR 1e-06 is not resolved"),
        (["--faces", "{}/faces", "--no-detector-score"], "--no-detector-score goes with --templates"),
    ],
)
def test_bad_usage_is_one_clear_line(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    assert main(arguments(world, tmp_path / "e", *(a.format(world) for a in more))) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error and error.startswith("pkd-evaluate: ")
