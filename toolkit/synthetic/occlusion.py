"""Cover a synthetic face: glasses, a mask, strands of hair, a hat, painted on the head before it is lit and turned."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from pkd.toolkit.synthetic.canvas import MIDDLE, curve, mirrored, smooth
from pkd.toolkit.synthetic.head import EYES_Y, Head


def _glasses(head: Head, random: np.random.Generator, dark: bool = False) -> None:
    frame = random.uniform(10, 90, 3) * random.uniform(0.4, 1.0)
    size = random.uniform([12, 8.5], [15, 12])
    a = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    round_ = np.stack([np.cos(a), np.sin(a)], 1)
    lens = np.sign(round_) * np.abs(round_) ** (2 / random.uniform(2.0, 5.0)) * size  # an ellipse … a rectangle
    eye = head.eye_x + 0.5
    centres = [np.array([MIDDLE + side * eye, EYES_Y + 1.5]) for side in (-1, 1)]
    if dark:
        head.canvas.paint([lens + c for c in centres], random.uniform(8, 45, 3), random.uniform(0.85, 0.97))
    head.canvas.paint([lens[22:31] * 0.72 + c for c in centres], np.full(3, 255.0), 0.25, 0.8, 1.5)
    rims = [np.concatenate([lens, lens[:2]]) + c for c in centres]
    head.canvas.paint(rims, frame, 0.95, width=random.uniform(1.0, 2.4))
    inner, outer = eye - size[0], eye + size[0]
    bridge = curve((MIDDLE - inner, EYES_Y), (MIDDLE, EYES_Y - 2), (MIDDLE + inner, EYES_Y))
    arms = [np.array([[MIDDLE + s * outer, EYES_Y], [MIDDLE + s * (head.half + 1), EYES_Y - 2]]) for s in (-1, 1)]
    head.canvas.paint([bridge, *arms], frame, 0.95, width=1.6)


def _sunglasses(head: Head, random: np.random.Generator) -> None:
    _glasses(head, random, dark=True)


def _mask(head: Head, random: np.random.Generator) -> None:
    cloth = random.choice(np.array([[196.0, 208, 216], [120, 168, 196], [34, 36, 40], [216, 214, 208]]))
    top, half, y = head.nose_y - random.uniform(2, 9), head.half * 0.98, head.mouth_y
    right = [(0.0, top), (half * 0.5, top + 4), (half, top + 3), (half * 0.90, y + 2)]
    head.canvas.paint(smooth(mirrored([*right, (half * 0.5, head.chin), (0.0, head.chin + 3)])), cloth, opaque=True)
    folds = [top + k * (head.chin - top) / 4 for k in (1, 2, 3)]
    lines = [curve((MIDDLE - half * 0.75, h), (MIDDLE, h + 3), (MIDDLE + half * 0.75, h)) for h in folds]
    head.canvas.paint(lines, cloth * 0.78, 0.7, 0.5, 0.9)


def _hair(head: Head, random: np.random.Generator) -> None:
    side = random.choice([-1, 1])
    for _ in range(4):
        strands = []
        for x in random.uniform(0, 24, random.integers(3, 7)):
            start = (MIDDLE + side * random.uniform(-4, 14), random.uniform(-4, 8))
            end = (MIDDLE + side * (x + 10), random.uniform(50, 90))
            strands.append(curve(start, (MIDDLE + side * (x + 2), 32), end))
        head.canvas.paint(strands, head.hair * random.uniform(0.7, 1.2), 0.9, width=random.uniform(1.0, 3.4))


def _hat(head: Head, random: np.random.Generator) -> None:
    cloth = np.clip(random.uniform(25, 190) + random.normal(0, 35, 3), 5, 235)
    brim, half = random.uniform(14, 30), head.half + random.uniform(3, 9)
    right = [(0.0, -26.0), (half * 0.6, -20), (half * 0.97, 0), (half, brim - 4), (half * 0.6, brim), (0.0, brim + 2)]
    head.canvas.paint(smooth(mirrored(right)), cloth, opaque=True)
    peak = [(0.0, brim - 4), (half * 0.9, brim - 6), (half * 0.75, brim + 5), (0.0, brim + 9)]
    head.canvas.paint(smooth(mirrored(peak)), cloth * 0.7, opaque=True)


PAINTERS: dict[str, Callable[[Head, np.random.Generator], None]] = {
    "glasses": _glasses,
    "sunglasses": _sunglasses,
    "mask": _mask,
    "hair": _hair,
    "hat": _hat,
}
