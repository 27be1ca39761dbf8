"""Run a model that tells presentation attacks from living people: aligned uint8 crops in, scores out."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from pkd.toolkit.bundle.onnx_check import check_onnx
from pkd.toolkit.certificates.attack_detection import AttackCertificate, Scoring
from pkd.toolkit.core.errors import InputError
from pkd.toolkit.encoders.base import DEPENDS, make_session, ort_reason
from pkd.toolkit.encoders.onnx_ports import load_refusal, read_input
from pkd.toolkit.images.codec import Rgb

Scores = NDArray[np.float32]


class AttackModel:
    """Score crops by an ONNX classifier. Safe to share between threads."""

    def __init__(self, path: Path, scoring: Scoring, *, threads: int = 1) -> None:
        """Open the file and try it. Raises InputError or BundleError that names what does not fit."""
        try:
            data = path.read_bytes()
        except OSError as error:
            raise InputError(f"{path}: {error.strerror}. Give the ONNX file of an attack detector.") from None
        check_onnx(data, path)
        self.scoring, self.path = scoring, path
        self.sha256 = hashlib.sha256(data).hexdigest()
        try:
            self._session = make_session(data, threads)
        except Exception as error:  # onnxruntime's own errors share no public base class
            raise InputError(f"{path}: {load_refusal(error)}") from None
        self._port = read_input(self._session, scoring.preprocess, path)
        if self._port.batch not in (None, 1):
            raise InputError(f"{path}: takes batches of {self._port.batch}. Export it for any number, or for one.")
        self._output = self._chosen(self._session)
        size = scoring.preprocess.size
        crops = np.random.default_rng(0).integers(0, 256, (3, size, size, 3), np.uint8)
        together, alone = self.score(crops)[1], self.score(crops[1:2])[0]
        if not np.isclose(together, alone, rtol=DEPENDS, atol=1e-4):
            raise InputError(
                f"{path}: a crop's score depends on the others in its batch, or on chance: the network was exported in "
                "training mode. Call model.eval() before torch.onnx.export, and export it again."
            )

    def score(self, crops: Rgb) -> Scores:
        """Score uint8 N×S×S×3 RGB → float32 N, larger is more likely bona fide; NaN is −∞: no answer is an attack."""
        self.scoring.preprocess.check(crops)
        parts = [crops[place : place + 1] for place in range(len(crops))] if self._port.batch == 1 else [crops]
        try:
            rows = [
                self._session.run([self._output], {self._port.name: self._port.feed(part, self.scoring.preprocess)})[0]
                for part in parts
            ]
        except Exception as error:
            raise InputError(f"{self.path}: does not run on crops: {ort_reason(error)}") from None
        logits = np.concatenate(rows).astype(np.float32).reshape(len(crops), -1)
        column = self.scoring.output
        if column >= logits.shape[1]:
            raise InputError(f"{self.path}: has {logits.shape[1]} outputs, none numbered {column} from 0.")
        if self.scoring.softmax:
            if logits.shape[1] < 2:
                raise InputError(f"{self.path}: has one output, and a softmax of one is always 1. Leave --softmax out.")
            powers = np.exp(logits - logits.max(1, keepdims=True))
            logits = powers / powers.sum(1, keepdims=True)
        return np.nan_to_num(logits[:, column], nan=-np.inf, posinf=np.inf, neginf=-np.inf).astype(np.float32)

    def _chosen(self, session: ort.InferenceSession) -> str:
        ports = session.get_outputs()
        if len(ports) != 1:
            raise InputError(f"{self.path}: has {len(ports)} outputs, expected one of N×K. Cut the graph to it.")
        return str(ports[0].name)


class AttackDetector:
    """Decide at the threshold of a certificate that was measured of this very model."""

    def __init__(self, path: Path, certificate: AttackCertificate) -> None:
        """Open the model. Raises InputError unless the certificate is of this file."""
        self.certificate = certificate
        self.model = AttackModel(path, certificate.scoring)
        if self.model.sha256 != certificate.model_sha256:
            raise InputError(
                f"{path}: its SHA-256 begins with {self.model.sha256[:12]}, the certificate is of "
                f"{certificate.model_sha256[:12]} ({certificate.detector}). Measure this file with pkd-pad."
            )

    def is_bona_fide(self, crop: Rgb) -> bool:
        """Say whether one crop is classified as bona fide; it is uint8 S×S×3 RGB."""
        return bool(self.model.score(crop[None])[0] >= self.certificate.threshold)
