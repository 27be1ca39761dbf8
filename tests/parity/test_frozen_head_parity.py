"""The streaming head against code that holds all logits, and against torch's own chunked cross entropy."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from pkd.toolkit.distill.heads import frozen_softmax
from pkd.toolkit.distill.heads.frozen_softmax import frozen_cross_entropy, streaming_logsumexp
from pkd.toolkit.distill.heads.margin import Margin, margin_cross_entropy

SPECS = ["softmax", "cosface:0.35", "arcface:0.5"]


@pytest.fixture(scope="module")
def problem() -> tuple[Tensor, Tensor, Tensor]:
    """48 embeddings at all cosines to their own centre, duplicate labels, crowded and lonely classes."""
    torch.manual_seed(0)
    centres = normalize(torch.randn(3001, 64))
    centres[:200] = normalize(centres[:1] + 0.1 * torch.randn(200, 64))
    labels = torch.randint(0, 3001, (48,))
    labels[:12] = torch.randint(0, 200, (12,))
    labels[5] = labels[6] = labels[7]
    toward = torch.linspace(-1, 1, 48)[:, None]
    x = normalize(toward * centres[labels] + (1 - toward.abs()) * normalize(torch.randn(48, 64)))
    return x * torch.rand(48, 1).add(0.2) * 10, centres, labels


def loss_and_gradient(x: Tensor, centres: Tensor, labels: Tensor, spec: str, plain: bool) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    margin = Margin.parse(spec)
    if plain:
        loss = margin_cross_entropy(x, centres, labels, margin, 64)
    else:
        loss = frozen_cross_entropy(x, centres, labels, margin, 64, chunk=700)
    return loss.detach(), torch.autograd.grad(loss, x)[0]


def distance(a: Tensor, b: Tensor) -> float:
    """Relative distance of two batches of gradients."""
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("spec", SPECS)
def test_float32_equals_the_plain_loss_in_float64(problem: tuple[Tensor, Tensor, Tensor], spec: str) -> None:
    x, centres, labels = problem
    expected = loss_and_gradient(x.double(), centres.double(), labels, spec, plain=True)
    found = loss_and_gradient(x, centres, labels, spec, plain=False)
    assert float(found[0]) == pytest.approx(float(expected[0]), rel=2e-6)
    assert distance(found[1], expected[1]) < (1e-3 if spec == "arcface:0.5" else 4e-6)  # ArcFace: its slope at ±1
    keep = slice(1, 47)  # without the two at cosine ±1, where float32 cannot know the angle
    assert distance(found[1][keep], expected[1][keep]) < 4e-6


@pytest.mark.parametrize("spec", SPECS)
def test_float64_equals_the_plain_loss(problem: tuple[Tensor, Tensor, Tensor], spec: str) -> None:
    x, centres, labels = (problem[0].double(), problem[1].double(), problem[2])
    expected = loss_and_gradient(x, centres, labels, spec, plain=True)
    found = loss_and_gradient(x, centres, labels, spec, plain=False)
    assert float(found[0]) == pytest.approx(float(expected[0]), rel=1e-12)
    assert distance(found[1][1:47], expected[1][1:47]) < 1e-10


@pytest.mark.parametrize("spec", SPECS)
def test_a_bf16_head_is_close(problem: tuple[Tensor, Tensor, Tensor], spec: str) -> None:
    x, centres, labels = problem
    head = centres.bfloat16()
    expected = loss_and_gradient(x.double(), head.double(), labels, spec, plain=True)
    found = loss_and_gradient(x, head, labels, spec, plain=False)
    assert float(found[0]) == pytest.approx(float(expected[0]), rel=5e-3)
    assert distance(found[1][1:47], expected[1][1:47]) < 2.5e-2


def test_without_a_margin_it_is_torchs_linear_cross_entropy(problem: tuple[Tensor, Tensor, Tensor]) -> None:
    peer = getattr(torch.nn.functional, "linear_cross_entropy", None)
    if peer is None:
        pytest.skip("this torch has no linear_cross_entropy (needs 2.13)")
    x, centres, labels = problem
    leaf = x.clone().requires_grad_()
    loss = peer(64 * normalize(leaf), centres, labels)
    (gradient,) = torch.autograd.grad(loss, leaf)
    found = loss_and_gradient(x, centres, labels, "softmax", plain=False)
    assert float(found[0]) == pytest.approx(float(loss.detach()), rel=2e-6)
    assert distance(found[1], gradient) < 1e-5


def test_a_bf16_head_without_bf16_instructions_is_widened_chunk_by_chunk(
    problem: tuple[Tensor, Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    x, centres, labels = problem
    head = centres.bfloat16()
    expected = loss_and_gradient(x, head.float(), labels, "cosface:0.35", plain=False)
    monkeypatch.setattr(frozen_softmax, "fast_bf16", lambda unit: False)
    found = loss_and_gradient(x, head, labels, "cosface:0.35", plain=False)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


def test_half_precision_embeddings_are_summed_in_float32(problem: tuple[Tensor, Tensor, Tensor]) -> None:
    unit = normalize(problem[0]).bfloat16()
    found, centre = streaming_logsumexp(unit, problem[1], 64)
    assert found.dtype == centre.dtype == torch.float32
    torch.testing.assert_close(found, torch.logsumexp(64 * unit.float() @ problem[1].T, dim=1))
