"""Paint one synthetic face flat and from the front, with its relief. ``faces.py`` explains the factors."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import cv2
import numpy as np
from numpy.typing import NDArray

from pkd.toolkit.synthetic.canvas import (
    GRID,
    MIDDLE,
    Canvas,
    Plane,
    Points,
    axis,
    both,
    bumps,
    curve,
    ellipse,
    fixed_point,
    fixed_radius,
    mask,
    mirrored,
    ramp,
    smooth,
    window,
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
        self.skin = ramp(SKIN, i.skin) * (1 + np.array([0.04, 0.0, -0.07]) * i.skin_warmth)
        fair = (i.hair + 1) * (1 - 0.3 * (i.skin + 1))  # light hair is rare on dark skin
        red = max(i.hair_red, 0.0) * (1 - 0.4 * (i.skin + 1))
        self.hair = ramp(HAIR, fair - 1) * (1 + np.array([0.30, -0.04, -0.30]) * red)
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
        self._paint()

    @property
    def five_points(self) -> Points:
        """Return eyes, nose tip and mouth corners, 5×2 crop units."""
        x, y = self.eye_x, EYES_Y
        offsets = [(-x, y), (x, y), (0.0, self.nose_y), (-self.mouth_w, self.mouth_y), (self.mouth_w, self.mouth_y)]
        return np.asarray(np.array(offsets) + np.array([MIDDLE, 0]))

    def _paint(self) -> None:
        """Paint from the back to the front. Each part draws its random numbers whatever the conditions are."""
        self.inside = mask([self._outline()])
        self.strands = self._strands()
        self._back_hair()
        self._body()
        self._ears()
        self.canvas.mix(self._complexion(), self.inside)
        np.maximum(self.canvas.alpha, self.inside, out=self.canvas.alpha)
        self._folds()
        self._spots()
        self._nose()
        self._mouth()
        self._sockets()
        for side in (-1, 1):
            self._eye(side)
        self._brows()
        self._front_hair()

    # ---- skin

    def _outline(self) -> Points:
        i = self.i
        jaw, corner = self.half * (0.81 + 0.10 * i.jaw), self.half * (0.42 + 0.13 * i.chin)
        bone = self.half * (0.97 + 0.04 * i.cheeks)
        return smooth(
            mirrored(
                [
                    (0.0, -4.0), (self.half * 0.62, 2.0), (self.half * 0.93, 24.0), (self.half, 48.0), (bone, 68.0),
                    (jaw, self.mouth_y - 1), (corner, self.chin - 5), (corner * 0.45, self.chin),
                ]
            )
        )  # fmt: skip

    def _complexion(self) -> Plane:
        """Paint skin with blush, mottling and beard (3×GRID×GRID)."""
        i, x, y = self.i, self.eye_x, EYES_Y + 6
        tired = 0.5 + 0.5 * i.age
        blush = bumps(
            [
                (MIDDLE - 23, 74, 9, 8, 1.0), (MIDDLE + 23, 74, 9, 8, 1.0), (MIDDLE, self.nose_y, 6, 5, 0.9),
                (MIDDLE - x, y, 7, 3, tired), (MIDDLE + x, y, 7, 3, tired),
            ]
        )  # fmt: skip
        coarse = self.random.standard_normal((14, 14), np.float32)
        mottle = cv2.resize(coarse, (GRID, GRID), interpolation=cv2.INTER_CUBIC) * np.float32(2.0)
        skin: Plane = blush * _rgb([3, -10, -8]) + _rgb(self.skin) + mottle
        if i.beard > 0:
            below = 1 / (1 + np.exp(-(axis() - (self.mouth_y - 9)) / 2.5))
            across = np.minimum(1, 0.35 + 1 / (1 + np.exp((4 - abs(axis() - MIDDLE)) / 2)))  # sparse in the middle
            area = np.outer(below, across).astype(np.float32)
            area *= 1 - np.float32(0.9) * mask([ellipse(MIDDLE, self.mouth_y + 1, self.mouth_w * 0.8, 4.5)])
            area *= _grain() * np.float32(0.25 + 0.65 * i.beard)
            skin += np.clip(area, 0, 0.92) * (_rgb(self.hair * 0.85) - skin)
        return skin

    def _ears(self) -> None:
        i = self.i
        for ear in both(ellipse(self.half + 1.0, 61, 4.2 + 1.4 * i.ears, 10 + 2 * i.ears)):
            self.canvas.cover(ear, self.skin * [0.91, 0.84, 0.82])

    def _folds(self) -> None:
        i, c, shade = self.i, self.c, self.skin * 0.62
        start, end = (self.nose_w + 2.5, self.nose_y - 2), (self.mouth_w + 4.5, self.mouth_y + 1)
        fold = curve(start, (self.mouth_w + 3, self.mouth_y - 8), end)
        self.canvas.stroke(both(fold), 1.1, shade, min(0.13 + 0.16 * i.age + 0.14 * max(c.smile, 0), 0.45), soft=1.0)
        bag = curve((self.eye_x - 6, EYES_Y + 6.5), (self.eye_x, EYES_Y + 8), (self.eye_x + 6, EYES_Y + 6.5))
        self.canvas.stroke(both(bag), 0.9, shade, max(0.15 + 0.35 * i.age, 0), soft=0.8)
        lined = min(0.30 * i.age + 0.2 * c.brow_raise, 0.4)
        if lined > 0:
            lines = [curve((MIDDLE - 20, y + 1), (MIDDLE, y - 1.2), (MIDDLE + 20, y + 1)) for y in (22.0, 28.0)]
            self.canvas.stroke(lines, 0.8, shade, lined, soft=0.7)
        if c.brow_raise < 0:
            frown = curve((3, 36), (2, 41), (3, 46))
            self.canvas.stroke(both(frown), 0.9, shade, -0.6 * c.brow_raise, soft=0.7)

    def _spots(self) -> None:
        i, random = self.i, self.random
        moles = random.uniform([-27, 28, 0.6], [27, 104, 1.2], (3, 3))[: random.integers(0, 4)]
        if len(moles):
            self.canvas.fill([ellipse(MIDDLE + x, y, r, r) for x, y, r in moles], self.skin * 0.45, 0.8)
        freckles = random.normal([MIDDLE, 67, 0.6], [15, 8, 0.12], (90, 3))[: round(90 * max(i.freckles, 0))]
        if len(freckles):
            dots = [ellipse(x, y, r, r)[::4] for x, y, r in freckles]
            self.canvas.fill(dots, self.skin * [0.72, 0.58, 0.48], 0.55, soft=0.4)

    # ---- features

    def _sockets(self) -> None:
        i = self.i
        socket = ellipse(self.eye_x, EYES_Y - 1.5, self.eye_w * 1.3, self.eye_h * 1.9)
        self.canvas.fill(both(socket), self.skin * [0.80, 0.72, 0.70], 0.30 + 0.18 * i.eye_depth, soft=2.4)

    def _eye(self, side: int) -> None:
        i, c = self.i, self.c
        t = np.linspace(-1, 1, 13)
        across, y = self.eye_x + t * self.eye_w, EYES_Y - 2.0 * i.eye_tilt * t
        sunk = 0.4 * c.eyelids * self.eye_h
        height = self.eye_h * (1 - 0.93 * c.eyelids)
        lower = y + height * (0.60 - 0.25 * max(c.smile, 0)) * (1 - np.abs(t + 0.05) ** 2.3 / 1.12) + sunk
        upper = np.minimum(y - height * (1 - np.abs(t - 0.08) ** 2.1 / 1.18) + sunk, lower)
        place = np.array([side, 1]), np.array([MIDDLE, 0])
        lid = np.stack([across, upper], 1) * place[0] + place[1]
        under = np.stack([across, lower], 1) * place[0] + place[1]
        almond = np.concatenate([lid, under[::-1]])
        if c.eyelids < 0.9:
            self._eyeball(side, lid, almond)
            self.canvas.stroke(under, 0.6, self.skin * [0.62, 0.5, 0.48], 0.6)
        self.canvas.stroke(lid, 1.2, self.hair * 0.3, 0.85)
        crease = lid[1:-1] * [1, 0] + [0, 1] * np.minimum(upper, y - 0.35 * self.eye_h)[1:-1, None]
        crease += [0, 0.5 * i.eye_depth - 2.4]
        self.canvas.stroke(crease, 0.8, self.skin * 0.55, 0.45 + 0.2 * i.eye_depth, soft=0.6)

    def _eyeball(self, side: int, lid: Points, almond: Points) -> None:
        """Paint white, iris, pupil and a reflection, seen through the almond opening."""
        i, c = self.i, self.c
        rows, columns = window([almond], 2)
        ball = np.empty((rows.stop - rows.start, columns.stop - columns.start, 3), np.float32)
        ball[:] = (230, 224, 220)
        x, y = MIDDLE + side * self.eye_x + 2.2 * c.gaze, EYES_Y - 0.4
        centre = fixed_point(x, y, rows, columns)
        colour = ramp(IRIS, i.iris - 0.5 * max(i.skin, 0) * (i.iris + 1))
        for radius, ring in ((4.0, colour * 0.45), (3.4, colour), (1.7, np.full(3, 12.0))):
            cv2.circle(ball, centre, fixed_radius(radius), ring.tolist(), -1, cv2.LINE_8, 4)
        ball = cv2.GaussianBlur(ball, (3, 3), 0)
        shine = fixed_point(x + 1.3, y - 1.4, rows, columns)
        cv2.circle(ball, shine, fixed_radius(0.9), (245, 245, 245), -1, cv2.LINE_8, 4)
        shadow = cv2.GaussianBlur(mask([lid], rows, columns, 2.2), (0, 0), 1.2)
        seen = ball.transpose(2, 0, 1) * (1 - np.float32(0.45) * shadow)
        part = self.canvas.rgb[:, rows, columns]
        part += mask([almond], rows, columns) * (seen - part)

    def _brows(self) -> None:
        i, c = self.i, self.c
        t = np.linspace(0, 1, 9)
        base = EYES_Y - 12.4 - 2.3 * i.brow_height - 2.6 * max(c.brow_raise, 0)
        frown = max(-c.brow_raise, 0)
        x = self.eye_x - 9.6 - 1.2 * frown + (21.0 + 1.2 * frown) * t
        y = base - (2.2 + 1.8 * i.brow_arch) * np.sin(np.pi * t**1.3) - 2.4 * i.brow_tilt * (t - 0.5) + 1.5 * t**2
        y = y + 3.0 * frown * (1 - t) ** 1.5
        thick = (2.0 + 0.95 * i.brow_weight) * (1 - t**2.5) ** 0.6 * (0.75 + 0.4 * np.sin(np.pi * t))
        brow = np.concatenate([np.stack([x, y - thick], 1), np.stack([x, y + thick * 0.8], 1)[::-1]])
        colour = self.hair * 0.55 + self.skin * 0.08
        self.canvas.fill(both(brow), colour, 0.70 + 0.12 * i.brow_weight, soft=0.8)

    def _nose(self) -> None:
        i, y, w, shade = self.i, self.nose_y, self.nose_w, self.skin * 0.55
        bridge = 3.4 + 0.8 * i.nose_width
        sides = curve((bridge + 1.5, EYES_Y - 5), (bridge, EYES_Y + 6), (bridge + 1.2, y - 4))
        self.canvas.stroke(both(sides), 1.6, shade, 0.18 + 0.10 * i.nose_bridge, soft=1.3)
        nostril = ellipse(w * 0.48, y + 4.6, w * 0.26, 1.35, angle=-0.25)
        self.canvas.fill(both(nostril), self.skin * [0.30, 0.22, 0.20], 0.8, soft=0.7)
        wing = curve((w * 0.86, y - 2.5), (w * 1.12, y + 1.8), (w * 0.80, y + 5.2))
        self.canvas.stroke(both(wing), 1.0, shade, 0.55, soft=0.7)
        self.canvas.stroke(curve((MIDDLE - 4, y + 6), (MIDDLE, y + 7), (MIDDLE + 4, y + 6)), 1.4, shade, 0.35, soft=1.2)

    def _mouth(self) -> None:
        i, c, y = self.i, self.c, self.mouth_y
        gap = 6.5 * c.mouth_open + 1.6 * max(c.smile - 0.35, 0)
        t = np.linspace(-1, 1, 15)
        x, arch = MIDDLE + t * self.mouth_w, 1 - t**2
        line = y - 2.6 * c.smile * (np.abs(t) ** 2.2 - 0.35)
        top, bottom = line - gap * 0.35 * arch, line + gap * 0.75 * arch
        bow = 1 - 0.28 * np.exp(-((t / 0.16) ** 2))
        above = top - (3.3 + 1.3 * i.lip_upper) * (1 - 0.15 * c.smile) * bow * (1 - np.abs(t) ** 1.7)
        below = bottom + (4.6 + 1.6 * i.lip_lower) * (1 - 0.12 * c.smile) * (1 - np.abs(t) ** 2.4)
        self.canvas.fill(_between(x, above, top), self.lips * 0.90, 0.85, soft=0.6)
        self.canvas.fill(_between(x, bottom, below), self.lips, 0.85, soft=0.7)
        if gap > 0.5:
            self.canvas.fill(_between(x, top, bottom)[1:-1], np.array([58.0, 22, 22]), 0.95, soft=0.4)
            teeth = np.minimum(bottom, top + 1.0 + 2.2 * arch + 1.2 * max(c.smile, 0))
            self.canvas.fill(_between(x[1:-1], top[1:-1], teeth[1:-1]), np.array([228.0, 222, 210]), 0.9, soft=0.5)
        self.canvas.stroke(np.stack([x, top], 1), 0.9, self.lips * 0.42, 0.75, soft=0.4)
        dip = curve((MIDDLE - 7, y + 9.5), (MIDDLE, y + 10.7), (MIDDLE + 7, y + 9.5))
        self.canvas.stroke(dip, 1.6, self.skin * 0.62, 0.35, soft=1.2)

    # ---- hair and body

    def _back_hair(self) -> None:
        i = self.i
        out = 3.0 + 5.0 * (i.hair_volume + 1)
        low = 46 + 34 * (i.hair_length + 1)
        half = self.half + out * 0.72
        right = [(0.0, -5 - out), (half * 0.70, -2 - out * 0.5), (half, 26.0), (half * 1.02, min(low, 60.0))]
        right += [(half * (1.0 + 0.05 * i.hair_length), low), (half * 0.5, low + 4)]
        self.canvas.cover(smooth(mirrored(right)), self.hair * 0.80, self.strands)

    def _front_hair(self) -> None:
        """Paint hair over the forehead and before the ears, down to a line that is drawn as a height per column."""
        i = self.i
        x = (axis() - MIDDLE) / self.half
        edge = 13.0 - 11.0 * i.hairline + 17 * np.maximum(np.abs(x - 0.3 * i.parting) - 0.2, 0) ** 1.6
        temples = max(i.hairline - 0.2, 0) * 16  # receding: higher above the temples
        edge = edge - temples * np.exp(-(((np.abs(x) - 0.52) / 0.2) ** 2))
        parting = np.exp(-(((x - 0.5 * i.parting) / 0.10) ** 2))
        edge = edge - 5 * parting
        ragged = np.interp(x, np.linspace(-1.3, 1.3, 60), self.random.standard_normal(60))
        edge = edge + ragged * (1.2 + 0.8 * max(-i.hairline, 0))
        edge = edge + (34 + 22 * (i.hair_length + 1)) / (1 + np.exp((0.93 - np.abs(x)) / 0.022))
        weight = np.clip((edge[None, :] - axis()[:, None]) / 4.5 + 0.5, 0, 1).astype(np.float32)
        weight *= self.canvas.alpha * np.float32(min(1.0, 2.0 + 1.2 * i.hair_volume))  # below −0.8 it thins out
        self.canvas.mix(_rgb(self.hair) * self.strands, weight)

    def _strands(self) -> Plane:
        """Make the brightness of hair around 1, in strands that fall from the crown (GRID×GRID)."""
        wave = np.tile(self.random.standard_normal(97).astype(np.float32), 3)[None]
        strands: Plane = (1 + np.float32(0.2) * cv2.GaussianBlur(wave, (3, 1), 0)[0, 97:194])[_crown()]
        return strands

    def _body(self) -> None:
        neck = self.half * (0.66 + 0.06 * self.i.jaw)
        outline = mirrored([(0.0, 84), (neck, 84), (neck * 1.06, 118), (neck * 1.5, 140), (0.0, 140)])
        self.canvas.cover(outline, self.skin * [0.72, 0.66, 0.64])
        random = np.random.default_rng([self.c.scene, 5])
        collar, dip = random.uniform(114, 127), random.uniform(2, 12)
        cloth = np.clip(random.uniform(20, 200) + random.normal(0, 30, 3), 5, 235)
        self.canvas.cover(
            mirrored([(0.0, collar + dip), (neck * 1.1, collar), (90, 128), (90, 150), (0.0, 150)]), cloth
        )

    # ---- relief

    def _relief(self) -> tuple[Plane, Plane]:
        i, c = self.i, self.c
        x, y = (axis() - MIDDLE) / (self.half * 1.06), (axis() - 60) / 66
        ball = np.maximum(0.02, (1 - x**2)[None, :] - (y**2)[:, None])
        shapes = [
            (MIDDLE, self.nose_y + 0.5, self.nose_w * 0.52, 4.6, 9 + 1.5 * i.nose_bridge),
            (MIDDLE, 58, 3.6, 10, 4.5 + 2.0 * i.nose_bridge),
            (MIDDLE, self.mouth_y, self.mouth_w * 0.7, 6, 3.0),
            (MIDDLE, self.mouth_y - 3, self.mouth_w * 0.5, 1.6, 0.9),
            (MIDDLE, self.mouth_y + 3.4, self.mouth_w * 0.45, 2.0, 1.3), (MIDDLE, self.mouth_y + 8.5, 9, 2.6, -1.8),
            (MIDDLE, self.chin - 7, 8 + 2 * i.chin, 5, 3.4), (MIDDLE, 22, 24, 14, 2.0),
        ]  # fmt: skip
        smile = max(c.smile, 0)
        for s in (-1, 1):
            eye = MIDDLE + s * self.eye_x
            shapes += [
                (eye, EYES_Y, 9, 6, -3.6 - 1.2 * i.eye_depth), (eye, EYES_Y, 5.5, 4, 1.6),
                (eye, EYES_Y - 13, 10, 4, 2.2),
                (MIDDLE + s * self.nose_w * 0.75, self.nose_y + 2.5, 2.6, 2.8, 2.6),
                (MIDDLE + s * 24, 72 - 2 * c.smile, 8, 8, 2.6 + 1.4 * i.cheeks + 1.6 * smile),
                (MIDDLE + s * (self.mouth_w + 5), self.mouth_y - 2, 4, 6, -1.2),
            ]  # fmt: skip
        features = bumps(shapes)
        relief: Plane = (30 * np.sqrt(ball)).astype(np.float32) + features
        smooth_ball = np.maximum(30 * (1 - 0.85 * (x**2)[None, :] - 0.55 * (y**2)[:, None]), -16)
        return relief, smooth_ball.astype(np.float32) + np.float32(0.75) * features


def _between(x: NDArray[np.float64], top: NDArray[np.float64], bottom: NDArray[np.float64]) -> Points:
    """Return the polygon between two lines over the same x."""
    return np.concatenate([np.stack([x, top], 1), np.stack([x, bottom], 1)[::-1]])


def _rgb(colour: NDArray[np.float64] | list[int]) -> Plane:
    return np.asarray(colour, np.float32).reshape(3, 1, 1)


@cache
def _grain() -> Plane:
    """Make fine noise around 0.8 that makes a beard of an even shade."""
    noise: Plane = 0.8 + 0.2 * np.random.default_rng(0).standard_normal((GRID, GRID), np.float32)
    return noise


@cache
def _crown() -> NDArray[np.int64]:
    """Return the index 0…96 of the strand that runs through each pixel of the canvas."""
    angle = np.arctan2((axis() - MIDDLE)[None, :], (axis() + 26)[:, None])
    return ((angle / np.pi + 1) * 125).astype(np.int64) % 97
