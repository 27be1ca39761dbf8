"""Which head a run uses, from the config to what the trainer is given."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from pkd.toolkit.core.errors import BadHead, InputError
from pkd.toolkit.distill.config import DistillConfig
from pkd.toolkit.distill.heads import resolve
from pkd.toolkit.distill.heads.head import save_head
from pkd.toolkit.distill.heads.resolve import HeadChoice
from pkd.toolkit.distill.training.setup import Prepared, prepare
from pkd.toolkit.distill.training.trainer import Trainer
from tests.support.head_data import write_shards
from tests.support.recordio_writer import insightface_records, write_records
from tests.support.training_data import SIZE, make_teacher, write_patterns

QUIET = Console(quiet=True)
TEACHER = make_teacher()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """crops/: 6 people; loose/: images without identity; twins/: 4 people, two of them under two names."""
    folder = tmp_path_factory.mktemp("heads")
    write_patterns(folder / "crops")
    write_patterns(folder / "loose", identities=2, images=4, seed=9)
    twins = folder / "twins"
    write_patterns(twins, identities=4, images=8, seed=1)
    for person in sorted(twins.iterdir()):
        person.rename(twins / f"a-{person.name}")
    for name in ("id-00", "id-01"):  # three of their images under another name
        (twins / f"b-{name}").mkdir()
        for k in (5, 6, 7):
            (twins / f"a-{name}" / f"{k}.png").rename(twins / f"b-{name}" / f"{k}.png")
    return folder


def made(place: Path, tmp_path: Path, /, **choices: Any) -> Prepared:
    base: dict[str, Any] = {
        "out": str(tmp_path / "run"), "faces": (str(place / "crops"),), "student": "mobilefacenet-relu:0.125",
        "steps": 2, "batch": 4, "precision": "fp32", "cache": str(place / "cache"), "teacher": "projection",
        "method": "proxylesskd",
    }  # fmt: skip
    return prepare(DistillConfig(**(base | choices)), TEACHER, QUIET)


def test_spelling() -> None:
    assert HeadChoice.parse(("auto",), "nowhere.onnx") == HeadChoice("means")
    assert HeadChoice.parse(("images:0.25",), None) == HeadChoice("images", share=0.25)
    assert HeadChoice.parse(("a.pt", "b.pt"), None) == HeadChoice("files", ("a.pt", "b.pt"))
    for wrong in (("means", "fit"), ("fit:2",), ("images:0",), ("images:1.5",), ("images:x",), ("images", "a.pt")):
        with pytest.raises(InputError, match="--head"):
            HeadChoice.parse(wrong, None)


def test_one_name_or_several_in_the_config() -> None:
    assert DistillConfig(out="r", faces=("f",), head="means").head == ("means",)  # type: ignore[arg-type]
    for bad in (0, 1, -0.5):
        with pytest.raises(InputError, match="--merge-duplicates"):
            DistillConfig(out="r", faces=("f",), teacher="t", merge_duplicates=bad)
    with pytest.raises(InputError, match="needs --teacher"):
        DistillConfig(out="r", faces=("f",), merge_duplicates=0.7)


def test_a_teacher_without_a_head_is_audited_for_every_method(place: Path, tmp_path: Path) -> None:
    for method in ("l2kd", "none", "proxylesskd"):
        found = made(place, tmp_path, method=method)
        assert found.audit is not None and found.audit.top1 is not None and found.audit.top1 > 0.9
        assert (found.head is None) == (method != "proxylesskd")
        assert found.audit.duplicates is not None and found.audit.duplicates.pairs == 0


def test_wrong_labels_stop_a_frozen_head_but_only_warn_where_labels_do_not_matter(place: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mixed"
    images = sorted((place / "crops").rglob("*.png"))
    for i, path in enumerate(images):
        (folder / f"id-{i % 6}").mkdir(parents=True, exist_ok=True)
        (folder / f"id-{i % 6}" / f"{i}.png").write_bytes(path.read_bytes())
    for head in ("means", "fit", "images"):
        with pytest.raises(BadHead, match="nearest to their own"):
            made(place, tmp_path, faces=(str(folder),), head=head)
    found = made(place, tmp_path, faces=(str(folder),), method="l2kd")
    assert found.audit is not None and found.audit.fault is not None


def test_shards_and_their_label_map_reach_the_trainer(place: Path, tmp_path: Path) -> None:
    head = made(place, tmp_path).head
    assert head is not None
    order = np.array([3, 0, 5, 1, 4, 2])
    write_shards(tmp_path / "pfc", head.centres.numpy()[order], 4, "checkpoint")
    (tmp_path / "map.json").write_text(json.dumps({head.identities[c]: row for row, c in enumerate(order.tolist())}))
    found = made(place, tmp_path, head=str(tmp_path / "pfc"), head_labels=str(tmp_path / "map.json"))
    assert found.head is not None and found.audit is not None and found.audit.top1 == 1
    rows = found.labels
    for i, label in enumerate(found.faces.labels):
        assert found.head.identities[rows[i]] == found.faces.identities[label]
    with pytest.raises(BadHead, match="nearest to their own"):
        made(place, tmp_path, head=str(tmp_path / "pfc"))


def test_numbers_of_recordio_are_rows_of_the_shards(place: Path, tmp_path: Path) -> None:
    """The images show three of twelve classes: without a map, the numbers alone say which rows are theirs."""
    write_patterns(tmp_path / "people", identities=12, images=3, seed=4)
    folders = sorted((tmp_path / "people").iterdir())
    images = [(label, path.read_bytes()) for label, folder in enumerate(folders) for path in sorted(folder.iterdir())]
    images = [(label, image) for label, image in images if label in {2, 7, 10}]
    write_records(tmp_path / "train.rec", insightface_records(images))
    in_order = made(place, tmp_path, faces=(str(tmp_path / "people"),)).head
    assert in_order is not None
    write_shards(tmp_path / "pfc", in_order.centres.numpy(), 5)
    found = made(place, tmp_path, faces=(str(tmp_path / "train.rec"),), head=str(tmp_path / "pfc"))
    assert found.labels.tolist() == [label for label, _ in images]
    assert found.audit is not None and found.audit.top1 == 1 and found.audit.empty_classes == 9


def test_a_fitted_head_is_kept_for_the_resumed_run(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = made(place, tmp_path, head="fit").head
    assert first is not None and first.source == "fit"

    def never(*args: Any) -> Any:
        raise AssertionError("fitted again")

    with monkeypatch.context() as patch:
        patch.setattr(resolve, "fit_head", never)
        again = made(place, tmp_path, head="fit").head
        assert again is not None and torch.equal(again.centres, first.centres)
        with pytest.raises(AssertionError, match="fitted again"):
            made(place, tmp_path, head="fit", seed=1)
    (tmp_path / "run" / "head.npz").write_bytes(b"torn")
    assert made(place, tmp_path, head="fit").head is not None


def test_images_as_centres_use_the_unlabelled_ones_too(place: Path, tmp_path: Path) -> None:
    found = made(place, tmp_path, head="images:0.5", unlabelled=(str(place / "loose"),))
    assert found.head is not None and found.exclude is not None and len(found.head.centres) == 38
    assert found.labels.min() == 0 and len(set(found.labels.tolist())) == 38
    sizes = found.exclude[found.labels]
    assert (sizes[:, 1] - sizes[:, 0]).tolist() == [5] * 30 + [1] * 8
    config = DistillConfig(
        out="r", faces=("f",), student="mobilefacenet-relu:0.125", steps=2, batch=4, precision="fp32", teacher="t"
    )
    trainer = Trainer(config, found, 16, SIZE)
    loss, _ = trainer.step(trainer.loader.make(0, np.array([0, 7, 29, 31])), 1e-3)
    assert np.isfinite(loss)


def test_unlabelled_images_reach_every_method_that_can_use_them(place: Path, tmp_path: Path) -> None:
    loose = (str(place / "loose"),)
    for method, images in (("l2kd", 38), ("proxylesskd", 30), ("proxylesskd+l2kd", 38), ("kd", 38), ("none", 30)):
        found = made(place, tmp_path, method=method, unlabelled=loose)
        assert len(found.faces) == images, method
        assert found.audit is not None and found.audit.unlabelled_images == images - 30
    alone = made(place, tmp_path, faces=(), unlabelled=loose, method="l2kd")
    assert alone.audit is None and alone.head is None
    everyone = made(place, tmp_path, faces=(), unlabelled=loose, head="images")
    assert everyone.head is not None and everyone.audit is None and len(everyone.head.centres) == 8
    with pytest.raises(InputError, match="--faces"):
        made(place, tmp_path, faces=(), unlabelled=loose, method="kd")


def test_people_under_two_labels_are_reported_then_merged(place: Path, tmp_path: Path) -> None:
    twins = (str(place / "twins"),)
    plain = made(place, tmp_path, faces=twins, method="l2kd")
    assert plain.audit is not None and plain.audit.duplicates is not None and not plain.audit.merged
    assert plain.audit.duplicates.pairs == 2 and len(plain.identities) == 6
    assert plain.audit.duplicates.nearest[0].cosine > 0.9
    for head in ("means", "fit", "images"):
        found = made(place, tmp_path, faces=twins, merge_duplicates=0.9, head=head)
        assert found.audit is not None and len(found.identities) == 4
        assert {(m.identity, *m.others) for m in found.audit.merged} == {("a-id-00", "b-id-00"), ("a-id-01", "b-id-01")}
        assert all(m.images == 8 and m.least_cosine > 0.9 for m in found.audit.merged)
        assert found.audit.classes == 4 and found.audit.top1 is not None and found.audit.top1 > 0.9
        if head != "images":
            named = [found.identities[i] for i in found.labels]
            real = [found.faces.identities[i].replace("b-", "a-") for i in found.faces.labels]
            assert named == real


def test_rows_of_an_inherited_head_are_merged_as_well(place: Path, tmp_path: Path) -> None:
    twins = (str(place / "twins"),)
    head = made(place, tmp_path, faces=twins).head
    assert head is not None
    (tmp_path / "teacher").mkdir()
    save_head(head, tmp_path / "teacher" / "head.npz")
    found = made(place, tmp_path, faces=twins, head=str(tmp_path / "teacher"), merge_duplicates=0.9)
    assert found.head is not None and len(found.head.centres) == 4 and found.audit is not None
    assert sum(len(m.others) for m in found.audit.merged) == 2
    assert [found.head.identities[i] for i in found.labels] == [
        found.faces.identities[i].replace("b-", "a-") for i in found.faces.labels
    ]
