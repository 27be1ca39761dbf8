"""LooseCrops: files that are aligned by their published five points as they are read."""

from __future__ import annotations

import hashlib
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from pkd.toolkit.core.errors import BadImage, NoFace
from pkd.toolkit.data.files import ImageFiles
from pkd.toolkit.data.packed_names import PackedNames
from pkd.toolkit.data.source import Ints, Keys
from pkd.toolkit.images.alignment import warp
from pkd.toolkit.images.codec import decode_rgb


class LooseCrops:
    """Aligned crops of files below ``root``; what is read is a BMP of the crop, so that its digest holds the points."""

    def __init__(self, root: Path, names: PackedNames, points: NDArray[np.float32]) -> None:
        self.root = root
        self._files = ImageFiles(root, names)
        self._points = points

    def __len__(self) -> int:
        return len(self._files)

    def name(self, row: int) -> str:
        """The file's name."""
        return self._files.name(row)

    def read(self, row: int) -> bytes:
        """The aligned crop as BMP. Raises BadImage for a file that cannot be decoded or points that are none."""
        where = self.root / self.name(row)
        try:
            crop = warp(decode_rgb(self._files.read(row)), self._points[row])
        except NoFace as error:
            raise BadImage(f"{where}: {error}") from None
        except BadImage as error:
            raise type(error)(str(error) if str(where) in str(error) else f"{where}: {error}") from None
        return cv2.imencode(".bmp", cv2.cvtColor(crop, cv2.COLOR_RGB2BGR))[1].tobytes()

    def is_file(self) -> bool:
        """False: the crop is no file."""
        return False

    def stamps(self, rows: Ints) -> tuple[Keys, NDArray[np.bool_]]:
        """A key per crop over the file's own and its points."""
        keys, settled = self._files.stamps(rows)
        mixed = [
            hashlib.sha256(key.tobytes() + self._points[row].tobytes()).digest()[:8]
            for key, row in zip(keys, rows.tolist(), strict=True)
        ]
        return np.array([int.from_bytes(part, "little") for part in mixed], np.uint64), settled
