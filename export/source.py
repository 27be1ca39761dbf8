"""What is exported: the encoder that sets the standard, its network as ONNX, and where it came from."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pkd.export.graph.build import onnx_network, torch_network
from pkd.toolkit.core.encoder_info import EncoderInfo
from pkd.toolkit.core.errors import InputError
from pkd.toolkit.distill.models.open_encoder import open_encoder
from pkd.toolkit.encoders.base import Encoder, OnnxEncoder

if TYPE_CHECKING:
    import onnx


@dataclass(frozen=True)
class Source:
    """``network``: float N×3×S×S → N×D, what ``encoder`` runs, before normalisation."""

    name: str
    encoder: Encoder
    network: onnx.ModelProto
    training: dict[str, str | int | float | bool | None]

    @property
    def info(self) -> EncoderInfo:
        """The source's identity, which the bundle keeps."""
        return self.encoder.info


def open_run(run: str) -> Source:
    """The student (or teacher) that pkd-distill left in the folder ``run``. Raises InputError for anything else."""
    path = Path(run)
    if run.startswith("insightface:") or (path.is_file() and path.name != "student.pt"):
        raise InputError(f"{run}: not the folder of a pkd-distill run. Pass a teacher as --teacher {run}.")
    return _source(run, open_encoder(run))


def open_teacher(spec: str, preprocess: str | None) -> Source:
    """Any encoder by its spelling: FILE.onnx, FILE.pt, ``insightface:PACK``, or a run folder."""
    return _source(spec, open_encoder(spec, preprocess))


def _source(spec: str, encoder: Encoder) -> Source:
    if isinstance(encoder, OnnxEncoder):
        if encoder.path is None:
            raise InputError(f"{spec}: is a bundle already. Export the run or the file it was made from.")
        digest = hashlib.sha256(encoder.path.read_bytes()).hexdigest()
        training: dict[str, str | int | float | bool | None] = {"source": encoder.path.name, "source_sha256": digest}
        return Source(spec, encoder, onnx_network(encoder.path), training)

    from pkd.toolkit.distill.models.student import TorchEncoder  # torch is there: it opened the encoder

    if not isinstance(encoder, TorchEncoder):
        raise InputError(f"{spec}: a {type(encoder).__name__} cannot be exported.")
    network = torch_network(encoder.module, encoder.info.preprocess.size)
    return Source(spec, encoder, network, dict(encoder.training))
