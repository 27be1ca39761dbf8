"""The numbers of /metrics: bounded labels, right sums over processes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest

from pkd.serving.api.problems import TYPES
from pkd.serving.galleries.store import Gallery, Space
from pkd.serving.observability.metrics import MAX_PENDING, SHARED, Metrics

ID = "teacher@sha256:" + "ab" * 32


def value(page: Any, name: str) -> Any:
    """Read the value of one series, 0 where it is not there."""
    found = re.search(rf"^{re.escape(name)} (\S+)$", page.decode(), re.MULTILINE)
    return float(found[1]) if found else 0.0


def test_labels_come_from_fixed_sets() -> None:
    metrics = Metrics(["teacher@abababab"])
    metrics.expect_refusals(TYPES)
    for i in range(50):
        metrics.request(f"METHOD{i}", None, 404, 0.1)
        metrics.refusal(f"kind-{i}")
        metrics.inference(f"stranger-{i}", 1, 0.1)
    page = metrics.page()
    assert value(page, 'pkd_requests_total{method="other",route="none",status="404"}') == 50
    assert value(page, 'pkd_refusals_total{type="other"}') == 50
    assert value(page, 'pkd_inference_seconds_count{encoder="other"}') == 50
    assert page.count(b"pkd_refusals_total{") == len(TYPES) + 1
    with pytest.raises(ValueError):
        metrics.decision("verify", "subject-1")


def test_durations_and_sizes_fall_into_their_buckets() -> None:
    metrics = Metrics(["e"])
    metrics.inference("e", 4, 0.003)
    metrics.inference("e", 32, 0.5)
    page = metrics.page()
    assert value(page, 'pkd_batch_size_bucket{encoder="e",le="4.0"}') == 1
    assert value(page, 'pkd_batch_size_bucket{encoder="e",le="32.0"}') == 2
    assert value(page, 'pkd_inference_seconds_bucket{encoder="e",le="0.004"}') == 1
    assert value(page, 'pkd_inference_seconds_sum{encoder="e"}') == 0.503


def test_what_nobody_reads_is_counted_and_does_not_pile_up() -> None:
    class Seconds(float):
        """A number that tells whether it is held."""

    metrics = Metrics(["e"])
    numbers = []
    for _ in range(3 * MAX_PENDING):
        metrics.waited(seconds := Seconds(0.1))
        numbers.append(weakref.ref(seconds))
    assert sum(one() is not None for one in numbers) <= MAX_PENDING
    assert value(metrics.page(), "pkd_queue_seconds_count") == 3 * MAX_PENDING


def test_threads_count_together() -> None:
    metrics = Metrics(["e"])

    def count() -> None:
        for i in range(2000):
            metrics.inference("e", 1, 0.1)
            if i % 100 == 0:
                metrics.fold()

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert value(metrics.page(), 'pkd_batch_size_sum{encoder="e"}') == 8000


def test_galleries_are_counted_together_and_not_by_name() -> None:
    metrics = Metrics(["teacher@ababababab"])
    space = Space(ID, 512)
    galleries = [
        Gallery("staff", space, None, 0.0, None, 2, {ID: 3}),
        Gallery("guests", space, None, 0.0, None, 1, {ID: 1, "student@sha256:" + "cd" * 32: 5}),
    ]
    metrics.galleries(galleries, expired=7)
    metrics.galleries(galleries)
    page = metrics.page()
    assert value(page, "pkd_galleries") == 2
    assert value(page, "pkd_gallery_subjects") == 3
    assert value(page, 'pkd_gallery_templates{encoder="teacher@ababababab"}') == 4
    assert value(page, 'pkd_gallery_templates{encoder="other"}') == 5
    assert value(page, "pkd_templates_expired_total") == 7
    assert b"staff" not in page


def test_processes_are_summed_and_a_dead_one_leaves_its_counts_but_not_its_gauges(tmp_path: Path) -> None:
    code = (
        "import os; from pkd.serving.observability.metrics import Metrics; m = Metrics(['e'])\n"
        "m.inference('e', 4, 0.25); m.ready.set(1); m.waiting = 3; m.decision('verify', 'match')\n"
        "from prometheus_client.multiprocess import mark_process_dead\n"
        "import sys; dead = sys.argv[1]\n"
        "dead and mark_process_dead(int(dead), os.environ['PROMETHEUS_MULTIPROC_DIR'])\n"
        "m.fold(); print(os.getpid(), flush=True); sys.stdout.buffer.write(m.page())"
    )
    pages, dead = [], ""
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", code, dead],
            capture_output=True,
            check=True,
            timeout=60,
            env={**os.environ, SHARED: str(tmp_path)},
        )
        dead, _, page = done.stdout.decode().partition("\n")
        pages.append(page.encode())
    first, second = pages
    assert value(first, "pkd_ready_workers") == value(second, "pkd_ready_workers") == 1
    assert value(second, "pkd_queue_depth") == 3
    assert value(second, 'pkd_batch_size_sum{encoder="e"}') == 8
    assert value(second, 'pkd_decisions_total{kind="verify",outcome="match"}') == 2
