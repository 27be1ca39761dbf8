"""Build TensorRT engines, with one code for ``tensorrt`` 10, ``tensorrt`` 11 and ``tensorrt_rtx``.

The precision lives in the ONNX graph (a strongly typed network): fp32, float16 tensors, or QuantizeLinear and
DequantizeLinear. No flag of the builder changes it, because TensorRT 11 has none left. ``tensorrt`` needs an NVIDIA GPU
to build; ``tensorrt_rtx`` builds anywhere and compiles the rest when the engine is loaded. See docs/tensorrt.md.
"""

from __future__ import annotations

import importlib
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pkd.export.formats.base import ORT, Built, Format, Tell, need_packages
from pkd.export.graph.precision_variants import GraphForm, Settings, Variant
from pkd.export.options import BuildOptions
from pkd.toolkit.core.errors import InputError, PkdError, TargetUnavailable
from pkd.toolkit.core.gpu import find_gpu
from pkd.toolkit.encoders.tensorrt import EXTRAS, error_logger, load_engine, one_line

MIB = 1 << 20
PORTS = ("crops", "embedding")
"""Input and output of every graph of a bundle, as graph/build.py names them."""


@dataclass(frozen=True)
class Engine:
    """Hold a serialised engine, the builder's version, and what the engine depends on."""

    data: bytes
    version: str
    settings: Settings


def build_engine(package: str, model: bytes, options: BuildOptions, tell: Tell) -> Engine:
    """Build ``model`` (ONNX with a dynamic first dimension) with ``tensorrt`` or ``tensorrt_rtx``.

    ``tell`` is given the phase that the builder is in. Raises TargetUnavailable without the package, or for
    ``tensorrt`` without a GPU; InputError for a graph that the parser refuses.
    """
    gpu = find_gpu()
    if reason := _unavailable(package):
        raise TargetUnavailable(reason)
    trt = importlib.import_module(package)
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
    settings: Settings = {
        "tensorrt": trt.__version__,
        "gpu": gpu.name if gpu and package == "tensorrt" else "any that tensorrt_rtx supports",
        "compute_capability": gpu.capability if gpu and package == "tensorrt" else "8.0 and later",
        "batch": f"{low}:{usual}:{high}",
        "workspace_mib": options.workspace,
        "tf32": False,
    }
    return Engine(bytes(data), str(trt.__version__), settings)


def _unavailable(package: str) -> str | None:
    if package == "tensorrt" and find_gpu() is None:
        return "no NVIDIA GPU with a working driver was found, and tensorrt builds on one only"
    return need_packages(EXTRAS[package], package)()


def _typed(trt: Any) -> int:
    """Return the creation flag of a strongly typed network; where there is no other kind, there may be no flag."""
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def _profile(builder: Any, network: Any, batches: tuple[int, int, int]) -> Any:
    profile = builder.create_optimization_profile()
    for i in range(network.num_inputs):
        taken = network.get_input(i)
        profile.set_shape(taken.name, *((batch, *tuple(taken.shape)[1:]) for batch in batches))
    return profile


def _open_cache(config: Any, path: Path | None) -> Any:
    """Make a timing cache and fill it from ``path``; one of another GPU or version is begun anew."""
    if path is None:
        return None
    cache = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
    if not config.set_timing_cache(cache, ignore_mismatch=False):
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, ignore_mismatch=False)
    return cache


def _monitor(trt: Any, tell: Tell) -> Any:
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


def _build(package: str, graph: Variant, precision: str, options: BuildOptions, tell: Tell) -> Built:
    engine = build_engine(package, graph.data, options, tell)
    made_with, embed = f"{package} {engine.version}", None
    with suppress(TargetUnavailable):  # built here, but it runs elsewhere
        embed = load_engine(package, engine.data, engine.settings, graph.encoder, PORTS).raw
    return Built({"encoder.engine": engine.data}, made_with, engine.settings, made_with if embed else ORT, embed)


def _format(package: str) -> Format:
    build, unavailable = partial(_build, package), partial(_unavailable, package)
    return Format(package, ("fp32", "fp16", "int8"), GraphForm("s8s8"), build, unavailable)


FORMAT, FORMAT_RTX = _format("tensorrt"), _format("tensorrt_rtx")
