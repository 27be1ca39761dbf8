"""Evaluation: what ``report.json`` holds. The page and the tables read their numbers from here and nowhere else."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pkd.toolkit.certificates.certificate import Attribute, Calibration, Interval, OperatingPoint
from pkd.toolkit.core.encoder_info import EncoderInfo
from pkd.toolkit.core.models import Record


class PairedDifference(Record):
    """Hold A − B of one statistic."""

    difference: float
    """Difference that was observed over all people."""
    ci95: Interval
    """95 % interval over people: both sides measured on the same people."""
    p: float
    """Two-sided p-value of the hypothesis that there is no difference: by random signs of what people contribute
    (paired.py), or by resamples for ranks and FNIR; never below 1 / 5,000, or 2 / (resamples + 1)."""


class Data(Record):
    """The images that were compared."""

    name: str
    """Last parts of the path that was given."""
    content_digest: str
    """SHA-256 over contents and identities."""
    images: int
    identities: int
    single_image_identities: int
    """Identities with one image: they give impostor pairs only."""


class Refusal(Record):
    """A false match rate that was not reported, and why."""

    fmr: float
    reason: str


class Det(Record):
    """Trace the detection error trade-off: balanced FNMR against FMR, down to the smallest FMR."""

    fmr: tuple[float, ...]
    fnmr: tuple[float, ...]
    low: tuple[float, ...]
    """95 % identity-level bootstrap interval of the FNMR."""
    high: tuple[float, ...]


class Histogram(Record):
    """Hold fractions of pairs (or images) in equal bins over cosine −1 to 1."""

    fractions: tuple[float, ...]


class Distances(Record):
    """Summarise the Euclidean distance √(2 − 2·score) of unit embeddings, of genuine and of impostor pairs."""

    genuine_mean: float
    genuine_std: float
    impostor_mean: float
    impostor_std: float
    d_prime: float
    """|difference of the means| / √(mean of the variances)."""


class PairOfFiles(Record):
    """Two images by their names in the list or folder."""

    query: str
    gallery: str
    score: float


class Worst(Record):
    """List the pairs that the encoders get most wrong, worst first."""

    false_matches: tuple[PairOfFiles, ...]
    """Impostor pairs with the highest scores."""
    false_non_matches: tuple[PairOfFiles, ...]
    """Genuine pairs with the lowest scores."""


class Influence(Record):
    """Say in which share of the false matches one person takes part."""

    identity: str
    share: float


class Suspects(Record):
    """Tell of names that look like one person under two labels, and what they do to the rates."""

    count: int
    """Pairs of names that look so."""
    people: tuple[tuple[str, str], ...]
    """The first ten of them."""
    fmr: float
    """Smallest target false match rate that is reported, for which the following holds."""
    share: float
    """Share of the false matches that are theirs."""
    tar_gain: float
    """Rise of the balanced TAR without them, for the threshold falls."""


class Planned(Record):
    """Project the intervals of one operating point to other numbers of such people."""

    fmr: float
    people: tuple[int, ...]
    """People with images of their own to compare, as balanced TAR counts them."""
    fmr_high: tuple[float, ...]
    """Upper end of the interval of the FMR over the rate itself."""
    tar_width: tuple[float, ...]
    """Width of the interval of the balanced TAR, a fraction."""


class Comparison(Record):
    """Describe one encoder pair: queries of one encoder against a gallery of another, over all pairs of images."""

    name: str
    """Query side first: ``S–T`` is a student's query against a teacher's gallery."""
    query: str
    """Encoder id."""
    gallery: str
    """Encoder id."""
    genuine_pairs: int
    genuine_identities: int
    """Identities with genuine pairs: what the balanced rates average over."""
    impostor_pairs: int
    identity_pairs: int
    """Pairs of different identities that were compared."""
    min_fmr: float
    """Smallest false match rate that these resolve."""
    points: tuple[OperatingPoint, ...]
    effective_people: tuple[float, ...] = ()
    """Effective people behind the false matches at each point: few where few people cause most of them."""
    refused: tuple[Refusal, ...]
    eer: float
    """Equal error rate, every pair weighing the same."""
    det: Det
    genuine: Histogram
    impostor: Histogram
    distances: Distances
    calibration: Calibration
    worst: Worst | None = None
    influential: tuple[Influence, ...] = ()
    """People who take part in most false matches at the smallest point."""
    suspects: Suspects | None = None
    planned: tuple[Planned, ...] = ()
    """Results that other numbers of people would give, one per point."""
    certificate: str | None = None
    """File in ``certificates/``; None where this cell is not certified."""
    demographics: tuple[Attribute, ...] = ()
    """Rates per group at this cell's own thresholds, where labels were given."""


