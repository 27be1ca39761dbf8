"""Run an encoder: aligned uint8 crops in, unit-norm float32 embeddings out. onnxruntime on CPU."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from pkd.toolkit.bundle.bundle import Bundle
from pkd.toolkit.bundle.onnx_check import require_one_file
from pkd.toolkit.core.encoder_info import EncoderInfo, describe, name_of
from pkd.toolkit.core.errors import BadVector, BundleError, InputError, TargetUnavailable
from pkd.toolkit.core.gpu import Device
from pkd.toolkit.core.preprocess import Preprocess
from pkd.toolkit.encoders.onnx_ports import (
    InputPort,
    Ports,
    choose_output,
    flat_rows,
    load_refusal,
    read_inputs,
    readable_outputs,
)
from pkd.toolkit.images.codec import Rgb

Embeddings = NDArray[np.float32]
Training = Mapping[str, str | int | float | bool | None]
NO_TRAINING: Training = MappingProxyType({})
PROVIDERS: dict[Device, str] = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
FASTEST = "onnxruntime-fp32"
"""The target that computes a bundle's own encoder as onnxruntime likes it best."""
DEPENDS = 0.1
"""Part of its length by which an embedding may move with what else is in its batch."""
MAX_MEMORY = 4 << 30
"""Bytes for the weights and results of all bundles that one process has opened."""


class Encoder(Protocol):
    """Embed crops: an ONNX file, a bundle, a torch student."""

    @property
    def info(self) -> EncoderInfo:
        """Say who this is; certificates and galleries are keyed by ``info.id``."""

    def embed(self, crops: Rgb) -> Embeddings:
        """Embed uint8 N×H×W×3 RGB → float32 N×D with unit rows."""


class NetEncoder:
    """Wrap a network that takes uint8 crops as they are. Safe to share between threads where that is."""

    def __init__(self, info: EncoderInfo, net: Callable[[Rgb], NDArray[np.float32]]) -> None:
        """Take ``net``: uint8 N×H×W×3 RGB, N ≥ 1 → float32 N×D of any length."""
        self.info = info
        self._net = net

    def embed(self, crops: Rgb) -> Embeddings:
        """Embed uint8 N×H×W×3 RGB → float32 N×D with unit rows. Raises InputError or BadVector."""
        self.info.preprocess.check(crops)
        if not len(crops):
            return np.empty((0, self.info.space.dim), np.float32)
        return unit_rows(self._net(crops), self.info.name)


class OnnxEncoder(NetEncoder):
    """Run an encoder in onnxruntime. Safe to share between threads.

    ``path``: the ONNX file it was opened from, ``ports``: how the file takes pixels and gives embeddings; both None for
    the graph of a bundle. ``training``: what a bundle's manifest says of how it was trained.
    """

    def __init__(
        self,
        info: EncoderInfo,
        session: ort.InferenceSession,
        feed: Callable[[Rgb], NDArray[np.generic]],
        *,
        output: str | None = None,
        path: Path | None = None,
        ports: Ports | None = None,
        training: Training = NO_TRAINING,
    ) -> None:
        """Take ``feed``: uint8 N×H×W×3 RGB → what the session takes; ``output``: its name, else the first."""
        super().__init__(info, lambda crops: self._run(feed(crops)))
        self.path = path
        self.ports = ports
        self.training = training
        self._session = session
        self._input = session.get_inputs()[0].name
        self._output = output or session.get_outputs()[0].name

    def _run(self, fed: NDArray[np.generic]) -> NDArray[np.float32]:
        (raw,) = self._session.run([self._output], {self._input: fed})
        return flat_rows(raw)


class _FixedBatch(OnnxEncoder):
    """Run a graph that was exported for one batch size: the last batch is filled up with zeros."""

    def _run(self, fed: NDArray[np.generic]) -> NDArray[np.float32]:
        size: int = self._session.get_inputs()[0].shape[0]
        filled = np.concatenate([fed, np.zeros((-len(fed) % size, *fed.shape[1:]), fed.dtype)])
        rows = [super(_FixedBatch, self)._run(filled[i : i + size]) for i in range(0, len(filled), size)]
        return np.concatenate(rows)[: len(fed)]


