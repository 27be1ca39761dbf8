"""Ranges of activations are those of the crops that calibrate."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import numpy_helper

from pkd.export.checks.parity import synthetic_crops
from pkd.export.graph.build import uint8_graph
from pkd.export.options import RANGE_METHODS, RangeMethod
from pkd.export.quantization.ranges import BINS, entropy_range, observe, percentile_range
from pkd.toolkit.core.preprocess import Preprocess
from tests.support.bundle_factory import DIM, network

CROPS = synthetic_crops(6, 112)
GRAPH = uint8_graph(network(), Preprocess(), DIM)
NAMES = ["net/convolved", "net/active", "net/embedding"]


def by_hand() -> np.ndarray:
    """Compute the convolution's outputs without ONNX."""
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in network().graph.initializer}
    pixels = Preprocess()(CROPS)
    blocks = pixels.reshape(6, 3, 7, 16, 7, 16).transpose(0, 2, 4, 1, 3, 5).reshape(6 * 49, -1)
    return blocks.astype(np.float64) @ weights["kernel"].reshape(8, -1).T


@pytest.mark.parametrize("method", RANGE_METHODS)
def test_ranges_hold_what_occurred_and_zero_and_every_crop_is_counted(method: RangeMethod) -> None:
    told: list[int] = []
    ranges = observe(GRAPH, NAMES, CROPS, method, told.append)
    assert sum(told) == len(CROPS) * (1 if method == "minmax" else 2)
    values = by_hand()
    low, high = ranges["net/convolved"]
    assert values.min() - 1e-4 <= low <= 0 <= high <= values.max() + 1e-4
    if method == "minmax":
        np.testing.assert_allclose((low, high), (values.min(), values.max()), rtol=1e-4)
        np.testing.assert_allclose(ranges["net/active"][0], values.min() / 4, rtol=1e-4)


def test_percentile_cuts_what_is_rare_and_nothing_else() -> None:
    counts = np.zeros(BINS, np.int64)
    counts[1024:1124] = 1_000_000
    counts[0] = counts[-1] = 100  # one in a million
    low, high = percentile_range(counts, -2.0, 2.0)
    assert (low, high) == (0.0, pytest.approx(2.0 * 100 / 1024, abs=0.005))
    counts[0] = counts[-1] = 100_000
    assert percentile_range(counts, -2.0, 2.0) == (-2.0, 2.0)


@pytest.mark.parametrize("scale", [0.5, 3.0])
def test_entropy_clips_the_far_tail_of_a_bell_but_not_a_flat_distribution(scale: float) -> None:
    random = np.random.default_rng(0)
    bell = np.abs(random.normal(0, scale, 200_000))
    bell[0] = 40 * scale
    counts = np.histogram(bell, BINS, range=(0, 40 * scale))[0]
    low, high = entropy_range(counts, -40 * scale, 40 * scale)
    assert low == -high
    assert 2 * scale < high < 8 * scale
    flat = np.histogram(random.uniform(0, scale, 200_000), BINS, range=(0, scale))[0]
    assert entropy_range(flat, 0.0, scale)[1] > 0.9 * scale


def test_entropy_is_not_misled_by_the_zeros_of_a_relu() -> None:
    values = np.maximum(np.random.default_rng(0).normal(-1, 1, 400_000), 0)  # five sixths are zero
    low, high = entropy_range(np.histogram(values, BINS, range=(0, values.max()))[0], 0.0, float(values.max()))
    assert low == 0
    assert high > 0.4 * values.max()
