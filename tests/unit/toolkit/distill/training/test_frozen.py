"""Frozen layers of an adopted student: where it is cut, what is stored, and that training leaves them alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
import torch
from rich.console import Console

from pkd.toolkit.core.errors import InputError
from pkd.toolkit.data.face_set import FaceSet
from pkd.toolkit.distill.config import DistillConfig
from pkd.toolkit.distill.models.adopted import Adopted, AdoptedNetwork, adopt
from pkd.toolkit.distill.models.cutting import choose_cut
from pkd.toolkit.distill.models.student import load_student
from pkd.toolkit.distill.training.frozen import store_features
from pkd.toolkit.distill.training.loop import distill
from pkd.toolkit.distill.training.setup import prepare
from pkd.toolkit.distill.training.trainer import Trainer
from tests.support.training_data import SIZE, make_teacher, write_patterns
from tests.unit.toolkit.distill.models.test_adopted import Graph, f, torch_old

QUIET = Console(quiet=True)
STATED = f"mean=127.5,std=127.5,size={SIZE},template=none"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("frozen")
    write_patterns(folder / "crops")
    torch_old(folder / "mobile.onnx")
    return folder


def make_config(place: Path, out: Path, /, **choices: Any) -> DistillConfig:
    base: dict[str, Any] = {
        "out": str(out), "faces": (str(place / "crops"),), "student": str(place / "mobile.onnx"),
        "student_preprocess": STATED, "teacher": "projection", "steps": 6, "batch": 8, "precision": "fp32",
        "threads": 1, "cache": str(place / "cache"),
    }  # fmt: skip
    return DistillConfig(**(base | choices))


def make_trainer(config: DistillConfig) -> Trainer:
    trainer = Trainer(config, prepare(config, make_teacher(), QUIET), 16, SIZE)
    trainer.student.train()
    return trainer


def adopted(place: Path) -> Adopted:
    return adopt(str(place / "mobile.onnx"), STATED)


def test_a_share_that_no_layer_has_is_refused(place: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no layer up to which so little is done"):
        prepare(make_config(place, tmp_path, freeze=0.1), make_teacher(), QUIET)


def test_stored_features_are_what_the_layers_give_mirrored_ones_too(place: Path) -> None:
    student, faces = adopted(place), FaceSet.read(str(place / "crops"))
    network = student.network(16).eval()
    cut = choose_cut(network, 0.9)
    assert cut is not None
    stored = store_features(student, cut, faces, mirror=True, cache=place / "cache")
    indices, mirrored = np.array([4, 0, 17]), np.array([True, False, True])
    crops = faces.load(indices, SIZE)
    crops[mirrored] = crops[mirrored][:, :, ::-1]
    found = stored.batch(indices, mirrored)
    assert found.dtype == torch.float16
    network.freeze(cut.step)
    with torch.no_grad():
        whole = network(torch.from_numpy(student.info.preprocess(crops)))
        torch.testing.assert_close(network(found.float(), features=True), whole, rtol=5e-3, atol=5e-3)


def test_features_that_half_floats_cannot_hold_are_refused(tmp_path: Path, place: Path) -> None:
    g = Graph()
    g.add("Conv", f(6, 3, 3, 3) * 1e7, strides=[2, 2], pads=[1, 1, 1, 1])
    g.add("Relu")
    g.add("Conv", f(64, 6, 3, 3) * 1e-7, pads=[1, 1, 1, 1])
    g.add("GlobalAveragePool")
    g.add("Flatten")
    g.save(tmp_path / "huge.onnx", 1, [64], 13)
    config = make_config(place, tmp_path / "run", student=str(tmp_path / "huge.onnx"), freeze=0.5)
    with pytest.raises(InputError, match=r"more than half floats hold\. Use --freeze 0"):
        prepare(config, make_teacher(), QUIET)


def test_training_leaves_frozen_layers_alone_and_trains_the_rest(place: Path, tmp_path: Path) -> None:
    config = make_config(place, tmp_path / "run")
    prepared = prepare(config, make_teacher(), QUIET)
    assert prepared.start is not None and prepared.frozen is not None
    network = prepared.start.network
    assert isinstance(network, AdoptedNetwork)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    summary = distill(config, prepared, make_teacher(), QUIET)
    after = load_student(tmp_path / "run").module.state_dict()
    steps = list(network.trunk.step_names)
    frozen = {f"trunk.{name}" for name in steps[: steps.index(str(network.frozen)) + 1]}
    for name, value in before.items():
        kept = name.rsplit(".", 1)[0].startswith(tuple(frozen)) and ".".join(name.split(".")[:2]) in frozen
        if kept:
            assert torch.equal(after[name], value), name
    changed = [name for name, value in before.items() if not torch.equal(after[name], value)]
    assert any(name.startswith("map") for name in changed) and any(name.startswith("trunk") for name in changed)
    assert summary["freeze"] == 0.9
    assert DistillConfig.model_validate_json((tmp_path / "run" / "config.json").read_text()).freeze == 0.9


def test_continuation_is_bit_for_bit(place: Path, tmp_path: Path) -> None:
    config = make_config(place, tmp_path / "run", ema=0.9)
    whole, first, second = (make_trainer(config) for _ in range(3))
    for trainer, start, stop in ((whole, 0, 6), (first, 0, 3)):
        for batch in trainer.loader.run(start, stop):
            trainer.step(batch, 1e-2)
    second.restore(first.state())
    for batch in second.loader.run(3, 6):
        second.step(batch, 1e-2)
    for (name, expected), found in zip(
        whole.trained_student().state_dict().items(), second.trained_student().state_dict().values(), strict=True
    ):
        assert torch.equal(expected, found), name


def test_batches_show_the_same_images_and_targets_as_without(place: Path, tmp_path: Path) -> None:
    with_, without = (make_trainer(make_config(place, tmp_path, freeze=freeze, augment=0.0)) for freeze in (0.9, 0.0))
    for a, b in zip(with_.loader.run(0, 4), without.loader.run(0, 4), strict=True):
        assert (a.features, b.features) == (True, False)
        np.testing.assert_array_equal(a.indices, b.indices)
        np.testing.assert_array_equal(a.mirrored, b.mirrored)
        assert a.teacher is not None and b.teacher is not None
        torch.testing.assert_close(a.teacher, b.teacher)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"freeze": 1.5}, "a share of the student's arithmetic"),
        ({"freeze": 0.9, "augment": 0.2}, "Leave out --augment"),
        ({"freeze": 0.9, "views": 4}, "Leave out --augment"),
        ({"freeze": 0.9, "student": "mobilefacenet:0.5"}, "needs an adopted student"),
    ],
)
def test_choices_that_cannot_be_are_refused(place: Path, choices: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_config(place, place / "run", **choices)


def test_defaults_follow_what_is_asked_for(place: Path) -> None:
    def chosen(**choices: Any) -> tuple[object, ...]:
        config = make_config(place, place / "run", **choices)
        return config.freeze, config.augment, config.lr, config.trunk_lr

    assert chosen() == (None, 0.2, 2e-3, 1.0)  # decided when the images are known
    assert chosen(freeze=0.5) == (0.5, 0.0, 2e-3, 1.0)
    assert chosen(freeze=0.0) == chosen(augment=0.2) == (0.0, 0.2, 1e-3, 0.1)
    assert chosen(views=3)[0] == 0.0
    with pytest.raises(InputError, match="trains early layers"):
        prepare(make_config(place, place / "run", method="l2kd+at", freeze=0.5), make_teacher(), QUIET)
