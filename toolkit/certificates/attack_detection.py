"""State what was measured of a model that detects presentation attacks, by the terms of ISO/IEC 30107-3.

A presentation is one picture shown to the model. A bona fide presentation shows the living person; a presentation
attack instrument (PAI) is shown in place of one, and PAIs of one make are a species: prints, screens, masks. APCER is
the share of a species' attacks that are classified as bona fide, BPCER the share of bona fide presentations classified
as attacks. ISO/IEC 30107-3 takes the worst species as the figure of the model: a mean would hide it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError, model_validator

from pkd.toolkit.certificates.certificate import Rate, RateInterval
from pkd.toolkit.certificates.signing import TrustedKeys, signature_beside
from pkd.toolkit.core.errors import BundleError, InputError
from pkd.toolkit.core.models import Record, fault_of, read_json
from pkd.toolkit.core.preprocess import Preprocess

SCHEMA = 1
Some = Annotated[int, Field(ge=1, le=10**12)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Classified(Record):
    """Give the error rate of one kind of presentation; the interval is of 95 %, over subjects."""

    presentations: Some
    subjects: Some
    """People that a presentation shows or imitates: those of one subject fail together."""
    rate: Rate
    """APCER of a species, or BPCER."""
    ci95: RateInterval


class Scoring(Record):
    """Say how a score is read from the model's output, N×K: larger is more likely bona fide."""

    preprocess: Preprocess
    output: int = Field(default=0, ge=0, lt=1000)
    """Column that stands for bona fide, from 0."""
    softmax: bool = False
    """True: the columns are logits of classes, and the score is the softmax of them."""


class AttackCertificate(Record):
    """Hold what was measured of one model at one threshold, on people whom the threshold was not chosen on."""

    schema_version: int = Field(default=SCHEMA, ge=SCHEMA, le=SCHEMA)
    detector: str = Field(min_length=1, max_length=200)
    model_sha256: Digest
    scoring: Scoring
    threshold: float
    """Score at and above which a presentation is classified as bona fide."""
    target_apcer: Annotated[float, Field(ge=0, lt=1)]
    """Largest APCER of any species where the threshold was chosen, on other subjects than those measured."""
    chosen_on: Some
    """Subjects whom the threshold was chosen on."""
    attacks: dict[str, Classified] = Field(min_length=1, max_length=1000)
    """Species of attack instruments → APCER."""
    bona_fide: Classified
    """BPCER."""
    data_name: str
    data_digest: Digest
    seed: int
    created: str
    pkd_version: str

    @model_validator(mode="after")
    def _better_than_chance(self) -> AttackCertificate:
        if self.apcer + self.bona_fide.rate >= 1:
            raise ValueError(
                f"APCER {self.apcer:g} and BPCER {self.bona_fide.rate:g} are no better than chance: train the model, "
                "or name the other output"
            )
        return self

    @property
    def worst(self) -> str:
        """Name the species that is taken for people most often."""
        return max(self.attacks, key=lambda one: (self.attacks[one].rate, self.attacks[one].ci95[1]))

    @property
    def apcer(self) -> float:
        """Return the APCER of the worst species."""
        return self.attacks[self.worst].rate

    @property
    def apcer_at_most(self) -> float:
        """Return the largest upper end of the species' intervals: what a demand for evidence is held against."""
        return max(one.ci95[1] for one in self.attacks.values())


def read_attack_certificate(path: Path, trusted: TrustedKeys | None = None) -> AttackCertificate:
    """Read a certificate of pkd-pad. Raises InputError, BundleError or NotTrusted (``trusted`` did not sign it)."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}. Give the certificate that pkd-pad wrote.") from None
    if trusted:
        trusted.require(data, signature_beside(path), path, "pkd-pad --sign KEY.pem")
    try:
        read_json(data, path)
        return AttackCertificate.model_validate_json(data, strict=True)
    except ValidationError as error:
        raise BundleError(f"{path}: {fault_of(error)}. Measure the model with pkd-pad.") from None
    except (ValueError, RecursionError):
        raise BundleError(f"{path}: is no JSON. Measure the model with pkd-pad.") from None
