"""The batcher, with a real encoder: same rows, separate failures."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from pkd.serving.core.errors import Overloaded
from pkd.serving.inference.batching import BUCKETS, Batched, Inference
from pkd.serving.inference.registry import Loaded
from pkd.serving.inference.thread_pool import Pool
from pkd.serving.observability.metrics import Metrics
from pkd.toolkit.core.encoder_info import short
from pkd.toolkit.core.errors import InputError, PkdError, TargetUnavailable
from pkd.toolkit.encoders.base import open_bundle
from tests.support import serving_bundles as made

CROPS = made.crops(120, seed=7)


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("batching")
    return open_bundle(made.encoder("teacher", made.weights(1)).write(folder / "teacher"))


class Watched:
    """The real encoder; notes the size of each batch, can be held, and refuses crops that are all white."""

    def __init__(self, real: Any) -> None:
        self.info, self._real = real.info, real
        self.batches: list[Any] = []
        self.open = threading.Event()
        self.open.set()

    def embed(self, crops: Any) -> Any:
        self.batches.append(len(crops))
        assert self.open.wait(20)
        if (crops == 255).all(axis=(1, 2, 3)).any():
            raise RuntimeError("a white crop")
        return self._real.embed(crops)


@pytest.fixture
def watched(real: Any) -> Any:
    return Watched(real)


@pytest.fixture
def batched(watched: Any) -> Iterator[Any]:
    front = Batched(watched)
    yield front
    watched.open.set()
    front.close()


@pytest.fixture
def pool() -> Iterator[Any]:
    with ThreadPoolExecutor(40) as pool:
        yield pool


def held(watched: Any, batched: Any, pool: Any) -> Any:
    """Occupy the encoder, so that what comes next gathers."""
    watched.open.clear()
    first = pool.submit(batched.embed, CROPS[:1])
    until(lambda: watched.batches == [1])
    return first


def until(true: Any) -> None:
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def waiting(batched: Any, count: int) -> None:
    until(lambda: batched.queue.qsize() == count)


def test_rows_are_those_of_the_encoder_alone_whatever_they_were_batched_with(
    real: Any, watched: Any, batched: Any, pool: Any
) -> None:
    parts = [CROPS[start : start + 1 + start % 5] for start in range(0, 100, 5)]
    first = held(watched, batched, pool)
    jobs = [pool.submit(batched.embed, part) for part in parts]
    waiting(batched, len(parts))
    watched.open.set()
    assert np.array_equal(first.result(20), real.embed(CROPS[:1]))
    for job, part in zip(jobs, parts, strict=True):
        assert np.allclose(job.result(20), real.embed(part), atol=1e-6)
    assert set(watched.batches) <= set(BUCKETS)
    assert len(watched.batches) <= 1 + 1 + sum(map(len, parts)) // (BUCKETS[-1] - 5)  # not one call each


def test_more_crops_than_the_largest_batch(real: Any, watched: Any, batched: Any) -> None:
    assert np.allclose(batched.embed(CROPS), real.embed(CROPS), atol=1e-6)
    assert watched.batches == [32, 32, 32, 32]
    assert batched.embed(CROPS[:0]).shape == (0, made.DIM)
    assert batched.info is real.info


def test_an_idle_encoder_waits_for_nobody(watched: Any, batched: Any) -> None:
    begun = time.monotonic()
    for count in (1, 2, 5, 9, 17):
        batched.embed(CROPS[:count])
    assert watched.batches == [1, 4, 8, 16, 32]
    assert time.monotonic() - begun < 2


def test_one_bad_item_fails_alone(real: Any, watched: Any, batched: Any, pool: Any) -> None:
    first = held(watched, batched, pool)
    white = np.full_like(CROPS[:2], 255)
    jobs = [pool.submit(batched.embed, crops) for crops in (CROPS[1:2], white, CROPS[2:4])]
    waiting(batched, 3)
    watched.open.set()
    first.result(20)
    assert np.allclose(jobs[0].result(20), real.embed(CROPS[1:2]), atol=1e-6)
    with pytest.raises(RuntimeError, match="a white crop"):
        jobs[1].result(20)
    assert np.allclose(jobs[2].result(20), real.embed(CROPS[2:4]), atol=1e-6)
    with pytest.raises(InputError):  # refused before it could join others
        batched.embed(CROPS[:1, :50])


def test_what_was_cancelled_is_never_embedded(watched: Any, batched: Any) -> None:
    async def visit() -> Any:
        first = pool.submit(partial(batched.embed, CROPS[:1]))  # type: ignore[attr-defined]
        await asyncio.to_thread(until, lambda: watched.batches == [1])
        jobs = [pool.submit(partial(batched.embed, CROPS[i : i + 1])) for i in range(1, 31)]  # type: ignore[attr-defined]
        await asyncio.to_thread(waiting, batched, 30)
        for job in jobs[:28]:
            job.cancel()  # it runs: it waits for the encoder
        watched.open.set()
        return await asyncio.gather(first, *jobs, return_exceptions=True)

    watched.open.clear()
    pool = Pool(40, Metrics())
    _, *rows = asyncio.run(visit())
    pool.close()
    assert all(isinstance(one, asyncio.CancelledError) for one in rows[:28])
    assert all(one.shape == (1, made.DIM) for one in rows[28:])
    assert watched.batches == [1, 4]


def test_a_full_queue_refuses(watched: Any, real: Any) -> None:
    front = Batched(watched, waiting=2)
    watched.open.clear()
    with ThreadPoolExecutor(4) as threads:
        jobs = [threads.submit(front.embed, CROPS[:1])]
        until(lambda: watched.batches == [1])
        jobs += [threads.submit(front.embed, CROPS[:1]) for _ in range(2)]
        waiting(front, 2)
        with pytest.raises(PkdError) as refused:
            front.embed(CROPS[:1])
        assert isinstance(refused.value, Overloaded)
        watched.open.set()
        assert all(len(job.result(20)) == 1 for job in jobs)
    front.close()


def test_without_a_gpu_nothing_runs_on_the_cpu_instead(tmp_path: Path) -> None:
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("there is a CUDA provider here")
    bundle = made.encoder("teacher", made.weights(1)).write(tmp_path / "teacher")
    with pytest.raises(TargetUnavailable, match="cuda: this onnxruntime has no CUDAExecutionProvider"):
        open_bundle(bundle, device="cuda")


def test_only_what_runs_on_a_gpu_is_batched(real: Any, tmp_path: Path) -> None:
    bundle = made.encoder("teacher", made.weights(1)).write(tmp_path / "teacher")
    for device, size in (("cpu", "3.0"), ("cuda", "4.0")):
        metrics = Metrics([short(real.info.id)])
        inference = Inference([Loaded(bundle, real, device=device)], metrics)  # type: ignore[arg-type]
        assert np.allclose(inference.embed(real, CROPS[:3]), real.embed(CROPS[:3]), atol=1e-6)
        inference.close()
        assert f'pkd_batch_size_sum{{encoder="{short(real.info.id)}"}} {size}' in metrics.page().decode()


@pytest.mark.gpu
def test_a_gpu_gives_the_rows_of_the_cpu(real: Any, tmp_path: Path) -> None:
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has no CUDA provider; install onnxruntime-gpu in its place")
    bundle = made.encoder("teacher", made.weights(1)).write(tmp_path / "teacher")
    front = Batched(open_bundle(bundle, device="cuda"))
    assert np.allclose(front.embed(CROPS), real.embed(CROPS), atol=1e-3)
    front.close()
