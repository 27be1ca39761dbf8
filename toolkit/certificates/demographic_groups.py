"""Groups: what an evaluation measured of the people that share a label, at the thresholds that everyone gets."""

from __future__ import annotations

from pydantic import Field

from pkd.toolkit.core.models import Record

Interval = tuple[float, float]


class GroupRates(Record):
    """Error rates of one group at one operating point; intervals are 95 % identity-level bootstrap intervals.

    A rate is None where the group is too small to resolve it.
    """

    target_fmr: float
    """The operating point's false match rate, over everyone."""
    threshold: float
    """Cosine similarity: the operating point's, found over everyone."""
    fmr: float | None
    """False match rate between people of the group; the smallest rate that the group resolves where that is larger."""
    fmr_ci95: Interval | None
    fmr_is_upper_bound: bool
    """True where the group's false match rate lies below the smallest rate that the group resolves."""
    fmr_ratio: float | None
    """``fmr`` over everyone's at this threshold; None where that is zero, too."""
    fnmr_balanced: float | None
    """False non-match rate, every identity weighing the same."""
    fnmr_balanced_ci95: Interval | None
    fnmr_balanced_ratio: float | None
    """``fnmr_balanced`` over everyone's at this threshold; None where that is zero, too."""
    fnmr: float | None
    """False non-match rate, every genuine pair weighing the same."""
    fnmr_ci95: Interval | None


class Group(Record):
    """The people with one value of an attribute. Pairs count where both people belong to the group."""

    value: str
    identities: int = Field(ge=0)
    images: int = Field(ge=0)
    genuine_identities: int = Field(ge=0)
    """Identities with genuine pairs: what the balanced rate averages over."""
    genuine_pairs: int = Field(ge=0)
    impostor_pairs: int = Field(ge=0)
    identity_pairs: int = Field(ge=0)
    """Pairs of different identities that were compared."""
    min_fmr: float | None
    """Smallest false match rate that these resolve; None where there is no impostor pair."""
    rates: tuple[GroupRates, ...]
    """One per operating point of the certificate, in its order."""


class Attribute(Record):
    """One column of the labels, for example ``sex``."""

    name: str
    unlabelled: int = Field(ge=0)
    """Identities without a value: they count in no group."""
    groups: tuple[Group, ...]
    """By value, in alphabetical order."""
