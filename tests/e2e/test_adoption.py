"""A model that exists becomes the teacher's student: by the map alone, by training from there, and as a bundle."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import onnx
import pytest

pytest.importorskip("torch")

from torch import nn

from pkd.export.cli import main as export
from pkd.toolkit.bundle.bundle import Bundle
from pkd.toolkit.cli.distill import main
from pkd.toolkit.data.face_set import FaceSet
from pkd.toolkit.distill.models.adopted import adopt
from pkd.toolkit.distill.models.backbones import parameters
from pkd.toolkit.distill.models.student import load_student
from pkd.toolkit.encoders.base import open_bundle, unit_rows
from tests.support.training_data import SIZE, write_patterns, write_teacher
from tests.unit.toolkit.distill.models.test_adopted import torch_old
from tests.unit.toolkit.distill.models.test_shrinking import bottlenecks

STATED = f"mean=127.5,std=127.5,size={SIZE},template=none"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("work")
    write_patterns(folder / "crops", identities=160, images=3)
    write_teacher(folder / "teacher.onnx")
    torch_old(folder / "mobile.onnx")
    return folder


def distill(place: Path, out: str, *more: str) -> int:
    return main(
        [
            "--teacher", str(place / "teacher.onnx"), "--teacher-preprocess", STATED, "--faces", str(place / "crops"),
            "--student", str(place / "mobile.onnx"), "--student-preprocess", STATED, "--threads", "1",
            "--cache", str(place / "cache"), "--out", str(place / out), *more,
        ]
    )  # fmt: skip


def cosine(place: Path, out: str) -> float:
    from pkd.toolkit.core.preprocess import Preprocess
    from pkd.toolkit.encoders.base import open_onnx

    faces = FaceSet.read(place / "crops")
    crops = faces.load(range(len(faces)), SIZE)
    expected = open_onnx(place / "teacher.onnx", Preprocess.parse(STATED)).embed(crops)
    return float(np.einsum("nd,nd->n", load_student(place / out).embed(crops), expected).mean())


def test_map_then_bundle(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert distill(place, "map", "--method", "map") == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "map from the layer in front of the embedding (ridge), 480 images: 32 held-out people: S–T TAR" in said
    report = json.loads((place / "map" / "report.json").read_text())
    assert [point["images"] for point in report["map"]["curve"]] == [100, 300, 384]
    assert report["map"]["held_out"]["teacher"] > 0.9
    assert cosine(place, "map") > 0.5
    training = load_student(place / "map").training
    assert (training["method"], training["backbone"], training["steps"]) == ("map", "mobile", 0)
    assert str(training["init"]).startswith("mobile@sha256:")

    assert export([str(place / "map"), "-o", str(place / "bundle")]) == 0
    bundle = Bundle.open(place / "bundle")
    crops = FaceSet.read(place / "crops").load(range(5), SIZE)
    np.testing.assert_allclose(open_bundle(bundle).embed(crops), load_student(place / "map").embed(crops), atol=1e-5)
    nodes = onnx.load_model_from_string(bundle.read("encoder.onnx")).graph.node
    own = [node for node in nodes if not node.name.startswith("pkd/")]
    before = onnx.load(str(place / "mobile.onnx")).graph.node
    assert operators(own) <= operators(before)


def operators(nodes: Iterable[onnx.NodeProto]) -> int:
    return sum(node.op_type not in {"Constant", "Identity"} for node in nodes)


def test_training_begins_with_the_map_and_is_checked(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert distill(place, "trained", "--steps", "30", "--batch", "16", "--precision", "fp32", "--ema", "0.9") == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "student, 16 held-out people: S–T TAR" in said
    assert "the map that it began with, 16 held-out people: S–T TAR" in said
    report = json.loads((place / "trained" / "report.json").read_text())
    assert report["check"]["people"] == 16
    assert report["map"]["images"] == 480 - 48
    assert {"tar", "interval", "fmr", "teacher"} <= {*report["map_check"]}
    first = (place / "trained" / "log.csv").read_text().splitlines()[1].split(",")
    held = report["map"]["held_out"]["cosine"]
    assert abs(float(first[2]) - held) < 0.2 < held, "the first step starts where the map is"
    assert load_student(place / "trained").training["method"] == "l2kd"
    kinds = [node.op_type for node in _exported(place, "trained").graph.node]
    assert "BatchNormalization" not in kinds


def test_a_share_of_its_own_embedding_keeps_how_the_student_tells_people_apart(place: Path) -> None:
    model = adopt(str(place / "mobile.onnx"), STATED)
    crops = FaceSet.read(place / "crops").load(range(0, 480, 10), SIZE)
    own = unit_rows((model.features.embed(crops) @ model.weight + model.bias).astype(np.float32))
    gaps = []
    for keep in ("0", "0.6"):
        training = ("--steps", "30", "--batch", "16", "--precision", "fp32", "--held-out", "0", "--keep", keep)
        assert distill(place, f"keep-{keep}", *training) == 0
        rows = load_student(place / f"keep-{keep}").embed(crops)
        gaps.append(np.abs(rows @ rows.T - own @ own.T).mean())
        assert load_student(place / f"keep-{keep}").training["keep"] == float(keep)
    assert gaps[1] < 0.7 * gaps[0], "similarities of the student's own embeddings stay"


def test_a_training_that_loses_against_the_map_leaves_the_map(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ("--steps", "12", "--batch", "32", "--lr", "3", "--precision", "fp32")
    assert distill(place, "lost", *more) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "The map is kept: the training lost against it. l2kd: mean cosine" in said
    report = json.loads((place / "lost" / "report.json").read_text())
    assert report["check"]["tar"] == pytest.approx(report["map_check"]["tar"], abs=0.02)
    kept = load_student(place / "lost")
    assert kept.training["method"] == "map"
    assert kept.info.name == "mobile-map"
    assert cosine(place, "lost") > 0.5
    assert "BatchNormalization" not in [node.op_type for node in _exported(place, "lost").graph.node]


def test_a_shrunk_student_is_trained_exported_and_smaller(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bottlenecks(place / "blocks.onnx")
    more = ("--student", str(place / "blocks.onnx"), "--shrink", "5000", "--map-rank", "8", "--freeze", "0.6")
    training = ("--steps", "60", "--batch", "32", "--lr", "0.005", "--seed", "1")
    assert distill(place, "small", *more, *training) == 0
    report = json.loads((place / "small" / "report.json").read_text())
    assert report["check"]["cosine"] > report["map"]["held_out"]["cosine"]
    student = load_student(place / "small")
    assert student.training["shrink"] == 5000
    assert parameters(student.module) <= 5000 + 200  # batch normalisation, which export folds
    _exported(place, "small")
    crops = FaceSet.read(place / "crops").load(range(5), SIZE)
    found = open_bundle(Bundle.open(place / "small-bundle")).embed(crops)
    np.testing.assert_allclose(found, student.embed(crops), atol=1e-5)
    assert distill(place, "again", "--student", str(place / "small"), "--method", "map") == 0
    assert parameters(load_student(place / "again").module) <= 5000, "its last layer stays of rank 8"
    assert distill(place, "kept", "--student", str(place / "small"), "--method", "map", "--keep", "0.1") == 2
    assert "--keep 0.1: needs a whole last layer. Add --map-rank 16" in capsys.readouterr().err
    whole = ("--student", str(place / "small"), "--method", "map", "--map-rank", "24")
    assert distill(place, "whole", *whole) == 0
    assert isinstance(load_student(place / "whole").module.map, nn.Linear)


def _exported(place: Path, run: str) -> onnx.ModelProto:
    assert export([str(place / run), "-o", str(place / f"{run}-bundle")]) == 0
    return onnx.load_model_from_string(Bundle.open(place / f"{run}-bundle").read("encoder.onnx"))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--method", "map+l2kd"), "--method map+l2kd: map stands alone"),
        (("--student", "mobilefacenet:0.5", "--method", "map"), "map stands alone, for --student FILE.onnx"),
        (("--student-preprocess", f"mean=127.5,std=127.5,size={SIZE}"), "Adopt a model of the same alignment"),
        (("--shrink", "10"), "are left when all channels inside its blocks are gone that can be"),
        (("--shrink", "0"), "a number of parameters for --student FILE.onnx"),
        (("--student", "nowhere.onnx"), "nowhere.onnx: no such file"),
        (("--keep", "1.5"), "--keep 1.5: must lie between 0 and 1"),
        (("--keep", "0.1", "--map-rank", "8"), "--keep 0.1: needs a whole last layer. Leave --map-rank out"),
        (("--student", "mobilefacenet:0.5", "--keep", "0.1"), "--keep 0.1: is for an adopted student"),
    ],
)
def test_refused_in_one_line(place: Path, more: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert distill(place, "none", *more) == 2
    assert said in capsys.readouterr().err
