"""Check signed verdicts of a presentation-attack detector: that this very picture shows a living person.

pkd ships no detector. One elsewhere, in a camera or an app, says so in a token that it signs (JWS). A
verdict is good for one request, one set of pictures and a short time. What the detector's word is worth is for whoever
runs it to measure: ISO/IEC 30107-3.
"""

from __future__ import annotations

import hashlib
import math
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import Field, ValidationError

from pkd.serving.core.embedding_codec import decode_base64
from pkd.serving.core.errors import BadToken, NotLive
from pkd.serving.core.schemas import EmbeddingSide, ImageInput, Number, Sent
from pkd.serving.core.signed_tokens import Expected, KeySet, header
from pkd.serving.core.watched_file import read_json_file
from pkd.toolkit.certificates.attack_detection import AttackCertificate

Shown = bytes | str | ImageInput | EmbeddingSide
"""One input of a request: a file's bytes, the same as base64, either inside JSON, or an embedding."""
REMEDY = "docs/security.md shows such a file."
MAX_USED = 1_000_000
"""Most nonces that are remembered at once; no verdict is taken beyond."""
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class LivenessConfig(Sent):
    """Hold the file of --liveness: whose verdicts are believed."""

    issuer: str = Field(min_length=1)
    audience: str = Field(min_length=1)
    jwks: str = Field(min_length=1)
    """File, relative to this one, or https address of the issuer's public keys."""
    max_age_seconds: Number = Field(default=60, gt=0, le=3600)
    """Longest time from a verdict's ``iat`` to its use."""
    leeway_seconds: Number = Field(default=5, ge=0, le=300)
    """Most that the issuer's clock and this one may be apart, seconds."""
    detectors: dict[str, Evidence] = Field(default={})
    """Measurements of each detector, by the name in its verdicts; empty: any is believed as it is."""


class Evidence(Sent):
    """Hold what was measured of a detector, by the terms of ISO/IEC 30107-3, at the threshold that it decides by."""

    apcer: Number = Field(ge=0, le=1)
    """Attacks taken for living people, of the worst kind of attack instrument (APCER)."""
    bpcer: Number = Field(ge=0, le=1)
    """Living people taken for attacks (BPCER)."""


class Verdict(Sent):
    """Hold the claim ``pad`` of a token."""

    verdict: Literal["live", "attack"]
    detector: str = Field(default="", max_length=200)
    sha256: list[Digest] = Field(min_length=1, max_length=64)
    """Digest of each picture as it is sent, or of each embedding's bytes: the verdict is about these."""


LivenessConfig.model_rebuild()


@dataclass(frozen=True)
class Demand:
    """Say what a gallery asks of a request's verdict."""

    gallery: str
    max_apcer: float | None
    """Largest measured APCER of the detector; None: no evidence is asked for."""


def require_measured(certificate: AttackCertificate, demand: Demand | None) -> None:
    """Raise NotLive where the server's own detector lets more attacks through than the gallery takes.

    The upper end of the worst species' interval counts: few attacks that failed prove little.
    """
    if demand and demand.max_apcer is not None and certificate.apcer_at_most > demand.max_apcer:
        raise NotLive(
            f"the gallery {demand.gallery!r} asks for an APCER of at most {demand.max_apcer:g}; of the server's "
            f"detector up to {certificate.apcer_at_most:.3g} is possible by its certificate.",
            details={"reason": "evidence", "max_apcer": demand.max_apcer},
        )


