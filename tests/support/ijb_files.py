"""IJB fixtures: a meta folder and loose crops in the published layout, written from anyone's aligned crops.

None of the published sets is here. The layouts are those that InsightFace's ``eval_ijbc.py`` and ``ijb_1n.py`` read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pkd.toolkit.images.alignment import TEMPLATE
from pkd.toolkit.images.codec import Rgb, write_rgb

HEAD = "TEMPLATE_ID,SUBJECT_ID,FILENAME,SIGHTING_ID,FACE_X,FACE_Y,FACE_WIDTH,FACE_HEIGHT"


def write_ijb(folder: Path, people: Mapping[str, Sequence[Rgb]], *, seed: int = 0) -> Path:
    """``folder/meta/ijbc_*`` and ``folder/loose_crop/<n>.png`` → the meta folder.

    Of each person's crops the first two (two media) are enrolled, in G1 and G2 by turns; of the rest every three make a
    probe template, its first two of one medium. A crop lies somewhere in a larger black picture.
    """
    random = np.random.default_rng(seed)
    meta, images = folder / "meta", folder / "loose_crop"
    for each in (meta, images):
        each.mkdir(parents=True)
    faces: list[Any] = []
    points: list[Any] = []
    rows: dict[str, list[str]] = {"gallery_G1": [], "gallery_G2": [], "probe_mixed": []}
    enrolled: list[Any] = []
    probes: list[Any] = []
    template = medium = 0
    for number, (person, crops) in enumerate(people.items()):
        subject = 100 + number
        parts = [(f"gallery_G{number % 2 + 1}", crops[:2])]
        parts += [("probe_mixed", crops[at : at + 3]) for at in range(2, len(crops), 3)]
        for kind, part in parts:
            template += 1
            (probes if kind == "probe_mixed" else enrolled).append((template, person))
            for place, crop in enumerate(part):
                medium += not (kind == "probe_mixed" and place == 1)
                name = f"{len(faces) + 1}.png"
                left, top = random.integers(0, 40, 2)
                loose = np.zeros((160, 170, 3), np.uint8)
                loose[top : top + 112, left : left + 112] = crop
                write_rgb(images / name, loose)
                marks = " ".join(f"{value:.3f}" for value in (TEMPLATE + np.array([left, top])).ravel())
                faces.append(f"{name} {template} {medium}\n")
                points.append(f"{name} {marks} {random.uniform(0.5, 1):.4f}\n")
                rows[kind].append(f"{template},{subject},img/{name},{place},{left},{top},112,112\n")
    (meta / "ijbc_face_tid_mid.txt").write_text("".join(faces))
    (meta / "ijbc_name_5pts_score.txt").write_text("".join(points))
    (meta / "ijbc_template_pair_label.txt").write_text(
        "".join(f"{a} {b} {int(who == other)}\n" for a, who in enrolled for b, other in probes)
    )
    for kind, lines in rows.items():
        (meta / f"ijbc_1N_{kind}.csv").write_text("\n".join([HEAD, "".join(lines)]))
    return meta
