"""FaceSet: aligned crops on disk with their identities, from a folder per identity or from list files."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pkd.toolkit.errors import InputError
from pkd.toolkit.images import SUFFIXES, Rgb, read_rgb
from pkd.toolkit.space import combine

UNLABELLED = -1


@dataclass(frozen=True)
class FaceSet:
    """Image files and what is known of who they show.

    ``paths``: N files. ``labels``: int64 N, an index into ``identities`` or −1 for an image without identity.
    ``names``: N short names (relative paths) for messages and reports.
    """

    paths: tuple[Path, ...]
    names: tuple[str, ...]
    labels: NDArray[np.int64]
    identities: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.paths)

    def load(self, indices: Sequence[int] | NDArray[np.int64], size: int) -> Rgb:
        """Read crops → uint8 N×size×size×3 RGB. Raises BadImage (unreadable) or InputError (another size)."""
        crops = np.empty((len(indices), size, size, 3), np.uint8)
        for row, index in enumerate(indices):
            image = read_rgb(self.paths[index])
            if image.shape != (size, size, 3):
                raise InputError(
                    f"{self.paths[index]}: {image.shape[1]}×{image.shape[0]} pixels, expected an aligned {size}×{size} "
                    "crop. Run pkd-align on the photographs first."
                )
            crops[row] = image
        return crops

    def digests(self) -> list[str]:
        """SHA-256 (hex) of every file's bytes, in order. Read once."""
        return list(self._digests)

    @cached_property
    def _digests(self) -> tuple[str, ...]:
        return tuple(hashlib.sha256(path.read_bytes()).hexdigest() for path in self.paths)

    def digest(self) -> str:
        """One SHA-256 over contents and identities, independent of where the files lie and of their order."""
        owners = [self.identities[label] if label >= 0 else "" for label in self.labels]
        return combine(sorted(f"{d} {owner}" for d, owner in zip(self.digests(), owners, strict=True)))

    def select(self, indices: NDArray[np.int64]) -> FaceSet:
        """The images at ``indices``, with the identities relabelled to those that occur."""
        labels = self.labels[indices]
        kept = sorted(set(labels[labels >= 0].tolist()))
        new = {old: i for i, old in enumerate(kept)}
        return FaceSet(
            paths=tuple(self.paths[i] for i in indices),
            names=tuple(self.names[i] for i in indices),
            labels=np.array([new.get(int(label), UNLABELLED) for label in labels], np.int64),
            identities=tuple(self.identities[i] for i in kept),
        )

    @classmethod
    def read(cls, *sources: str | Path, labelled: bool = True) -> FaceSet:
        """Read folders (``<identity>/<image>``) and list files (one path a line, identity = the parent folder).

        Paths in a list are relative to the list's own folder or to that folder's parent, whichever holds the first.
        With ``labelled=False`` every image gets label −1 and images may lie anywhere below a folder.
        Raises InputError naming what is missing.
        """
        found: list[tuple[Path, str, str]] = []
        for source in map(Path, sources):
            if source.is_dir():
                found += _from_folder(source, labelled)
            elif source.is_file():
                found += _from_list(source)
            else:
                raise InputError(f"{source}: no such folder or list file. Give a folder of aligned crops or a list.")
        identities = tuple(sorted({identity for _, _, identity in found})) if labelled else ()
        index = {identity: i for i, identity in enumerate(identities)}
        return cls(
            paths=tuple(path for path, _, _ in found),
            names=tuple(name for _, name, _ in found),
            labels=np.array([index.get(identity, UNLABELLED) for _, _, identity in found], np.int64),
            identities=identities,
        )


def join(a: FaceSet, b: FaceSet) -> FaceSet:
    """The images of ``a`` and of an unlabelled ``b``."""
    if b.identities:
        raise InputError("only an unlabelled set can be joined to another; read both sources with one FaceSet.read.")
    return FaceSet(a.paths + b.paths, a.names + b.names, np.concatenate([a.labels, b.labels]), a.identities)


def _from_folder(folder: Path, labelled: bool) -> list[tuple[Path, str, str]]:
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    if not files:
        raise InputError(f"{folder}: holds no image ({', '.join(sorted(SUFFIXES))}).")
    if labelled and (stray := [p for p in files if p.parent == folder]):
        raise InputError(
            f"{folder}: {len(stray):,} images lie directly in it (first: {stray[0].name}), so they have no identity. "
            "Put each person's images in a folder of their own, or pass the folder as --unlabelled."
        )
    return [(p, p.relative_to(folder).as_posix(), p.parent.relative_to(folder).as_posix()) for p in files]


def _from_list(listing: Path) -> list[tuple[Path, str, str]]:
    try:
        lines = [line.strip() for line in listing.read_text(encoding="utf-8").splitlines()]
    except UnicodeDecodeError:
        raise InputError(f"{listing}: not a text file. Give a folder, or a list with one image path a line.") from None
    names = [line for line in lines if line and not line.startswith("#")]
    if not names:
        raise InputError(f"{listing}: the list is empty.")
    roots = (listing.parent, listing.parent.parent, listing.parent.resolve().parent)
    root = next((r for r in roots if (r / names[0]).is_file()), None)
    if root is None:
        raise InputError(f"{listing}: its first image {names[0]!r} lies neither in {roots[0]} nor in {roots[2]}.")
    missing = [name for name in names if not (root / name).is_file()]
    if missing:
        raise InputError(f"{listing}: {len(missing):,} of {len(names):,} images do not exist (first: {missing[0]}).")
    return [(root / name, name, Path(name).parent.as_posix()) for name in names]