class Liveness:
    """Check verdicts. ``shared``: a folder where the processes of one server remember nonces together."""

    def __init__(
        self, config: LivenessConfig, keys: KeySet, clock: Callable[[], float] = time.time, shared: Path | None = None
    ) -> None:
        self.config, self._keys, self._clock = config, keys, clock
        self.shared = shared
        self._began = math.floor(clock())
        """Second in which this process began: it knows no nonce that another before it has seen."""
        self._used: dict[str, float] = {}
        self._lock = threading.Lock()
        self._expected = Expected(
            config.issuer, config.audience, config.leeway_seconds, ("exp", "iat", "iss", "aud", "jti", "pad")
        )

    @classmethod
    def read(cls, path: Path) -> Liveness:
        """Read the file of --liveness. Raises InputError that names what is wrong with it."""
        config = read_json_file(path, LivenessConfig.model_validate, REMEDY)
        return cls(config, KeySet(config.jwks if "://" in config.jwks else str(path.parent / config.jwks)))

    def require(self, token: str, inputs: Sequence[Shown], demand: Demand | None) -> None:
        """Raise NotLive unless ``token`` proves what is asked of the ``inputs`` of a request.

        It may fetch keys, so it runs in a thread. A token that passes is used up.
        """
        try:
            kid = header(token).get("kid")
            if self._keys.is_due(kid):
                self._keys.refresh(kid)
            claims = self._keys.claims(token, self._expected)
            verdict = Verdict.model_validate(claims["pad"])
        except BadToken as error:
            raise NotLive(f"the verdict is not believed: {error}", details={"reason": "invalid"}) from None
        except ValidationError:
            said = "its claim pad must hold verdict (live or attack) and sha256 (a list of hex digests)"
            raise NotLive(f"the verdict is not believed: {said}.", details={"reason": "invalid"}) from None
        config = self.config
        if not isinstance(claims["jti"], str) or not 16 <= len(claims["jti"]) <= 200:
            raise NotLive("the verdict's nonce (jti) has not 16 to 200 characters.", details={"reason": "invalid"})
        if self._clock() - claims["iat"] > config.max_age_seconds + config.leeway_seconds:
            raise NotLive(
                f"the verdict is older than {config.max_age_seconds:g} s. Check the person anew.",
                details={"reason": "expired", "max_age_seconds": config.max_age_seconds},
            )
        if claims["iat"] < self._began:
            raise NotLive(
                "the verdict is from before this server began, which cannot tell whether it was used. Check the person "
                "anew.",
                details={"reason": "expired", "max_age_seconds": config.max_age_seconds},
            )
        if missing := [number for number, shown in enumerate(inputs) if digest_of(shown) not in verdict.sha256]:
            raise NotLive(
                f"the verdict is about other pictures: input {missing[0]} is not among its sha256.",
                details={"reason": "other-input", "index": missing[0]},
            )
        if verdict.verdict == "attack":
            raise NotLive("the detector takes this for an attack.", details={"reason": "attack"})
        self._require_evidence(verdict, demand)
        if not self._use(claims["jti"]):
            raise NotLive("the verdict was used before. Check the person anew.", details={"reason": "replayed"})

    def _require_evidence(self, verdict: Verdict, demand: Demand | None) -> None:
        known = self.config.detectors
        evidence = known.get(verdict.detector)
        if known and evidence is None:
            raise NotLive(
                f"the verdict is of the detector {verdict.detector[:80]!r}, which the operator does not list.",
                details={"reason": "unknown-detector", "detectors": sorted(known)},
            )
        if demand and demand.max_apcer is not None and (evidence is None or evidence.apcer > demand.max_apcer):
            got = "none was measured" if evidence is None else f"{evidence.apcer:g} was measured"
            raise NotLive(
                f"the gallery {demand.gallery!r} asks for an APCER of at most {demand.max_apcer:g}; {got}.",
                details={"reason": "evidence", "max_apcer": demand.max_apcer},
            )

    def _use(self, nonce: str) -> bool:
        """Remember a nonce; False where it was used before, by any process of this server."""
        name = hashlib.sha256(nonce.encode()).hexdigest()
        now = self._clock()
        forgotten = now - self.config.max_age_seconds - 2 * self.config.leeway_seconds - 1
        with self._lock:
            if len(self._used) >= MAX_USED // 2:
                self._used = {one: when for one, when in self._used.items() if when > forgotten}
            if name in self._used or len(self._used) >= MAX_USED:
                return False
            self._used[name] = now
        return self.shared is None or _claim(self.shared, name, forgotten)


def digest_of(shown: Shown) -> str:
    """Hash one input as a verdict names it (SHA-256, hex): an image's bytes, or an embedding's.

    An embedding that is sent as numbers is hashed as little-endian float32. Raises NotLive for what is not base64.
    """
    if isinstance(shown, bytes):
        return hashlib.sha256(shown).hexdigest()
    text = shown if isinstance(shown, str) else shown.embedding if isinstance(shown, EmbeddingSide) else shown.image_b64
    if not isinstance(text, str):
        return hashlib.sha256(np.asarray(text, "<f4").tobytes()).hexdigest()
    try:
        return hashlib.sha256(decode_base64(text)).hexdigest()
    except ValueError:
        raise NotLive("an input is not base64, so no verdict can be about it.", details={"reason": "invalid"}) from None


def _claim(folder: Path, name: str, forgotten: float) -> bool:
    """Make an empty file of this name, which one process alone can; older ones are removed now and then."""
    folder = folder / "nonces"
    folder.mkdir(mode=0o700, exist_ok=True)
    try:
        os.close(os.open(folder / name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    except FileExistsError:
        return False
    if name.startswith("00"):  # one in 256
        for old in folder.iterdir():
            if old.stat().st_mtime < forgotten:
                old.unlink(missing_ok=True)
    return True
