"""Read face sets: aligned crops with their identities, from folders, lists, RecordIO and tar files, also mixed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pkd.toolkit.core.errors import BadImage, InputError
from pkd.toolkit.core.parallel import in_order
from pkd.toolkit.data.files import ImageFiles, read_folder, read_list
from pkd.toolkit.data.recordio import read_recordio
from pkd.toolkit.data.row_store import KeyedRows, Rows
from pkd.toolkit.data.source import UNLABELLED, Found, ImageCollection, Ints
from pkd.toolkit.data.tar import read_tar
from pkd.toolkit.data.tree import LeftOut, is_hidden, report_left_out
from pkd.toolkit.images.codec import SUFFIXES, Rgb, decode_rgb

CONTAINERS = {".rec": read_recordio, ".tar": read_tar}
BYTES = 32
CHUNK = 512
BLOCK = 1 << 16
READERS = 8
"""Threads that read and hash; more than cores, since most of the time goes into waiting for the disk."""


@dataclass(frozen=True)
class FaceSet:
    """Hold images and what is known of who they show. 16 bytes of memory an image, besides what its source takes.

    ``rows``: int64 N into ``images``. ``labels``: int64 N, an index into ``identities`` or −1 for an image without
    identity.
    """

    images: ImageCollection
    rows: Ints
    labels: Ints
    identities: tuple[str, ...]
    _known: list[Rows] = field(default_factory=list, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, index: int) -> str:
        """Name an image in messages and reports: a path in its folder, list or tar, or ``train.rec#7``."""
        source, row = self.images.locate(int(self.rows[index]))
        return source.name(row)

    @property
    def names(self) -> tuple[str, ...]:
        """Return all names, made on demand."""
        return tuple(self.name(i) for i in range(len(self)))

    def path(self, index: int) -> Path:
        """Return the file that holds this image alone. Raises InputError for one in a .rec or .tar."""
        source, row = self.images.locate(int(self.rows[index]))
        if not isinstance(source, ImageFiles):
            raise InputError(
                f"{source.root / source.name(row)}: not a file of its own. Give a folder or a list of files."
            )
        return source.path(row)

    def load(self, indices: Sequence[int] | Ints, size: int) -> Rgb:
        """Read crops → uint8 N×size×size×3 RGB. Raises BadImage (unreadable) or InputError (another size)."""
        crops = np.empty((len(indices), size, size, 3), np.uint8)
        for place, index in enumerate(indices):
            row = int(self.rows[index])
            image = self._decode(row)
            if image.shape != (size, size, 3):
                raise InputError(
                    f"{self.images.where(row)}: {image.shape[1]}×{image.shape[0]} pixels, expected an aligned "
                    f"{size}×{size} crop. Run pkd-align --size {size} on the photographs first."
                )
            crops[place] = image
        return crops

    def crop_size(self) -> int:
        """Return height and width of the first image, pixels. Raises InputError if it is not square."""
        row = int(self.rows[0])
        height, width = map(int, self._decode(row).shape[:2])
        if height != width:
            raise InputError(
                f"{self.images.where(row)}: {width}×{height} pixels, expected a square crop. Run pkd-align."
            )
        return height

    def digests(self, cache: Path | None = None) -> Rows:
        """Hash every image's bytes (SHA-256), in order → N rows of 32 uint8, by index. Computed once.

        ``cache``: folder that remembers them by file, size and times, so that the next start need not read the images.
        """
        if not self._known:
            self._known.append(digests_of(self.images, self.rows, cache))
        return self._known[0]

    def digest(self) -> str:
        """Hash (SHA-256) contents and identities, independent of where the files lie and of their order."""
        return content_digest(self.digests(), self.labels, self.identities)

    def select(self, indices: Ints) -> FaceSet:
        """Take the images at ``indices``, with the identities relabelled to those that occur."""
        labels = self.labels[indices]
        kept = np.unique(labels[labels >= 0])
        relabelled = np.where(labels >= 0, np.searchsorted(kept, labels), UNLABELLED)
        return FaceSet(self.images, self.rows[indices], relabelled, tuple(self.identities[i] for i in kept))

    @classmethod
    def read(cls, *sources: str | Path, labelled: bool = True) -> FaceSet:
        """Read folders (``<identity>/…/<image>``), lists of paths, ``.rec`` and ``.tar`` files, and folders of these.

        Paths in a list are relative to the list's own folder or to that folder's parent, whichever holds the first;
        their identity is the parent folder. Class numbers mean the same people in all files of one folder; where there
        are other sources, too, they are told apart by the name of that folder. With ``labelled=False`` every image
        gets label −1 and images may lie anywhere below a folder. Raises InputError naming what is missing.
        """
        found = [each for source in sources for each in _found(Path(source), labelled)]
        names = _distinct(found)
        identities = tuple(sorted({identity for own in names for identity in own}))
        index = {identity: i for i, identity in enumerate(identities)}
        images = ImageCollection(tuple(each.images for each in found))
        labels = []
        for each, own in zip(found, names, strict=True):
            place = np.array([*(index[identity] for identity in own), UNLABELLED], np.int64)
            labels.append(place[each.owners])
        return cls(
            images=images,
            rows=np.arange(len(images)),
            labels=np.concatenate([np.empty(0, np.int64), *labels]),
            identities=identities,
        )

    def _decode(self, row: int) -> Rgb:
        data = self.images.read(row)
        try:
            return decode_rgb(data)
        except BadImage as error:
            raise type(error)(f"{self.images.where(row)}: {error}") from None


