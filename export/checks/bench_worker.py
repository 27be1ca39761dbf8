"""Time one encoder of a bundle in a process of its own, so that its memory and its threads are its own.

Run as: python -m pkd.export.checks.bench_worker BUNDLE NAME [FILE.onnx]. It speaks JSON, a line each: first who it is
or why it cannot run; then, for every ``[batch, calls]`` it reads, what that took.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from time import perf_counter, process_time
from typing import TextIO

import cv2
import numpy as np
from numpy.typing import NDArray

from pkd.toolkit.bundle.bundle import Bundle, self_test
from pkd.toolkit.core.errors import MissingExtra, PkdError, plain_reason
from pkd.toolkit.encoders.base import open_graph, unit_rows
from pkd.toolkit.encoders.registry import open_target
from pkd.toolkit.encoders.tensorrt import EXTRAS
from pkd.toolkit.images.codec import Rgb

BASELINE = "encoder.onnx"
INSIGHTFACE = "insightface"
Embed = Callable[[Rgb], NDArray[np.float32]]


def main(path: str, name: str, file: str = "") -> None:
    """Answer until stdin ends."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a runtime prints is no answer
    cv2.setNumThreads(1)
    bundle = Bundle.open(path)
    target = bundle.manifest.target(name)
    package = target.runtime if target else INSIGHTFACE if name == INSIGHTFACE else "onnxruntime"
    try:
        version = _import(package)
        level = _level()
        embed = _open(bundle, name, file)
        error = self_test(bundle, embed, target)
    except Exception as reason:  # each runtime has errors of its own
        said = str(reason) if isinstance(reason, PkdError) else plain_reason(reason)
        _say(out, {"skipped": said.replace(path, "BUNDLE")})
        return
    _say(out, {"runtime": f"{package} {version}", "golden_error": error})
    golden = bundle.golden().crops
    for line in sys.stdin:
        batch, calls = json.loads(line)
        crops = np.resize(golden, (batch, *golden.shape[1:]))
        cpu, wall = process_time(), perf_counter()
        for _ in range(calls):
            embed(crops)
        took = process_time() - cpu, perf_counter() - wall
        cpu_ms, wall_ms = (1e3 * seconds / (calls * batch) for seconds in took)
        _say(out, {"cpu_ms": cpu_ms, "wall_ms": wall_ms, "memory_mb": (_peak() - level) / 1e6})


def _import(package: str) -> str:
    """Import the runtime, so that its own memory is not counted, and say which version it is."""
    try:
        module = importlib.import_module(package)
    except ImportError:
        raise MissingExtra(package, EXTRAS.get(package, package)) from None
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # onnxruntime comes in packages of other names
        return str(module.__version__)


def _open(bundle: Bundle, name: str, file: str) -> Embed:
    if name == BASELINE:
        return open_graph(bundle, bundle.manifest.encoder, name).embed
    if name != INSIGHTFACE:
        return open_target(bundle, name).embed
    return _insightface(file)


def _insightface(file: str) -> Embed:
    """Open ArcFaceONNX as insightface does, but on one thread and, like ours, without spinning."""
    import onnxruntime
    from insightface.model_zoo import get_model

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    model = get_model(file, providers=["CPUExecutionProvider"], sess_options=options)

    def embed(crops: Rgb) -> NDArray[np.float32]:
        return unit_rows(model.get_feat([crop[:, :, ::-1] for crop in crops]))  # it takes what cv2.imread gives

    return embed


def _level() -> int:
    """Count the bytes that the process holds now; its peak so far is forgotten where the system can."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return _peak()


def _peak() -> int:
    """Count the bytes that the process held at most. On Linux getrusage would begin with the peak of the parent."""
    with suppress(OSError):
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    import resource

    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return held if sys.platform == "darwin" else 1024 * held


def _say(out: TextIO, answer: dict[str, object]) -> None:
    print(json.dumps(answer), file=out, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
