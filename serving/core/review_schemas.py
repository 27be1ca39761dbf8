"""Define the JSON that answers a review of a gallery, and a move of templates."""

from __future__ import annotations

from pydantic import Field

from pkd.serving.core.gallery_schemas import ReceiptAnswer
from pkd.serving.core.schemas import Answer


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