def join(a: FaceSet, b: FaceSet) -> FaceSet:
    """Join the images of ``a`` and of an unlabelled ``b``."""
    if b.identities:
        raise InputError("only an unlabelled set can be joined to another; read both sources with one FaceSet.read.")
    images = ImageCollection(a.images.sources + b.images.sources)
    rows = np.concatenate([a.rows, b.rows + len(a.images)])
    return FaceSet(images, rows, np.concatenate([a.labels, b.labels]), a.identities)


def _found(source: Path, labelled: bool) -> list[Found]:
    try:
        return _open(source, labelled)
    except OSError as error:
        raise InputError(f"{error.filename or source}: {error.strerror or error}. Make it readable.") from None


def _open(source: Path, labelled: bool) -> list[Found]:
    if source.is_dir():
        here = sorted(path for path in source.iterdir() if not is_hidden(path.name))
        packed = [path for path in here if path.suffix in CONTAINERS and path.is_file()]
        if packed:
            loose = [path.name for path in here if path.is_dir() or path.suffix.lower() in SUFFIXES]
            reason = f"beside {packed[0].name}, which is read instead; give the folder and the containers by themselves"
            report_left_out(source, [LeftOut(name, reason) for name in loose])
            return [CONTAINERS[path.suffix](path, labelled) for path in packed]
        return [read_folder(source, labelled)]
    if not source.is_file():
        raise InputError(
            f"{source}: no such folder or list file. Give a folder of aligned crops, a list, a .rec or a .tar."
        )
    return [CONTAINERS.get(source.suffix, read_list)(source, labelled)]


def _distinct(found: list[Found]) -> list[tuple[str, ...]]:
    """Name the identities of each source; class numbers get their folder's name where others have the same."""
    numbered = {each.folder for each in found if each.numbered}
    if len(numbered) < 2 and all(each.numbered for each in found):
        return [each.identities for each in found]
    clash = len({folder.name for folder in numbered}) < len(numbered)
    return [
        tuple(f"{each.folder if clash else each.folder.name}/{number}" for number in each.identities)
        if each.numbered
        else each.identities
        for each in found
    ]


def digests_of(images: ImageCollection, rows: Ints, cache: Path | None) -> Rows:
    """Hash the bytes of each image (SHA-256) → N rows of 32 uint8. Raises BadImage.

    ``cache``: folder that remembers them by path, size and times of the file. The result is memory-mapped then, unless
    a file is so young that another change of it could go unnoticed; such files are not remembered.
    """
    if cache is None:
        return _hash(images, rows)
    store = KeyedRows(cache / "digests", "sha256", "u8", BYTES, np.uint8)
    keys, untouched = images.stamps(rows)
    missing = np.flatnonzero((store.find(keys) < 0) & untouched)
    missing = missing[np.argsort(rows[missing], kind="stable")]  # containers are read from front to back
    for part, found in _hashed(images, rows[missing]):
        store.append(keys[missing[part]], found)
    young = np.flatnonzero(~untouched)
    if not len(young):
        return store.view(keys)
    found = np.empty((len(rows), BYTES), np.uint8)
    found[untouched] = store.view(keys[untouched])[:]
    found[young] = _hash(images, rows[young])
    return found


def content_digest(digests: Rows, labels: Ints, identities: tuple[str, ...]) -> str:
    """Hash (SHA-256) the sorted lines ``<hex digest> <identity>``, whatever the order of the images.

    ``labels``: int64 N into ``identities``, −1 for images without one, whose line ends after the space.
    """
    owners = [*identities, ""]
    rank = np.empty(len(owners), np.int64)
    rank[np.argsort(np.array(owners, object), kind="stable")] = np.arange(len(owners))
    halves = np.empty((2, len(labels)), ">u8")  # 16 of 32 bytes: enough to tell 10²⁰ images apart
    for start in range(0, len(labels), BLOCK):
        rows = np.ascontiguousarray(digests[start : start + BLOCK])
        halves[:, start : start + BLOCK] = rows.view(">u8")[:, :2].T
    order = np.lexsort((rank[labels], halves[1].astype(np.uint64), halves[0].astype(np.uint64)))
    sha = hashlib.sha256()
    for start in range(0, len(labels), BLOCK):
        block = order[start : start + BLOCK]
        text = digests[block].tobytes().hex()
        lines = [f"{text[64 * i : 64 * i + 64]} {owners[label]}" for i, label in enumerate(labels[block].tolist())]
        sha.update((("\n" if start else "") + "\n".join(lines)).encode())
    return sha.hexdigest()


def _hash(images: ImageCollection, rows: Ints) -> NDArray[np.uint8]:
    out = np.empty((len(rows), BYTES), np.uint8)
    for part, found in _hashed(images, rows):
        out[part] = found
    return out


def _hashed(images: ImageCollection, rows: Ints) -> Iterator[tuple[slice, NDArray[np.uint8]]]:
    def work(part: slice) -> tuple[slice, NDArray[np.uint8]]:
        raw = b"".join(hashlib.sha256(images.read(row)).digest() for row in rows[part].tolist())
        return part, np.frombuffer(raw, np.uint8).reshape(-1, BYTES)

    parts = (slice(start, start + CHUNK) for start in range(0, len(rows), CHUNK))
    return in_order(work, parts, workers=READERS)
