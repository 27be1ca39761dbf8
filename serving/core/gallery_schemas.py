"""Define the JSON about galleries that clients send and get. The client reads answers with these very classes."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    model_validator,
)

from pkd.serving.core.schemas import (
    ASSURANCE,
    MAX_IMAGES,
    Answer,
    CertificateAnswer,
    Input,
    Name,
    Number,
    Query,
    Sent,
    SpaceAnswer,
    number_given,
)
from pkd.toolkit.certificates.certificate import Assurance

Key = Annotated[str, StringConstraints(min_length=1, max_length=255, pattern=r"^[\x21-\x7e]+$")]
"""An idempotency key: printable ASCII without spaces."""
EncoderId = Annotated[str, StringConstraints(max_length=300)]


def _structured(sent: Any) -> Any:
    """Read JSON out of text: form fields and query parameters hold what has parts so."""
    if isinstance(sent, str):
        try:
            return json.loads(sent)
        except (ValueError, RecursionError):
            raise ValueError("must be JSON") from None
    return sent


def _in_calendar(moment: datetime) -> datetime:
    if moment.year > 9000:
        raise ValueError("lies too far ahead; leave it out for no end")
    return moment


Moment = Annotated[AwareDatetime, AfterValidator(_in_calendar)]
AttributeName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
AttributeValue = Annotated[str, StringConstraints(max_length=256)]
Attributes = Annotated[dict[AttributeName, AttributeValue], Field(max_length=16), BeforeValidator(_structured)]
"""Attributes that may be filtered on. They are stored as they are, so they are no place for a name."""


class ConsentBody(Sent):
    """State on what ground a subject is enrolled. It is recorded and given back, not judged."""

    basis: str = Field(min_length=1, max_length=64, description="Legal basis, for example `consent` or `contract`")
    reference: str = Field("", max_length=256, description="Place where the paper lies")
    given: str = Field("", max_length=40, description="When, ISO 8601")


class QualityLimits(Sent):
    """Require more of a face; limits of server, gallery and request hold together, so each can only be stricter."""

    detection_score: Number = Field(default=0, ge=0, le=1, description="Smallest score of the detector")
    face_pixels: Number = Field(
        default=0, ge=0, le=10_000, description="Shorter side of the face's box in the photograph, pixels, at least"
    )
    sharpness: Number = Field(default=0, ge=0, le=1e6, description="Smallest `quality.sharpness` of /v1/embed")
    exposure: Number = Field(default=0, ge=0, le=1, description="Smallest share of well exposed pixels")
    inter_eye: Number = Field(default=0, ge=0, le=10_000, description="Fewest pixels between the eyes")
    yaw: Number = Field(default=180, ge=0, le=180, description="Most degrees to either side")
    pitch: Number = Field(default=180, ge=0, le=180, description="Most degrees up or down")
    roll: Number = Field(default=180, ge=0, le=180, description="Most degrees of tilt to either side")
    occlusion: Number = Field(default=1, ge=0, le=1, description="Largest covered share, where a detector says so")


class LivenessDemand(Sent):
    """Say for what a gallery asks proof that a living person is shown: a detector's signed verdict."""

    enrol: bool = Field(default=False, description="Demanded of every enrolment, of embeddings, too")
    query: bool = Field(default=False, description="Demanded of every search of it and comparison with its subjects")
    max_apcer: Number | None = Field(default=None, ge=0, le=1, description="Largest measured APCER of the detector")


class DuplicateRule(Sent):
    """Doubt a face that matches another subject of the gallery."""

    action: Literal["refuse", "flag"]
    fpir: Number = Field(0.01, ge=1e-9, lt=1, description="Share of new people who are doubted by chance")


class OwnRule(Sent):
    """Doubt a face that matches none of its subject's own templates."""

    action: Literal["refuse", "flag"]
    fmr: Number = Field(1e-3, gt=0, lt=1, description="False match rate of the threshold that it must reach")


