"""Schemas: the JSON that clients send and get. Requests are validated with these; answers are documented by them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

from pkd.serving.vectors import Encoding

Faces = Literal["largest", "all", "exactly_one"]
MAX_DIM = 4096
"""Longest embedding that is read, numbers; each space then states its own."""
MAX_IMAGES = 32
"""Most images in one request."""
MAX_VALUES = 2 * MAX_DIM + 1000
"""Most values in one JSON body: two embeddings and everything around them."""


class _Sent(BaseModel):
    """A request body: unknown fields are refused, so that a misspelt option cannot be ignored."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class EmbedOptions(_Sent):
    """How to embed: query parameters, form fields or JSON fields."""

    encoder: str | None = Field(None, max_length=300, description="Id, short id or name; the teacher by default")
    faces: Faces = Field("largest", description="Which faces of each photograph; `all` may give none")
    aligned: bool = Field(False, description="The images are aligned crops already; nothing is detected")
    encoding: Encoding = Field("float", description="How embeddings are written; base64 is little-endian")


class ImageInput(_Sent):
    """An image inside JSON."""

    image_b64: str = Field(description="JPEG, PNG, WebP or BMP file as base64")


class EmbedBody(EmbedOptions):
    """JSON body of /v1/embed."""

    inputs: list[ImageInput] = Field(min_length=1, max_length=MAX_IMAGES)


class ImageSide(ImageInput):
    """One side of a comparison: an image, embedded here."""

    encoder: str | None = Field(None, max_length=300, description="Loaded encoder; the teacher by default")
    aligned: bool = False
    faces: Literal["largest", "exactly_one"] = "largest"


class EmbeddingSide(_Sent):
    """One side of a comparison: an embedding made elsewhere, for example on a device."""

    embedding: Annotated[list[float], Field(max_length=MAX_DIM)] | str
    encoding: Encoding = "float"
    encoder: str = Field(max_length=300, description="Id of the encoder that made it")
    space: str | None = Field(None, max_length=300, description="Id of its space, checked where given")


class Policy(_Sent):
    """When two faces match; exactly one of the two."""

    target_fmr: float | None = Field(None, gt=0, lt=1, description="False match rate, a fraction")
    threshold: float | None = Field(None, ge=-1, le=1, description="Cosine similarity")

    @model_validator(mode="after")
    def _one(self) -> Policy:
        if (self.target_fmr is None) == (self.threshold is None):
            raise ValueError("give either target_fmr or threshold")
        return self


def _side(sent: object) -> str:
    return "image" if isinstance(sent, ImageSide) or (isinstance(sent, dict) and "image_b64" in sent) else "embedding"


Side = Annotated[Annotated[ImageSide, Tag("image")] | Annotated[EmbeddingSide, Tag("embedding")], Discriminator(_side)]
"""Told apart by their fields, so that an error is about the one that was meant."""


class VerifyBody(_Sent):
    """JSON body of /v1/verify."""

    a: Side = Field(description="The query (probe)")
    b: Side = Field(description="The gallery side")
    policy: Policy | None = Field(None, description="The server's default target FMR where left out")


class SpaceAnswer(BaseModel):
    id: str
    dim: int
    metric: str


class EncoderAnswer(BaseModel):
    id: str
    role: str
    preprocess: str


class Quality(BaseModel):
    sharpness: float = Field(description="Variance of the Laplacian of the grey crop, squared grey levels (0–255)")


class FaceAnswer(BaseModel):
    index: int = Field(description="Which image of the request")
    face: int = Field(description="Which face of that image, largest first")
    box: list[float] | None = Field(description="x1 y1 x2 y2, pixels of the upright photograph; null for aligned crops")
    landmarks: list[list[float]] | None = Field(description="Five points x y: eyes, nose, mouth corners")
    detection_score: float | None
    quality: Quality
    embedding: list[float] | str
    encoding: Encoding


class Timing(BaseModel):
    """Milliseconds, summed over the images of the request."""

    decode: float
    detect: float
    queue: float
    infer: float


class EmbedAnswer(BaseModel):
    space: SpaceAnswer
    encoder: EncoderAnswer
    data: list[FaceAnswer]
    timing_ms: Timing


class SignatureAnswer(BaseModel):
    key: str = Field(description="Fingerprint of the ed25519 key that is said to have signed")
    verified: bool = Field(description="True: checked at start. False: the server was started without trusted keys")
    covers: Literal["certificate", "bundle"] = Field(
        description="What was signed: the certificate itself, or only the bundle that holds it"
    )


class CertificateAnswer(BaseModel):
    query: str
    gallery: str
    space: str
    identities: int
    impostor_pairs: int
    data_name: str
    synthetic: bool = Field(description="True: measured on procedural faces; the rates say nothing about people")
    created: str
    signature: SignatureAnswer | None = Field(description="null where neither the certificate nor its bundle is signed")


class VerifyAnswer(BaseModel):
    match: bool
    score: float = Field(description="Cosine similarity")
    threshold: float
    target_fmr: float | None = Field(description="What the threshold was chosen for; null where the request stated one")
    fmr_at_score: float = Field(description="Share of impostor pairs that score at least this high")
    fmr_ci95: tuple[float, float] = Field(description="95 % interval of it over people")
    fmr_is_upper_bound: bool = Field(
        description="True where the score lies above the last one whose rate the evaluation resolved: the share is at "
        "most fmr_at_score"
    )
    certificate: CertificateAnswer
