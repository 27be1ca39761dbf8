"""Margins against float64 re-derivations, gradients, and the edges where naive code breaks."""

from __future__ import annotations

import math

import pytest
import torch

from pkd.toolkit.core.errors import InputError
from pkd.toolkit.distill.heads.margin import Margin, margin_cross_entropy

SPECS = ["softmax", "cosface:0.35", "arcface:0.5", "arcface:0.1"]


def oracle(cosine: float, margin: Margin) -> float:
    """ψ by angles, in Python floats."""
    if margin.kind == "softmax":
        return cosine
    if margin.kind == "cosface":
        return cosine - margin.size
    theta = math.acos(cosine)
    if theta + margin.size < math.pi:
        return math.cos(theta + margin.size)
    return cosine - margin.size * math.sin(math.pi - margin.size)


@pytest.mark.parametrize("spec", SPECS)
def test_psi_is_the_papers(spec: str) -> None:
    margin = Margin.parse(spec)
    cosines = torch.linspace(-0.9999, 0.9999, 401, dtype=torch.float64)
    expected = torch.tensor([oracle(float(c), margin) for c in cosines], dtype=torch.float64)
    torch.testing.assert_close(margin(cosines), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("spec", SPECS)
def test_psi_rises_with_the_cosine_up_to_the_fallback(spec: str) -> None:
    margin = Margin.parse(spec)
    values = margin(torch.linspace(-0.85, 1, 500, dtype=torch.float64))
    assert bool((values.diff() > 0).all())


@pytest.mark.parametrize("spec", SPECS)
def test_gradient_is_exact(spec: str) -> None:
    margin = Margin.parse(spec)
    cosines = torch.linspace(-0.8, 0.99, 37, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(margin, (cosines,))


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("edge", [-1.0, 1.0])
def test_gradient_is_finite_at_the_poles(spec: str, edge: float) -> None:
    cosine = torch.tensor([edge], requires_grad=True)
    Margin.parse(spec)(cosine).sum().backward()
    assert cosine.grad is not None and bool(torch.isfinite(cosine.grad).all())


@pytest.mark.parametrize("spec", SPECS)
def test_loss_equals_a_loop_in_float64(spec: str) -> None:
    torch.manual_seed(3)
    margin = Margin.parse(spec)
    x = torch.randn(5, 8, dtype=torch.float64)
    centres = torch.nn.functional.normalize(torch.randn(7, 8, dtype=torch.float64))
    labels = torch.tensor([0, 6, 3, 3, 1])
    total = 0.0
    for row, label in zip(x, labels.tolist(), strict=True):
        cosines = [float(row @ c / row.norm()) for c in centres]
        logits = [16 * (oracle(c, margin) if j == label else c) for j, c in enumerate(cosines)]
        total += math.log(sum(math.exp(v) for v in logits)) - logits[label]
    assert float(margin_cross_entropy(x, centres, labels, margin, 16)) == pytest.approx(total / 5, abs=1e-9)


def test_gradient_of_the_whole_loss() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    centres = torch.nn.functional.normalize(torch.randn(9, 6, dtype=torch.float64))
    labels = torch.tensor([0, 8, 2, 2])
    assert torch.autograd.gradcheck(
        lambda e: margin_cross_entropy(e, centres, labels, Margin.parse("arcface:0.5"), 8), x
    )


def test_loss_at_random_initialisation_is_the_known_constant() -> None:
    """s·sin m + ln C + s²/2D for ArcFace: 43.2 at C=5000, D=512, s=64, m=0.5."""
    torch.manual_seed(0)
    centres = torch.nn.functional.normalize(torch.randn(5000, 512))
    loss = margin_cross_entropy(torch.randn(256, 512), centres, torch.arange(256), Margin.parse("arcface:0.5"), 64)
    expected = 64 * math.sin(0.5) + math.log(5000) + 64**2 / (2 * 512)
    assert float(loss) == pytest.approx(expected, abs=0.6)


@pytest.mark.parametrize("spec", ["arcfce:0.5", "arcface:x", "arcface:2", "cosface:-1", "softmax:0.5", ""])
def test_unknown_margins_are_refused(spec: str) -> None:
    with pytest.raises(InputError, match="--margin"):
        Margin.parse(spec)


@pytest.mark.parametrize(
    ("dtype", "angles", "tolerance"),
    [(torch.float32, (0.01, 1.3e-3, 1e-3), 0.1), (torch.float64, (1e-3, 1e-5, 1e-7), 1e-3)],
)
def test_arcface_keeps_its_gradient_next_to_the_centre(
    dtype: torch.dtype, angles: tuple[float, ...], tolerance: float
) -> None:
    """Away from the centre, an embedding at angle θ is pushed along the sphere with sin(θ + m), however small θ."""
    margin = Margin.parse("arcface:0.5")
    centre, aside = torch.eye(16, dtype=torch.float64)[:2]
    for angle in angles:
        exact = math.cos(angle) * centre + math.sin(angle) * aside
        x = exact.to(dtype).requires_grad_()
        margin(((x / x.norm()) @ centre.to(dtype))[None]).sum().backward()  # type: ignore[no-untyped-call]
        assert x.grad is not None
        tangent = float(x.grad.double() @ (math.cos(angle) * aside - math.sin(angle) * centre))
        assert -tangent == pytest.approx(math.sin(angle + 0.5), rel=tolerance), angle


def test_arcface_has_a_gradient_at_the_last_float_before_the_centre_and_beyond_it() -> None:
    cosine = torch.tensor([1 - 2**-24, 1.0, 1 + 2**-23], requires_grad=True)
    values = Margin.parse("arcface:0.5")(cosine)
    values.sum().backward()  # type: ignore[no-untyped-call]
    assert cosine.grad is not None and bool((cosine.grad > 100).all())
    assert float(values.detach().max()) == pytest.approx(math.cos(0.5), abs=1e-3)
