"""The trainer's options: averaged weights, SGD, clipping, mixed faces; and a run of each that is resumed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from pkd.toolkit.core.errors import InputError
from pkd.toolkit.distill.config import DistillConfig
from pkd.toolkit.distill.models.student import load_student
from pkd.toolkit.distill.training.loop import distill
from pkd.toolkit.distill.training.setup import prepare
from pkd.toolkit.distill.training.trainer import Trainer, WeightAverage
from tests.support.training_data import SIZE, make_teacher, write_patterns

QUIET = Console(quiet=True)
RECORDING = """
from torch.nn.functional import normalize
seen = []
def loss(inputs):
    seen.append(inputs)
    return (normalize(inputs.embeddings) - inputs.teacher).square().sum()
"""


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_patterns(tmp_path_factory.mktemp("data") / "patterns")


def make_config(tmp_path: Path, faces: Path, /, **choices: Any) -> DistillConfig:
    base: dict[str, Any] = {
        "out": str(tmp_path / "run"), "faces": (str(faces),), "student": "mobilefacenet-relu:0.125", "steps": 6,
        "batch": 8, "precision": "fp32", "threads": 1, "cache": str(tmp_path / "cache"), "teacher": "projection",
        "method": "l2kd",
    }  # fmt: skip
    return DistillConfig(**(base | choices))


def make_trainer(config: DistillConfig) -> Trainer:
    trainer = Trainer(config, prepare(config, make_teacher(), QUIET), 16, SIZE)
    trainer.student.train()
    return trainer


def run(trainer: Trainer, start: int, stop: int) -> None:
    for batch in trainer.loader.run(start, stop):
        trainer.step(batch, 1e-2)


@pytest.mark.parametrize(
    "choices",
    [
        {"ema": 0.9},
        {"optimizer": "sgd", "clip_norm": 0.5, "ema": 0.99},
        {"views": 3, "mix": 0.4, "augment": 0.6},
        {"teacher_live": True, "mix": 0.4},
        {"views": 2, "views_in_memory": True, "mix": 0.4},
        {"method": "csd+infonce"},
    ],
    ids=str,
)
def test_continuation_is_bit_for_bit(tmp_path: Path, faces: Path, choices: dict[str, Any]) -> None:
    config = make_config(tmp_path, faces, **choices)
    whole, first, second = (make_trainer(config) for _ in range(3))
    run(whole, 0, 7)
    run(first, 0, 3)
    torch.save(first.state(), tmp_path / "state.pt")
    second.restore(torch.load(tmp_path / "state.pt", weights_only=True))
    run(second, 3, 7)
    for one, other in ((whole.student, second.student), (whole.trained_student(), second.trained_student())):
        for (name, expected), found in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
            assert torch.equal(expected, found), name


def test_the_average_is_what_its_formula_says_counts_included() -> None:
    network = torch.nn.BatchNorm1d(3)
    state = network.state_dict()  # shares its memory
    average, expected = WeightAverage(network, 0.6), state["weight"].clone()
    for step in range(1, 9):
        with torch.no_grad():
            state["weight"] += step
            state["num_batches_tracked"] += 1
        average.update(network)
        decay = min(0.6, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * state["weight"]
    torch.testing.assert_close(average.weights["weight"], expected)
    assert int(average.weights["num_batches_tracked"]) == 8


def test_the_averaged_weights_are_what_a_run_leaves(tmp_path: Path, faces: Path) -> None:
    config = make_config(tmp_path, faces, ema=0.9)
    distill(config, prepare(config, make_teacher(), QUIET), make_teacher(), QUIET)
    checkpoint = torch.load(config.run / "checkpoint.pt", weights_only=True)["state"]
    kept = load_student(config.run).module.state_dict()
    for name, value in kept.items():
        assert torch.equal(value, checkpoint["average"]["weights"][name])
    assert any(not torch.equal(value, checkpoint["student"][name]) for name, value in kept.items())
    assert json.loads((config.run / "config.json").read_text())["ema"] == 0.9


def test_a_gradient_is_clipped_to_its_norm_and_only_then(tmp_path: Path, faces: Path) -> None:
    norms = {}
    for clip in (None, 1e-3, 1e6):
        trainer = make_trainer(make_config(tmp_path, faces, clip_norm=clip))
        run(trainer, 0, 1)
        norms[clip] = float(
            torch.stack([p.grad.norm() for p in trainer.student.parameters() if p.grad is not None]).norm()
        )
    assert norms[1e-3] == pytest.approx(1e-3, rel=1e-3)
    assert norms[None] == norms[1e6] > 1e-2


def test_sgd_has_its_own_defaults_and_learns(tmp_path: Path, faces: Path) -> None:
    config = make_config(tmp_path, faces, optimizer="sgd", steps=60, augment=0.0)
    assert (config.lr, config.weight_decay) == (0.1, 5e-4)
    assert make_config(tmp_path, faces, optimizer="sgd", lr=0.3).lr == 0.3
    assert (make_config(tmp_path, faces).lr, make_config(tmp_path, faces).weight_decay) == (0.02, 0.05)
    assert isinstance(make_trainer(config).optimiser, torch.optim.SGD)
    assert distill(config, prepare(config, make_teacher(), QUIET), make_teacher(), QUIET)["cosine"] > 0.4


def test_a_mixed_face_is_nobodys(tmp_path: Path, faces: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "recording_loss.py").write_text(RECORDING)
    monkeypatch.syspath_prepend(tmp_path)
    config = make_config(tmp_path, faces, method="recording_loss:loss", mix=0.5, teacher_live=True)
    trainer = make_trainer(config)
    batches = list(trainer.loader.run(0, 3))
    for batch in batches:
        trainer.step(batch, 1e-3)
    import recording_loss  # type: ignore[import-not-found]

    for batch, inputs in zip(batches, recording_loss.seen, strict=True):
        assert 0 < batch.mixed.sum() < 8
        np.testing.assert_array_equal(inputs.labels.numpy() < 0, batch.mixed)
        np.testing.assert_array_equal(inputs.people.numpy() < 0, batch.mixed)
        np.testing.assert_array_equal(inputs.images.numpy(), batch.indices)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"ema": 1.0}, "--ema 1.0: a decay"),
        ({"views": -1}, "--views -1"),
        ({"views": 2, "teacher_live": True}, "give one of them"),
        ({"views": 2, "teacher": None}, "need --teacher"),
        ({"views_in_memory": True}, "Add --views 8"),
        ({"mix": 0.3}, "Add --views 8 or --teacher-live"),
        ({"mix": 1.3, "views": 2}, "between 0 and 1"),
        ({"clip_norm": 0.0}, "--clip-norm 0.0: must be above 0"),
    ],
)
def test_choices_that_cannot_be_are_refused(tmp_path: Path, faces: Path, choices: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_config(tmp_path, faces, **choices)


def test_mixing_needs_a_loss_that_reads_unlabelled_faces(tmp_path: Path, faces: Path) -> None:
    with pytest.raises(InputError, match="a mixed face has none"):
        prepare(make_config(tmp_path, faces, method="proxylesskd", mix=0.3, views=2), make_teacher(), QUIET)
