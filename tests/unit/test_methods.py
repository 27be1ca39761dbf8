"""Methods: the registry, weighted sums, and the cases where a loss must be exactly zero."""

from __future__ import annotations

import pytest
import torch

from pkd.toolkit.distill.margin import Margin, margin_cross_entropy
from pkd.toolkit.distill.methods import METHODS, Step, WeightedSum
from pkd.toolkit.errors import InputError


def make_step(labels: list[int], embeddings: torch.Tensor | None = None) -> Step:
    torch.manual_seed(1)
    teacher = torch.nn.functional.normalize(torch.randn(len(labels), 16))
    centres = torch.nn.functional.normalize(torch.randn(5, 16))
    if embeddings is None:
        embeddings = torch.randn(len(labels), 16)
    return Step(embeddings, torch.tensor(labels), teacher, centres, Margin.parse("arcface:0.5"), 32.0)


def test_l2kd_is_zero_for_the_teacher_itself_at_any_length() -> None:
    step = make_step([0, 1, -1])
    assert step.teacher is not None
    same = Step(step.teacher * 7, step.labels, step.teacher, None, step.margin, 1)
    assert float(METHODS["l2kd"].loss(same)) == pytest.approx(0, abs=1e-6)


def test_l2kd_is_twice_one_minus_cosine() -> None:
    step = make_step([0, 1, 2, 3])
    assert step.teacher is not None
    cosine = torch.nn.functional.cosine_similarity(step.embeddings, step.teacher).mean()
    assert float(METHODS["l2kd"].loss(step)) == pytest.approx(float(2 - 2 * cosine), abs=1e-5)


def test_unlabelled_rows_do_not_enter_the_classification() -> None:
    mixed = make_step([0, -1, 3, -1])
    assert mixed.centres is not None
    kept = margin_cross_entropy(mixed.embeddings[[0, 2]], mixed.centres, torch.tensor([0, 3]), mixed.margin, 32.0)
    assert float(METHODS["proxylesskd"].loss(mixed)) == pytest.approx(float(kept), abs=1e-5)


def test_a_batch_without_labels_costs_nothing_and_has_a_gradient() -> None:
    embeddings = torch.randn(3, 16, requires_grad=True)
    loss = METHODS["proxylesskd"].loss(make_step([-1, -1, -1], embeddings))
    loss.backward()
    assert float(loss.detach()) == 0 and embeddings.grad is not None and not bool(embeddings.grad.any())


def test_weighted_sum() -> None:
    step = make_step([0, 1, 2])
    total = float(WeightedSum.parse("proxylesskd+l2kd:0.5").loss(step))
    parts = float(METHODS["proxylesskd"].loss(step)) + 0.5 * float(METHODS["l2kd"].loss(step))
    assert total == pytest.approx(parts, rel=1e-6)


def test_needs() -> None:
    assert WeightedSum.parse("proxylesskd+l2kd").head == "frozen"
    assert not WeightedSum.parse("proxylesskd+l2kd").needs_labels
    assert WeightedSum.parse("proxylesskd").needs_labels
    assert not WeightedSum.parse("none").needs_teacher and WeightedSum.parse("none").head == "trained"
    assert WeightedSum.parse("l2kd").head == "none"


@pytest.mark.parametrize(
    "spec", ["proxyless", "l2kd:0", "l2kd:-1", "l2kd:inf", "l2kd:x", "none+proxylesskd", "l2kd+l2kd", ""]
)
def test_bad_sums_are_refused(spec: str) -> None:
    with pytest.raises(InputError, match="--method"):
        WeightedSum.parse(spec)