class PairAccuracy(Record):
    """Hold the accuracy of one ordered pair of encoders on an official pair list."""

    name: str
    query: str
    """Encoder id of each pair's first image."""
    gallery: str
    """Encoder id of each pair's second image."""
    accuracy: float
    """Mean over the folds, a fraction."""
    fold_std: float | None
    """Standard deviation over the folds (divisor: the folds, as in published tables); None for one fold."""
    ci95: Interval
    """95 % identity-level bootstrap interval at the thresholds used."""
    fold_accuracy: tuple[float, ...]
    fold_threshold: tuple[float, ...]
    threshold_from: str
    genuine_pairs: int
    impostor_pairs: int


class RankPoint(Record):
    """Closed set: the fraction of mated searches whose mate is among the ``rank`` best people."""

    rank: int
    rate_balanced: float
    """Every identity weighing the same."""
    rate_balanced_ci95: Interval
    rate: float
    """Every search weighing the same."""
    rate_ci95: Interval


class OpenSetPoint(Record):
    """Open set: misses at the threshold for one false positive identification rate."""

    fpir: float
    """Target fraction of the searches without a mate in which someone scores at or above the threshold."""
    threshold: float
    """Smallest cosine with this FPIR, every identity weighing the same."""
    fnir_balanced: float
    """Fraction of mated searches whose mate is not found, at ``threshold``."""
    fnir_balanced_ci95: Interval
    raw_threshold: float
    """Smallest cosine with this FPIR, every search weighing the same; for ``fnir``."""
    fnir: float
    fnir_ci95: Interval


class OpenSetCurve(Record):
    """FNIR against FPIR, every identity weighing the same, down to the smallest FPIR that is resolved."""

    fpir: tuple[float, ...]
    fnir: tuple[float, ...]
    low: tuple[float, ...]
    """95 % interval over probe identities, the gallery held."""
    high: tuple[float, ...]


class Identification(Record):
    """Describe one-to-many searches of one encoder pair. Intervals are over probe identities, the gallery held."""

    name: str
    query: str
    """Encoder id of the probes."""
    gallery: str
    """Encoder id of the entries."""
    galleries: str
    """Description of who is enrolled."""
    enrolled: tuple[int, ...]
    """People in each gallery; the searches of several are counted together."""
    mated_searches: int
    mated_identities: int
    non_mated_searches: int
    """Searches by people who are not enrolled."""
    non_mated_identities: int
    ranks: tuple[RankPoint, ...]
    within: int
    """R of FNIR(T, R): the mate must be among the R best."""
    min_fpir: float | None
    """Smallest false positive identification rate that is resolved; None where none is."""
    points: tuple[OpenSetPoint, ...]
    unresolved: tuple[float, ...]
    """Rates that too few people who are not enrolled were searched for."""
    curve: OpenSetCurve


class TemplateData(Record):
    """Tell how faces were pooled to templates."""

    templates: int
    media: int
    aligned: bool
    """Loose crops were aligned by their published points."""
    scored: bool
    """Faces were weighted by their published detector scores."""
    subjects_rebuilt: int
    """Templates whose subject no file names: it is that of the templates that they are declared the same as."""


class Agreement(Record):
    """Summarise the cosine between teacher and student embedding of one and the same image."""

    mean: float
    std: float
    low: float
    """5th percentile."""
    median: float
    histogram: Histogram