class GalleryPolicy(Sent):
    """Hold what the operator demands of one gallery, in the file of --policies."""

    quality: QualityLimits = Field(default=QualityLimits(), description="Limits of photographs that are enrolled")
    query_quality: QualityLimits = Field(
        default=QualityLimits(), description="Limits of photographs it is searched for or compared with its subjects"
    )
    liveness: LivenessDemand = Field(default=LivenessDemand(), description="Proof that a living person is shown")
    duplicates: DuplicateRule | None = Field(
        default=None, description="Fate of an enrolment whose face matches another subject"
    )
    own: OwnRule | None = Field(default=None, description="Fate of one that matches none of its subject's templates")
    promised_fmr: Number | None = Field(
        default=None, gt=0, lt=1, description="False match rate that certificates of mapped templates must resolve"
    )


class GalleryBody(Sent):
    """Hold the JSON body of PUT /v1/galleries/{gallery}; it may be left out."""

    space: str | None = Field(None, max_length=300, description="Id of its space; the default encoder's if left out")
    retention_seconds: float | None = Field(None, ge=1, le=1e10, description="Templates are deleted after; null: kept")


class MoveBody(Sent):
    """Hold the JSON body of POST …/move."""

    into: Name = Field(description="Subject who has the templates then")
    templates: list[EncoderId] = Field(
        default=[], max_length=10_000, description="Ids; all if left out, which merges the two subjects"
    )
    new: bool = Field(False, description="`into` is made by this, and must not be there")


class EnrolOptions(Sent):
    """Say how to enrol: JSON fields, form fields or query parameters; in the latter two what has parts is JSON."""

    encoder: str | None = Field(None, max_length=300, description="Encoder of images; the teacher by default")
    aligned: bool = Field(False, description="The images are aligned crops already")
    faces: Literal["exactly_one", "largest"] = Field(
        "exactly_one", description="`largest` enrols whoever is in front where a photograph shows several"
    )
    attributes: Attributes = Field(default={}, description="Replaces the subject's attributes, unless empty")
    consent: Annotated[ConsentBody | None, BeforeValidator(_structured)] = None
    expires: Moment | None = Field(None, description="When these templates are deleted; else by retention")
    quality: Annotated[QualityLimits, BeforeValidator(_structured)] = Field(
        default=QualityLimits(), description="Limits beside those of server and gallery"
    )
    liveness: str | None = Field(
        None, max_length=8192, description="Signed verdict of an attack detector on exactly these inputs (JWS)"
    )
    accept_doubts: bool = Field(
        False, description="Enrol although the gallery's policy refuses; needs an admin key, and is recorded"
    )


class EnrolBody(EnrolOptions):
    """Hold the JSON body of an enrolment: images, embeddings, or both. All of them are enrolled, or none."""

    inputs: list[Input] = Field(min_length=1, max_length=MAX_IMAGES)


class IdentifyOptions(Sent):
    """Say how to search: JSON fields, form fields or query parameters; at most one of target_fpir and threshold."""

    model_config = ConfigDict(json_schema_extra={"not": {"allOf": [*number_given("target_fpir", "threshold")]}})

    top_k: int = Field(5, ge=1, le=100, description="Most candidates")
    target_fpir: float | None = Field(
        None, ge=1e-12, lt=1, description="Share of searches for strangers that may find somebody; default 0.01"
    )
    threshold: float | None = Field(None, ge=-1, le=1, description="Cosine similarity, instead of target_fpir")
    assurance: Assurance | None = Field(None, description=ASSURANCE)
    where: Annotated[Attributes | None, BeforeValidator(_structured)] = Field(
        None, description="Search only subjects with all these attributes"
    )
    liveness: str | None = Field(
        None, max_length=8192, description="Signed verdict of an attack detector on exactly these inputs (JWS)"
    )
    partial: bool = Field(False, description="Search what is certified, and list what is not, instead of a 409")

    @model_validator(mode="after")
    def _one(self) -> IdentifyOptions:
        if self.target_fpir is not None and self.threshold is not None:
            raise ValueError("give either target_fpir or threshold")
        if self.threshold is not None and self.assurance is not None:
            raise ValueError("a threshold is taken as it is: leave out assurance, or give target_fpir")
        return self


class IdentifyBody(IdentifyOptions):
    """Hold the JSON body of /v1/galleries/{gallery}/identify."""

    query: Query


class IdentifyImage(IdentifyOptions):
    """Say how to search for an image that is the body or a form's file."""

    encoder: str | None = Field(None, max_length=300, description="Loaded encoder; the teacher by default")
    aligned: bool = False
    faces: Literal["largest", "exactly_one"] = "largest"


