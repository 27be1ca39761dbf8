"""KeyedRows: few keys in many, many in few, and rows that are read by index."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pkd.toolkit.core.errors import InputError
from pkd.toolkit.data.row_store import KeyedRows, StoredRows


def keys_of(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**64, count, np.uint64)


@pytest.mark.parametrize(("stored", "asked"), [(0, 5), (1, 1), (1000, 3), (1000, 1000), (20, 5000), (100_000, 64)])
def test_find_against_a_dictionary(tmp_path: Path, stored: int, asked: int) -> None:
    store = KeyedRows(tmp_path, "x", "i8", 1, np.int64)
    known = keys_of(stored, 0)
    store.append(known, np.arange(stored)[:, None])
    wanted = np.concatenate([known[:: max(1, stored // asked)], keys_of(asked, 1)])
    where = {key: row for row, key in enumerate(known.tolist())}
    assert store.find(wanted).tolist() == [where.get(key, -1) for key in wanted.tolist()]
    assert store.rows()[:, 0].tolist() == list(range(stored))


@pytest.mark.parametrize("asked", [1, 300])
def test_keys_that_share_their_first_bits_and_extreme_ones(tmp_path: Path, asked: int) -> None:
    store = KeyedRows(tmp_path, "x", "u8", 1, np.uint8)
    known = np.array([*range(100), 2**64 - 1, 2**63], np.uint64)
    store.append(known, np.zeros((len(known), 1), np.uint8))
    wanted = np.array([2**64 - 1, 0, 99, 100, 2**63, 2**64 - 2] * asked, np.uint64)
    assert store.find(wanted).tolist() == [100, 0, 99, -1, 101, -1] * asked


def test_rows_are_not_copied_before_they_are_asked_for(tmp_path: Path) -> None:
    store = KeyedRows(tmp_path, "x", "f32", 3, np.float32)
    rows = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
    store.append(np.arange(50, dtype=np.uint64), rows)
    assert isinstance(store.rows(), np.memmap)
    order = np.random.default_rng(1).permutation(50)
    view = StoredRows(store.rows(), order)
    assert (len(view), view.shape) == (50, (50, 3))
    for index in (np.array([3, 3, 0]), np.arange(50) % 7 == 0, slice(5, 9), slice(None), 4, np.empty(0, np.int64)):
        got = view[index]
        np.testing.assert_array_equal(got, rows[order][index])
        assert type(got) is np.ndarray
        assert got.dtype == np.float32
        got += 1  # a copy: the store is not touched
    np.testing.assert_array_equal(store.rows(), rows)


def test_a_view_stays_right_while_another_run_appends(tmp_path: Path) -> None:
    store = KeyedRows(tmp_path, "x", "f32", 2, np.float32)
    store.append(np.array([7], np.uint64), np.ones((1, 2), np.float32))
    view = StoredRows(store.rows(), store.find(np.array([7], np.uint64)))
    KeyedRows(tmp_path, "x", "f32", 2, np.float32).append(np.array([8], np.uint64), np.full((1, 2), 9, np.float32))
    assert view[:].tolist() == [[1, 1]]
    assert store.find(np.array([8, 7], np.uint64)).tolist() == [1, 0]


def test_rows_without_their_keys_are_overwritten(tmp_path: Path) -> None:
    """Killed between the two files."""
    store = KeyedRows(tmp_path, "x", "f32", 2, np.float32)
    with (tmp_path / "x.f32").open("ab") as file:
        file.write(b"\xff" * 8)
    store.append(np.array([1], np.uint64), np.ones((1, 2), np.float32))
    assert store.rows()[store.find(np.array([1], np.uint64))].tolist() == [[1, 1]]


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="Pass --cache DIR or set PKD_CACHE"):
        KeyedRows(tmp_path / "file", "x", "f32", 2, np.float32)


def test_a_view_of_what_is_gone_is_refused(tmp_path: Path) -> None:
    store = KeyedRows(tmp_path, "x", "f32", 2, np.float32)
    keys = np.arange(3, dtype=np.uint64)
    store.append(keys, np.ones((3, 2), np.float32))
    assert store.view(keys[::-1]).shape == (3, 2)
    (tmp_path / "x.f32").write_bytes(b"")
    with pytest.raises(InputError, match=r"x\.f32: 3 of 3 rows that were just written are gone"):
        store.view(keys)


def test_nobody_but_the_owner_reads_what_is_cached(tmp_path: Path) -> None:
    """Rows may be embeddings of faces."""
    folder = tmp_path / "cache/pkd"
    KeyedRows(folder, "x", "f32", 4, np.float32)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (folder.parent, folder, *folder.iterdir())}
    assert modes == {"cache": 0o700, "pkd": 0o700, "x.keys": 0o600, "x.f32": 0o600}
    (folder / "x.f32").chmod(0o644)  # as an older pkd made it
    KeyedRows(folder, "x", "f32", 4, np.float32)
    assert (folder / "x.f32").stat().st_mode & 0o777 == 0o600
