"""The training loop: schedule, bit-for-bit continuation, divergence, and what a run leaves behind."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from pkd.toolkit.core.errors import BadHead, InputError, TrainingDiverged
from pkd.toolkit.distill.config import DistillConfig
from pkd.toolkit.distill.heads.head import read_head
from pkd.toolkit.distill.losses.registry import METHODS, WeightedSum
from pkd.toolkit.distill.models.student import TorchEncoder, load_student, weights_digest
from pkd.toolkit.distill.training.loop import distill, separation
from pkd.toolkit.distill.training.schedule import learning_rate, resolve
from pkd.toolkit.distill.training.setup import Prepared, prepare
from pkd.toolkit.distill.training.trainer import Trainer
from pkd.toolkit.encoders.base import Encoder
from tests.support.training_data import SIZE, make_pyramid, make_teacher, write_patterns

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_patterns(tmp_path_factory.mktemp("data") / "patterns")


@pytest.fixture(scope="module")
def teacher() -> TorchEncoder:
    return make_teacher()


def make_config(tmp_path: Path, folder: Path, /, **choices: Any) -> DistillConfig:
    base: dict[str, Any] = {
        "out": str(tmp_path / "run"), "faces": (str(folder),), "student": "mobilefacenet-relu:0.125", "steps": 6,
        "batch": 8, "precision": "fp32", "threads": 1, "cache": str(tmp_path / "cache"), "teacher": "projection",
        "method": "proxylesskd",
    }  # fmt: skip
    return DistillConfig(**(base | choices))


def train(config: DistillConfig, teacher: Encoder | None) -> dict[str, Any]:
    return distill(config, prepare(config, teacher, QUIET), teacher, QUIET)


def test_separation_is_the_mean_standard_score_of_the_own_image() -> None:
    random = np.random.default_rng(0)
    queries, gallery = (random.normal(size=(40, 8)) for _ in range(2))
    queries, gallery = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (queries, gallery))
    scores = queries @ gallery.T
    plain = np.mean([(row[i] - row.mean()) / row.std() for i, row in enumerate(scores)])
    assert separation(queries, gallery) == pytest.approx(plain, rel=1e-9)
    assert separation(gallery, gallery) > 2 > separation(queries, gallery)
    assert separation(0.5 * queries, gallery) == pytest.approx(plain, rel=1e-9), "no scale of the cosines counts"


def test_learning_rate_rises_then_falls_to_zero() -> None:
    config = DistillConfig(out="r", faces=("f",), lr=0.1, warmup=0.1)
    rates = [learning_rate(step, 100, config) for step in range(100)]
    assert rates[0] == pytest.approx(0.01) and max(rates) == pytest.approx(0.1) == rates[10]
    assert rates[:10] == sorted(rates[:10]) and rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] < 1e-4


@pytest.mark.parametrize(
    "method", [*(name for name in METHODS if name != "map"), "proxylesskd+l2kd:30", "l2kd+fsp:0.1+rkd:1"]
)
def test_every_method_learns(tmp_path: Path, faces: Path, method: str) -> None:
    teacher = make_pyramid()
    config = make_config(tmp_path, faces, method=method, steps=60, scale=16.0, lr=5e-3, augment=0.0)
    summary = train(config, teacher)
    with (config.run / "log.csv").open() as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file)]
    assert len(losses) == 60 and np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])
    student = load_student(config.run)
    assert student.info.id == summary["encoder"] and summary["method"] == str(WeightedSum.parse(method))
    aligns = WeightedSum.parse(method).aligns
    assert (student.info.space == teacher.info.space) == aligns
    if aligns:
        assert summary["cosine"] > (0.4 if "l2kd" in method else 0.15)


def test_methods_that_the_teacher_cannot_serve_are_refused_before_any_work(
    tmp_path: Path, faces: Path, teacher: TorchEncoder
) -> None:
    with pytest.raises(InputError, match="names no stages"):
        prepare(make_config(tmp_path, faces, method="fitnets"), teacher, QUIET)
    with pytest.raises(InputError, match="needs --teacher"):
        prepare(make_config(tmp_path, faces, method="rkd", teacher=None), None, QUIET)
    with pytest.raises(InputError, match="margin softmax has none"):
        prepare(make_config(tmp_path, faces, method="margindistillation", margin="softmax"), teacher, QUIET)
    assert not (tmp_path / "cache").exists() and not (tmp_path / "run").exists()


def test_a_teacher_is_trained_with_its_classifier_and_a_student_inherits_it(tmp_path: Path, faces: Path) -> None:
    config = make_config(
        tmp_path, faces, teacher=None, method="none", dim=12, steps=90, scale=16.0, lr=5e-3, augment=0.0
    )
    train(config, None)
    trained = load_student(config.run)
    assert trained.info.role == "teacher" and trained.info.space.dim == 12
    student = make_config(tmp_path, faces, teacher=config.out, out=str(tmp_path / "student"), steps=2)
    prepared = prepare(student, trained, QUIET)
    assert prepared.head is not None and prepared.head.source.endswith("head.npz")
    assert prepared.audit is not None and prepared.audit.top1 is not None and prepared.audit.top1 > 0.8
    own = read_head(config.run / "head.npz", prepared.identities, 12)
    np.testing.assert_array_equal(prepared.head.centres, own.centres)
    train(student, trained)
    assert load_student(student.run).info.space == trained.info.space


def test_the_frozen_head_stays_and_the_others_move(tmp_path: Path, faces: Path, teacher: TorchEncoder) -> None:
    def centres(trainer: Trainer) -> torch.Tensor:
        kept = (trainer.head and trainer.head.centres, trainer.ema_head and trainer.ema_head.units, trainer.own)
        return next(tensor for tensor in kept if tensor is not None).detach().clone()  # type: ignore[union-attr]

    for method, moves in (("proxylesskd", False), ("adadistill", True), ("none", True)):
        config = make_config(tmp_path, faces, method=method)
        trainer = Trainer(config, prepare(config, teacher, QUIET), 16, SIZE)
        before = centres(trainer)
        for batch in trainer.loader.run(0, 2):
            trainer.step(batch, 1e-2)
        assert bool((centres(trainer) != before).any()) == moves


@pytest.mark.parametrize("method", ["proxylesskd", "none", "adadistill", "l2kd+fsp"])
def test_continuation_is_bit_for_bit(tmp_path: Path, faces: Path, method: str) -> None:
    teacher = make_pyramid()
    torch.set_num_threads(1)
    config = make_config(tmp_path, faces, method=method, steps=8)
    prepared = prepare(config, teacher, QUIET)

    def steps(trainer: Trainer, start: int, stop: int) -> None:
        trainer.student.train()
        for step, batch in enumerate(trainer.loader.run(start, stop), start=start):
            trainer.step(batch, learning_rate(step, 8, config))

    whole = Trainer(config, prepared, 16, SIZE)
    steps(whole, 0, 8)
    first = Trainer(config, prepared, 16, SIZE)
    steps(first, 0, 3)
    torch.save(first.state(), tmp_path / "state.pt")
    second = Trainer(config, prepared, 16, SIZE)
    second.restore(torch.load(tmp_path / "state.pt", weights_only=True))
    steps(second, 3, 8)
    assert weights_digest(whole.student.state_dict()) == weights_digest(second.student.state_dict())
    if method == "none":
        assert whole.own is not None and second.own is not None
        assert torch.equal(whole.own, second.own)


def test_divergence_keeps_the_last_good_checkpoint(tmp_path: Path, faces: Path, teacher: TorchEncoder) -> None:
    config = make_config(tmp_path, faces, lr=1e20, steps=30, checkpoint_seconds=1e-9)
    with pytest.raises(TrainingDiverged, match=r"lower --lr") as caught:
        train(config, teacher)
    assert caught.value.exit_code == 1
    assert not (config.run / "student.pt").exists()
    if (config.run / "checkpoint.pt").exists():
        state = torch.load(config.run / "checkpoint.pt", weights_only=True)["state"]
        assert all(bool(torch.isfinite(t).all()) for t in state["student"].values() if t.is_floating_point())


def test_nan_pixels_of_a_good_run_cannot_reach_its_checkpoint(
    tmp_path: Path, faces: Path, teacher: TorchEncoder
) -> None:
    config = make_config(tmp_path, faces)
    trainer = Trainer(config, prepare(config, teacher, QUIET), 16, SIZE)
    assert trainer.finite()
    with torch.no_grad():
        next(trainer.student.parameters())[0, 0, 0, 0] = math.nan
    assert not trainer.finite()


def test_time_becomes_steps_and_epochs_become_steps(tmp_path: Path, faces: Path, teacher: TorchEncoder) -> None:
    timed = make_config(tmp_path, faces, steps=None, max_minutes=0.5)
    prepared = prepare(timed, teacher, QUIET)
    resolved = resolve(timed, prepared, 16, SIZE, QUIET)
    assert resolved.steps is not None and resolved.steps >= 10 and resolved.max_minutes is None
    with pytest.raises(InputError, match=r"preparing took 0\.5 minutes.*cached now"):
        resolve(timed, replace(prepared, seconds=30.0), 16, SIZE, QUIET)
    epochs = resolve(make_config(tmp_path, faces, steps=None, epochs=2.0), prepared, 16, SIZE, QUIET)
    assert epochs.steps == math.ceil(2 * 30 / 8)
    auto = resolve(make_config(tmp_path, faces, precision="auto"), prepared, 16, SIZE, QUIET)
    assert auto.precision in {"fp32", "bf16"}


def test_bf16_trains(tmp_path: Path, faces: Path, teacher: TorchEncoder) -> None:
    summary = train(make_config(tmp_path, faces, precision="bf16"), teacher)
    assert math.isfinite(summary["loss"])
    assert all(t.dtype != torch.bfloat16 for t in load_student(summary["run"]).module.state_dict().values())


def test_a_run_starts_from_the_weights_of_another(tmp_path: Path, faces: Path, teacher: TorchEncoder) -> None:
    first = make_config(tmp_path, faces, method="l2kd", steps=40, lr=5e-3, augment=0.0)
    before = train(first, teacher)
    second = make_config(tmp_path, faces, method="l2kd", steps=2, lr=1e-6, init=first.out, out=str(tmp_path / "second"))
    after = train(second, teacher)
    assert after["init"] == before["encoder"]
    weights = dict(load_student(first.run).module.named_parameters())
    for name, weight in load_student(second.run).module.named_parameters():
        torch.testing.assert_close(weight, weights[name], rtol=0, atol=1e-4)
    wrong = make_config(tmp_path, faces, init=first.out, student="mobilefacenet-relu:0.25", out=str(tmp_path / "wrong"))
    with pytest.raises(InputError, match="--init"):
        train(wrong, teacher)


def test_what_a_run_leaves_behind(tmp_path: Path, faces: Path, teacher: TorchEncoder) -> None:
    config = make_config(tmp_path, faces)
    train(config, teacher)
    assert json.loads((config.run / "config.json").read_text())["steps"] == 6
    assert json.loads((config.run / "audit.json").read_text())["classes"] == 6
    assert list((config.run / "tb").iterdir())
    assert not list(config.run.glob("*.part"))


def test_unlabelled_images_join_only_where_a_method_can_use_them(
    tmp_path: Path, faces: Path, teacher: TorchEncoder
) -> None:
    def images(method: str) -> Prepared:
        config = make_config(tmp_path, faces, method=method, unlabelled=(str(more),))
        return prepare(config, teacher, QUIET)

    more = write_patterns(tmp_path / "more", 2, 3, seed=9)
    assert len(images("proxylesskd").faces) == 30
    assert len(images("l2kd").faces) == 36
    assert (images("proxylesskd+l2kd").labels == -1).sum() == 6


def test_changed_images_and_permuted_heads_are_refused(tmp_path: Path, teacher: TorchEncoder) -> None:
    folder = write_patterns(tmp_path / "own")
    config = make_config(tmp_path, folder)
    prepared = prepare(config, teacher, QUIET)
    assert prepared.head is not None
    names = np.array(prepared.identities)
    np.savez(tmp_path / "permuted.npz", centres=prepared.head.centres, identities=np.roll(names, 1))
    with pytest.raises(BadHead, match="permuted"):
        prepare(make_config(tmp_path, folder, head=str(tmp_path / "permuted.npz")), teacher, QUIET)
    train(config, teacher)
    (folder / "id-00" / "0.png").unlink()
    (config.run / "student.pt").unlink()
    with pytest.raises(InputError, match="images have changed"):
        train(config, teacher)


def test_one_writer_per_run(tmp_path: Path, faces: Path, teacher: TorchEncoder) -> None:
    import fcntl

    config = make_config(tmp_path, faces)
    config.run.mkdir()
    with (config.run / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="another pkd-distill"):
            train(config, teacher)


@pytest.mark.parametrize(
    "choices",
    [
        {"steps": 0}, {"batch": 1}, {"lr": -1.0}, {"warmup": 2.0}, {"augment": -0.1}, {"steps": 5, "max_minutes": 1.0},
        {"dim": 12}, {"faces": ()},
    ],
)  # fmt: skip
def test_senseless_choices_are_refused(tmp_path: Path, faces: Path, choices: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        make_config(tmp_path, faces, **choices)


def test_one_identity_cannot_be_classified(tmp_path: Path, teacher: TorchEncoder) -> None:
    folder = write_patterns(tmp_path / "one", identities=1, images=9)
    with pytest.raises(InputError, match="1 identities"):
        prepare(make_config(tmp_path, folder), teacher, QUIET)
