"""Define the JSON that clients send and get: requests are read with these models, and answers are written with them."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    StringConstraints,
    Tag,
    model_validator,
)
from pydantic.config import JsonDict

from pkd.serving.core.embedding_codec import Encoding
from pkd.toolkit.certificates.certificate import Assurance, Certificate
from pkd.toolkit.core.preprocess import Preprocess

Faces = Literal["largest", "all", "exactly_one"]
MAX_DIM = 4096
"""Longest embedding that is read, numbers; each space then states its own."""
MAX_IMAGES = 32
"""Most images in one request."""
MAX_VALUES = 2 * MAX_DIM + 1000
"""Most values in one JSON body: two embeddings and everything around them."""
MANY_VALUES = MAX_IMAGES * MAX_DIM
"""Most values where a body may hold as many embeddings as images."""
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._@+-]{0,127}$")]
"""A gallery or a subject: 1 to 128 characters that mean nothing to a file system, a URL or a shell."""


class Sent(BaseModel):
    """Refuse unknown fields, so that a misspelt option cannot be ignored, and values of another type than stated.

    Strict types: ``false`` is no number, nor is ``"0.5"``. Form fields and query parameters are text, so they are read
    leniently (``validation.validated``); a number within JSON there is a ``Number``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


def _no_boolean(sent: object) -> object:
    if isinstance(sent, bool):
        raise ValueError("must be a number")
    return sent


Number = Annotated[float, BeforeValidator(_no_boolean)]
"""A number that ``true`` and ``false`` are not, wherever it is read."""


class Answer(BaseModel):
    """Hold what is answered. It can be made of any object with attributes of these names (``model_validate``)."""

    model_config = ConfigDict(from_attributes=True)


class EmbedOptions(Sent):
    """Say how to embed: query parameters, form fields or JSON fields."""

    encoder: str | None = Field(None, max_length=300, description="Id, short id or name; the teacher by default")
    faces: Faces = Field("largest", description="Faces to embed of each photograph; `all` may give none")
    aligned: bool = Field(False, description="The images are aligned crops already; nothing is detected")
    encoding: Encoding = Field("float", description="Form in which embeddings are written; base64 is little-endian")


class ImageInput(Sent):
    """Hold an image inside JSON."""

    image_b64: str = Field(description="JPEG, PNG, WebP, BMP, AVIF or HEIC file as base64")


class EmbedBody(EmbedOptions):
    """Hold the JSON body of /v1/embed."""

    inputs: list[ImageInput] = Field(min_length=1, max_length=MAX_IMAGES)


class ImageSide(ImageInput):
    """Give one side of a comparison as an image, embedded here."""

    encoder: str | None = Field(None, max_length=300, description="Loaded encoder; the teacher by default")
    aligned: bool = False
    faces: Literal["largest", "exactly_one"] = "largest"


class EmbeddingSide(Sent):
    """Give one side of a comparison as an embedding made elsewhere, for example on a device."""

    embedding: Annotated[list[float], Field(max_length=MAX_DIM)] | str
    encoding: Encoding = "float"
    encoder: str = Field(max_length=300, description="Id of the encoder that made it")
    space: str | None = Field(None, max_length=300, description="Id of its space, checked where given")


class SubjectSide(Sent):
    """Give one side of a comparison as somebody who is enrolled, by the best of their templates."""

    gallery: Name
    subject: Name


def number_given(*fields: str) -> list[JsonDict]:
    """Describe to JSON Schema that each of these fields is given in turn, and is no null."""
    return [{"required": [name], "properties": {name: {"type": "number"}}} for name in fields]


ASSURANCE = (
    "What the target rate is asked as: `point`, met on average over evaluations like the certificate's, or `bound`, "
    "kept with 95 % confidence, at a higher threshold. Absent: the server's setting"
)


class Policy(Sent):
    """Say when two faces match; give exactly one of the two."""

    model_config = ConfigDict(json_schema_extra={"oneOf": [*number_given("target_fmr", "threshold")]})

    target_fmr: float | None = Field(None, gt=0, lt=1, description="False match rate, a fraction")
    threshold: float | None = Field(None, ge=-1, le=1, description="Cosine similarity")
    assurance: Assurance | None = Field(None, description=ASSURANCE)

    @model_validator(mode="after")
    def _one(self) -> Policy:
        if (self.target_fmr is None) == (self.threshold is None):
            raise ValueError("give either target_fmr or threshold")
        if self.threshold is not None and self.assurance is not None:
            raise ValueError("a threshold is taken as it is: leave out assurance, or give target_fmr")
        return self


def _side(sent: object) -> str:
    for tag, kind, field in (("image", ImageInput, "image_b64"), ("subject", SubjectSide, "subject")):
        if isinstance(sent, kind) or (isinstance(sent, dict) and field in sent):
            return tag
    return "embedding"


