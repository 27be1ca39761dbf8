"""Describe one form of an encoder in a bundle, for one runtime in one precision."""

from __future__ import annotations

from pydantic import Field, field_validator

from pkd.toolkit.core.encoder_info import EncoderInfo
from pkd.toolkit.core.models import Record


class Target(Record):
    """Describe what a device loads instead of ``encoder.onnx``. Its name is ``<runtime>-<precision>``."""

    runtime: str
    """onnxruntime, openvino, ncnn, executorch, litert, coreml, npu, tensorrt or tensorrt_rtx."""
    precision: str
    """fp32, fp16, bf16, int8 or w8a16."""
    encoder: EncoderInfo
    """The bundle's own in fp32, however it was rewritten; another numeric mode is another encoder of the same space."""
    graph: str
    """The ONNX file in the bundle that it was made from, and can be made from again."""
    file: str | None
    """The file in the bundle that the runtime loads. None: not built yet, the machine that wrote it could not."""
    golden_tolerance: float = Field(gt=0, le=1)
    """Largest allowed 1 − cosine between a golden embedding and what this target makes of its crop."""
    checked_with: str
    """Program and version that embedded the golden crops before this was written: the runtime, or onnxruntime with
    ``graph`` where the runtime needs a device that was not there. For Core ML torch, with the operators of the file."""
    made_with: str
    """Converter and version."""
    settings: dict[str, str | int | float | bool] = Field(default_factory=dict)
    """Dependencies of the file: pinned precision, GPU architecture, batch sizes, calibration."""

    @property
    def package(self) -> str | None:
        """Return the folder that the runtime loads as one thing, with a ``/`` behind it; None where it loads files."""
        parts = (self.file or "").split("/")
        inside = [i for i, part in enumerate(parts[:-1]) if part.endswith(".mlpackage")]
        return "/".join(parts[: inside[0] + 1]) + "/" if inside else None

    @property
    def name(self) -> str:
        """Return ``<runtime>-<precision>``, for example ``onnxruntime-int8``."""
        return f"{self.runtime}-{self.precision}"

    @field_validator("runtime", "precision")
    @classmethod
    def _plain(cls, value: str) -> str:
        if not value.replace("_", "").isalnum() or not value.isascii():
            raise ValueError("must be letters, digits and underscores")
        return value
