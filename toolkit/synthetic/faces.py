"""Draw synthetic faces: procedural aligned 112×112 crops of people who do not exist.

The offline data of the demo, the tests and the golden crops of bundles. **They are drawings, not photographs**: error
rates measured on them say whether the tools work, and nothing about people. Whatever is measured on them must say so.

A crop is ``draw(identity, conditions)``. ``Identity`` holds what stays with a person, ``Conditions`` what changes
from image to image; every field is a factor that can be set by itself. Image k of identity i depends on (seed, i, k)
alone, never on what was generated before it. The same seed gives the same bytes with the same numpy and OpenCV on the
same kind of machine; another OpenCV may round lines and warps differently by a few grey levels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

import cv2
import numpy as np

from pkd.toolkit.core.errors import InputError
from pkd.toolkit.images.codec import Rgb, decode_rgb, write_rgb
from pkd.toolkit.synthetic.head import Head
from pkd.toolkit.synthetic.occlusion import PAINTERS
from pkd.toolkit.synthetic.scene import photograph

SIZE = 112
"""Height and width of a crop, pixels."""
OCCLUSIONS = ("none", *PAINTERS)


@dataclass(frozen=True)
class Identity:
    """Describe what stays with a person. Every factor lies in −1…1, 0 is the average face; ``marks`` is a seed."""

    face_width: float = 0.0
    face_length: float = 0.0
    jaw: float = 0.0  # −1 narrow … 1 broad at the height of the mouth
    chin: float = 0.0  # −1 pointed … 1 square
    cheeks: float = 0.0
    ears: float = 0.0
    eye_size: float = 0.0
    eye_open: float = 0.0  # height of the opening against its width
    eye_tilt: float = 0.0  # −1 outer corners low … 1 high
    eye_spacing: float = 0.0
    eye_depth: float = 0.0
    brow_height: float = 0.0
    brow_weight: float = 0.0
    brow_arch: float = 0.0
    brow_tilt: float = 0.0
    nose_length: float = 0.0
    nose_width: float = 0.0
    nose_bridge: float = 0.0
    mouth_height: float = 0.0  # −1 close to the nose … 1 close to the chin
    mouth_width: float = 0.0
    lip_upper: float = 0.0
    lip_lower: float = 0.0
    skin: float = 0.0  # −1 pale … 1 dark
    skin_warmth: float = 0.0
    lips: float = 0.0  # −1 the skin's own colour … 1 red
    iris: float = 0.0  # −1 dark brown … 1 light blue
    hair: float = 0.0  # −1 black … 1 blond or grey
    hair_red: float = 0.0
    hairline: float = 0.0  # −1 low, with a fringe … 1 receding
    hair_volume: float = 0.0
    hair_length: float = 0.0
    parting: float = 0.0  # −1 left … 1 right
    beard: float = 0.0  # below 0 none … 1 full
    freckles: float = 0.0  # below 0 none … 1 many
    age: float = 0.0  # folds beside the mouth, under the eyes and on the forehead
    marks: int = 0  # seed of where moles, freckles, strands and mottling lie


@dataclass(frozen=True)
class Conditions:
    """Describe what changes from image to image. The defaults are a frontal, evenly lit, sharp, neutral face.

    The head turns in depth; the crop is then aligned by its five points, as a detector would, but for an error.
    """

    yaw: float = 0.0  # degrees to the right of the image, up to about ±35
    pitch: float = 0.0  # degrees down, up to about ±20
    roll: float = 0.0  # degrees of in-plane rotation that the alignment left over
    shift_x: float = 0.0  # pixels of alignment error
    shift_y: float = 0.0
    zoom: float = 1.0  # factor, scale error of the alignment
    light_azimuth: float = 0.0  # degrees from the camera to the right of the image
    light_elevation: float = 25.0  # degrees above the camera
    light_strength: float = 0.35  # 0 flat … 1 all light from one direction
    exposure: float = 1.0  # factor on all intensities
    warmth: float = 0.0  # colour cast, −1 blue … 1 orange
    contrast: float = 1.0
    smile: float = 0.0  # −1 corners down … 1 broad smile
    mouth_open: float = 0.0  # 0 closed … 1 wide open
    brow_raise: float = 0.0  # −1 frown … 1 raised
    eyelids: float = 0.0  # 0 open … 1 closed
    gaze: float = 0.0  # −1 left … 1 right
    occlusion: str = "none"  # one of OCCLUSIONS
    occlusion_seed: int = 0  # of its colour, size and place
    blur: float = 0.0  # standard deviation of a Gaussian, pixels
    noise: float = 0.0  # standard deviation of sensor noise, grey levels
    jpeg: int = 0  # quality 1…100 of the JPEG that the crop went through; 0 for none
    scene: int = 0  # seed of background, clothes and the noise's pattern


def draw(identity: Identity, conditions: Conditions | None = None) -> Rgb:
    """Draw one synthetic face → uint8 112×112×3 RGB, its five points at the ArcFace template. About 3 ms."""
    c = conditions or Conditions()
    head = Head(identity, c)
    if c.occlusion != "none":
        PAINTERS[c.occlusion](head, np.random.default_rng([c.occlusion_seed, 9]))
    cast = c.exposure * np.array([1 + 0.16 * c.warmth, 1.0, 1 - 0.20 * c.warmth])
    image = photograph(head, c, SIZE) * (cast * c.contrast).astype(np.float32)
    image += (cast * 128 * (1 - c.contrast)).astype(np.float32)
    if c.blur > 0:
        image = np.asarray(cv2.GaussianBlur(image, (0, 0), c.blur), np.float32)
    if c.noise > 0:
        pattern = np.random.default_rng([c.scene, 3]).standard_normal(image.shape, np.float32)
        image += np.float32(c.noise) * pattern
    crop: Rgb = np.clip(np.rint(image), 0, 255).astype(np.uint8)
    if c.jpeg > 0:
        _, data = cv2.imencode(".jpg", cv2.cvtColor(crop, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, c.jpeg])
        crop = decode_rgb(data.tobytes())
    return crop


def random_identity(seed: int, person: int) -> Identity:
    """Make identity ``person`` of the population ``seed``: every factor uniform in −1…1, by itself."""
    random = np.random.default_rng([seed, person])
    factors = {f.name: float(random.uniform(-1, 1)) for f in fields(Identity) if f.name != "marks"}
    return Identity(**factors, marks=int(random.integers(2**31)))


def random_conditions(seed: int, person: int, image: int, difficulty: float = 1.0) -> Conditions:
    """Make the conditions of image ``image`` of identity ``person``; they do not depend on who the person is.

    ``difficulty`` 0 gives every image the defaults but for the scene, 1 the range of unposed snapshots, 2 hardly
    recognisable ones. Raises InputError outside 0…2.
    """
    if not 0 <= difficulty <= 2:
        raise InputError(f"difficulty {difficulty:g}: give 0 (portraits), 1 (snapshots) up to 2 (hardly recognisable).")
    random = np.random.default_rng([seed, person, image, 1])
    d, flat = difficulty, random.uniform

    def wide(spread: float, limit: float, middle: float = 0.0) -> float:
        return middle + float(np.clip(random.normal(0, spread * d), -limit, limit))

    def between(low: float, high: float, least: float, most: float) -> float:
        return float(np.clip(flat(low, high) * d, least, most))

    covered = random.random() < 0.28 * d
    return Conditions(
        yaw=wide(13, 35),
        pitch=wide(7, 20),
        roll=wide(2.5, 12),
        shift_x=wide(1.3, 6),
        shift_y=wide(1.3, 6),
        zoom=wide(0.035, 0.15, 1),
        light_azimuth=wide(40, 85),
        light_elevation=wide(20, 45, 25),
        light_strength=min(max(wide(0.25, 0.6, 0.35), 0.0), 1.0),
        exposure=float(np.exp(wide(0.16, 0.6))),
        warmth=wide(0.4, 1),
        contrast=float(np.exp(wide(0.12, 0.4))),
        smile=between(-0.7, 1.3, -1, 1),
        mouth_open=between(-1.0, 0.9, 0, 1),
        brow_raise=wide(0.45, 1),
        eyelids=between(-0.6, 0.45, 0, 1) if random.random() > 0.06 * d else 1.0,
        gaze=wide(0.45, 1),
        occlusion=str(random.choice(OCCLUSIONS[1:])) if covered else "none",
        occlusion_seed=int(random.integers(2**31)),
        blur=between(-0.5, 1.2, 0, 3),
        noise=between(0, 7, 0, 20),
        jpeg=int(np.clip(98 - flat(0, 45) * d, 15, 98)) if d > 0 else 0,
        scene=int(random.integers(2**31)),
    )


def face(seed: int, person: int, image: int, difficulty: float = 1.0) -> Rgb:
    """Draw image ``image`` of synthetic identity ``person`` → uint8 112×112×3 RGB."""
    return draw(random_identity(seed, person), random_conditions(seed, person, image, difficulty))


def write_faces(
    folder: str | Path,
    seed: int,
    identities: int,
    images_per_identity: int,
    *,
    first: int = 0,
    difficulty: float = 1.0,
    progress: Callable[[int], None] = lambda done: None,
) -> None:
    """Write ``folder/synthetic-00017/003.png`` …: a folder per identity. ``progress`` gets the images just written.

    ``first``: number of the first identity, so that ranges of the same seed can be disjoint.
    """
    for person in range(first, first + identities):
        own = Path(folder) / f"synthetic-{person:05d}"
        own.mkdir(parents=True, exist_ok=True)
        for image in range(images_per_identity):
            write_rgb(own / f"{image:03d}.png", face(seed, person, image, difficulty))
        progress(images_per_identity)
