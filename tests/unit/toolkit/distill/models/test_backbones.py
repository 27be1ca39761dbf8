"""Backbones: shapes, sizes, widths and stages."""

from __future__ import annotations

import math

import pytest
import torch

from pkd.toolkit.core.errors import InputError
from pkd.toolkit.distill.models.backbones import BACKBONES, build, parameters
from pkd.toolkit.distill.models.layers import fused


@pytest.mark.parametrize(
    ("spec", "dim"),
    [("mobilefacenet:0.25", 128), ("mobilefacenet-relu:0.5", 512), ("repvit:0.67", 512), ("iresnet18", 64)],
)
def test_crops_become_embeddings(spec: str, dim: int) -> None:
    network = build(spec, dim).eval()
    assert network(torch.zeros(2, 3, 112, 112)).shape == (2, dim)


@pytest.mark.parametrize("spec", ["mobilefacenet:0.125", "repvit:0.25", "iresnet18"])
@pytest.mark.parametrize("size", [32, 50, 160])
def test_other_crop_sizes(spec: str, size: int) -> None:
    assert build(spec, 8, size).eval()(torch.zeros(1, 3, size, size)).shape == (1, 8)


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("size", [32, 112])
def test_stages_give_one_feature_map_a_resolution(name: str, size: int) -> None:
    with torch.device("meta"):
        network = BACKBONES[name](8, 1.0, size).eval()
    sides: list[tuple[int, int]] = []
    for stage in network.stages:
        network.get_submodule(stage).register_forward_hook(lambda m, i, out: sides.append(tuple(out.shape[2:])))
    network(torch.zeros(2, 3, size, size, device="meta"))
    assert sides == [(math.ceil(size / stride),) * 2 for stride in (2, 4, 8, 16)]


def test_stages_end_where_the_resolution_changes() -> None:
    """The last block of each resolution; a change of these names would orphan the adapters of unfinished runs."""
    assert build("mobilefacenet:0.125", 8, 32).stages == ("stem", "blocks.4", "blocks.11", "blocks.14")
    assert build("repvit:0.25", 8, 32).stages == ("stem", "stage1", "stage2", "stage3")
    assert build("iresnet18", 8, 32).stages == ("layer1", "layer2", "layer3", "layer4")


def test_full_width_has_the_papers_size() -> None:
    """MobileFaceNet's table: 0.99 M parameters with 128 outputs, of which PReLU and batch-norm are a small part."""
    assert parameters(build("mobilefacenet", 128)) == pytest.approx(0.99e6, rel=0.02)


@pytest.mark.parametrize("name", ["mobilefacenet", "repvit"])
def test_width_shrinks_the_network(name: str) -> None:
    sizes = [parameters(build(f"{name}:{width}", 128)) for width in (0.25, 0.5, 1, 2)]
    assert sizes == sorted(sizes) and sizes[0] * 8 < sizes[2]


@pytest.mark.parametrize(
    ("name", "millions"),
    [("iresnet18", 24.0), ("iresnet34", 34.1), ("iresnet50", 43.6), ("iresnet100", 65.2), ("iresnet200", 118.8)],
)
def test_iresnet_sizes(name: str, millions: float) -> None:
    with torch.device("meta"):
        network = BACKBONES[name](512, 1.0, 112)
    assert parameters(network) / 1e6 == pytest.approx(millions, abs=0.1)


def test_fusing_changes_the_operators_and_not_the_embedding() -> None:
    torch.manual_seed(0)
    network = build("repvit:0.25", 8, 32)
    for _ in range(3):  # batch statistics away from their start
        network.train()(torch.randn(16, 3, 32, 32))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    pixels = torch.randn(4, 3, 32, 32)
    expected = network.eval()(pixels)
    made = fused(network)
    torch.testing.assert_close(made(pixels), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(network(pixels), expected), "the original is left alone"
    assert fused(plain := build("mobilefacenet:0.125", 8, 32).eval()) is plain


@pytest.mark.parametrize("spec", ["resnet", "mobilefacenet:0", "mobilefacenet:x", "mobilefacenet:9", "iresnet18:0.5"])
def test_unknown_backbones_are_refused(spec: str) -> None:
    with pytest.raises(InputError, match="--student"):
        build(spec, 128)
