"""Paint one synthetic face flat and from the front, with its relief. ``faces.py`` explains the factors."""

from __future__ import annotations

from typing import TYPE_CHECKING

import cv2
import numpy as np

from pkd.toolkit.synthetic.canvas import (
    AXIS,
    GRID,
    MIDDLE,
    Canvas,
    Colour,
    Plane,
    Points,
    between,
    both,
    bumps,
    curve,
    ellipse,
    mask,
    mirrored,
    planes,
    smooth,
)

if TYPE_CHECKING:
    from pkd.toolkit.synthetic.faces import Conditions, Identity

SKIN = np.array([[238, 208, 188], [226, 182, 154], [196, 145, 111], [142, 96, 68], [92, 62, 46]], np.float64)
HAIR = np.array([[24, 20, 19], [50, 35, 27], [98, 66, 44], [166, 128, 84], [190, 184, 176]], np.float64)
IRIS = np.array([[44, 27, 18], [92, 62, 34], [104, 104, 58], [88, 124, 146], [128, 166, 198]], np.float64)
EYES_Y = 51.6


class Head:
    """Paint a head on ``canvas``, with ``relief`` for light and ``depth`` for pose (GRID×GRID, crop units)."""

    def __init__(self, identity: Identity, conditions: Conditions) -> None:
        self.i, self.c = i, c = identity, conditions
        self.random = np.random.default_rng([i.marks, 7])
        self.skin = _ramp(SKIN, i.skin) * (1 + np.array([0.04, 0.0, -0.07]) * i.skin_warmth)
        fair = (i.hair + 1) * (1 - 0.3 * (i.skin + 1))  # light hair is rare on dark skin
        red = max(i.hair_red, 0.0) * (1 - 0.4 * (i.skin + 1))
        self.hair = _ramp(HAIR, fair - 1) * (1 + np.array([0.30, -0.04, -0.30]) * red)
        self.lips = self.skin * (0.82 - 0.06 * i.lips) + np.array([18, -14, -6]) * (0.9 + 0.7 * i.lips)
        # lengths in crop units, after expression
        self.half = 38.0 * (1 + 0.10 * i.face_width)
        self.chin = 112.0 + 5.0 * i.face_length + 4.0 * c.mouth_open
        self.eye_x = 17.6 * (1 + 0.09 * i.eye_spacing)
        self.eye_w = 8.2 * (1 + 0.14 * i.eye_size)
        self.eye_h = self.eye_w * (0.46 + 0.13 * i.eye_open) * (1 + 0.15 * c.brow_raise)
        self.nose_y = 71.7 + 3.2 * i.nose_length
        self.nose_w = 8.0 * (1 + 0.26 * i.nose_width)
        self.mouth_y = 92.3 + 2.6 * i.mouth_height + 0.8 * c.mouth_open
        self.mouth_w = 14.6 * (1 + 0.16 * i.mouth_width + 0.14 * c.smile - 0.10 * c.mouth_open)
        self.relief, self.depth = self._relief()
        self.canvas = Canvas(self.hair)
        # from the back to the front; each part draws its random numbers whatever the conditions are
        self.strands = cv2.resize(self.random.normal(1, 0.13, (2, GRID)).astype(np.float32), (GRID, GRID))
        self._back_hair()
        self._body()
        for ear in both(ellipse(self.half + 1.0, 61, 4.2 + 1.4 * i.ears, 10 + 2 * i.ears)):
            self.canvas.paint(ear, self.skin * [0.91, 0.84, 0.82], opaque=True)
        self.canvas.paint(self._outline(), self._complexion(), opaque=True)
        self._folds()
        self._spots()
        self._nose()
        self._mouth()
        self._eyes()
        self._brows()
        self._front_hair()

    @property
    def five_points(self) -> Points:
        """Return eyes, nose tip and mouth corners, 5×2 crop units."""
        x, y = self.eye_x, EYES_Y
        offsets = [(-x, y), (x, y), (0.0, self.nose_y), (-self.mouth_w, self.mouth_y), (self.mouth_w, self.mouth_y)]
        return np.asarray(np.add(offsets, [MIDDLE, 0]))

    # ---- skin

    def _outline(self) -> Points:
        i, half = self.i, self.half
        bone, corner = half * (0.97 + 0.04 * i.cheeks), half * (0.42 + 0.13 * i.chin)
        right = [(0.0, -4.0), (half * 0.62, 2.0), (half * 0.93, 24.0), (half, 48.0), (bone, 68.0)]
        right += [(half * (0.81 + 0.10 * i.jaw), self.mouth_y - 1), (corner, self.chin - 5), (corner * 0.45, self.chin)]
        return smooth(mirrored(right))

    def _complexion(self) -> Plane:
        """Paint skin with blush, mottling and beard (3×GRID×GRID)."""
        i, tired = self.i, 0.5 + 0.5 * self.i.age
        spots = [(MIDDLE, self.nose_y, 6, 5, 0.9)]
        for s in (-1, 1):
            spots += [(MIDDLE + 23 * s, 74, 9, 8, 1.0), (MIDDLE + s * self.eye_x, EYES_Y + 6, 7, 3, tired)]
        mottle = cv2.resize(self.random.normal(0, 2, (14, 14)), (GRID, GRID), interpolation=cv2.INTER_CUBIC)
        skin: Plane = bumps(spots) * planes([3, -10, -8]) + planes(self.skin) + mottle.astype(np.float32)
        if i.beard > 0:
            below = 1 / (1 + np.exp(-(AXIS - (self.mouth_y - 9)) / 2.5))
            across = np.minimum(1, 0.35 + 1 / (1 + np.exp((4 - abs(AXIS - MIDDLE)) / 2)))  # sparse in the middle
            grain = 0.8 + np.float32(0.2) * self.random.standard_normal((GRID, GRID), np.float32)
            area = np.outer(below, across * (0.25 + 0.65 * i.beard)).astype(np.float32) * grain
            area *= 1 - np.float32(0.9) * mask([ellipse(MIDDLE, self.mouth_y + 1, self.mouth_w * 0.8, 4.5)])
            skin += np.clip(area, 0, 0.92) * (planes(self.hair * 0.85) - skin)
        return skin

    def _folds(self) -> None:
        """Paint folds beside the mouth, under the eyes, on the forehead and between the brows."""
        i, c, y = self.i, self.c, self.mouth_y
        fold = curve((self.nose_w + 2.5, self.nose_y - 2), (self.mouth_w + 3, y - 8), (self.mouth_w + 4.5, y + 1))
        bag = curve((self.eye_x - 6, EYES_Y + 6.5), (self.eye_x, EYES_Y + 8), (self.eye_x + 6, EYES_Y + 6.5))
        lines = [curve((MIDDLE - 20, y + 1), (MIDDLE, y - 1.2), (MIDDLE + 20, y + 1)) for y in (22.0, 28.0)]
        for shapes, width, weight, soft in (
            (both(fold), 1.1, min(0.13 + 0.16 * i.age + 0.14 * max(c.smile, 0), 0.45), 1.0),
            (both(bag), 0.9, 0.15 + 0.35 * i.age, 0.8),
            (lines, 0.8, min(0.30 * i.age + 0.2 * c.brow_raise, 0.4), 0.7),
            (both(curve((3, 36), (2, 41), (3, 46))), 0.9, -0.6 * c.brow_raise, 0.7),
        ):
            if weight > 0:
                self.canvas.paint(shapes, self.skin * 0.62, weight, soft, width)

    def _spots(self) -> None:
        i, random = self.i, self.random
        moles = random.uniform([MIDDLE - 27, 28, 0.6], [MIDDLE + 27, 104, 1.2], (3, 3))[: random.integers(0, 4)]
        freckles = random.normal([MIDDLE, 67, 0.6], [15, 8, 0.12], (90, 3))[: round(90 * max(i.freckles, 0))]
        for spots, tone, weight, soft in ((moles, [0.45] * 3, 0.8, 0.0), (freckles, [0.72, 0.58, 0.48], 0.55, 0.4)):
            if len(spots):
                self.canvas.paint([ellipse(x, y, r, r)[::2] for x, y, r in spots], self.skin * tone, weight, soft)

    # ---- features

    def _eyes(self) -> None:
        i, c, paint = self.i, self.c, self.canvas.paint
        socket = ellipse(self.eye_x, EYES_Y - 1.5, self.eye_w * 1.3, self.eye_h * 1.9)
        paint(both(socket), self.skin * [0.80, 0.72, 0.70], 0.30 + 0.18 * i.eye_depth, soft=2.4)
        t = np.linspace(-1, 1, 13)
        x, y = self.eye_x + t * self.eye_w, EYES_Y - 2.0 * i.eye_tilt * t
        sunk, height = 0.4 * c.eyelids * self.eye_h, self.eye_h * (1 - 0.93 * c.eyelids)
        lower = y + height * (0.60 - 0.25 * max(c.smile, 0)) * (1 - np.abs(t + 0.05) ** 2.3 / 1.12) + sunk
        upper = np.minimum(y - height * (1 - np.abs(t - 0.08) ** 2.1 / 1.18) + sunk, lower)
        lids = both(np.stack([x, upper], 1))
        if c.eyelids < 0.9:
            almonds = both(between(x, upper, lower))
            paint(almonds, np.array([230.0, 224, 220]))
            centres = [(MIDDLE + side * self.eye_x + 2.2 * c.gaze, EYES_Y - 0.4) for side in (-1, 1)]
            colour = _ramp(IRIS, i.iris - 0.5 * max(i.skin, 0) * (i.iris + 1))
            for radius, ring in ((4.0, colour * 0.45), (3.4, colour), (1.7, np.full(3, 12.0))):
                paint([ellipse(*at, radius, radius) for at in centres], ring, soft=0.3, inside=almonds)
            paint(
                [ellipse(at + 1.3, level - 1.4, 0.9, 0.9) for at, level in centres], np.full(3, 245.0), inside=almonds
            )
            paint(lids, np.zeros(3), 0.45, 1.1, 2.2, inside=almonds)  # their shadow
            paint(both(np.stack([x, lower], 1)), self.skin * [0.62, 0.5, 0.48], 0.6, width=0.6)
        paint(lids, self.hair * 0.3, 0.85, width=1.2)
        crease = np.stack([x, np.minimum(upper, y - 0.35 * self.eye_h) + 0.5 * i.eye_depth - 2.4], 1)[1:-1]
        paint(both(crease), self.skin * 0.55, 0.45 + 0.2 * i.eye_depth, 0.6, 0.8)

    def _brows(self) -> None:
        i, c, frown = self.i, self.c, max(-self.c.brow_raise, 0)
        t = np.linspace(0, 1, 9)
        x = self.eye_x - 9.6 - 1.2 * frown + (21.0 + 1.2 * frown) * t
        y = EYES_Y - 12.4 - 2.3 * i.brow_height - 2.6 * max(c.brow_raise, 0) + 3.0 * frown * (1 - t) ** 1.5
        y += 1.5 * t**2 - (2.2 + 1.8 * i.brow_arch) * np.sin(np.pi * t**1.3) - 2.4 * i.brow_tilt * (t - 0.5)
        thick = (2.0 + 0.95 * i.brow_weight) * (1 - t**2.5) ** 0.6 * (0.75 + 0.4 * np.sin(np.pi * t))
        brow = both(between(x, y - thick, y + thick * 0.8))
        self.canvas.paint(brow, self.hair * 0.55 + self.skin * 0.08, 0.70 + 0.12 * i.brow_weight, soft=0.8)

    def _nose(self) -> None:
        i, y, w, shade = self.i, self.nose_y, self.nose_w, self.skin * 0.55
        bridge = 3.4 + 0.8 * i.nose_width
        sides = curve((bridge + 1.5, EYES_Y - 5), (bridge, EYES_Y + 6), (bridge + 1.2, y - 4))
        self.canvas.paint(both(sides), shade, 0.18 + 0.10 * i.nose_bridge, 1.3, 1.6)
        nostril = ellipse(w * 0.48, y + 4.6, w * 0.26, 1.35)
        self.canvas.paint(both(nostril), self.skin * [0.30, 0.22, 0.20], 0.8, soft=0.7)
        wing = curve((w * 0.86, y - 2.5), (w * 1.12, y + 1.8), (w * 0.80, y + 5.2))
        self.canvas.paint(both(wing), shade, 0.55, 0.7, 1.0)
        self.canvas.paint(curve((MIDDLE - 4, y + 6), (MIDDLE, y + 7), (MIDDLE + 4, y + 6)), shade, 0.35, 1.2, 1.4)

    def _mouth(self) -> None:
        i, c, smile = self.i, self.c, max(self.c.smile, 0)
        gap = 6.5 * c.mouth_open + 1.6 * max(c.smile - 0.35, 0)
        t = np.linspace(-1, 1, 15)
        x, arch = MIDDLE + t * self.mouth_w, 1 - t**2
        line = self.mouth_y - 2.6 * c.smile * (np.abs(t) ** 2.2 - 0.35)
        top, bottom = line - gap * 0.35 * arch, line + gap * 0.75 * arch
        bow = (1 - 0.28 * np.exp(-((t / 0.16) ** 2))) * (1 - np.abs(t) ** 1.7)
        above = top - (3.3 + 1.3 * i.lip_upper) * (1 - 0.15 * c.smile) * bow
        below = bottom + (4.6 + 1.6 * i.lip_lower) * (1 - 0.12 * c.smile) * (1 - np.abs(t) ** 2.4)
        self.canvas.paint(between(x, above, top), self.lips * 0.90, 0.85, soft=0.6)
        self.canvas.paint(between(x, bottom, below), self.lips, 0.85, soft=0.7)
        if gap > 0.5:
            teeth = np.minimum(bottom, top + 1.0 + 2.2 * arch + 1.2 * smile)
            self.canvas.paint(between(x, top, bottom), np.array([58.0, 22, 22]), 0.95, soft=0.4)
            self.canvas.paint(between(x, top, teeth), np.array([228.0, 222, 210]), 0.9, soft=0.5)
        self.canvas.paint(np.stack([x, top], 1), self.lips * 0.42, 0.75, 0.4, 0.9)
        dip = [(MIDDLE + dx, self.mouth_y + dy) for dx, dy in ((-7, 9.5), (0, 10.7), (7, 9.5))]
        self.canvas.paint(curve(*dip), self.skin * 0.62, 0.35, 1.2, 1.6)

    # ---- hair and body

    def _back_hair(self) -> None:
        i = self.i
        out, low = 3.0 + 5.0 * (i.hair_volume + 1), 46 + 34 * (i.hair_length + 1)
        half = self.half + out * 0.72
        right = [(0.0, -5 - out), (half * 0.70, -2 - out * 0.5), (half, 26.0), (half * 1.02, min(low, 60.0))]
        right += [(half * (1.0 + 0.05 * i.hair_length), low), (half * 0.5, low + 4)]
        self.canvas.paint(smooth(mirrored(right)), planes(self.hair * 0.80) * self.strands, opaque=True)

    def _front_hair(self) -> None:
        """Paint hair over the forehead and before the ears, down to a line that is drawn as a height per column."""
        i, x = self.i, (AXIS - MIDDLE) / self.half
        away = np.abs(x)
        edge = 13.0 - 11.0 * i.hairline + 17 * np.maximum(np.abs(x - 0.3 * i.parting) - 0.2, 0) ** 1.6
        edge -= max(i.hairline - 0.2, 0) * 16 * np.exp(-(((away - 0.52) / 0.2) ** 2))  # receding above the temples
        edge -= 5 * np.exp(-(((x - 0.5 * i.parting) / 0.10) ** 2))
        ragged = np.interp(x, np.linspace(-1.3, 1.3, 60), self.random.standard_normal(60))
        edge += ragged * (1.2 + 0.8 * max(-i.hairline, 0))
        edge += (34 + 22 * (i.hair_length + 1)) / (1 + np.exp((0.93 - away) / 0.022))
        weight = np.clip((edge[None, :] - AXIS[:, None]) / 4.5 + 0.5, 0, 1).astype(np.float32)
        weight *= self.canvas.alpha * np.float32(min(1.0, 2.0 + 1.2 * i.hair_volume))  # below −0.8 it thins out
        self.canvas.rgb += weight * (planes(self.hair) * self.strands - self.canvas.rgb)

    def _body(self) -> None:
        neck = self.half * (0.66 + 0.06 * self.i.jaw)
        outline = mirrored([(0.0, 84), (neck, 84), (neck * 1.06, 118), (neck * 1.5, 140), (0.0, 140)])
        self.canvas.paint(outline, self.skin * [0.72, 0.66, 0.64], opaque=True)
        random = np.random.default_rng([self.c.scene, 5])
        collar, dip = random.uniform(114, 127), random.uniform(2, 12)
        shirt = mirrored([(0.0, collar + dip), (neck * 1.1, collar), (90, 128), (90, 150), (0.0, 150)])
        cloth = np.clip(random.uniform(20, 200) + random.normal(0, 30, 3), 5, 235)
        self.canvas.paint(shirt, cloth, opaque=True)

    def _relief(self) -> tuple[Plane, Plane]:
        i, c, nose, mouth = self.i, self.c, self.nose_y, self.mouth_y
        shapes = [
            (MIDDLE, nose + 0.5, self.nose_w * 0.52, 4.6, 9 + 1.5 * i.nose_bridge),
            (MIDDLE, 58, 3.6, 10, 4.5 + 2.0 * i.nose_bridge), (MIDDLE, mouth, self.mouth_w * 0.7, 6, 3.0),
            (MIDDLE, mouth + 3.4, self.mouth_w * 0.45, 2.0, 1.3), (MIDDLE, mouth + 8.5, 9, 2.6, -1.8),
            (MIDDLE, self.chin - 7, 8 + 2 * i.chin, 5, 3.4), (MIDDLE, 22, 24, 14, 2.0),
        ]  # fmt: skip
        for s in (-1, 1):
            eye = MIDDLE + s * self.eye_x
            shapes += [
                (eye, EYES_Y, 9, 6, -3.6 - 1.2 * i.eye_depth), (eye, EYES_Y, 5.5, 4, 1.6),
                (eye, EYES_Y - 13, 10, 4, 2.2), (MIDDLE + s * self.nose_w * 0.75, nose + 2.5, 2.6, 2.8, 2.6),
                (MIDDLE + s * 24, 72 - 2 * c.smile, 8, 8, 2.6 + 1.4 * i.cheeks + 1.6 * max(c.smile, 0)),
                (MIDDLE + s * (self.mouth_w + 5), mouth - 2, 4, 6, -1.2),
            ]  # fmt: skip
        features = bumps(shapes)
        x, y = ((AXIS - MIDDLE) / (self.half * 1.06))[None] ** 2, ((AXIS - 60) / 66)[:, None] ** 2
        ball, smooth_ball = 30 * np.sqrt(np.maximum(0.02, 1 - x - y)), np.maximum(30 - 25.5 * x - 16.5 * y, -16)
        return ball.astype(np.float32) + features, smooth_ball.astype(np.float32) + np.float32(0.75) * features


def _ramp(stops: Colour, value: float) -> Colour:
    """Return the colour at −1…1 along N×3 stops."""
    return np.array([np.interp(value, np.linspace(-1, 1, len(stops)), channel) for channel in stops.T])
