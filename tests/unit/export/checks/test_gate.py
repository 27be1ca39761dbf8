"""The gate: what a target loses against the fp32 encoder, paired over people, and what decides."""

from __future__ import annotations

import io
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from pkd.export.checks import gate as checks
from pkd.export.checks.gate import Gate, GateResults, fewest_people, gate_table, most_lost, require_passed, unseen
from pkd.export.cli import main
from pkd.export.options import GateOptions
from pkd.toolkit.bundle.bundle import Bundle
from pkd.toolkit.core.encoder_info import EncoderInfo, describe, in_mode
from pkd.toolkit.core.errors import GateFailed, SpaceMismatch, UnsupportedFmr
from pkd.toolkit.core.preprocess import Preprocess
from pkd.toolkit.core.progress import no_progress
from pkd.toolkit.encoders.base import Embeddings, Encoder, unit_rows
from pkd.toolkit.evaluation.metrics.paired import Contributions, compared
from pkd.toolkit.evaluation.metrics.pairing import Doubles
from pkd.toolkit.evaluation.protocols.common import EvaluationOptions
from pkd.toolkit.images.codec import Rgb
from tests.support.evaluation_faces import PREPROCESS, write_people, write_teacher

DIM = 24
TEACHER = describe("teacher", "teacher", "0" * 64, Preprocess(), DIM)
STUDENT = describe("student", "student", "1" * 64, Preprocess(), DIM, space=TEACHER.space)