Input = Annotated[
    Annotated[ImageInput, Tag("image")] | Annotated[EmbeddingSide, Tag("embedding")], Discriminator(_side)
]
"""Kinds of input, told apart by their fields, so that an error is about the one that was meant."""
Query = Annotated[Annotated[ImageSide, Tag("image")] | Annotated[EmbeddingSide, Tag("embedding")], Discriminator(_side)]
Side = Annotated[
    Annotated[ImageSide, Tag("image")]
    | Annotated[EmbeddingSide, Tag("embedding")]
    | Annotated[SubjectSide, Tag("subject")],
    Discriminator(_side),
]


class VerifyBody(Sent):
    """Hold the JSON body of /v1/verify."""

    a: Side = Field(description="The query (probe)")
    b: Side = Field(description="The gallery side")
    policy: Policy | None = Field(None, description="The server's default target FMR where left out")
    liveness: str | None = Field(
        None, max_length=8192, description="Signed verdict of an attack detector on the side that is not enrolled (JWS)"
    )


class VerifyFiles(Sent):
    """Say how to compare two photographs: form fields beside the files ``a`` and ``b``."""

    encoder: str | None = Field(None, max_length=300, description="Loaded encoder of both; the teacher by default")
    aligned: bool = Field(False, description="Both are aligned crops already")
    faces: Literal["largest", "exactly_one"] = "largest"
    target_fmr: Number | None = Field(None, gt=0, lt=1, description="False match rate, a fraction")
    threshold: Number | None = Field(None, ge=-1, le=1, description="Cosine similarity, instead of target_fmr")
    liveness: str | None = Field(None, max_length=8192, description="Verdict, as in JSON")

    @model_validator(mode="after")
    def _one(self) -> VerifyFiles:
        if self.target_fmr is not None and self.threshold is not None:
            raise ValueError("give target_fmr or threshold, not both")
        return self

    def body(self, files: Mapping[str, bytes]) -> VerifyBody:
        """Make of it, and of both files, what a JSON body says."""

        def side(name: str) -> ImageSide:
            data = base64.b64encode(files[name]).decode()
            return ImageSide(image_b64=data, encoder=self.encoder, aligned=self.aligned, faces=self.faces)

        stated = self.target_fmr is not None or self.threshold is not None
        asked = {"target_fmr": self.target_fmr, "threshold": self.threshold}
        policy = (
            Policy.model_validate({name: rate for name, rate in asked.items() if rate is not None}) if stated else None
        )
        return VerifyBody(a=side("a"), b=side("b"), policy=policy, liveness=self.liveness)


class SpaceAnswer(Answer):
    """Describe an embedding space."""

    id: str
    dim: int
    metric: str


class EncoderAnswer(Answer):
    """Describe the encoder that made embeddings."""

    id: str
    role: str
    preprocess: str


class Quality(Answer):
    """Hold what was measured of a face."""

    sharpness: float = Field(description="Variance of the Laplacian of the grey crop, squared grey levels (0–255)")
    exposure: float = Field(description="Share of the face's pixels that are neither under- nor overexposed")
    inter_eye: float | None = Field(None, description="Pixels of the photograph between the eyes; null for crops")
    yaw: float | None = Field(None, description="Degrees to the side, positive towards the image's right")
    pitch: float | None = Field(None, description="Degrees up, negative: down")
    roll: float | None = Field(None, description="Degrees that the face is tilted in the image, clockwise")
    occlusion: float | None = Field(None, description="Share that is covered; null unless the detector says so")


class FaceAnswer(Answer):
    """Describe one face and its embedding."""

    index: int = Field(description="Number of the image in the request")
    face: int = Field(description="Number of the face in that image, largest first")
    box: list[float] | None = Field(description="x1 y1 x2 y2, pixels of the upright photograph; null for aligned crops")
    landmarks: list[list[float]] | None = Field(description="Five points x y: eyes, nose, mouth corners")
    detection_score: float | None
    quality: Quality
    embedding: list[float] | str
    encoding: Encoding


class Timing(Answer):
    """Count milliseconds, summed over the images of the request."""

    decode: float
    detect: float
    queue: float
    infer: float


class EmbedAnswer(Answer):
    """Answer /v1/embed."""

    space: SpaceAnswer
    encoder: EncoderAnswer
    data: list[FaceAnswer]
    timing_ms: Timing


class SignatureAnswer(Answer):
    """Describe who signed a certificate."""

    key: str = Field(description="Fingerprint of the ed25519 key that is said to have signed")
    verified: bool = Field(description="True: checked at start. False: the server was started without trusted keys")
    covers: Literal["certificate", "bundle"] = Field(
        description="Signed is the certificate itself, or only the bundle that holds it"
    )


class CertificateAnswer(Answer):
    """Describe the certificate that an answer rests on."""

    query: str
    gallery: str
    space: str
    identities: int
    impostor_pairs: int
    data_name: str
    synthetic: bool = Field(description="True: measured on procedural faces; the rates say nothing about people")
    created: str
    signature: SignatureAnswer | None = Field(description="null where neither the certificate nor its bundle is signed")


class ComparedTemplate(Answer):
    """Name the template of a subject that decided."""

    gallery: str
    subject: str
    template: str
    encoder: str