class MigrationBody(Sent):
    """Hold the JSON body of POST …/migrations."""

    space: str = Field(max_length=300, description="Id of the space to move to")


class MapOriginAnswer(Answer):
    """Say where mapped templates come from."""

    old: str = Field(description="Encoder that made them")
    new: str = Field(description="Teacher whose own templates replace them")


class GalleryAnswer(Answer):
    """Describe a gallery."""

    name: str
    space: SpaceAnswer
    moving_to: SpaceAnswer | None = Field(description="The second space while a migration is under way")
    created: datetime
    retention_seconds: float | None
    subjects: int
    templates: dict[str, int] = Field(description="Encoder id → how many templates it made")
    policy: GalleryPolicy = Field(GalleryPolicy(), description="Demands of the operator")
    maps: dict[str, MapOriginAnswer] = Field({}, description="Encoder of mapped templates → their origin")
    staged: list[str] = Field([], description="Mapped encoders whose templates are not all there: no search sees them")


class GalleriesAnswer(Answer):
    """List galleries."""

    galleries: list[GalleryAnswer]


class MeasuredQuality(Answer):
    """Hold what was measured of an enrolled image; null for an embedding, and where there was no detection."""

    detection_score: float | None
    face_pixels: float | None = Field(description="Shorter side of the face's box: a smaller face is blown up")
    sharpness: float
    exposure: float
    inter_eye: float | None
    yaw: float | None
    pitch: float | None
    roll: float | None
    occlusion: float | None


class EnrolledTemplate(Answer):
    """Describe a template that was enrolled."""

    id: str
    encoder: str
    space: str
    quality: MeasuredQuality | None


class DoubtAnswer(Answer):
    """Say why a template was doubted by the gallery's policy."""

    kind: Literal["duplicate", "unlike"]
    action: Literal["refuse", "flag"]
    index: int = Field(description="Number of the input")
    subject: str = Field(description="Subject that it matches; of `unlike` the one that it does not match")
    score: float = Field(description="Cosine similarity, the highest to that subject")
    threshold: float
    rate: float = Field(description="FPIR of the rule; of `unlike` the FMR that its threshold belongs to")
    calibrated: bool = Field(description="False: the threshold is extrapolated beyond what was measured")


class EnrolAnswer(Answer):
    """Answer an enrolment."""

    gallery: str
    subject: str
    templates: list[EnrolledTemplate]
    sequence: int = Field(description="Number of the change; a later one is larger")
    replayed: bool = Field(description="True: the idempotency key had been used, nothing was enrolled")
    doubts: list[DoubtAnswer] = Field(default=[], description="Reasons for the flag, by the gallery's policy")


class TemplateAnswer(Answer):
    """Describe a template."""

    id: str
    encoder: str
    space: str
    created: datetime
    expires: datetime | None


class SubjectAnswer(Answer):
    """Describe a subject."""

    gallery: str
    subject: str
    attributes: dict[str, str]
    consent: ConsentBody | None
    templates: list[TemplateAnswer]


class SubjectsAnswer(Answer):
    """List a page of subjects."""

    subjects: list[str]
    next: str | None = Field(description="Pass it as `after` for the next page; null: this is the last one")


class ReceiptAnswer(Answer):
    """Prove a deletion: what was removed, and the place of its record in the audit log."""

    gallery: str
    subject: str | None
    templates: int
    rows: int = Field(description="Rows removed from the durable store, keys included")
    covers: tuple[str, ...] = Field(description="Places where nothing is left")
    sequence: int = Field(description="Number of the audit record")
    hash: str = Field(description="SHA-256 of the audit record")


class Candidate(Answer):
    """Describe a subject that a search found."""

    subject: str
    template: str
    encoder: str = Field(description="Encoder that made the template")
    score: float = Field(description="Cosine similarity")
    fmr_at_score: float
    fmr_is_upper_bound: bool
    threshold: float = Field(description="Threshold of this template's encoder")
    match: bool


