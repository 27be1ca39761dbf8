"""l2kd, rkd and cckd against plain derivations, their gradients, and the teacher itself, which must cost nothing."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.functional import cosine_similarity, normalize

from pkd.toolkit.distill.losses.embedding import cckd, l2kd, rkd
from tests.support.loss_inputs import make_inputs

LABELS = [0, 1, 2, 3, -1]


def huber(difference: float) -> float:
    return 0.5 * difference**2 if abs(difference) < 1 else abs(difference) - 0.5


def relations(units: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Every pair's distance over the mean distance, every triplet's cosine, from difference vectors."""
    count = len(units)
    distances = np.array([[np.linalg.norm(a - b) for b in units] for a in units])
    distances /= distances[distances > 0].mean()
    cosines = np.zeros((count,) * 3)
    for v, a, b in itertools.product(range(count), repeat=3):
        one, other = units[a] - units[v], units[b] - units[v]
        length = np.linalg.norm(one) * np.linalg.norm(other)
        cosines[v, a, b] = one @ other / length if length > 0 else 0
    return distances, cosines


def test_rkd_against_numpy() -> None:
    inputs = make_inputs(LABELS, dtype=torch.float64)
    assert inputs.teacher is not None
    student = relations(normalize(inputs.embeddings).numpy())
    teacher = relations(inputs.teacher.numpy())
    distance, angle = (float(np.mean([huber(d) for d in (s - t).flat])) for s, t in zip(student, teacher, strict=True))
    assert float(rkd(inputs)) == pytest.approx(distance + 2 * angle, rel=1e-9)


def test_cckd_against_numpy() -> None:
    inputs = make_inputs(LABELS, dtype=torch.float64)
    assert inputs.teacher is not None

    def correlation(units: np.ndarray) -> np.ndarray:
        cosines = units @ units.T
        return math.exp(-0.8) * (1 + 0.8 * cosines + 0.8**2 / 2 * cosines**2)

    off = correlation(normalize(inputs.embeddings).numpy()) - correlation(inputs.teacher.numpy())
    assert float(cckd(inputs)) == pytest.approx(float(np.mean(off**2)), rel=1e-9)


def test_l2kd_is_twice_one_minus_cosine() -> None:
    inputs = make_inputs(LABELS)
    assert inputs.teacher is not None
    cosine = cosine_similarity(inputs.embeddings, inputs.teacher).mean()
    assert float(l2kd(inputs)) == pytest.approx(float(2 - 2 * cosine), abs=1e-5)


@pytest.mark.parametrize("loss", [l2kd, rkd, cckd])
def test_the_teacher_itself_costs_nothing_at_any_length(loss) -> None:  # type: ignore[no-untyped-def]
    inputs = make_inputs(LABELS, dtype=torch.float64)
    assert inputs.teacher is not None
    assert float(loss(replace(inputs, embeddings=inputs.teacher * 7))) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("loss", [rkd, cckd])
def test_relations_do_not_see_a_rotation_of_the_space(loss) -> None:  # type: ignore[no-untyped-def]
    inputs = make_inputs(LABELS, dtype=torch.float64)
    assert inputs.teacher is not None
    rotation, _ = torch.linalg.qr(torch.randn(16, 16, dtype=torch.float64))
    assert float(loss(replace(inputs, embeddings=inputs.teacher @ rotation))) == pytest.approx(0, abs=1e-12)
    assert float(l2kd(replace(inputs, embeddings=inputs.teacher @ rotation))) > 0.1


@pytest.mark.parametrize("loss", [l2kd, rkd, cckd])
def test_gradients(loss) -> None:  # type: ignore[no-untyped-def]
    inputs = make_inputs(LABELS, dtype=torch.float64)
    start = inputs.embeddings.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: loss(replace(inputs, embeddings=x)), (start,))


@pytest.mark.parametrize("loss", [l2kd, rkd, cckd])
def test_images_that_coincide_have_a_finite_gradient(loss) -> None:  # type: ignore[no-untyped-def]
    """The same photograph twice in a batch, and a student that maps everything to one point."""
    inputs = make_inputs(LABELS)
    assert inputs.teacher is not None
    twice = torch.cat([inputs.embeddings[:2], inputs.embeddings[:2], inputs.embeddings[4:]])
    collapsed = inputs.embeddings[:1].repeat(5, 1)
    for embeddings in (twice, collapsed):
        start = embeddings.clone().requires_grad_()
        value = loss(replace(inputs, embeddings=start))
        value.backward()
        assert torch.isfinite(value) and start.grad is not None and bool(torch.isfinite(start.grad).all())


@pytest.mark.parametrize("loss", [rkd, cckd])
def test_float32_agrees_with_float64(loss) -> None:  # type: ignore[no-untyped-def]
    exact, single = make_inputs(LABELS, dtype=torch.float64), make_inputs(LABELS)
    assert float(loss(single)) == pytest.approx(float(loss(exact)), rel=1e-4)


@pytest.mark.parametrize("gap", [1e-3, 1e-4, 2e-5])
def test_rkd_in_float32_keeps_the_gradients_of_near_identical_embeddings(gap: float) -> None:
    """Burst photographs: distances of 1e-4 drown in the rounding of float32 products of unit vectors, 6e-8."""
    random = torch.Generator().manual_seed(4)
    teacher = normalize(torch.randn(6, 64, generator=random, dtype=torch.float64))
    base = normalize(torch.randn(6, 64, generator=random, dtype=torch.float64))
    base[1] = normalize(base[0] + gap * normalize(torch.randn(64, generator=random, dtype=torch.float64), dim=0), dim=0)
    found = {}
    for dtype in (torch.float64, torch.float32):
        x = base.to(torch.float32).to(dtype).requires_grad_()  # the same numbers for both
        rkd(replace(make_inputs([-1] * 6), embeddings=x, teacher=teacher.to(dtype))).backward()  # type: ignore[no-untyped-call]
        assert x.grad is not None
        found[dtype] = x.grad.double()
    error = (found[torch.float32] - found[torch.float64])[:2].norm() / found[torch.float64][:2].norm()
    assert float(error) < 0.02
