"""RecordIO and tar: whatever goes in comes out, and damage is an InputError or a BadImage, never anything else."""

from __future__ import annotations

import io
import tarfile
import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from pkd.toolkit.core.errors import InputError
from pkd.toolkit.data.recordio import read_recordio
from pkd.toolkit.data.tar import read_tar
from tests.support.recordio_writer import MAGIC, insightface_records, write_records

PIECES = st.lists(st.sampled_from([MAGIC, b"\x00", b"ab", b"cdef", MAGIC[:2], b"\xff" * 5]), min_size=1, max_size=12)
IMAGES = st.lists(st.tuples(st.integers(0, 2**24 - 1), PIECES.map(b"".join)), min_size=1, max_size=8)
DAMAGE = st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 255)), min_size=1, max_size=4)


@given(IMAGES, st.booleans(), st.booleans())
@settings(max_examples=60)
def test_records_come_back(images: list[tuple[int, bytes]], insightface: bool, index: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        plain = [(key, float(label), image) for key, (label, image) in enumerate(images)]
        rec = write_records(Path(folder) / "a.rec", insightface_records(images) if insightface else plain, index=index)
        found = read_recordio(rec, labelled=True)
        assert [found.images.read(i) for i in range(len(found.images))] == [image for _, image in images]
        assert [int(found.identities[owner]) for owner in found.owners] == [label for label, _ in images]


@given(IMAGES, DAMAGE, st.booleans())
@settings(max_examples=120)
def test_damaged_records_are_refused_or_read(
    images: list[tuple[int, bytes]], damage: list[tuple[int, int]], index: bool
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        rec = write_records(Path(folder) / "a.rec", insightface_records(images), index=index)
        _spoil(rec, damage)
        _read_all(rec)


@given(IMAGES, DAMAGE, st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))
@settings(max_examples=120)
def test_damaged_tars_are_refused_or_read(
    images: list[tuple[int, bytes]], damage: list[tuple[int, int]], form: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.tar"
        with tarfile.open(path, "w", format=form) as tar:
            for i, (label, image) in enumerate(images):
                for name, data in ((f"{'n' * 20 * i}/{i}.png", image), (f"{'n' * 20 * i}/{i}.cls", b"%d" % label)):
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
        found = read_tar(path, labelled=True)
        assert [found.images.read(i) for i in range(len(found.images))] == [image for _, image in images]
        _spoil(path, damage)
        _read_all(path)


def _spoil(path: Path, damage: list[tuple[int, int]]) -> None:
    data = bytearray(path.read_bytes())
    for at, value in damage:
        data[at % len(data)] = value
    path.write_bytes(data[: len(data) - damage[0][0] % 7])


def _read_all(path: Path) -> None:
    try:
        found = (read_recordio if path.suffix == ".rec" else read_tar)(path, labelled=True)
        for row in range(len(found.images)):
            found.images.read(row)
    except InputError as error:
        assert path.stem in str(error)
        assert len(str(error).splitlines()) == 1
