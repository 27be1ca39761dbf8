"""Map stored templates of one encoder into another teacher's space: a new teacher without new photographs.

A template is a unit vector, all that is left of a face. Where both encoders saw some faces, no matter whose, the linear
map that takes the one's vectors to the other's follows in closed form (linear_maps.py), and maps every template there
is. What is estimated is the new vector, given the old one; what is stored is the direction that tells this vector best
from those of other people, which is the estimate less their mean, divided by their covariance (Fisher 1936). Both are
linear. The old encoder and the map together are one more encoder of the new space, with an id of its own, so that its
pairs are certified like any other's and no threshold of the old pair is used for the mapped one.
"""

from __future__ import annotations

import io
import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from pkd.toolkit.core.encoder_info import EncoderInfo, short
from pkd.toolkit.core.errors import BadVector, InputError, SpaceMismatch
from pkd.toolkit.core.models import Record
from pkd.toolkit.encoders.base import Embeddings, Encoder, unit_rows
from pkd.toolkit.encoders.linear_maps import (
    Doubles,
    LinearMapEncoder,
    Moments,
    describe_mapped,
    fit_procrustes,
    fit_ridge,
    moments,
)

FORMAT = 1
KIND = "mapped"
"""Part of a mapped encoder's name, between the old encoder's and the digest."""
PENALTIES = tuple(float(p) for p in np.geomspace(1e-6, 1e-1, 16))
"""λ tried, as baselines.py does: unit vectors of d numbers have variances of about 1/d."""
HELD_OUT = 0.2
"""Share of the people, or of the images where nobody is named, that kind and λ are chosen on."""
SHRINKAGE = 1.0
"""Part of their mean variance that is added to the variances of the new space before they divide."""
FEWEST = 100
"""Images below which a map is refused."""


class MapReport(Record):
    """Say what a map was fitted on, and how it does on faces that it has not seen."""

    images: int
    people: int
    """Number of people; 0 if nobody was named."""
    data: str
    """Name of the faces."""
    data_digest: str
    kind: str
    """``ridge`` or ``procrustes``."""
    penalty: float | None
    """Penalty λ of the ridge."""
    held_out_by: str
    """``people``, or ``images`` where nobody was named."""
    held_out_images: int
    held_out_cosine: float
    """Mean cosine of mapped and native embedding of one image, over what was held out."""


class _About(Record):
    format: int
    old: EncoderInfo
    new: EncoderInfo
    report: MapReport


