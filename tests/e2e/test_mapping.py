"""pkd-map and pkd-evaluate --mapped as an operator runs them: a map, its certificates and what it costs."""

from __future__ import annotations

import json
import shutil
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pkd.serving.cli.gallery import main as gallery
from pkd.serving.galleries.crypto import MasterKey
from pkd.serving.galleries.sqlite.store import SqliteStore
from pkd.serving.galleries.store import Enrolment, NewTemplate, Space
from pkd.toolkit.bundle.bundle import Bundle
from pkd.toolkit.certificates.certificate import read_certificate
from pkd.toolkit.cli.evaluate import main as evaluate
from pkd.toolkit.cli.map import main as fit
from pkd.toolkit.cli.verify import main as verify
from pkd.toolkit.core.preprocess import Preprocess
from pkd.toolkit.data.face_set import FaceSet
from pkd.toolkit.encoders.base import open_bundle, open_onnx
from pkd.toolkit.encoders.space_map import SpaceMap
from pkd.toolkit.evaluation.results.schema import Evaluation
from tests.support.evaluation_faces import PREPROCESS, teacher_info, write_people, write_student, write_teacher


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """faces/, others/ to fit on, new.onnx with student/, old/ with a space of its own, map.npz and evaluation/."""
    folder = tmp_path_factory.mktemp("mapping")
    write_people(folder / "faces", [3] * 50)
    for person in write_people(folder / "others", [4] * 60, seed=9).iterdir():
        person.rename(person.with_name(f"other-{person.name}"))
    write_teacher(folder)
    write_student(folder, teacher_info(folder / "teacher.onnx").space)
    write_student(folder, None, noise=0.3, name="old", turned=True)
    assert fit(arguments(folder, "--old", folder / "old", "--faces", folder / "others", out="map.npz")) == 0
    assert evaluate(mapped(folder, "--student", folder / "student", "--faces", folder / "faces")) == 0
    return folder


def arguments(world: Path, *more: str | Path, out: str) -> list[str]:
    word = "--new" if out.endswith(".npz") else "--teacher"
    named = [word, world / "teacher.onnx", f"{word}-preprocess", PREPROCESS, *more]
    return [str(a) for a in (*named, "--cache", world / "cache", "--jobs", "1", "--out", world / out)]


def mapped(world: Path, *more: str | Path, out: str = "evaluation") -> list[str]:
    rest = ("--mapped", world / "map.npz", "--old", world / "old", "--bootstrap", "100", *more)
    return arguments(world, *rest, out=out)


def test_mapped_templates_are_certified_like_any_other_gallery(world: Path) -> None:
    out = world / "evaluation"
    made = Evaluation.model_validate_json((out / "report.json").read_bytes())
    assert [c.name for c in made.comparisons] == ["T–T", "S–T", "S–S", "T–M", "S–M"]
    id = SpaceMap.read(world / "map.npz").info.id
    assert made.mapped is not None and made.mapped.id == id
    found = [read_certificate(path) for path in (out / "certificates").glob("*.json")]
    assert {(c.query, c.gallery) for c in found if c.gallery == id} == {
        (made.teacher.id, id),
        (made.student.id if made.student else "", id),
    }
    assert {c.space for c in found} == {made.teacher.space.id}
    own = {c.name: c.points[0] for c in made.comparisons}
    for cost in made.costs:
        assert cost.difference.difference == pytest.approx(own[cost.pair].tar_balanced - own[cost.native].tar_balanced)
        assert cost.difference.ci95[0] <= cost.difference.difference <= cost.difference.ci95[1]
    assert {(cost.pair, cost.native) for cost in made.costs} == {("T–M", "T–T"), ("S–M", "S–T")}
    assert own["T–M"].threshold != own["T–T"].threshold and own["T–M"].tar_balanced > 0.3
    assert "What mapped templates cost" in (out / "report.html").read_text()
    assert verify([str(out)]) == 0
    other = shutil.copytree(out, world / "changed")
    report = json.loads((other / "report.json").read_text())
    (other / "report.json").write_text(json.dumps({**report, "mapped": None}))
    assert verify([str(other)]) == 4