class Searched(Answer):
    """Describe the search of one encoder's templates, under its own certificate."""

    encoder: str
    templates: int
    threshold: float | None = Field(description="null where nothing was searched")
    calibrated: bool = Field(description="False: the threshold is extrapolated beyond what was measured")
    certificate: CertificateAnswer


NotSearchedReason = Literal["not-certified", "other-space", "staged", "unsupported-fmr"]


class NotSearched(Answer):
    """Count templates that were not searched."""

    encoder: str
    templates: int
    reason: NotSearchedReason


class IdentifyAnswer(Answer):
    """Answer a search."""

    gallery: str
    decision: Literal["match", "no_match", "ambiguous"] = Field(
        description="ambiguous: two or more subjects reach their threshold"
    )
    candidates: list[Candidate] = Field(description="Least likely to be chance first; every subject once")
    query_encoder: str
    target_fpir: float | None
    target_fmr: float | None = Field(description="Per comparison: 1 − (1 − target_fpir)^(1 / templates)")
    assurance: Assurance | None = Field(
        description="Assurance that target_fmr was asked for with; null where the request stated a threshold"
    )
    templates: int = Field(description="Templates searched, over all encoders")
    calibrated: bool = Field(description="False where any threshold is extrapolated")
    searched: list[Searched]
    not_searched: list[NotSearched]


class MigrationAnswer(Answer):
    """Describe how far a migration is."""

    gallery: str
    space: SpaceAnswer
    moving_to: SpaceAnswer | None = Field(description="null: no migration is under way")
    moved: int = Field(description="Subjects that have a template in the second space")
    total: int
    unmoved: list[str] = Field(description="A page of the subjects that have none yet")
    next: str | None


class MovedAnswer(Answer):
    """Answer the end of a migration."""

    gallery: str
    space: SpaceAnswer
    templates: int = Field(description="Templates of the other space that were deleted")
    receipt: ReceiptAnswer


class AuditRecord(Answer):
    """Describe one change of a gallery, as the audit log has it."""

    sequence: int
    time: datetime
    actor: str = Field(description="Name of the key that asked for it; retention and pkd-gallery act, too")
    action: str
    gallery: str
    subject: str | None = Field(description="Pseudonym, hex: the log names nobody")
    templates: int
    rows: int
    hash: str = Field(description="SHA-256, which the next record holds")


class AuditAnswer(Answer):
    """List a page of the audit log, newest first."""

    records: list[AuditRecord]
    next: int | None = Field(description="Pass it as `before` for older records; null: these are the first")


class ChainAnswer(Answer):
    """Tell whether the audit log's chain of hashes is whole."""

    whole: bool
    sequence: int | None = Field(description="Number of the newest record; null where the chain is broken")
    hash: str | None = Field(description="Hash of the newest record: note both outside, and pass them another time")
    fault: str | None = Field(description="The first record that is missing or was changed")


class DoubtfulPair(Answer):
    """Describe two subjects who may be one person."""

    subject: str
    other: str
    template: str
    other_template: str
    encoders: tuple[str, str]
    score: float
    expected_false: float = Field(description="Pairs of different people that reach such a score here by chance")
    calibrated: bool = Field(description="False: the rate is extrapolated beyond what was measured")


class Outlier(Answer):
    """Describe a template that matches none of its subject's others."""

    subject: str
    template: str
    encoder: str
    score: float = Field(description="To the most similar of the others")
    threshold: float
    others: int = Field(description="Templates that it was compared with")
    genuine_below: float = Field(description="Share of genuine pairs that score as low, by the certificate")
    nearest: str | None = Field(description="Subject whom it matches instead")


class Review(Answer):
    """Hold what a review found: the most doubtful first."""

    subjects: int
    templates: int
    compared: int = Field(description="Pairs of templates of different subjects")
    pairs: list[DoubtfulPair]
    outliers: list[Outlier]
    not_compared: dict[str, int] = Field(description="Encoder → templates that no certificate covers")


class ReviewAnswer(Review):
    """Answer a review."""

    gallery: str


class MoveAnswer(Answer):
    """Answer a move."""

    gallery: str
    subject: str
    into: str
    templates: list[str] = Field(description="Ids that they have now")
    sequence: int = Field(description="Number of the audit record of their arrival")
    receipt: ReceiptAnswer = Field(description="Templates that left `subject`, who is gone where no template is left")