def open_onnx(path: str | Path, preprocess: Preprocess, *, name: str | None = None, threads: int = 1) -> OnnxEncoder:
    """Open an ONNX network as a teacher, with its preprocessing stated by the caller.

    It takes pixels as floats or uint8, N×3×S×S or N×S×S×3, and gives floats N×D or such as N×D×1×1. The file's SHA-256
    is the weights' digest. Raises InputError if the file or its ports are not what was stated.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}. Give the path of an ONNX file.") from None
    require_one_file(data, path)
    try:
        session = make_session(data, threads)
    except Exception as error:  # onnxruntime's own errors share no public base class
        raise InputError(f"{path}: {load_refusal(error)}") from None
    layouts, names = read_inputs(session, preprocess, path), readable_outputs(session, path)
    probe = np.zeros((layouts[0].batch or 1, preprocess.size, preprocess.size, 3), np.uint8)
    taken, given = _first_run(session, layouts, names, probe, preprocess, path)
    outputs = {name: np.asarray(values) for name, values in zip(names, given, strict=True)}
    output = choose_output(outputs, len(probe), path)
    ports = Ports(taken, output, dim=outputs[output][0].size, flat=outputs[output].ndim == 2)
    _require_function(session, ports, preprocess, path)
    name = name or name_of(path)
    info = describe(name, "teacher", hashlib.sha256(data).hexdigest(), preprocess, ports.dim)
    kind = OnnxEncoder if taken.batch is None else _FixedBatch
    return kind(info, session, lambda crops: taken.feed(crops, preprocess), output=output, path=path, ports=ports)


def _first_run(
    session: ort.InferenceSession,
    layouts: Sequence[InputPort],
    names: Sequence[str],
    probe: Rgb,
    preprocess: Preprocess,
    path: Path,
) -> tuple[InputPort, Sequence[object]]:
    """Run a network for the first time, in the layout that it takes; returns that and what it gave.

    Raises InputError where it runs in none.
    """
    failures = []
    for taken in layouts:
        try:
            return taken, session.run(names, {taken.name: taken.feed(probe, preprocess)})
        except Exception as error:  # onnxruntime's own errors share no public base class
            failures.append(error)
    size = preprocess.size
    raise InputError(
        f"{path}: does not run on a {size}×{size} crop: {ort_reason(failures[0])} State its crop size with the "
        "preprocessing if it is another (size=160), or export it again."
    ) from None


def _require_function(session: ort.InferenceSession, ports: Ports, preprocess: Preprocess, path: Path) -> None:
    """Raise InputError unless each crop's embedding depends on that crop, and on it alone.

    A graph that was exported in training mode normalises by its batch, or drops features by chance: every figure
    measured with it would be one of the batches that happened to be made. Quantised ranges of a batch move embeddings
    by a hundredth.
    """
    taken = ports.input
    noise = np.random.default_rng(0).integers(0, 256, (4, preprocess.size, preprocess.size, 3), np.uint8)
    noise[1] = np.sort(noise[1].ravel()).reshape(noise[1].shape)
    noise[2] //= 3

    def rows(crops: Rgb) -> NDArray[np.float32]:
        return flat_rows(session.run([ports.output], {taken.name: taken.feed(crops, preprocess)})[0])

    size = taken.batch or len(noise)
    one = min(1, size - 1)  # the second has one before it and others behind
    try:
        several = np.concatenate([noise] * (-(-size // len(noise))))[:size]
        both = rows(several)
        alone = several * (np.arange(size) == one)[:, None, None, None].astype(np.uint8)
        again = rows(alone)[one:] if taken.batch else rows(several[one : one + 1])
        others = both if size > 1 else np.concatenate([both, rows(noise[1:2])])
    except Exception as error:
        raise InputError(
            f"{path}: runs on one crop, but not on {size}: {ort_reason(error)} Export it again with a dynamic batch "
            "dimension."
        ) from None
    if (len(both), len(again)) != (size, size - one if taken.batch else 1):
        raise InputError(
            f"{path}: gives {len(both)} rows for {size} crops. Export it again with a dynamic batch dimension."
        )
    if not np.isfinite(both).all():
        return  # each embedding is looked at when it is used
    length = float(np.linalg.norm(both[one]))
    gap = float(np.linalg.norm(both[one] - again[0])) / max(length, float(np.linalg.norm(again[0])), 1e-12)
    if not gap < DEPENDS:
        raise InputError(
            f"{path}: a crop's embedding depends on the others in its batch, or on chance (it moves by {gap:.0%}): the "
            "network was exported in training mode. Call model.eval() before torch.onnx.export, and export it again."
        )
    if not float(np.abs(others - others[0]).max()) > 1e-6 * max(length, 1e-12):
        raise InputError(
            f"{path}: gives the same {ports.dim} numbers for every crop. Check that the output that you keep is the "
            "embedding and depends on the pixels."
        )


def open_bundle(bundle: Bundle, *, threads: int = 1, device: Device = "cpu") -> OnnxEncoder:
    """Open a bundle's encoder: uint8 N×H×W×3 in, preprocessing and normalisation inside the graph.

    That is ``encoder.onnx``, or the same encoder as it was rewritten for onnxruntime, where the bundle has that.
    Raises BundleError if the graph does not take and give what the manifest says, TargetUnavailable without a GPU.
    """
    rewritten = bundle.manifest.target(FASTEST)
    name = rewritten.file if rewritten and rewritten.file else "encoder.onnx"
    return open_graph(bundle, bundle.manifest.encoder, name, threads=threads, device=device)


def open_graph(
    bundle: Bundle, info: EncoderInfo, name: str, *, threads: int = 1, device: Device = "cpu"
) -> OnnxEncoder:
    """Open the ONNX file ``name`` of a bundle as ``info``. Raises BundleError as ``open_bundle``."""
    where, spec = bundle.path / name, bundle.manifest.graph
    try:
        session = make_session(bundle.read(name), threads, device, bounded=device == "cpu")
    except (BundleError, TargetUnavailable):
        raise
    except Exception as error:
        raise BundleError(f"{where}: onnxruntime cannot load it: {ort_reason(error)}") from None
    size = info.preprocess.size
    for ports, port_name, kind, shape in (
        (session.get_inputs(), spec.input_name, "tensor(uint8)", (size, size, 3)),
        (session.get_outputs(), spec.output_name, "tensor(float)", (info.space.dim,)),
    ):
        found = [(port.name, port.type, list(port.shape)) for port in ports]
        if len(ports) != 1 or found[0][:2] != (port_name, kind) or found[0][2][1:] != list(shape):
            raise BundleError(
                f"{where}: has {found}, expected one {kind} {port_name!r} of shape N×{'×'.join(map(str, shape))}. "
                "Export the bundle again."
            )
    return OnnxEncoder(info, session, lambda crops: crops, training=bundle.manifest.training)


def make_session(model: bytes, threads: int, device: Device = "cpu", *, bounded: bool = False) -> ort.InferenceSession:
    """Make a session that does not spin: spinning doubles the cost where cores are shared.

    ``bounded``: it fails instead of taking more than its share of MAX_MEMORY, whatever its graph asks for. Raises
    TargetUnavailable for ``cuda`` where onnxruntime would silently run on the CPU instead.
    """
    provider = PROVIDERS[device]
    if provider not in ort.get_available_providers():
        raise TargetUnavailable(
            f"{device}: this onnxruntime has no {provider}. Install onnxruntime-gpu in place of onnxruntime."
        )
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # Without it, sums of INT8 products overflow silently on x86 processors that lack VNNI.
    options.add_session_config_entry("session.x64quantprecision", "1")
    options.log_severity_level = 4  # errors are raised; printing them as well would only frighten
    if bounded:
        _bound_memory()
        options.add_session_config_entry("session.use_env_allocators", "1")
    session = ort.InferenceSession(model, options, providers=[provider])
    if provider not in session.get_providers():
        raise TargetUnavailable(f"{device}: {provider} does not start. Check the driver, CUDA and cuDNN (nvidia-smi).")
    return session


@cache
def _bound_memory() -> None:
    """Limit memory, once in a process: only the one allocator that onnxruntime's sessions share takes a limit."""
    arena = {"max_mem": MAX_MEMORY, "arena_extend_strategy": -1, "initial_chunk_size_bytes": -1}
    memory = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    ort.create_and_register_allocator(memory, ort.OrtArenaCfg({**arena, "max_dead_bytes_per_chunk": -1}))


def unit_rows(vectors: NDArray[np.float32], source: str = "encoder") -> Embeddings:
    """Divide N×D rows by their length. Raises BadVector for NaN, infinity or a zero row."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    bad = ~np.isfinite(norms[:, 0]) | (norms[:, 0] < 1e-12)
    if bad.any():
        raise BadVector(f"{source}: {int(bad.sum())} of {len(vectors)} embeddings are zero, NaN or infinite.")
    unit: Embeddings = (vectors / norms).astype(np.float32, copy=False)
    return unit


def batches(count: int, size: int) -> Iterator[range]:
    """Yield consecutive index ranges of at most ``size``."""
    for start in range(0, count, size):
        yield range(start, min(start + size, count))


def ort_reason(error: Exception) -> str:
    """Return what onnxruntime says as one short sentence: no codes, no paths of its source files."""
    first = (str(error).splitlines() or [type(error).__name__])[0]
    first = first.split(" Status Message:")[0]
    if found := re.search(r"Non-zero status code returned while running (\w+) node", first):
        return f"its operator {found[1]} fails on it."
    return first.rsplit(" : ", 1)[-1][:300].rstrip(".") + "."
