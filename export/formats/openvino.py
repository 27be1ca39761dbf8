"""OpenVINO: the ONNX graph as IR (a network and a weights file), nothing rounded on the way."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from pkd.toolkit.core.errors import InputError, TargetUnavailable


def to_ir(model: bytes) -> tuple[bytes, bytes, str]:
    """ONNX → ``.xml``, ``.bin`` and OpenVINO's version. Raises TargetUnavailable or InputError."""
    try:
        import openvino
    except ImportError:
        raise TargetUnavailable("openvino is not installed (pip install 'pkd[openvino]')") from None
    with TemporaryDirectory() as folder:
        onnx, xml = Path(folder, "encoder.onnx"), Path(folder, "encoder.xml")
        onnx.write_bytes(model)
        try:
            # not convert_model: offline it was seen to hang with idle child processes, probably of its telemetry
            openvino.save_model(openvino.Core().read_model(onnx), xml, compress_to_fp16=False)
        except Exception as error:  # openvino's errors share no public base class
            reason = " ".join(str(error).split())[-300:]
            raise InputError(f"OpenVINO {openvino.__version__} cannot convert the graph: {reason}") from None
        return xml.read_bytes(), xml.with_suffix(".bin").read_bytes(), str(openvino.__version__).split("-")[0]