class Projection:
    """Embeds by a random projection of the pixels, plus noise that depends on the pixels alone."""

    def __init__(self, info: EncoderInfo, noise: float = 0.0, seed: int = 0) -> None:
        self.info = info
        self._weight = np.random.default_rng(0).normal(size=(14 * 14 * 3, DIM))
        self._other = np.random.default_rng(1 + seed).normal(size=(14 * 14 * 3, DIM))
        self._noise = noise

    def embed(self, crops: Rgb) -> Embeddings:
        pixels = crops[:, ::8, ::8].reshape(len(crops), -1).astype(np.float64) - 127.5
        disturbed = np.sin(pixels @ self._other)  # no smooth function of the image
        plain = pixels @ self._weight
        return unit_rows((plain + self._noise * plain.std() * disturbed).astype(np.float32))


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Embed anew, and draw 200 times, not 1,000: what decides is the same."""
    monkeypatch.setenv("PKD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(checks, "EvaluationOptions", partial(EvaluationOptions, resamples=200))


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_people(tmp_path_factory.mktemp("gate") / "faces", [4] * 40, noise=70.0)


def options(faces: Path, **more: float) -> GateOptions:
    return GateOptions(faces=faces, **{"fmr": 0.05, **more})  # type: ignore[arg-type]


def gate(options: GateOptions, reference: Encoder, targets: Mapping[str, Encoder]) -> GateResults:
    opened = Gate(options, reference, no_progress)
    return opened.conclude(opened.judge(targets))


def test_a_target_that_loses_little_passes_and_one_that_loses_much_fails(faces: Path) -> None:
    reference = Projection(TEACHER)
    targets = {
        "onnxruntime-fp32": reference,
        "near": Projection(in_mode(TEACHER, "fp16"), 0.01),
        "far": Projection(in_mode(TEACHER, "int8"), 2.0),
    }
    gated = gate(options(faces, max_drop=0.05), reference, targets)
    near, far = gated.rows  # fp32 is not gated against itself
    assert (near.target, far.target) == ("near", "far")
    assert near.passed and near.drop.ci95[1] <= 0.05
    assert not far.passed and far.drop.difference == pytest.approx(far.reference - far.tar) and far.drop.p < 0.05
    assert {c.query for c in gated.certificates} == {near.encoder, far.encoder}
    assert {c.gallery for c in gated.certificates} == {TEACHER.id}
    assert gate_table(gated.rows).row_count == 2
    assert {row.people for row in gated.rows} == {40}
    with pytest.raises(
        GateFailed,
        match=r"^gate failed: TAR at FMR 0\.05 .* far loses .* too much\. Of these people 40 have .* takes 72",
    ):
        require_passed(gated)


def test_the_end_of_the_interval_decides_and_not_the_point(faces: Path) -> None:
    reference, target = Projection(TEACHER), Projection(in_mode(TEACHER, "int8"), 0.35)
    (row,) = gate(options(faces, max_drop=0.5), reference, {"int8": target}).rows
    low, high = row.drop.ci95
    assert low < row.drop.difference < high
    assert row.most >= high
    between = (row.drop.difference + row.most) / 2
    assert not gate(options(faces, max_drop=max(0.0, between)), reference, {"int8": target}).rows[0].passed
    assert gate(options(faces, max_drop=row.most + 1e-6), reference, {"int8": target}).rows[0].passed


def contributed(own: Doubles) -> Contributions:
    """Hold what people contribute to a rate whose threshold nothing moves."""
    return Contributions(own, np.zeros(len(own)), np.empty(0), np.empty(0), np.ones(1), np.empty(0))


@pytest.mark.parametrize("people", [46, 142, 300, 500])
def test_a_target_that_breaks_more_people_than_allowed_hardly_ever_passes(people: int) -> None:
    """It breaks 1.5 %, 1 % is allowed. Of 46 people half the draws hold nobody of them, and signs say +0.0."""
    random, passed = np.random.default_rng(people), 0
    for _ in range(60):
        lost = (random.random(people) < 0.015).astype(np.float64)
        drop = compared(contributed(lost / people), contributed(np.zeros(people)), observed=float(lost.mean()))
        passed += most_lost(float(lost.mean()), drop.ci95[1], lost) <= 0.01
    assert passed <= 0.05 * 60


def test_the_table_says_where_the_exact_bound_for_few_people_decides(faces: Path) -> None:
    rows = gate(options(faces), Projection(TEACHER), {"near": Projection(in_mode(TEACHER, "int8"), 0.03)}).rows
    (row,) = rows
    assert row.bounded and row.most > row.drop.ci95[1]
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(gate_table(rows))
    said = " ".join(console.export_text().split())
    assert f"{100 * row.most:+.1f} (95 %)*" in said
    assert "* more than the interval's end: of 40 people too few lose anything" in said


def test_so_many_people_show_a_small_loss_where_nobody_loses_anything() -> None:
    assert [fewest_people(drop) for drop in (0.01, 0.03, 0.05)] == [368, 122, 72]
    enough = fewest_people(0.01)
    assert unseen(np.zeros(enough)) <= 0.01 < unseen(np.zeros(enough - 1))
    assert unseen(np.zeros(enough), 0.99) > 0.01, "further tries are judged more strictly"


def test_only_fp32_leaves_nothing_to_gate(faces: Path) -> None:
    gated = gate(options(faces), Projection(TEACHER), {"onnxruntime-fp32": Projection(TEACHER)})
    require_passed(gated)
    assert gated.rows == () and gated.summary.startswith("nothing to gate")


def test_another_teacher_and_an_unresolved_rate_are_refused(faces: Path, tmp_path: Path) -> None:
    teacher = write_teacher(tmp_path)
    with pytest.raises(SpaceMismatch):
        gate(
            GateOptions(faces=faces, teacher=str(teacher), teacher_preprocess=PREPROCESS, fmr=0.05),
            Projection(STUDENT),
            {},
        )
    with pytest.raises(UnsupportedFmr):
        gate(options(faces, fmr=1e-4), Projection(TEACHER), {})


@pytest.mark.parametrize(
    ("given", "said"), [(["--max-tar-drop", "1"], "--max-tar-drop 1"), (["--gate-fmr", "0"], "--gate-fmr 0")]
)
def test_impossible_limits_are_refused(
    faces: Path, tmp_path: Path, given: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--teacher", "t.onnx", "-o", str(tmp_path / "made"), "--gate", str(faces), *given]) == 2
    assert said in capsys.readouterr().err


def test_the_command_gates_and_certifies_every_target(
    faces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["--teacher", str(write_teacher(tmp_path)), "--teacher-preprocess", PREPROCESS, "-o", "made"]
    command += ["--precision", "fp32", "fp16", "--gate-fmr", "0.05"]
    assert main([*command, "--max-tar-drop", "0"]) == 2
    assert "--gate DIR|LIST is missing" in capsys.readouterr().err
    assert main([*command, "--gate", str(faces), "--max-tar-drop", "0.03"]) == 0
    manifest = Bundle.open("made").manifest
    assert manifest.gate.startswith("passed: TAR at FMR 0.05 on faces, 160 images of 40 people, allowed 3 points")
    (certificate,) = Bundle.open("made").certificates()
    assert certificate.query == manifest.targets[1].encoder.id and certificate.gallery == manifest.encoder.id


@pytest.mark.slow
def test_the_gate_leaves_out_what_cannot_predict_here_and_says_so(
    faces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torch", reason="Core ML's program is computed in torch")
    pytest.importorskip("coremltools.proto", reason="pip install 'pkd[coreml]'")
    monkeypatch.chdir(tmp_path)
    command = ["--teacher", str(write_teacher(tmp_path)), "--teacher-preprocess", PREPROCESS, "-o", "made"]
    command += ["--format", "onnx", "coreml", "--precision", "fp16"]
    assert main([*command, "--gate", str(faces), "--gate-fmr", "0.05", "--max-tar-drop", "0.03"]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "note: the gate leaves out coreml-fp16, and no certificate covers them" in said
    assert "no certificate covers onnxruntime-fp16" not in said
    bundle = Bundle.open("made")
    assert "onnxruntime-fp16" in bundle.manifest.gate and "coreml" not in bundle.manifest.gate
    by_runtime = {target.runtime: target.encoder.id for target in bundle.manifest.targets}
    assert [certificate.query for certificate in bundle.certificates()] == [by_runtime["onnxruntime"]]


def test_a_student_needs_its_teacher(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["run", "-o", str(tmp_path / "made"), "--gate", "faces"]) == 2
    assert "Pass --gate-teacher SPEC, too." in capsys.readouterr().err


def test_a_second_try_measures_the_target_alone_and_is_judged_more_strictly(faces: Path) -> None:
    class Counted(Projection):
        asked = 0

        def embed(self, crops: Rgb) -> Embeddings:
            self.asked += len(crops)
            return super().embed(crops)

    reference, target = Counted(TEACHER), Projection(in_mode(TEACHER, "int8"), 0.35)
    opened = Gate(options(faces, max_drop=0.5), reference, no_progress)
    (first,) = opened.judge({"int8": target})
    asked = reference.asked
    (second,) = opened.judge({"int8": target}, "another way", level=0.99)
    assert reference.asked == asked > 0
    assert first.row.drop == second.row.drop and first.row.drop.ci95[1] <= first.row.most < second.row.most
    between = Gate(options(faces, max_drop=(first.row.most + second.row.most) / 2), reference, no_progress)
    assert between.judge({"int8": target})[0].row.passed
    assert not between.judge({"int8": target}, "another way", level=0.99)[0].row.passed
    said = opened.conclude([first, second]).summary
    assert "in try 2 on these people: another way" in said and said.count("int8 loses") == 1
