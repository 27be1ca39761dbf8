"""Choose the range of each activation of a graph on real crops: the values that INT8 maps to its 256 steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray

from pkd.export.options import RangeMethod
from pkd.toolkit.core.errors import InputError
from pkd.toolkit.data.face_set import FaceSet
from pkd.toolkit.encoders.base import batches, make_session
from pkd.toolkit.images.codec import Rgb

CALIBRATION_CROPS = 256
"""Crops that ranges are measured on. More change them little: TensorRT's and OpenVINO's tools take 300 to 500."""
HELD_OUT_CROPS = 64
"""Crops that errors are measured on: 2,016 pairs."""
FEWEST_CROPS = 40
"""Crops below which ranges would be guesses."""
Ranges = Mapping[str, tuple[float, float]]
"""Tensor name → lowest and highest value that INT8 has to tell apart; what lies outside is clipped."""
Activations = dict[str, NDArray[np.float32]]
"""Tensor name → its values for a few crops."""
BATCH = 4
"""Crops in one pass: every activation of them is in memory at once."""
BINS = 2048
SAMPLE = 1 << 16
"""Values of one tensor, of ``BATCH`` crops, that enter its histogram, evenly taken. The extremes are always of all."""
LEVELS = 128
"""Steps on one side of zero."""
PERCENTILE = 99.99
"""Share of the values that ``percentile`` keeps, half of the rest cut off at either end."""


@dataclass(frozen=True)
class Calibration:
    """Hold two samples of a face set that share no image: ranges are chosen on one, errors measured on the other."""

    crops: Rgb
    """uint8 N×S×S×3."""
    held_out: Rgb
    """uint8 M×S×S×3."""
    method: RangeMethod
    name: str
    """Name of the list or folder, without its path."""

    @property
    def passes(self) -> int:
        """Count how often ``choose_ranges`` goes through the crops."""
        return 1 if self.method == "minmax" else 2


def read_calibration(source: Path, size: int, method: RangeMethod) -> Calibration:
    """Sample ``source`` (as FaceSet.read) evenly; of a small set every fifth crop is held out. Raises InputError."""
    faces = FaceSet.read(source, labelled=False) if source.is_dir() else FaceSet.read(source)
    if len(faces) < FEWEST_CROPS:
        raise InputError(
            f"--calib {source}: {len(faces)} crops are too few to see typical values. Give {FEWEST_CROPS}, better 400."
        )
    taken = np.unique(np.linspace(0, len(faces) - 1, CALIBRATION_CROPS + HELD_OUT_CROPS).astype(np.int64))
    held = np.arange(len(taken)) % 5 == 4
    return Calibration(faces.load(taken[~held], size), faces.load(taken[held], size), method, source.name)


def observe(
    graph: onnx.ModelProto, tensors: Sequence[str], crops: Rgb, method: RangeMethod, advance: Callable[[int], None]
) -> Ranges:
    """Run ``graph`` on ``crops`` (uint8 N×S×S×3) and choose a range for each of ``tensors`` (float).

    ``minmax``: all that occurred. ``percentile``: without the extreme 0.01 % of the values. ``entropy``: the symmetric
    range whose 128 steps lose least information (Migacz 2017, "8-bit inference with TensorRT", GTC S7310). The last two
    see the crops twice: first for the extremes, then for a histogram between them. ``advance`` is told of each crop.
    """
    return choose_ranges(lambda: _activations(graph, tensors, crops, advance), method)


def choose_ranges(activations: Callable[[], Iterator[Activations]], method: RangeMethod) -> Ranges:
    """Choose ranges as ``observe`` does, of whatever computes them.

    Each call of ``activations`` goes through the same crops once.
    """
    limits: dict[str, tuple[float, float]] = {}
    for values in activations():
        for name, array in values.items():
            low, high = limits.get(name, (0.0, 0.0))  # zero is always a step of its own: padding is zero
            limits[name] = (min(low, float(array.min())), max(high, float(array.max())))
    if method == "minmax":
        return limits
    counts = {name: np.zeros(BINS, np.int64) for name in limits}
    for values in activations():
        for name, array in values.items():
            low, high = limits[name]
            array = array.reshape(-1)[:: array.size // SAMPLE | 1]  # an odd step falls on every column and channel
            array, low, high = (array, low, high) if method == "percentile" else (np.abs(array), 0.0, max(-low, high))
            counts[name] += np.histogram(array, BINS, range=(low, high))[0]
    choose = {"percentile": percentile_range, "entropy": entropy_range}[method]
    return {name: choose(counts[name], *limits[name]) for name in limits}


def percentile_range(counts: NDArray[np.int64], low: float, high: float) -> tuple[float, float]:
    """Cut 0.005 % off either end of ``counts``, a histogram between ``low`` and ``high``. Zero stays inside."""
    edges = np.linspace(low, high, len(counts) + 1)
    share = np.concatenate([[0.0], np.cumsum(counts)]) / max(1, counts.sum())
    tail = (1 - PERCENTILE / 100) / 2
    first = np.searchsorted(share, tail, side="right") - 1
    last = np.searchsorted(share, 1 - tail, side="left")
    return min(0.0, float(edges[first])), max(0.0, float(edges[last]))


def entropy_range(counts: NDArray[np.int64], low: float, high: float) -> tuple[float, float]:
    """Choose the symmetric range whose 128 steps lose least information.

    ``counts``: histogram of absolute values between 0 and the larger of ``−low`` and ``high``.
    """
    top = max(-low, high)
    counts = np.concatenate([counts[1:2], counts[1:]])  # zeros, half of a ReLU's values, are exact in any range
    loss = {kept: _divergence(counts, kept) for kept in range(LEVELS, len(counts) + 1, LEVELS // 8)}
    limit = top * min(loss, key=lambda kept: (loss[kept], -kept)) / len(counts)
    return max(low, -limit), min(high, limit)


def _divergence(counts: NDArray[np.int64], kept: int) -> float:
    """Return the Kullback–Leibler divergence of the values, clipped to the first ``kept`` bins, from their steps."""
    clipped = counts[:kept].astype(np.float64)
    inside = clipped.copy()
    clipped[-1] += counts[kept:].sum()
    step = np.arange(kept) * LEVELS // kept
    occupied = clipped > 0
    weight = np.bincount(step, inside, LEVELS)
    bins = np.bincount(step, occupied, LEVELS)
    stepped = np.where(occupied, (weight / np.maximum(bins, 1))[step], 0.0)
    p, q = clipped / max(clipped.sum(), 1), stepped / max(stepped.sum(), 1)
    both = (p > 0) & (q > 0)
    missed = p[(p > 0) & (q == 0)].sum()  # a step that cannot express what occurs
    return float(np.sum(p[both] * np.log(p[both] / q[both])) + missed * 1e3)


def _activations(
    graph: onnx.ModelProto, tensors: Sequence[str], crops: Rgb, advance: Callable[[int], None]
) -> Iterator[Activations]:
    shown = onnx.ModelProto()
    shown.CopyFrom(graph)
    known = {value.name for value in shown.graph.output}
    shown.graph.output.extend(onnx.ValueInfoProto(name=name) for name in tensors if name not in known)
    session = make_session(shown.SerializeToString(), 1)
    taken = session.get_inputs()[0].name
    for chunk in batches(len(crops), BATCH):
        yield dict(zip(tensors, session.run(list(tensors), {taken: crops[chunk.start : chunk.stop]}), strict=True))
        advance(len(chunk))
