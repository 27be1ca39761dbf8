"""Ask an encoder itself whether its stated preprocessing is right: how far apart it tells people on the faces at hand.

A wrong scale or channel order is no error anywhere. It only costs accuracy, and what is measured or trained then looks
as if the labels or the class centres were wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from pkd.toolkit.core.errors import PkdError
from pkd.toolkit.core.preprocess import Preprocess
from pkd.toolkit.data.face_set import FaceSet
from pkd.toolkit.encoders.base import Encoder
from pkd.toolkit.images.codec import Rgb

PEOPLE, SEARCHED = 128, 48
"""People looked at, two images each, and those of them that all common scales are tried on."""
FEWEST = 12
"""Fewest people with two images from which on anything is said."""
SCALES = ((127.5, 127.5), (127.5, 128.0), (0.0, 255.0), (0.0, 1.0), (127.5, 255.0))
"""Mean and std of common teachers (docs/distillation.md has a table of them)."""
GOOD = 3.0
"""Separation from which on only the channel order is tried: teachers reach 4 to 7 on aligned photographs."""
SURE = 4.0
"""Student's t over people, from which on another preprocessing counts as better."""
BETTER = 1.01
"""Least ratio of the better separation to the stated one's."""


@dataclass(frozen=True)
class Separation:
    """Hold how far one preprocessing lets the encoder tell people apart.

    ``each``: per person, cosine of the two images less the mean over other people, in standard deviations of those.
    """

    preprocess: Preprocess
    each: NDArray[np.float64]

    @property
    def mean(self) -> float:
        """Return the mean over people."""
        return float(self.each.mean())


def check_preprocessing(
    encoder: Encoder, faces: FaceSet, reopen: Callable[[Preprocess], Encoder] | None, *, seed: int = 0
) -> str | None:
    """Compare the stated preprocessing with others on some of ``faces`` → what is wrong, in words; None if nothing.

    ``reopen``: opens the same weights with another preprocessing (``open_encoder.reopener``). Without it, or with too
    few people, nothing is said.
    """
    pairs = _two_of_each(faces, seed)
    stated = encoder.info.preprocess
    if reopen is None or len(pairs) < FEWEST:
        return None
    crops = faces.load(pairs.ravel(), stated.size)
    own = separation(encoder, crops)
    if own.mean < GOOD:
        crops = crops[: 2 * SEARCHED]
        own = separation(encoder, crops)
    best = own
    for other in _others(stated, every=own.mean < GOOD):
        try:
            found = separation(reopen(other), crops)
        except PkdError:  # one that this network does not take
            continue
        best = max(best, found, key=lambda each: each.mean)
    gain = best.each - own.each
    spread = float(gain.std(ddof=1)) / np.sqrt(len(gain))
    if best is own or best.mean < BETTER * max(own.mean, 0.1) or gain.mean() < SURE * spread:
        return None
    what = "channel order" if best.preprocess.channels != stated.channels else "scaling"
    return (
        f"teacher {encoder.info.name}: the stated preprocessing looks wrong, its {what} first. With "
        f"{describe_scaling(best.preprocess)} it tells {len(own.each)} of these people apart by {best.mean:.1f} "
        f"standard deviations, with {describe_scaling(stated)} by {own.mean:.1f}. Check --teacher-preprocess."
    )


def separation(encoder: Encoder, crops: Rgb) -> Separation:
    """Measure crops of P people, uint8 2P×S×S×3: two images of a person after one another."""
    rows = np.concatenate([encoder.embed(crops[start : start + 16]) for start in range(0, len(crops), 16)])
    cosines = rows[::2].astype(np.float64) @ rows[1::2].T.astype(np.float64)
    others = cosines[~np.eye(len(cosines), dtype=bool)]
    return Separation(encoder.info.preprocess, (np.diag(cosines) - others.mean()) / max(float(others.std()), 1e-9))


def describe_scaling(preprocess: Preprocess) -> str:
    """Write channels, mean and std as ``--teacher-preprocess`` takes them."""

    def number(value: float | tuple[float, ...]) -> str:
        return ",".join(f"{one:g}" for one in value) if isinstance(value, tuple) else f"{value:g}"

    return f"channels={preprocess.channels},mean={number(preprocess.mean)},std={number(preprocess.std)}"


def _others(stated: Preprocess, *, every: bool) -> Iterator[Preprocess]:
    """Yield the stated one with its channels turned, and with ``every`` the common scales in both orders."""
    turned = stated.model_copy(update={"channels": "bgr" if stated.channels == "rgb" else "rgb"})
    yield turned
    for mean, std in SCALES if every else ():
        for order in (stated, turned):
            other = order.model_copy(update={"mean": mean, "std": std})
            if other not in (stated, turned):
                yield other


def _two_of_each(faces: FaceSet, seed: int) -> NDArray[np.int64]:
    """Draw two images of each of some people → int64 P×2 indices."""
    random = np.random.default_rng(seed)
    order = np.argsort(faces.labels, kind="stable")
    order = order[faces.labels[order] >= 0]
    starts = np.flatnonzero(np.diff(faces.labels[order], prepend=-1, append=-1))
    several = [(a, b) for a, b in pairwise(starts) if b - a > 1]
    chosen = random.permutation(len(several))[:PEOPLE]
    drawn = [random.choice(order[several[i][0] : several[i][1]], 2, replace=False) for i in sorted(chosen)]
    return np.array(drawn, np.int64).reshape(-1, 2)