@dataclass(frozen=True)
class SpaceMap:
    """Hold a fitted map from the vectors of ``old`` into the space of ``new``."""

    old: EncoderInfo
    new: EncoderInfo
    """The teacher whose space it maps into."""
    weight: Doubles
    """d×D."""
    bias: Doubles
    """D."""
    estimate: tuple[Doubles, Doubles]
    """Weight and bias of the least squares estimate of the native vector, d×D and D."""
    report: MapReport

    @property
    def info(self) -> EncoderInfo:
        """Describe the mapped encoder, the one that mapped templates are stamped with."""
        return describe_mapped(self.old, KIND, self.weight, self.bias, self.new.space)

    def map(self, vectors: NDArray[Any]) -> tuple[Embeddings, Doubles]:
        """Map unit rows N×d → float32 unit rows N×D, and the cosine expected to each native template, N.

        Least squares estimates the mean of the native vector given the old one, and the mean of cosines to a direction
        is the cosine of the mean. Raises BadVector.
        """
        unit = self._unit(vectors.astype(np.float64))
        return unit.astype(np.float32), self._expected(vectors.astype(np.float64), unit)

    def templates(self, vectors: NDArray[Any]) -> Embeddings:
        """Map unit rows N×d → float32 unit rows N×D. Raises BadVector.

        It is computed in float64, so that one template is mapped to the same 16-bit floats however many are mapped with
        it.
        """
        return self._unit(vectors.astype(np.float64)).astype(np.float32)

    def expected_cosine(self, mapped: NDArray[Any]) -> Doubles:
        """Recover from mapped unit rows N×D the cosine that ``map`` expected, N; NaN where it cannot be told.

        A mapped row is m = (xW + b)/s with ‖x‖ = 1, so s solves ‖s·mW⁺ − bW⁺‖ = 1, a quadratic, and x follows. It needs
        as many numbers in the new space as in the old, or more; otherwise several old vectors have the same mapped one.
        """
        if self.weight.shape[0] > self.weight.shape[1]:
            return np.full(len(mapped), np.nan)
        inverse = np.linalg.pinv(self.weight)
        a, c = mapped.astype(np.float64) @ inverse, self.bias @ inverse
        square, half, rest = (a * a).sum(axis=1), a @ c, float(c @ c) - 1
        length = (half + np.sqrt(np.maximum(half * half - square * rest, 0))) / square
        return self._expected(length[:, None] * a - c, mapped.astype(np.float64))

    def _unit(self, vectors: Doubles) -> Doubles:
        mapped = vectors @ self.weight + self.bias
        lengths = np.linalg.norm(mapped, axis=1, keepdims=True)
        if not (np.isfinite(lengths) & (lengths > 1e-12)).all():
            raise BadVector(f"{self.old.name}: a template is zero, NaN or infinite, or the map is.")
        unit: Doubles = mapped / lengths
        return unit

    def _expected(self, old: Doubles, mapped: Doubles) -> Doubles:
        weight, bias = self.estimate
        found: Doubles = np.clip(np.einsum("nd,nd->n", old @ weight + bias, mapped), -1.0, 1.0)
        return found

    def encoder(self, base: Encoder) -> LinearMapEncoder:
        """Put ``base`` behind the map. Raises SpaceMismatch for another encoder than the map was fitted for."""
        if base.info.id != self.old.id:
            raise SpaceMismatch(
                f"{short(base.info.id)} is not {short(self.old.id)}, whose templates the map is for. Give that one."
            )
        return LinearMapEncoder(base, self.weight, self.bias, self.info)

    def write(self, path: Path) -> None:
        """Write one .npz file, complete or not at all."""
        about = _About(format=FORMAT, old=self.old, new=self.new, report=self.report).model_dump_json().encode()
        buffer = io.BytesIO()
        arrays = {"weight": self.weight, "bias": self.bias}
        arrays |= {"estimate_weight": self.estimate[0], "estimate_bias": self.estimate[1]}
        arrays = {name: values.astype(np.float32) for name, values in arrays.items()}
        np.savez(buffer, about=np.frombuffer(about, np.uint8), **arrays)  # type: ignore[arg-type]
        part = path.with_name(path.name + ".part")
        part.write_bytes(buffer.getvalue())
        part.replace(path)

    @classmethod
    def read(cls, path: Path) -> SpaceMap:
        """Read a file that ``write`` wrote. Raises InputError for any other."""
        try:
            with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
                names = ("weight", "bias", "estimate_weight", "estimate_bias")
                weight, bias, *estimate = (np.asarray(file[name], np.float64) for name in names)
                text = file["about"].tobytes()
            if json.loads(text)["format"] != FORMAT:
                raise InputError(f"{path}: is of a later pkd. Upgrade pkd.")
            about = _About.model_validate_json(text)
        except OSError as error:
            raise InputError(f"{path}: {error.strerror}. Give the file that pkd-map wrote.") from None
        except (ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, ValidationError):
            raise InputError(f"{path}: damaged, or not written by pkd-map. Fit the map again.") from None
        shape = (about.old.space.dim, about.new.space.dim)
        whole = all(one.shape == (shape, shape[1:])[i % 2] for i, one in enumerate((weight, bias, *estimate)))
        if not whole or not all(np.isfinite(one).all() for one in (weight, bias, *estimate)):
            raise InputError(f"{path}: holds no map of {shape[0]} to {shape[1]} numbers. Fit the map again.")
        return cls(about.old, about.new, weight, bias, (estimate[0], estimate[1]), about.report)


