"""Run a target of a bundle in the runtime it was made for. One small function per runtime, one table of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pkd.toolkit.bundle.bundle import Bundle, is_bundle
from pkd.toolkit.bundle.target import Target
from pkd.toolkit.core.errors import BundleError, PkdError, TargetUnavailable, plain_reason
from pkd.toolkit.encoders.base import Encoder, open_graph
from pkd.toolkit.encoders.executorch import open_executorch
from pkd.toolkit.encoders.litert import open_litert
from pkd.toolkit.encoders.ncnn import open_ncnn
from pkd.toolkit.encoders.openvino import open_openvino
from pkd.toolkit.encoders.tensorrt import open_tensorrt

Open = Callable[[Bundle, Target, str, int], Encoder]


def open_target(bundle: Bundle, name: str, *, threads: int = 1) -> Encoder:
    """Open the encoder of the target ``<runtime>-<precision>``, on the CPU or, of TensorRT, on the GPU.

    Raises BundleError for a target that the bundle lacks, TargetUnavailable for one that was not built or cannot run
    here, MissingExtra without its runtime.
    """
    target = bundle.manifest.target(name)
    if target is None:
        known = ", ".join(target.name for target in bundle.manifest.targets) or "none"
        raise BundleError(f"{bundle.path}: has no target {name}; it has {known}. Add it with pkd-export --from-bundle.")
    if target.file is None:
        raise TargetUnavailable(
            f"{bundle.path}: {name} is not built yet, only its graph {target.graph} is there. Build it with "
            f"pkd-export --from-bundle {bundle.path} on a machine that can."
        )
    if target.runtime not in RUNTIMES:
        raise TargetUnavailable(f"{bundle.path}: {name}: this pkd knows {', '.join(RUNTIMES)} targets only.")
    try:
        return RUNTIMES[target.runtime](bundle, target, target.file, threads)
    except PkdError:
        raise
    except Exception as error:  # the runtimes' own errors share no public base class
        raise BundleError(
            f"{bundle.path / target.file}: {target.runtime} cannot load it: {plain_reason(error)} "
            "Build it again on this machine with pkd-export --from-bundle."
        ) from None


def target_of(path: Path) -> tuple[Path, str] | None:
    """Split ``BUNDLE/targets/NAME`` → bundle (folder or zip) and target name; None for any other path."""
    bundle = path.parent.parent
    if path.parent.name != "targets" or not is_bundle(bundle):
        return None
    return bundle, path.name


def _onnxruntime(bundle: Bundle, target: Target, file: str, threads: int) -> Encoder:
    return open_graph(bundle, target.encoder, file, threads=threads)


def _coreml(bundle: Bundle, target: Target, file: str, threads: int) -> Encoder:
    raise TargetUnavailable(
        f"{bundle.path}: {target.name}: Core ML computes on Apple's systems only. Prove it there with the kit: "
        f"pkd-verify {bundle.path}/targets/{target.name} --device-kit kit (docs/device.md)."
    )


def _npu(bundle: Bundle, target: Target, file: str, threads: int) -> Encoder:
    raise TargetUnavailable(
        f"{bundle.path}: {target.name} is what the compilers of NPUs read: nothing runs it as it is. Try what they "
        f"make of it on the device, with the kit: pkd-verify {bundle.path} --device-kit kit (docs/device.md)."
    )


RUNTIMES: dict[str, Open] = {
    "onnxruntime": _onnxruntime,
    "openvino": open_openvino,
    "ncnn": open_ncnn,
    "executorch": open_executorch,
    "litert": open_litert,
    "coreml": _coreml,
    "npu": _npu,
    "tensorrt": open_tensorrt,
    "tensorrt_rtx": open_tensorrt,
}
