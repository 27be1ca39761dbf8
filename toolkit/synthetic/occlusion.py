"""Cover a synthetic face: glasses, masks, hair, hands, hats, painted on the head before it is lit and turned."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from pkd.toolkit.synthetic.canvas import MIDDLE, Colour, Points, curve, mirrored, smooth
from pkd.toolkit.synthetic.head import EYES_Y, Head


def cover(head: Head, kind: str, seed: int) -> None:
    """Paint the occlusion ``kind`` (a key of PAINTERS) on ``head``; ``seed`` chooses colour, size and place."""
    PAINTERS[kind](head, np.random.default_rng([seed, 9]))


def _glasses(head: Head, random: np.random.Generator, dark: bool = False) -> None:
    frame = random.uniform(10, 90, 3) * random.uniform(0.4, 1.0)
    width, height = random.uniform(12, 15), random.uniform(8.5, 12)
    power = 2 / random.uniform(2.0, 5.0)  # 1 an ellipse, less a rounded rectangle
    a = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    x, y = np.abs(np.cos(a)) ** power * np.sign(np.cos(a)), np.abs(np.sin(a)) ** power * np.sign(np.sin(a))
    lens = np.stack([x * width, y * height], 1)
    centres = [np.array([MIDDLE + side * (head.eye_x + 0.5), EYES_Y + 1.5]) for side in (-1, 1)]
    if dark:
        head.canvas.fill([lens + c for c in centres], random.uniform(8, 45, 3), random.uniform(0.85, 0.97))
    head.canvas.stroke([lens[22:31] * 0.72 + c for c in centres], 1.5, np.full(3, 255.0), 0.25, soft=0.8)
    head.canvas.stroke([np.concatenate([lens, lens[:2]]) + c for c in centres], random.uniform(1.0, 2.4), frame, 0.95)
    inner = head.eye_x + 0.5 - width
    bridge = curve((MIDDLE - inner, EYES_Y), (MIDDLE, EYES_Y - 2), (MIDDLE + inner, EYES_Y))
    reach = width + head.eye_x + 0.5
    arms = [np.array([[MIDDLE + s * reach, EYES_Y], [MIDDLE + s * (head.half + 1), EYES_Y - 2]]) for s in (-1, 1)]
    head.canvas.stroke([bridge, *arms], 1.6, frame, 0.95)


def _sunglasses(head: Head, random: np.random.Generator) -> None:
    _glasses(head, random, dark=True)


def _mask(head: Head, random: np.random.Generator) -> None:
    cloth: Colour = random.choice(np.array([[196.0, 208, 216], [120, 168, 196], [34, 36, 40], [216, 214, 208]]))
    top, half, y = head.nose_y - random.uniform(2, 9), head.half * 0.98, head.mouth_y
    right = [(0.0, top), (half * 0.5, top + 4), (half, top + 3), (half * 0.90, y + 2)]
    right += [(half * 0.5, head.chin), (0.0, head.chin + 3)]
    head.canvas.cover(smooth(mirrored(right)), cloth)
    lines = [(MIDDLE - half * 0.75, MIDDLE + half * 0.75, top + k * (head.chin - top) / 4) for k in (1, 2, 3)]
    head.canvas.stroke([curve((a, h), (MIDDLE, h + 3), (b, h)) for a, b, h in lines], 0.9, cloth * 0.78, 0.7, soft=0.5)
    straps = [np.array([[MIDDLE + s * half, top + 5], [MIDDLE + s * (half + 5), top - 8]]) for s in (-1, 1)]
    head.canvas.stroke(straps, 1.2, cloth * 0.9, 0.9)


def _hair(head: Head, random: np.random.Generator) -> None:
    side = random.choice([-1, 1])
    for _ in range(4):
        strands = []
        for _ in range(int(random.integers(3, 7))):
            x = random.uniform(0, 24)
            start = (MIDDLE + side * random.uniform(-4, 14), random.uniform(-4, 8))
            end = (MIDDLE + side * (x + 10), random.uniform(50, 90))
            strands.append(curve(start, (MIDDLE + side * (x + 2), 32), end))
        head.canvas.stroke(strands, random.uniform(1.0, 3.4), head.hair * random.uniform(0.7, 1.2), 0.9)


def _hand(head: Head, random: np.random.Generator) -> None:
    """Paint four fingers that come from below and lie on one cheek, towards the mouth."""
    side, x, reach = random.choice([-1, 1]), random.uniform(8, 26), random.uniform(58, 84)
    fingers: list[Points] = []
    for k in range(4):
        tip = (x - 14 + 9.6 * k, reach + 3.5 * (k - 1.4) ** 2)
        root = (x + 2 + 7.8 * k, 124.0)
        bend = ((tip[0] + root[0]) / 2 - 2.5, (tip[1] + root[1]) / 2)
        fingers.append(curve(tip, bend, root) * [side, 1] + [MIDDLE, 0])
    for finger in fingers:
        head.canvas.stroke(finger, 10.5, head.skin * 0.52, 0.75, soft=0.7)
        head.canvas.stroke(finger, 8.6, head.skin * [0.97, 0.91, 0.89], soft=0.5)
        nail = finger[0] + [0, 0.5]
        head.canvas.fill(
            np.array([[-1.6, -2], [1.6, -2], [1.5, 1.6], [-1.5, 1.6]]) + nail, head.skin * 1.06, 0.7, soft=0.5
        )


def _hat(head: Head, random: np.random.Generator) -> None:
    cloth = np.clip(random.uniform(25, 190) + random.normal(0, 35, 3), 5, 235)
    brim, half = random.uniform(14, 30), head.half + random.uniform(3, 9)
    right = [(0.0, -26.0), (half * 0.6, -20), (half * 0.97, 0), (half, brim - 4), (half * 0.6, brim), (0.0, brim + 2)]
    head.canvas.cover(smooth(mirrored(right)), cloth)
    if random.random() < 0.5:
        peak = [(0.0, brim - 4), (half * 0.9, brim - 6), (half * 0.75, brim + 5), (0.0, brim + 9)]
        head.canvas.cover(smooth(mirrored(peak)), cloth * 0.7)
    else:
        band = curve((MIDDLE - half, brim - 6), (MIDDLE, brim - 1), (MIDDLE + half, brim - 6))
        head.canvas.stroke(band, 6.0, cloth * 0.75)


PAINTERS: dict[str, Callable[[Head, np.random.Generator], None]] = {
    "glasses": _glasses,
    "sunglasses": _sunglasses,
    "mask": _mask,
    "hair": _hair,
    "hand": _hand,
    "hat": _hat,
}
