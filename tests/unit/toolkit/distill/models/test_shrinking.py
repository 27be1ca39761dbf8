"""Adopted networks lose channels inside their blocks, and what reads the rest is fitted anew."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
import torch

from pkd.toolkit.core.errors import InputError
from pkd.toolkit.distill.models.adopted import Adopted, adopt
from pkd.toolkit.distill.models.backbones import parameters
from pkd.toolkit.distill.models.shrinking import eliminate, shrink
from tests.support.training_data import SIZE
from tests.unit.toolkit.distill.models.test_adopted import Graph

STATED = f"mean=127.5,std=127.5,size={SIZE},template=none"
RANDOM = np.random.default_rng(0)
CROPS = RANDOM.integers(0, 256, (60, SIZE, SIZE, 3), dtype=np.uint8)
TARGETS = RANDOM.normal(size=(60, 12)).astype(np.float32)


def bottlenecks(path: Path) -> Path:
    """Write a small network of blocks with shortcuts, batch normalisation, a 3×3 reader and a dense area at the end."""
    random = np.random.default_rng(3)

    def f(*shape: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
        return (random.normal(size=shape) / np.sqrt(max(1, np.prod(shape[1:], dtype=int)))).astype(np.float32)

    g = Graph()
    g.add("Conv", f(8, 3, 3, 3), f(8), strides=[2, 2], pads=[1, 1, 1, 1])
    before = g.add("Relu")
    g.add("Conv", f(16, 8, 1, 1))
    g.add("Relu")
    g.add("Conv", f(16, 1, 3, 3), pads=[1, 1, 1, 1], group=16)
    g.add("Conv", f(8, 16, 1, 1), f(8))
    before = g.add("Add", inputs=(g.end, before))
    g.add("Conv", f(24, 8, 3, 3), strides=[2, 2], pads=[1, 1, 1, 1])
    g.add("BatchNormalization", 1 + 0.1 * np.abs(f(24)), f(24), f(24), 1 + np.abs(f(24)))
    g.add("PRelu", 0.1 * np.abs(f(24, 1, 1)))
    g.add("Conv", f(8, 24, 3, 3), pads=[1, 1, 1, 1])
    g.add("Conv", f(32, 8, 1, 1))
    g.add("PRelu", 0.1 * np.abs(f(32, 1, 1)))
    g.add("Conv", f(32, 1, SIZE // 4, SIZE // 4), group=32)
    g.add("Flatten")
    g.add("Gemm", f(32, 10))
    g.save(path, 1, [10], 13)
    return path


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Adopted:
    return adopt(str(bottlenecks(tmp_path_factory.mktemp("shrinking") / "mobile.onnx")), STATED)


def features(student: Adopted) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    return student.features.embed(CROPS)


@pytest.mark.parametrize("rank", [None, 4])
def test_the_number_of_parameters_is_kept_and_the_runtimes_agree(student: Adopted, rank: int | None) -> None:
    least = 0
    for asked in (6000, 4500):
        small = shrink(student, asked, CROPS, TARGETS, rank)
        network = small.network(12)
        network.set_map(np.zeros((small.width, 12)), np.zeros(12), rank)
        count = parameters(network)
        assert least < count <= asked + 8  # biases that a reader lacked come on top
        assert small.features.info.id != student.features.info.id
        pixels = torch.from_numpy(small.info.preprocess(CROPS))
        with torch.no_grad():
            rows = network.eval().flatten(network.trunk(pixels)).numpy()
        np.testing.assert_allclose(features(small), rows, rtol=1e-3, atol=1e-4)
        assert features(small).shape == (60, small.width)


def test_what_others_make_up_for_costs_nothing() -> None:
    """Five of nine channels are sums of the other four: any four that say everything may stay."""
    random = np.random.default_rng(2)
    own = random.normal(size=(100, 4))
    z = np.concatenate([own, own @ random.normal(size=(4, 5)), np.ones((100, 1))], 1)
    y = own @ random.normal(size=(4, 3)) + 1
    chosen, weight = eliminate(z.T @ z, z.T @ y, 1, 4)
    np.testing.assert_allclose(z[:, [*chosen, 9]] @ weight, y, atol=0.01)


def test_fitting_is_better_than_leaving_out(student: Adopted) -> None:
    """The features of the smaller network predict the larger one's far better than chance."""
    small = shrink(student, 5500, CROPS, TARGETS, None)
    mine, whole = features(small), features(student)
    z = np.concatenate([mine, np.ones((60, 1), np.float32)], 1)
    left = whole - z @ np.linalg.lstsq(z, whole, rcond=1e-3)[0]
    assert left.var() < 0.5 * whole.var()


def exhaustive(z: np.ndarray, y: np.ndarray, keep: int) -> float:  # type: ignore[type-arg]
    """Find the least sum of squared errors over all choices."""
    from itertools import combinations

    def error(chosen: tuple[int, ...]) -> float:
        columns = np.concatenate([z[:, list(chosen)], np.ones((len(z), 1))], 1)
        return float(((y - columns @ np.linalg.lstsq(columns, y, rcond=None)[0]) ** 2).sum())

    return min(error(chosen) for chosen in combinations(range(z.shape[1]), keep))


def test_elimination_comes_near_the_best_choice() -> None:
    random = np.random.default_rng(1)
    mixed = random.normal(size=(200, 5)) @ random.normal(size=(5, 9)) + 0.3 * random.normal(size=(200, 9))
    y = mixed @ random.normal(size=(9, 4))
    z = np.concatenate([mixed, np.ones((200, 1))], 1)
    chosen, weight = eliminate(z.T @ z, z.T @ y, 1, 4)
    columns = np.concatenate([mixed[:, chosen], np.ones((200, 1))], 1)
    error = float(((y - columns @ weight) ** 2).sum())
    assert error <= 1.3 * exhaustive(mixed, y, 4)
    blocks, block_weight = eliminate(z.T @ z, z.T @ y, 3, 2)
    assert len(blocks) == 2 and block_weight.shape == (7, 4)


def test_what_cannot_become_so_small_is_refused(student: Adopted, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--shrink 100: [\d,]+ are left when all channels"):
        shrink(student, 100, CROPS, TARGETS, None)
    with pytest.raises(InputError, match=r"the student has [\d,]+ parameters with its map\. Give fewer"):
        shrink(student, 10**6, CROPS, TARGETS, None)
    g = Graph()
    g.add("Conv", np.ones((6, 3, 3, 3), np.float32), strides=[2, 2])
    g.add("Tanh")
    g.add("GlobalAveragePool")
    g.add("Flatten")
    g.add("Gemm", np.eye(6, 5, dtype=np.float32))
    g.save(tmp_path / "plain.onnx", 1, [5], 13)
    with pytest.raises(InputError, match=r"all [\d,]+ are needed"):
        shrink(adopt(str(tmp_path / "plain.onnx"), STATED), 100, CROPS, TARGETS, None)
