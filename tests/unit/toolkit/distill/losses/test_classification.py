"""Losses over class centres against plain float64 derivations, their gradients, and the cases that must be exact."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import kl_div, log_softmax, normalize, softmax

from pkd.toolkit.distill.heads.ema import EmaHead
from pkd.toolkit.distill.heads.frozen_softmax import FrozenHead
from pkd.toolkit.distill.losses.classification import adadistill, kd, margindistillation, own_classifier, proxylesskd
from tests.support.loss_inputs import make_inputs

LABELS = [0, 4, 3, 3]


def arcface_loss(embeddings: Any, centres: Any, labels: Any, margins: Any, scale: Any) -> Any:  # type: ignore[no-untyped-def]
    """Mean margin softmax in numpy, one image at a time."""
    losses = []
    for x, y, m in zip(embeddings, labels, margins, strict=True):
        cosines = centres @ (x / np.linalg.norm(x))
        theta = math.acos(cosines[y])
        logits = scale * cosines
        logits[y] = scale * (math.cos(theta + m) if theta + m <= math.pi else cosines[y] - m * math.sin(m))
        top = logits.max()
        losses.append(top + math.log(np.exp(logits - top).sum()) - logits[y])
    return float(np.mean(losses))


@pytest.mark.parametrize("loss", [proxylesskd, own_classifier])
def test_margin_softmax_against_numpy(loss: Any) -> None:  # type: ignore[no-untyped-def]
    inputs = make_inputs(LABELS, dtype=torch.float64)
    assert inputs.head is not None and inputs.trained is not None
    centres = inputs.head.centres if loss is proxylesskd else inputs.trained
    expected = arcface_loss(inputs.embeddings.numpy(), centres.numpy(), LABELS, [0.5] * 4, inputs.scale)
    assert float(loss(inputs)) == pytest.approx(expected, rel=1e-9)


def test_loss_of_random_embeddings_is_what_theory_says() -> None:
    torch.manual_seed(0)
    head = FrozenHead(normalize(torch.randn(5000, 512)))
    inputs = replace(
        make_inputs([0]), embeddings=torch.randn(256, 512), labels=torch.randint(0, 5000, (256,)), head=head, scale=64.0
    )
    expected = 64 * math.sin(0.5) + math.log(5000) + 64**2 / (2 * 512)
    assert float(proxylesskd(inputs)) == pytest.approx(expected, abs=0.5)


def test_kd_is_the_divergence_of_the_softened_posteriors() -> None:
    inputs = make_inputs(LABELS, dtype=torch.float64)
    assert inputs.head is not None and inputs.teacher is not None
    sharpness = inputs.scale / inputs.temperature
    student = log_softmax(sharpness * normalize(inputs.embeddings) @ inputs.head.centres.T, dim=1)
    teacher = softmax(sharpness * inputs.teacher @ inputs.head.centres.T, dim=1)
    expected = inputs.temperature**2 * float(kl_div(student, teacher, reduction="batchmean"))
    assert float(kd(inputs)) == pytest.approx(expected, rel=1e-9)


def test_kd_of_the_teacher_itself_is_zero() -> None:
    inputs = make_inputs(LABELS, dtype=torch.float64)
    assert inputs.teacher is not None
    assert float(kd(replace(inputs, embeddings=inputs.teacher * 3))) == pytest.approx(0, abs=1e-12)


def test_margindistillation_against_numpy() -> None:
    inputs = make_inputs(LABELS, dtype=torch.float64)
    assert inputs.head is not None and inputs.teacher is not None
    centres = inputs.head.centres.numpy()
    closeness = np.maximum([t @ centres[y] for t, y in zip(inputs.teacher.numpy(), LABELS, strict=True)], 0)
    margins = 0.2 + 0.3 * closeness / closeness.max()
    expected = arcface_loss(inputs.embeddings.numpy(), centres, LABELS, margins, inputs.scale)
    assert float(margindistillation(inputs)) == pytest.approx(expected, rel=1e-9)


def test_margindistillation_without_any_agreement_uses_the_smallest_margin() -> None:
    inputs = make_inputs(LABELS, dtype=torch.float64)
    assert inputs.head is not None
    opposed = replace(inputs, teacher=-inputs.head.rows(inputs.labels))
    expected = arcface_loss(inputs.embeddings.numpy(), inputs.head.centres.numpy(), LABELS, [0.2] * 4, inputs.scale)
    assert float(margindistillation(opposed)) == pytest.approx(expected, rel=1e-9)


def test_adadistill_classifies_against_the_moved_centres() -> None:
    inputs = make_inputs(LABELS, dtype=torch.float64)
    assert inputs.teacher is not None and inputs.head is not None
    moved = EmaHead(inputs.head.centres)
    moved.update(normalize(inputs.embeddings), inputs.teacher, inputs.labels)
    expected = arcface_loss(inputs.embeddings.numpy(), moved.units.numpy(), LABELS, [0.5] * 4, inputs.scale)
    assert float(adadistill(inputs)) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("loss", [proxylesskd, kd, margindistillation, own_classifier])
@pytest.mark.parametrize("margin", ["softmax", "cosface:0.35", "arcface:0.5"])
def test_gradients(loss: Any, margin: str) -> None:  # type: ignore[no-untyped-def]
    inputs = make_inputs(LABELS, dtype=torch.float64, margin=margin)
    start = inputs.embeddings.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: loss(replace(inputs, embeddings=x)), (start,))


def test_gradient_of_adadistill() -> None:
    inputs = make_inputs(LABELS, dtype=torch.float64)
    assert inputs.head is not None
    moved = EmaHead(inputs.head.centres)
    moved.update(normalize(inputs.embeddings), inputs.teacher, inputs.labels)  # type: ignore[arg-type]

    def loss(x: torch.Tensor) -> torch.Tensor:
        return proxylesskd(replace(inputs, embeddings=x, head=moved.head))

    x = inputs.embeddings.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(x), x)
    again = inputs.embeddings.clone().requires_grad_()
    (found,) = torch.autograd.grad(adadistill(replace(inputs, embeddings=again)), again)
    assert torch.allclose(found, expected, atol=1e-12)