NotComparedReason = Literal["not-certified", "space-mismatch", "unsupported-fmr"]


class NotCompared(Answer):
    """Count templates that no comparison was permitted with."""

    encoder: str
    templates: int
    reason: NotComparedReason


class VerifyAnswer(Answer):
    """Answer /v1/verify."""

    match: bool
    score: float = Field(description="Cosine similarity")
    threshold: float
    target_fmr: float | None = Field(
        description="Rate that the threshold was chosen for; null where the request stated one"
    )
    assurance: Assurance | None = Field(
        description="Assurance that target_fmr was asked for with; null where the request stated a threshold"
    )
    fmr_at_score: float = Field(description="Share of impostor pairs that score at least this high")
    fmr_ci95: tuple[float, float] = Field(description="95 % interval of it over people")
    fmr_is_upper_bound: bool = Field(
        description="True where the score lies above the last one whose rate the evaluation resolved: the share is at "
        "most fmr_at_score"
    )
    certificate: CertificateAnswer
    a: ComparedTemplate | None = Field(None, description="Template that decided, if `a` is a subject")
    b: ComparedTemplate | None = Field(None, description="Template that decided, if `b` is a subject")
    comparisons: int = Field(
        1, description="Pairs compared; rates are per comparison, the best of n errs up to n times"
    )
    not_compared: list[NotCompared] = Field(
        default=[], description="Templates of the subjects that were left out, and why"
    )


class EncoderListed(Answer):
    """Describe a loaded encoder."""

    id: str
    name: str
    role: Literal["teacher", "student"]
    numeric_mode: str
    space: SpaceAnswer
    preprocess: Preprocess
    licence: str
    default: bool = Field(description="True: images go to this one where a request names none")


class EncodersAnswer(Answer):
    """List the loaded encoders."""

    encoders: list[EncoderListed]


class FileAnswer(Answer):
    """Describe a file to download."""

    name: str = Field(description="Pass it as `file`")
    sha256: str
    bytes: int


class TargetAnswer(Answer):
    """Describe the encoder for one runtime in one precision."""

    name: str = Field(description="Pass it as `target`")
    runtime: str
    precision: str
    golden_tolerance: float = Field(description="Largest allowed 1 − cosine over the bundle's golden crops")
    settings: dict[str, str | int | float | bool]
    files: list[FileAnswer] = Field(
        description="Files that the device needs, the one to load first; empty: not built yet"
    )


class Comparable(Answer):
    """List encoder ids that some certificate joins with this one."""

    as_query_against: list[str]
    as_gallery_for: list[str]


class EncoderDetail(EncoderListed):
    """Describe one encoder, its certificates and its files."""

    loaded: bool = Field(description="False: a target in a bundle, for devices; no image can be sent to it here")
    certificates: Comparable
    artifact: FileAnswer = Field(description="File that …/artifact gives without options")
    targets: list[TargetAnswer]


class DeviceLatest(Answer):
    """Say what a class of devices is to run now."""

    device_class: str
    encoder: str = Field(description="Id under which the device sends its embeddings")
    space: SpaceAnswer
    numeric_mode: str
    target: str | None = Field(description="Form of the encoder; null: `encoder.onnx`")
    runtime: str
    golden_tolerance: float = Field(description="Largest allowed 1 − cosine over the bundle's golden crops")
    certified_against: list[str] = Field(description="Encoders of templates that its queries may be compared with")
    bundle_encoder: str = Field(description="Encoder of the bundle that holds the files: `/v1/encoders/{id}/artifact`")
    files: list[FileAnswer] = Field(description="The file to load first, manifest, golden crops, certificates")


class SpaceListed(SpaceAnswer):
    """Describe a space and the loaded encoders that embed into it."""

    encoders: list[str]


class SpacesAnswer(Answer):
    """List the spaces of the loaded encoders."""

    spaces: list[SpaceListed]


class DriftPoint(Answer):
    """Count how often one operating point was reached."""

    kind: Literal["identify", "verify"]
    fmr: float = Field(description="The operating point's")
    threshold: float
    observations: int = Field(description="Decisions that could tell")
    reached: int = Field(description="Those of them in which an impostor, or a refused face, reached the threshold")
    expected: float = Field(description="Number that would, by the certificate's own rate")
    at_most: float = Field(description="Most that would, with the allowance for the people of the gallery")


class DriftAnswer(Answer):
    """Say whether a certificate still holds."""

    query: str
    gallery: str
    since: datetime | None = Field(description="First observation; null: nothing was seen")
    alarm: bool = Field(description="True: what was seen contradicts the certificate. It stays true")
    evidence: float = Field(description="Against the certificate; 1 at first, an alarm from `alarm_at` on")
    alarm_at: float
    false_alarm_rate: float = Field(description="Over all the time that the certificate is watched")
    observed: list[DriftPoint]
    assumptions: list[str]


class CertificatesAnswer(Answer):
    """List certificates."""

    certificates: list[Certificate]
