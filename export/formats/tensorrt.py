"""TensorRT engines: one network-building code for ``tensorrt`` 10, ``tensorrt`` 11 and ``tensorrt_rtx``.

The precision lives in the ONNX graph (a strongly typed network): fp32, float16 tensors, or QuantizeLinear and
DequantizeLinear. No flag of the builder changes it, because TensorRT 11 has none left. ``tensorrt`` needs an NVIDIA GPU
to build; ``tensorrt_rtx`` builds anywhere and compiles the rest when the engine is loaded. See docs/tensorrt.md.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pkd.toolkit.core.errors import InputError, PkdError, TargetUnavailable
from pkd.toolkit.core.gpu import find_gpu
from pkd.toolkit.encoders.tensorrt import EXTRAS, error_logger, one_line

MIB = 1 << 20


@dataclass(frozen=True)
class BuildOptions:
    """How an engine is built."""

    batches: tuple[int, int, int] = (1, 8, 32)
    """Smallest, most frequent and largest batch: the optimisation profile. Others are refused by the engine."""
    workspace: int = 1024
    """MiB of GPU memory that one layer may use as scratch space."""
    timing_cache: Path | None = None
    """File that remembers measured kernels, so that the next build on the same GPU takes seconds. tensorrt only."""


@dataclass(frozen=True)
class Engine:
    """A serialised engine and what it depends on."""

    data: bytes
    version: str
    settings: dict[str, str | int | float | bool]


def build_engine(package: str, model: bytes, options: BuildOptions, tell: Callable[[str], None]) -> Engine:
    """Build ``model`` (ONNX with a dynamic first dimension) with ``tensorrt`` or ``tensorrt_rtx``.

    ``tell`` is given the phase that the builder is in. Raises TargetUnavailable without the package, or for
    ``tensorrt`` without a GPU; InputError for a graph that the parser refuses.
    """
    gpu = find_gpu()
    if package == "tensorrt" and gpu is None:
        raise TargetUnavailable("no NVIDIA GPU with a working driver was found, and tensorrt builds on one only")
    trt = _package(package)
    messages: list[str] = []
    logger = error_logger(trt, messages)
    builder = trt.Builder(logger)
    network = builder.create_network(_typed(trt))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(model):
        first = parser.get_error(0).desc() if parser.num_errors else "no reason given"
        raise InputError(f"{package} {trt.__version__} cannot parse the graph: {one_line(first)}")

    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace * MIB)
    config.clear_flag(trt.BuilderFlag.TF32)  # fp32 means fp32: TF32 keeps ten bits of the mantissa
    config.progress_monitor = _monitor(trt, tell)
    config.add_optimization_profile(_profile(builder, network, options.batches))
    cache = _open_cache(config, options.timing_cache) if package == "tensorrt" else None
    data = builder.build_serialized_network(network, config)
    if data is None:
        raise PkdError(
            f"{package} {trt.__version__} built no engine: {messages[-1] if messages else 'no reason given'}"
        )
    if cache is not None and options.timing_cache is not None:
        options.timing_cache.write_bytes(bytes(cache.serialize()))
    low, usual, high = options.batches
    settings: dict[str, str | int | float | bool] = {
        "tensorrt": trt.__version__,
        "gpu": gpu.name if gpu and package == "tensorrt" else "any that tensorrt_rtx supports",
        "compute_capability": gpu.capability if gpu and package == "tensorrt" else "8.0 and later",
        "batch": f"{low}:{usual}:{high}",
        "workspace_mib": options.workspace,
        "tf32": False,
    }
    return Engine(bytes(data), str(trt.__version__), settings)


def parse_batches(text: str) -> tuple[int, int, int]:
    """``1:8:32`` → smallest, most frequent, largest batch. Raises InputError."""
    parts = text.split(":")
    if len(parts) == 3 and all(part.isdecimal() for part in parts):
        low, usual, high = map(int, parts)
        if 1 <= low <= usual <= high <= 4096:
            return low, usual, high
    raise InputError(f"--batch {text!r}: give smallest:usual:largest between 1 and 4096, for example 1:8:32.")


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise TargetUnavailable(f"{name} is not installed (pip install 'pkd[{EXTRAS[name]}]')") from None


def _typed(trt: Any) -> int:
    """The creation flag of a strongly typed network; where there is no other kind, there may be no flag."""
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def _profile(builder: Any, network: Any, batches: tuple[int, int, int]) -> Any:
    profile = builder.create_optimization_profile()
    for i in range(network.num_inputs):
        taken = network.get_input(i)
        profile.set_shape(taken.name, *((batch, *tuple(taken.shape)[1:]) for batch in batches))
    return profile


def _open_cache(config: Any, path: Path | None) -> Any:
    """A timing cache, filled from ``path``; one of another GPU or version is ignored by TensorRT and begun anew."""
    if path is None:
        return None
    cache = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
    if not config.set_timing_cache(cache, ignore_mismatch=False):
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, ignore_mismatch=False)
    return cache


def _monitor(trt: Any, tell: Callable[[str], None]) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.steps[phase_name] = num_steps
            tell(phase_name)

        def step_complete(self, phase_name: str, step: int) -> bool:
            tell(f"{phase_name} {step + 1}/{self.steps.get(phase_name, 0)}")
            return True

        def phase_finish(self, phase_name: str) -> None:
            self.steps.pop(phase_name, None)

    return Monitor()
