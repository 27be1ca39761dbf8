"""Methods: the registry, weighted sums and what they need."""

from __future__ import annotations

import pytest
import torch

from pkd.toolkit.core.errors import InputError
from pkd.toolkit.distill.heads.margin import margin_cross_entropy
from pkd.toolkit.distill.losses.registry import METHODS, WeightedSum
from tests.support.loss_inputs import make_inputs


def test_weighted_sum() -> None:
    inputs = make_inputs([0, 1, 2])
    total = float(WeightedSum.parse("proxylesskd+l2kd:0.5").loss(inputs))
    parts = float(METHODS["proxylesskd"].loss(inputs)) + 0.5 * float(METHODS["l2kd"].loss(inputs))
    assert total == pytest.approx(parts, rel=1e-6)


@pytest.mark.parametrize("method", [name for name in METHODS if name != "adadistill"])
def test_every_method_is_finite_and_reaches_the_embeddings_or_the_stages(method: str) -> None:
    inputs = make_inputs([0, 1, 1, -1], requires_grad=True)
    loss = METHODS[method].loss(inputs)
    loss.backward()  # type: ignore[no-untyped-call]
    reached = [inputs.embeddings.grad, *(pair.student.grad for pair in inputs.stages)]
    assert torch.isfinite(loss)
    assert any(grad is not None and bool(grad.any()) for grad in reached)


@pytest.mark.parametrize("method", ["proxylesskd", "none", "adadistill", "margindistillation"])
def test_unlabelled_rows_do_not_enter_the_classification(method: str) -> None:
    mixed, kept = make_inputs([0, -1, 3, -1]), make_inputs([0, -1, 3, -1], rows=[0, 2])
    assert float(METHODS[method].loss(mixed).detach()) == pytest.approx(
        float(METHODS[method].loss(kept).detach()), 1e-6
    )


@pytest.mark.parametrize("method", [name for name, m in METHODS.items() if m.labels])
def test_a_batch_without_labels_costs_nothing_and_has_a_gradient(method: str) -> None:
    inputs = make_inputs([-1, -1, -1], requires_grad=True)
    loss = METHODS[method].loss(inputs)
    loss.backward()  # type: ignore[no-untyped-call]
    assert float(loss.detach()) == 0 and inputs.embeddings.grad is not None and not bool(inputs.embeddings.grad.any())


@pytest.mark.parametrize("method", [name for name, m in METHODS.items() if not m.labels])
def test_methods_without_need_of_labels_look_at_every_image(method: str) -> None:
    known, unknown = make_inputs([0, 1, 2, 3]), make_inputs([-1, -1, -1, -1])
    assert float(METHODS[method].loss(known).detach()) == float(METHODS[method].loss(unknown).detach())


def test_proxylesskd_equals_the_plain_margin_softmax() -> None:
    inputs = make_inputs([0, 4, 3])
    assert inputs.head is not None
    plain = margin_cross_entropy(inputs.embeddings, inputs.head.centres, inputs.labels, inputs.margin, inputs.scale)
    assert float(METHODS["proxylesskd"].loss(inputs)) == pytest.approx(float(plain), rel=1e-6)


def test_needs() -> None:
    both = WeightedSum.parse("proxylesskd+l2kd")
    assert both.head == "frozen" and not both.needs_labels and both.aligns and not both.stages
    assert WeightedSum.parse("proxylesskd").needs_labels
    control = WeightedSum.parse("none")
    assert not control.needs_teacher and control.head == "trained" and not control.aligns
    assert WeightedSum.parse("l2kd").head == "none"
    assert WeightedSum.parse("adadistill").head == "ema"
    assert WeightedSum.parse("l2kd+fsp").stages == 2 and WeightedSum.parse("l2kd+fsp").aligns


@pytest.mark.parametrize("method", ["fitnets", "at", "fsp", "rkd", "cckd"])
def test_what_was_published_beside_a_classifier_gets_the_students_own(method: str) -> None:
    alone = WeightedSum.parse(method)
    assert str(alone) == f"none+{method}:{METHODS[method].default_weight:g}" and alone.head == "trained"
    assert alone.needs_teacher and not alone.aligns
    beside = WeightedSum.parse(f"proxylesskd+{method}:3")
    assert str(beside) == f"proxylesskd+{method}:3" and beside.head == "frozen" and beside.aligns
    assert WeightedSum.parse(str(alone)) == alone


@pytest.mark.parametrize(
    "spec",
    ["proxyless", "l2kd:0", "l2kd:-1", "l2kd:inf", "l2kd:x", "none+proxylesskd", "adadistill+kd", "l2kd+l2kd", ""],
)
def test_bad_sums_are_refused(spec: str) -> None:
    with pytest.raises(InputError, match="--method"):
        WeightedSum.parse(spec)