def test_a_gallery_is_migrated_under_its_certificates(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = world / "evaluation"
    old, new = open_bundle(Bundle.open(world / "old")), teacher_info(world / "teacher.onnx")
    faces, key = FaceSet.read(world / "others"), world / "master.key"
    assert gallery(["new-key", str(key)]) == 0
    vectors = old.embed(faces.load(np.arange(40), 112))
    with closing(SqliteStore(world / "store", MasterKey.read(key))) as store:
        space = Space(old.info.space.id, old.info.space.dim)
        store.create("staff", space, None, "test")
        people = [Enrolment(f"p{i}", [NewTemplate(old.info.id, space.id, v)]) for i, v in enumerate(vectors)]
        store.enrol("staff", people, "test")

    def run(command: str, *more: object, code: int = 0) -> dict[str, Any]:
        capsys.readouterr()
        store = (world / "store", "staff", "--master-key", key, "--map", world / "map.npz")
        assert gallery(["--json", command, *map(str, (*store, *more))]) == code
        said = capsys.readouterr()
        return json.loads(said.out) if code == 0 else {"error": said.err}

    (world / "policies.json").write_text(json.dumps({"staff": {"promised_fmr": 1e-3}}))
    assert "promises FMR 0.0001" in run("migrate", "--evaluation", out, "--fmr", 1e-4, code=4)["error"]
    assert "promises FMR 0.001" in run("migrate", "--evaluation", out, code=4)["error"]
    strict = ("--policies", world / "policies.json")
    assert "promises FMR 0.001" in run("migrate", "--evaluation", out, *strict, code=4)["error"]
    plain = shutil.copytree(out, world / "plain")
    report = json.loads((plain / "report.json").read_text())
    (plain / "report.json").write_text(json.dumps({**report, "mapped": None}))
    assert "no evaluation of these maps" in run("migrate", "--evaluation", plain, "--fmr", 0.01, code=2)["error"]
    with closing(SqliteStore(world / "store", MasterKey.read(key))) as store:
        assert store.get("staff").moving_to is None  # nothing was begun
    done = run("migrate", "--evaluation", out, "--fmr", 0.01)
    assert (done["templates"], done["subjects"], done["unmoved"], done["moving_to"]) == (40, 40, 0, new.space.id)
    assert {cost["pair"] for cost in done["costs"]} == {"T–M", "S–M"} and len(done["certificates"]) == 2
    again = run("migrate", "--evaluation", out, "--fmr", 0.01, "--finish")
    assert (again["templates"], again["there_already"], again["deleted"], again["space"]) == (0, 40, 40, new.space.id)
    listed = run("mapped")["subjects"]
    assert len(listed) == 40 and listed[0]["expected_cosine"] <= listed[-1]["expected_cosine"]
    with closing(SqliteStore(world / "store", MasterKey.read(key))) as store:
        (found,) = store.search("staff", SpaceMap.read(world / "map.npz").info.id, new_vectors(world, faces)[:1], 1)
        assert found.hits[0].subject == "p0"


def new_vectors(world: Path, faces: FaceSet) -> Any:
    """Embed with the new teacher, who made no template of the gallery."""
    return open_onnx(world / "teacher.onnx", Preprocess.parse(PREPROCESS)).embed(faces.load(np.arange(4), 112))


def test_what_does_not_fit_the_map_is_refused(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def failed(argv: list[str], command: object = evaluate) -> str:
        assert command(argv) == 2  # type: ignore[operator]
        return capsys.readouterr().err

    faces = ("--faces", world / "faces")
    assert "is not old@" in failed(mapped(world, *faces, "--old", world / "student"))
    assert "fitted on these very images" in failed(mapped(world, "--faces", world / "others"))
    assert "Give both" in failed(arguments(world, "--mapped", world / "map.npz", *faces, out="e"))
    assert "--mapped goes with" in failed(mapped(world, *faces, "--flip"))
    other = world / "elsewhere.npz"
    kept = SpaceMap.read(world / "map.npz")
    square, zeros = np.eye(kept.old.space.dim), np.zeros(kept.old.space.dim)
    SpaceMap(kept.old, kept.old, square, zeros, (square, zeros), kept.report).write(other)
    assert "cannot be compared" in failed(mapped(world, *faces, "--mapped", other))
    assert "share a space" in failed(
        arguments(world, "--old", world / "student", *faces, out="x.npz"), fit
    )  # fmt: skip
    few = ("--old", world / "old", "--faces", world / "faces" / "p000", "--unlabelled")
    assert "too few" in failed(arguments(world, *few, out="x.npz"), fit)
    assert "--out" in failed(arguments(world, *few, out="none/x.npz"), fit)