def fit_space_map(
    old: EncoderInfo,
    new: EncoderInfo,
    x: Embeddings,
    y: Embeddings,
    labels: NDArray[np.int64],
    *,
    data: str,
    data_digest: str,
    seed: int = 0,
) -> SpaceMap:
    """Fit the map from ``x``, N×d unit rows of ``old``, to ``y``, N×D unit rows of ``new``, of the same N images.

    ``labels``: whose image each is, -1 where nobody knows. Kind (affine ridge, or orthogonal Procrustes where d ≤ D)
    and λ are those with the highest mean cosine on people who are held out; then the map is fitted on everybody. An
    image of a person with n images counts 1/√n: few who have most images would decide otherwise.
    Raises InputError for too few images, SpaceMismatch for two encoders of one space.
    """
    if old.space.id == new.space.id:
        raise SpaceMismatch(f"{short(old.id)} and {short(new.id)} share a space: their templates need no map.")
    if len(x) < FEWEST:
        raise InputError(f"{data}: {len(x):,} images are too few to fit a map on. Give {FEWEST} or more.")
    random = np.random.default_rng(seed)
    people = np.unique(labels[labels >= 0])
    by_people = len(people) >= 10 and bool((labels >= 0).all())
    units = labels if by_people else np.arange(len(x))
    order = random.permutation(np.unique(units))
    held = np.isin(units, order[: max(1, round(HELD_OUT * len(order)))])
    weights = _weights(labels)
    seen, unseen = (moments(x[part], y[part], weights[part]) for part in (~held, held))
    tried: list[float | None] = [*PENALTIES, *([None] if old.space.dim <= new.space.dim else [])]
    scored = [(_agreement(x[held], y[held], *_fit(seen, penalty)), penalty) for penalty in tried]
    _, penalty = max(scored, key=lambda one: one[0])
    estimate = _fit(seen + unseen, penalty)
    weight, bias = (part.astype(np.float32).astype(np.float64) for part in _fisher(*estimate, y, weights))
    cosine = _agreement(x[held], y[held], *_fisher(*_fit(seen, penalty), y[~held], weights[~held]))
    report = MapReport(
        images=len(x),
        people=len(people),
        data=data,
        data_digest=data_digest,
        kind="procrustes" if penalty is None else "ridge",
        penalty=penalty,
        held_out_by="people" if by_people else "images",
        held_out_images=int(held.sum()),
        held_out_cosine=cosine,
    )
    return SpaceMap(old, new, weight, bias, estimate, report)


def _weights(labels: NDArray[np.int64]) -> Doubles:
    counts = np.bincount(np.maximum(labels, 0))
    weights: Doubles = np.where(labels >= 0, 1 / np.sqrt(np.maximum(counts[np.maximum(labels, 0)], 1)), 1.0)
    return weights


def _fisher(weight: Doubles, bias: Doubles, y: Embeddings, weights: Doubles) -> tuple[Doubles, Doubles]:
    """Turn the estimate of a native vector into the direction that tells it best from the vectors ``y`` of anybody."""
    m = moments(y, y, weights)
    mean = m.y / m.n
    covariance = m.xx / m.n - np.outer(mean, mean)
    inverse = np.linalg.inv(covariance + SHRINKAGE * np.trace(covariance) / len(mean) * np.eye(len(mean)))
    return weight @ inverse, (bias - mean) @ inverse


def _fit(m: Moments, penalty: float | None) -> tuple[Doubles, Doubles]:
    return fit_procrustes(m) if penalty is None else fit_ridge(m, penalty)


def _agreement(x: Embeddings, y: Embeddings, weight: Doubles, bias: Doubles) -> float:
    """Compute the mean cosine of the mapped ``x`` to ``y``."""
    mapped = unit_rows((x @ weight + bias).astype(np.float32), "the map")
    return float(np.einsum("nd,nd->n", mapped, y).mean(dtype=np.float64))
