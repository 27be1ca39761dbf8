"""Build OpenVINO targets: the ONNX graph as IR (a network and a weights file), with nothing rounded on the way."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from pkd.export.formats.base import Built, Format, Tell, need_packages
from pkd.export.graph.precision_variants import GraphForm, Variant
from pkd.export.graph.rewrite import decompose_prelu
from pkd.export.options import BuildOptions
from pkd.toolkit.core.errors import InputError, plain_reason
from pkd.toolkit.encoders.openvino import HINTS, OpenVinoModel


def to_ir(model: bytes) -> tuple[bytes, bytes, str]:
    """Convert ONNX to ``.xml``, ``.bin`` and OpenVINO's version. Raises InputError."""
    import openvino

    with TemporaryDirectory() as folder:
        onnx, xml = Path(folder, "encoder.onnx"), Path(folder, "encoder.xml")
        onnx.write_bytes(model)
        try:
            # not convert_model: offline it was seen to hang with idle child processes, probably of its telemetry
            openvino.save_model(openvino.Core().read_model(onnx), xml, compress_to_fp16=False)
        except Exception as error:  # openvino's errors share no public base class
            raise InputError(
                f"OpenVINO {openvino.__version__} cannot convert the graph: {plain_reason(error)} "
                "Leave --format openvino out."
            ) from None
        return xml.read_bytes(), xml.with_suffix(".bin").read_bytes(), str(openvino.__version__).split("-")[0]


def _build(graph: Variant, precision: str, options: BuildOptions, tell: Tell) -> Built:
    xml, weights, version = to_ir(graph.data)
    model = OpenVinoModel(xml, weights, precision, 1)
    files = {"encoder.xml": xml, "encoder.bin": weights}
    settings = {"INFERENCE_PRECISION_HINT": HINTS[precision]}
    return Built(files, f"openvino {version}", {**settings}, model.version, model)


FORMAT = Format(
    "openvino",
    ("fp32", "bf16", "int8"),
    GraphForm("s8s8", decompose_prelu, decompose_prelu),
    _build,
    need_packages("openvino", "openvino"),
)
