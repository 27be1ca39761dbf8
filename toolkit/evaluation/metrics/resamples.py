"""Draws: what every resample of the identities measured, kept so that two evaluations can be compared in pairs.

``draws.npz`` beside ``report.json``. Two evaluations over the same pairs, with the same seed, drew the same people in
the same order: resample by resample their difference is a difference of encoders and not of people.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pkd.toolkit.core.errors import InputError
from pkd.toolkit.evaluation.metrics.pairing import Doubles
from pkd.toolkit.evaluation.results.schema import Evaluation

FILE = "draws.npz"
_ABOUT = "drawn"


@dataclass(frozen=True)
class Draws:
    """Per-resample values of one evaluation."""

    drawn: dict[str, str]
    """What was drawn from: data digest, protocol, resamples, seed. Equal for evaluations that can be paired."""
    values: dict[str, Doubles] = field(default_factory=dict)
    """``<cell>/<statistic>[/<target>]``, as ``S–T/tar_balanced/0.001`` → float64, one entry per resample."""

    @property
    def key(self) -> str:
        """Equal where the same people were drawn in the same order."""
        return hashlib.sha256(json.dumps(self.drawn, sort_keys=True).encode()).hexdigest()


def drawn_from(evaluation: Evaluation) -> dict[str, str]:
    """What the people of an evaluation were drawn from."""
    return {
        "data": evaluation.data.content_digest,
        "protocol": evaluation.protocol,
        "resamples": str(evaluation.resamples),
        "seed": str(evaluation.seed),
    }


def write_draws(folder: Path, draws: Draws) -> None:
    """Write ``folder/draws.npz``."""
    about = np.frombuffer(json.dumps(draws.drawn, sort_keys=True).encode(), np.uint8)
    np.savez_compressed(folder / FILE, **{_ABOUT: about, **draws.values})  # type: ignore[arg-type]


def read_draws(folder: Path) -> Draws:
    """Read ``folder/draws.npz``. Raises InputError for a folder without it, or with a broken one."""
    path = folder / FILE
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
            values = {name: np.asarray(file[name], np.float64) for name in file.files if name != _ABOUT}
            drawn = {str(k): str(v) for k, v in json.loads(file[_ABOUT].tobytes()).items()}
    except FileNotFoundError:
        raise InputError(
            f"{path}: no such file. Run pkd-evaluate again: it keeps what each resample measured."
        ) from None
    except (OSError, EOFError, ValueError, KeyError, AttributeError, zipfile.BadZipFile):
        raise InputError(f"{path}: damaged, or not written by pkd-evaluate. Run pkd-evaluate again.") from None
    return Draws(drawn, values)
