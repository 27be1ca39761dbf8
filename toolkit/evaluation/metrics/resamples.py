"""Keep what every resample of the identities measured, and compare two evaluations resample by resample.

The file is ``draws.npz``, beside ``report.json``. Two evaluations over the same pairs, with the same seed, drew the
same people in the same order: resample by resample their difference is a difference of encoders and not of people.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pkd.toolkit.core.errors import InputError
from pkd.toolkit.evaluation.metrics.bootstrap import interval
from pkd.toolkit.evaluation.metrics.pairing import Doubles
from pkd.toolkit.evaluation.results.schema import Evaluation, PairedDifference

FILE = "draws.npz"
_ABOUT = "drawn"


@dataclass(frozen=True)
class ResampleValues:
    """Hold the per-resample values of one evaluation."""

    source: dict[str, str]
    """Source of the resamples: data digest, protocol, resamples, seed. Equal for evaluations that can be paired."""
    values: dict[str, Doubles] = field(default_factory=dict)
    """``<encoder pair>/<statistic>[/<target>]``, as ``S–T/tar_balanced/0.001`` → float64, one entry per resample.

    After the name of a statistic that knows pairs of people: ``Contributions`` (paired.py), one array each."""

    @property
    def key(self) -> str:
        """Return a digest that is equal where the same people were drawn in the same order."""
        return hashlib.sha256(json.dumps(self.source, sort_keys=True).encode()).hexdigest()


def resampled_from(evaluation: Evaluation) -> dict[str, str]:
    """Describe what the resamples of an evaluation were taken from."""
    return {
        "data": evaluation.data.content_digest,
        "protocol": evaluation.protocol,
        "resamples": str(evaluation.resamples),
        "seed": str(evaluation.seed),
    }


def write_resample_values(folder: Path, kept: ResampleValues) -> None:
    """Write ``folder/draws.npz``."""
    about = np.frombuffer(json.dumps(kept.source, sort_keys=True).encode(), np.uint8)
    np.savez_compressed(folder / FILE, **{_ABOUT: about, **kept.values})  # type: ignore[arg-type]


def read_resample_values(folder: Path) -> ResampleValues:
    """Read ``folder/draws.npz``. Raises InputError for a folder without it, or with a broken one."""
    path = folder / FILE
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
            values = {name: np.asarray(file[name], np.float64) for name in file.files if name != _ABOUT}
            source = {str(k): str(v) for k, v in json.loads(file[_ABOUT].tobytes()).items()}
    except FileNotFoundError:
        raise InputError(
            f"{path}: no such file. Run pkd-evaluate again: it keeps what each resample measured."
        ) from None
    except (OSError, EOFError, ValueError, KeyError, AttributeError, zipfile.BadZipFile):
        raise InputError(f"{path}: damaged, or not written by pkd-evaluate. Run pkd-evaluate again.") from None
    return ResampleValues(source, values)


def paired_difference(a: Doubles, b: Doubles, *, observed: float, level: float = 0.95) -> PairedDifference:
    """Compare a statistic of A and of B, from the values of the same resamples in the same order.

    ``a``, ``b``: float64, R each. ``observed``: A − B over all people. The p-value is the smallest level at which the
    percentile interval excludes 0 (Efron and Tibshirani 1993, An Introduction to the Bootstrap, section 15.4): twice
    the fraction of resamples on the far side of 0, of those at 0 half (mid-p, Lancaster 1961: where few people differ
    many resamples do not), with one added to count and number, so that it is never 0. Raises InputError where the
    numbers of resamples differ.
    """
    if a.shape != b.shape or a.ndim != 1 or not len(a):
        raise InputError(
            f"{len(a):,} resamples against {len(b):,}: evaluate both with the same --bootstrap and --seed."
        )
    difference = a - b
    none = np.count_nonzero(difference == 0)
    tail = min(np.count_nonzero(difference < 0), np.count_nonzero(difference > 0)) + none / 2
    low, high = interval(difference) if level == 0.95 else np.quantile(difference, ((1 - level) / 2, (1 + level) / 2))
    return PairedDifference(
        difference=observed,
        ci95=(min(float(low), observed), max(float(high), observed)),
        p=float(min(1.0, 2 * (tail + 1) / (len(difference) + 1))),
    )


def holm(p: Sequence[float]) -> list[float]:
    """Adjust the p-values of several comparisons: the chance of one false claim among them all (Holm 1979)."""
    order = sorted(range(len(p)), key=lambda i: p[i])
    adjusted, running = [0.0] * len(p), 0.0
    for place, i in enumerate(order):
        running = max(running, min(1.0, (len(p) - place) * p[i]))
        adjusted[i] = running
    return adjusted
