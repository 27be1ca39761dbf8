"""RecordIO: what MXNet wrote is read, and what is broken is named."""

from __future__ import annotations

import base64
import struct
from pathlib import Path

import numpy as np
import pytest

from pkd.toolkit.core.errors import BadImage, InputError
from pkd.toolkit.data.recordio import read_recordio
from tests.support.recordio_writer import MAGIC, insightface_records, write_records

# Written by MXNet 1.9.1 itself: w = mx.recordio.MXIndexedRecordIO("g.idx", "g.rec", "w"), then for each entry of
# RECORDS w.write_idx(key, mx.recordio.pack(mx.recordio.IRHeader(0, label, key, 0), image)).
MXNET_REC = base64.b64decode(
    "CiPXziAAAAACAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAMBAAAAAQQoj184bAAAAAAAAAAAAgEABAAAAAAAAAAAAAAAAAAAAb25lAAoj184eAAAAAAAAAAAA"
    "gEACAAAAAAAAAAAAAAAAAAAAc2Vjb25kAAAKI9fOLAAAAAMAAAAAAAAAAwAAAAAAAAAAAAAAAAAAAAAA4EAAAAA/AACAPnRoaXJkISEhCiPXzhwAACAAAAAA"
    "AADgQAQAAAAAAAAAAAAAAAAAAABhYmNkCiPXzgAAAEAKI9fOBAAAQHRhaWwKI9fOAAAAYAoj184lAAAAAAAAAAAA4EAFAAAAAAAAAAAAAAAAAAAAYWIKI9fO"
    "c2hpZnRlZAAAAAoj184gAAAAAgAAAAAAAAAGAAAAAAAAAAAAAAAAAAAAAACAPwAAQEAKI9fOIAAAAAIAAAAAAAAABwAAAAAAAAAAAAAAAAAAAAAAQEAAAMBA"
)
MXNET_IDX = "0\t0\n1\t40\n2\t76\n3\t116\n4\t168\n5\t232\n6\t280\n7\t320\n"
RECORDS = [
    (0, [6.0, 8.0], b""),
    (1, 4.0, b"one"),
    (2, 4.0, b"second"),
    (3, [7.0, 0.5, 0.25], b"third!!!"),
    (4, 7.0, b"abcd" + MAGIC + MAGIC + b"tail" + MAGIC),
    (5, 7.0, b"ab" + MAGIC + b"shifted"),
    (6, [1.0, 3.0], b""),
    (7, [3.0, 6.0], b""),
]
IMAGES = [image for _, _, image in RECORDS[1:6]]


def test_the_writer_of_these_tests_writes_what_mxnet_writes(tmp_path: Path) -> None:
    rec = write_records(tmp_path / "g.rec", RECORDS)  # type: ignore[arg-type]
    assert rec.read_bytes() == MXNET_REC
    assert rec.with_suffix(".idx").read_text() == MXNET_IDX


@pytest.mark.parametrize("index", [True, False])
def test_what_mxnet_wrote_is_read_with_and_without_its_index(tmp_path: Path, index: bool) -> None:
    rec = tmp_path / "train.rec"
    rec.write_bytes(MXNET_REC)
    if index:
        rec.with_suffix(".idx").write_text(MXNET_IDX)
    found = read_recordio(rec, labelled=True)
    assert [found.images.read(i) for i in range(len(found.images))] == IMAGES
    assert [found.images.name(i) for i in range(5)] == [f"train.rec#{key}" for key in range(1, 6)]
    assert found.identities == ("00000004", "00000007")
    assert found.owners.tolist() == [0, 0, 1, 1, 1]
    assert found.numbered


def test_without_insightface_s_first_record_every_record_is_an_image(tmp_path: Path) -> None:
    rec = write_records(tmp_path / "a.rec", [(i, float(i % 2), b"image %d" % i) for i in range(4)])
    found = read_recordio(rec, labelled=True)
    assert found.owners.tolist() == [0, 1, 0, 1]
    assert found.images.read(0) == b"image 0"


def test_keys_decide_the_order_not_places(tmp_path: Path) -> None:
    rec = write_records(tmp_path / "a.rec", [(9, 1.0, b"later"), (2, 0.0, b"sooner")])
    found = read_recordio(rec, labelled=True)
    assert [found.images.read(i) for i in range(2)] == [b"sooner", b"later"]
    assert found.images.name(1) == "a.rec#9"


def test_a_label_below_zero_is_no_identity_and_unlabelled_asks_for_none(tmp_path: Path) -> None:
    rec = write_records(tmp_path / "a.rec", [(0, -1.0, b"x"), (1, 5.0, b"y")])
    found = read_recordio(rec, labelled=True)
    assert (found.owners.tolist(), found.identities) == ([-1, 0], ("00000005",))
    loose = read_recordio(rec, labelled=False)
    assert (loose.owners.tolist(), loose.identities, loose.numbered) == ([-1, -1], (), False)


@pytest.mark.parametrize("label", [0.5, float("nan"), float("inf"), 2.0**24])
def test_labels_that_are_no_class_numbers(tmp_path: Path, label: float) -> None:
    rec = write_records(tmp_path / "a.rec", [(0, 1.0, b"x"), (1, label, b"y")])
    with pytest.raises(InputError, match=r"a\.rec#1: label .* is no class number from 0 to 16,777,215 \(1 such"):
        read_recordio(rec, labelled=True)
    assert len(read_recordio(rec, labelled=False).images) == 2


