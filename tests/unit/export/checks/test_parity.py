"""Checks of a graph against its source: what they pass, and each fault that they find."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from pkd.export.checks.parity import (
    BATCHES,
    GOLDEN_COUNT,
    GOLDEN_TOLERANCE,
    measure,
    onnx_runner,
    parity_table,
    require_parity,
    synthetic_crops,
)
from pkd.export.graph.build import serialise, uint8_graph
from pkd.toolkit.core.errors import BadVector, GateFailed, InputError
from pkd.toolkit.core.preprocess import Preprocess
from pkd.toolkit.images.codec import Rgb
from tests.support.bundle_factory import DIM, network

CROPS = synthetic_crops(max(BATCHES), 112)
TRUE = onnx_runner(serialise(uint8_graph(network(), Preprocess(), DIM)), lambda crops: crops, "tiny")
EXPECTED = TRUE(CROPS)


def other(preprocess: Preprocess) -> NDArray[np.float32]:
    """Feed the same network with another preprocessing, as unit rows."""
    return onnx_runner(serialise(uint8_graph(network(), preprocess, DIM)), lambda crops: crops, "other")(CROPS)


def test_the_same_network_passes_at_every_batch() -> None:
    rows = measure("same", EXPECTED, CROPS, TRUE)
    assert [row.batch for row in rows] == [1, 2, 7, 32]
    assert all(row.passed for row in rows)
    require_parity(rows)


def averaged(crops: Rgb) -> NDArray[np.float32]:
    """Right alone, wrong in company."""
    rows = TRUE(crops)
    return (rows + 1e-3 * (rows.mean(axis=0) - rows)).astype(np.float32)


def off_by(amount: float) -> NDArray[np.float32]:
    moved = EXPECTED + np.float32(amount) * np.eye(len(EXPECTED), DIM, dtype=np.float32)
    return (moved / np.linalg.norm(moved, axis=1, keepdims=True)).astype(np.float32)


WRONG = {
    "BGR for RGB": lambda crops: other(Preprocess(channels="bgr"))[: len(crops)],
    "std 128 for 127.5": lambda crops: other(Preprocess(std=128, mean=0))[: len(crops)],
    "mean 127 for 127.5": lambda crops: other(Preprocess(mean=127))[: len(crops)],
    "bf16": lambda crops: (TRUE(crops).view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32),
    "not normalised": lambda crops: TRUE(crops) * np.float32(1.001),
    "depends on the batch": averaged,
    "a little off": lambda crops: off_by(2e-4)[: len(crops)],
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_graphs_fail_the_gate(name: str) -> None:
    rows = measure(name, EXPECTED, CROPS, WRONG[name])
    with pytest.raises(GateFailed, match=name) as caught:
        require_parity(rows)
    assert caught.value.exit_code == 4
    assert "Nothing was written" in str(caught.value)


def test_only_larger_batches_may_fail_and_do() -> None:
    rows = measure("x", EXPECTED, CROPS, averaged)
    assert [row.passed for row in rows] == [True, False, False, False]


def test_each_graph_says_how_far_it_moves_the_similarities_of_pairs() -> None:
    turn, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(DIM, DIM)))
    turned = measure("turned", EXPECTED, CROPS, lambda crops: (3 * TRUE(crops) @ turn).astype(np.float32))
    noisy = measure("noisy", EXPECTED, CROPS, lambda crops: off_by(0.1)[: len(crops)])
    assert [row.similarity_rms is None for row in noisy] == [True, False, False, False], "one crop makes no pair"
    assert turned[-1].worst_cosine < 0.9
    assert turned[-1].similarity_rms < 1e-6, "neither a rotation nor a length changes a similarity"  # type: ignore[operator]
    similarities = (rows @ rows.T for rows in (off_by(0.1).astype(float), EXPECTED.astype(float)))
    difference = np.subtract(*similarities)[np.triu_indices(len(EXPECTED), 1)]
    assert noisy[-1].similarity_rms == pytest.approx(np.sqrt(np.mean(difference**2)), rel=1e-4)
    assert noisy[-1].similarity_rms > 1e-3  # type: ignore[operator]


def test_rows_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(BadVector, match="not a number"):
        measure("nan", EXPECTED, CROPS, lambda crops: TRUE(crops) * np.float32("nan"))
    with pytest.raises(BadVector, match=r"\(1, 8\)"):
        measure("short", EXPECTED, CROPS, lambda crops: TRUE(crops)[:, :8])


def test_a_graph_that_does_not_load_or_run_is_refused() -> None:
    with pytest.raises(InputError, match="does not load"):
        onnx_runner(b"nothing", lambda crops: crops, "x")
    wrong_feed = onnx_runner(serialise(uint8_graph(network(), Preprocess(), DIM)), lambda crops: crops[:, :50], "x")
    with pytest.raises(InputError, match="batch of 3"):
        wrong_feed(CROPS[:3])


def test_the_table_marks_what_failed(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    rows = measure("broken", EXPECTED, CROPS, averaged) + measure("whole", EXPECTED, CROPS, TRUE)
    Console(width=120).print(parity_table(rows))
    lines = capsys.readouterr().out.splitlines()
    assert "FAILED" in next(line for line in lines if "broken" in line)
    assert " ok " in next(line for line in lines if "whole" in line)


def test_a_precision_widens_the_limits_but_not_to_another_network() -> None:
    (row, *_) = measure("x", EXPECTED, CROPS, lambda crops: off_by(1e-3)[: len(crops)], "fp16")
    assert row.passed
    assert not row.model_copy(update={"precision": "fp32"}).passed
    mirrored = other(Preprocess(mean=-127.5))
    for precision in ("fp16", "bf16"):
        rows = measure("x", EXPECTED, CROPS, lambda crops: mirrored[: len(crops)], precision)
        with pytest.raises(GateFailed, match="x at batch"):
            require_parity(rows)


def test_golden_crops_are_the_same_every_time_all_different_and_of_the_asked_size() -> None:
    again = synthetic_crops(GOLDEN_COUNT, 112)
    np.testing.assert_array_equal(again, CROPS[:GOLDEN_COUNT])
    assert len(np.unique(again.reshape(GOLDEN_COUNT, -1), axis=0)) == GOLDEN_COUNT
    assert synthetic_crops(2, 128).shape == (2, 128, 128, 3)
    assert synthetic_crops(2, 128).dtype == np.uint8


@pytest.mark.parametrize("preprocess", [Preprocess(channels="bgr"), Preprocess(std=128, mean=0), Preprocess(mean=126)])
def test_golden_crops_notice_another_preprocessing(preprocess: Preprocess) -> None:
    cosines = np.sum(other(preprocess) * EXPECTED, axis=1)[:GOLDEN_COUNT]
    assert np.max(1 - cosines) > GOLDEN_TOLERANCE