class LinearMap(Record):
    """Describe a linear map from the control's embeddings into the teacher's space, fitted on other people."""

    letter: str
    """Its place in the names of cells: ``P`` or ``R``."""
    kind: str
    """``orthogonal Procrustes`` or ``affine ridge``."""
    encoder: str
    """Encoder id of control and map together."""
    penalty: float | None
    """Penalty λ of the ridge: the loss is the mean squared error over the images plus λ‖W‖². None without one."""
    fit_cosine: float
    """Mean cosine to the teacher's embeddings of the images that the map was fitted on."""
    held_out_cosine: float
    """The same over people that were left out, by a map fitted without them; λ was chosen on these."""


class Gain(Record):
    """Hold what the student accepts beyond a baseline against the same gallery: S–T minus the baseline's pair."""

    baseline: str
    """``R–T``, ``P–T`` or ``C–T``."""
    fmr: float
    difference: PairedDifference
    """Difference of the balanced TAR, over the same people."""


class MappingCost(Record):
    """Hold what mapped templates cost: the true accept rate against them minus that against native ones."""

    pair: str
    """``T–M`` or ``S–M``."""
    native: str
    """``T–T`` or ``S–T``: the same queries against templates that the teacher made."""
    fmr: float
    native_tar_balanced: float
    mapped_tar_balanced: float
    difference: PairedDifference
    """Difference of the balanced TAR, each at its own threshold, over the same people."""


class Control(Record):
    """An encoder that was not distilled from the teacher, and what was done to bring it into the teacher's space."""

    encoder: EncoderInfo
    fit: Data | None = None
    """The images the maps were fitted on; None without maps."""
    held_out_identities: int = 0
    maps: tuple[LinearMap, ...] = ()


Training = dict[str, str | int | float | bool | None]
"""Training of an encoder, as its run or bundle tells it."""


class LabelFile(Record):
    """Say where the groups of ``demographics`` come from."""

    name: str
    sha256: str
    unlabelled: dict[str, tuple[str, ...]]
    """Attribute → the first ten identities without a value; ``demographics`` says how many there are."""


class Discard(Record):
    """Tell what one encoder pair's misses fall to where the photographs of least quality are discarded.

    All tuples go along ``fractions``. Every identity weighs the same, and the threshold stays.
    """

    name: str
    """The encoder pair, query first: ``S–T``."""
    measure: str
    unit: str
    says: str
    standard: str
    """Term of ISO/IEC 29794-5."""
    better: Literal["high", "low"]
    """``low``: best at 0, on either side."""
    fmr: float
    threshold: float
    images: int
    """Images that have a value."""
    pairs: int
    """Genuine pairs both of whose images have one."""
    identities: int
    fractions: tuple[float, ...]
    """Share of the genuine pairs that is discarded."""
    limits: tuple[float, ...]
    """Value of the worse image, in ``unit``, at which each fraction ends: what a gallery's limit would be."""
    fnmr: tuple[float, ...]
    ci95: tuple[Interval, ...]
    change: tuple[float, ...]
    """FNMR minus that without discarding."""
    change_ci95: tuple[Interval, ...]
    """Interval of the difference, over the same resampled identities."""


class Evaluation(Record):
    """Hold a whole run of pkd-evaluate."""

    schema_version: int = 1
    tool: str
    created: str
    """ISO 8601, UTC."""
    protocol: str
    data: Data
    templates: TemplateData | None = None
    synthetic: bool
    flip: bool
    """True where every embedding is the sum of the image's and its mirror image's."""
    resamples: int
    seed: int
    teacher: EncoderInfo
    student: EncoderInfo | None
    mapped: EncoderInfo | None = None
    """Old encoder behind the map into the teacher's space: M."""
    control: Control | None = None
    gains: tuple[Gain, ...] = ()
    costs: tuple[MappingCost, ...] = ()
    training: dict[str, Training] = Field(default_factory=dict)
    """Trainings by letter, of those encoders whose run or bundle tells."""
    labels: LabelFile | None = None
    comparisons: tuple[Comparison, ...] = ()
    pair_accuracies: tuple[PairAccuracy, ...] = ()
    identifications: tuple[Identification, ...] = ()
    discards: tuple[Discard, ...] = ()
    agreement: Agreement | None = None
    notes: tuple[str, ...] = ()