def test_every_cut_of_a_file_is_noticed(tmp_path: Path) -> None:
    """Wherever a copy broke off: with the index at once; without it unless it broke off between two records."""
    records = insightface_records([(i // 2, b"image" * (i + 1)) for i in range(6)])
    rec = write_records(tmp_path / "a.rec", records)
    whole, index = rec.read_bytes(), rec.with_suffix(".idx")
    starts = [int(line.split()[1]) for line in index.read_text().splitlines()]
    for length in range(0, len(whole), 3):
        rec.write_bytes(whole[:length])
        with pytest.raises(InputError, match=r"a\.rec"):
            read_recordio(rec, labelled=True)
    index.unlink()
    for length in range(len(whole)):
        rec.write_bytes(whole[:length])
        if length in (starts[7] - 2, starts[7] - 1, *starts[7:]):  # padding, or identities' records, are missing
            assert len(read_recordio(rec, labelled=True).images) == 6
        else:
            with pytest.raises(InputError, match=r"a\.rec"):
                read_recordio(rec, labelled=True)


def test_a_wrong_magic_number_is_named_with_its_place(tmp_path: Path) -> None:
    rec = write_records(tmp_path / "a.rec", [(i, 0.0, b"image") for i in range(5)])
    data = bytearray(rec.read_bytes())
    data[80] ^= 1
    rec.write_bytes(data)
    for _ in range(2):
        with pytest.raises(InputError, match="no RecordIO frame at byte 80 "):
            read_recordio(rec, labelled=True)
        rec.with_suffix(".idx").unlink(missing_ok=True)


def test_a_record_that_breaks_after_it_was_indexed_is_named(tmp_path: Path) -> None:
    rec = write_records(tmp_path / "a.rec", [(i, 0.0, b"image") for i in range(3)])
    images = read_recordio(rec, labelled=True).images
    data = bytearray(rec.read_bytes())
    data[40] ^= 1
    rec.write_bytes(data[:100])
    assert images.read(0) == b"image"
    with pytest.raises(BadImage, match=r"a\.rec#1: no RecordIO frame at byte 40"):
        images.read(1)
    with pytest.raises(BadImage, match=r"a\.rec#2: truncated"):
        images.read(2)
    rec.unlink()
    with pytest.raises(BadImage, match=r"a\.rec#0: .*No such file"):
        images.read(0)


def test_parts_out_of_order_and_a_missing_last_part(tmp_path: Path) -> None:
    def frame(flag: int, data: bytes) -> bytes:
        return MAGIC + struct.pack("<I", flag << 29 | len(data)) + data

    rec = tmp_path / "a.rec"
    head = struct.pack("<IfQQ", 0, 1.0, 0, 0)
    for flags, words in (((2,), "out of order"), ((1, 0), "out of order"), ((1, 2), "lacks a part"), ((5,), "corrupt")):
        rec.write_bytes(b"".join(frame(flag, head) for flag in flags))
        with pytest.raises(InputError, match=words):
            read_recordio(rec, labelled=True)


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (b"short", "no room for the image header"),
        (struct.pack("<IfQQ", 2**31, 1.0, 0, 0) + b"image", "no room for the image header"),
    ],
)
def test_records_that_are_no_images(tmp_path: Path, record: bytes, words: str) -> None:
    from tests.support.recordio_writer import frames

    rec = tmp_path / "a.rec"
    rec.write_bytes(frames(record))
    with pytest.raises(InputError, match=f"a.rec#0: .*{words}"):
        read_recordio(rec, labelled=True)


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ("", "holds no 'key<TAB>offset' lines"),
        ("0\n1\n", "holds no 'key<TAB>offset' lines"),
        ("0\tzero\n", "not an index of"),
        ("0\t0\n0\t32\n", "has the key 0 twice"),
        ("0\t0\n1\t4000\n", r"puts record 1 at 4,000 \(1 such"),
        ("0\t0\n1\t-4\n", "puts record 1 at -4"),
        ("0\t0\n1\t34\n", "puts record 1 at 34"),
        ("0\t0\n1\t20\n", "no RecordIO frame at byte 20"),
        ("\x00\x01\x02", "not an index of"),
    ],
)
def test_bad_indices(tmp_path: Path, index: str, words: str) -> None:
    rec = write_records(tmp_path / "a.rec", [(0, 0.0, b"x"), (1, 0.0, b"y")])
    rec.with_suffix(".idx").write_text(index)
    with pytest.raises(InputError, match=words):
        read_recordio(rec, labelled=True)


def test_an_index_that_lacks_announced_images(tmp_path: Path) -> None:
    rec = write_records(tmp_path / "a.rec", insightface_records([(0, b"x"), (0, b"y"), (1, b"z")]))
    index = rec.with_suffix(".idx")
    index.write_text("".join(index.read_text().splitlines(keepends=True)[:3]))
    with pytest.raises(InputError, match="announces 3 images, 2 are there"):
        read_recordio(rec, labelled=True)


def test_a_file_of_identities_only(tmp_path: Path) -> None:
    rec = write_records(tmp_path / "a.rec", [(5, [1.0, 2.0], b"")])
    with pytest.raises(InputError, match="holds no image"):
        read_recordio(rec, labelled=True)


def test_stamps_change_with_the_file_and_differ_by_place(tmp_path: Path) -> None:
    rec = write_records(tmp_path / "a.rec", [(i, 0.0, b"image") for i in range(3)])
    rows = np.arange(3)
    before, _ = read_recordio(rec, labelled=True).images.stamps(rows)
    again, _ = read_recordio(rec, labelled=True).images.stamps(rows)
    np.testing.assert_array_equal(before, again)
    assert len(set(before.tolist())) == 3
    write_records(rec, [(i, 0.0, b"imago") for i in range(3)])
    after, settled = read_recordio(rec, labelled=True).images.stamps(rows)
    assert not set(before.tolist()) & set(after.tolist())
    assert not settled.any()
