"""Losses over class centres against plain float64 derivations, their gradients, and the cases that must be exact."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.functional import kl_div, log_softmax, normalize, softmax

from pkd.toolkit.distill.heads.ema import MovingHead
from pkd.toolkit.distill.heads.frozen_softmax import FrozenHead
from pkd.toolkit.distill.losses.classification import adadistill, kd, margindistillation, own_classifier, proxylesskd
from tests.support.distill_step import make_step

LABELS = [0, 4, 3, 3]


def arcface_loss(embeddings, centres, labels, margins, scale):  # type: ignore[no-untyped-def]
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
def test_margin_softmax_against_numpy(loss) -> None:  # type: ignore[no-untyped-def]
    step = make_step(LABELS, dtype=torch.float64)
    assert step.head is not None and step.trained is not None
    centres = step.head.centres if loss is proxylesskd else step.trained
    expected = arcface_loss(step.embeddings.numpy(), centres.numpy(), LABELS, [0.5] * 4, step.scale)
    assert float(loss(step)) == pytest.approx(expected, rel=1e-9)


def test_loss_of_random_embeddings_is_what_theory_says() -> None:
    torch.manual_seed(0)
    head = FrozenHead(normalize(torch.randn(5000, 512)))
    step = replace(
        make_step([0]), embeddings=torch.randn(256, 512), labels=torch.randint(0, 5000, (256,)), head=head, scale=64.0
    )
    expected = 64 * math.sin(0.5) + math.log(5000) + 64**2 / (2 * 512)
    assert float(proxylesskd(step)) == pytest.approx(expected, abs=0.5)


def test_kd_is_the_divergence_of_the_softened_posteriors() -> None:
    step = make_step(LABELS, dtype=torch.float64)
    assert step.head is not None and step.teacher is not None
    sharpness = step.scale / step.temperature
    student = log_softmax(sharpness * normalize(step.embeddings) @ step.head.centres.T, dim=1)
    teacher = softmax(sharpness * step.teacher @ step.head.centres.T, dim=1)
    expected = step.temperature**2 * float(kl_div(student, teacher, reduction="batchmean"))
    assert float(kd(step)) == pytest.approx(expected, rel=1e-9)


def test_kd_of_the_teacher_itself_is_zero() -> None:
    step = make_step(LABELS, dtype=torch.float64)
    assert step.teacher is not None
    assert float(kd(replace(step, embeddings=step.teacher * 3))) == pytest.approx(0, abs=1e-12)


def test_margindistillation_against_numpy() -> None:
    step = make_step(LABELS, dtype=torch.float64)
    assert step.head is not None and step.teacher is not None
    centres = step.head.centres.numpy()
    closeness = np.maximum([t @ centres[y] for t, y in zip(step.teacher.numpy(), LABELS, strict=True)], 0)
    margins = 0.2 + 0.3 * closeness / closeness.max()
    expected = arcface_loss(step.embeddings.numpy(), centres, LABELS, margins, step.scale)
    assert float(margindistillation(step)) == pytest.approx(expected, rel=1e-9)


def test_margindistillation_without_any_agreement_uses_the_smallest_margin() -> None:
    step = make_step(LABELS, dtype=torch.float64)
    assert step.head is not None
    opposed = replace(step, teacher=-step.head.rows(step.labels))
    expected = arcface_loss(step.embeddings.numpy(), step.head.centres.numpy(), LABELS, [0.2] * 4, step.scale)
    assert float(margindistillation(opposed)) == pytest.approx(expected, rel=1e-9)


def test_adadistill_classifies_against_the_moved_centres() -> None:
    step = make_step(LABELS, dtype=torch.float64)
    assert step.teacher is not None and step.head is not None
    moved = MovingHead(step.head.centres)
    moved.update(normalize(step.embeddings), step.teacher, step.labels)
    expected = arcface_loss(step.embeddings.numpy(), moved.units.numpy(), LABELS, [0.5] * 4, step.scale)
    assert float(adadistill(step)) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("loss", [proxylesskd, kd, margindistillation, own_classifier])
@pytest.mark.parametrize("margin", ["softmax", "cosface:0.35", "arcface:0.5"])
def test_gradients(loss, margin: str) -> None:  # type: ignore[no-untyped-def]
    step = make_step(LABELS, dtype=torch.float64, margin=margin)
    start = step.embeddings.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: loss(replace(step, embeddings=x)), (start,))


def test_gradient_of_adadistill() -> None:
    step = make_step(LABELS, dtype=torch.float64)
    assert step.head is not None
    moved = MovingHead(step.head.centres)
    moved.update(normalize(step.embeddings), step.teacher, step.labels)  # type: ignore[arg-type]

    def loss(x: torch.Tensor) -> torch.Tensor:
        return proxylesskd(replace(step, embeddings=x, head=moved.head))

    x = step.embeddings.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(x), x)
    again = step.embeddings.clone().requires_grad_()
    (found,) = torch.autograd.grad(adadistill(replace(step, embeddings=again)), again)
    assert torch.allclose(found, expected, atol=1e-12)
