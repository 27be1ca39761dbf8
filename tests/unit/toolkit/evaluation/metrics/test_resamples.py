"""draws.npz: what is kept of every resample, and how a damaged one is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pkd.toolkit.core.errors import InputError
from pkd.toolkit.evaluation.metrics.resamples import FILE, ResampleValues, read_resample_values, write_resample_values

DRAWN = {"data": "ab" * 32, "protocol": "all pairs of one set", "resamples": "3", "seed": "0"}


def test_draws_come_back_as_they_were_written(tmp_path: Path) -> None:
    made = ResampleValues(DRAWN, {"S–T/tar_balanced/0.001": np.array([0.1, 0.2, 0.30000000000000004])})
    write_resample_values(tmp_path, made)
    read = read_resample_values(tmp_path)
    assert read.source == DRAWN and read.key == made.key
    assert read.values.keys() == made.values.keys()
    np.testing.assert_array_equal(read.values["S–T/tar_balanced/0.001"], [0.1, 0.2, 0.30000000000000004])


@pytest.mark.parametrize("changed", ["data", "protocol", "resamples", "seed"])
def test_the_key_differs_where_other_people_were_drawn(changed: str) -> None:
    assert ResampleValues(DRAWN).key != ResampleValues({**DRAWN, changed: "1"}).key


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04broken"])
def test_a_damaged_file_is_refused_with_the_remedy(tmp_path: Path, content: bytes) -> None:
    (tmp_path / FILE).write_bytes(content)
    with pytest.raises(InputError, match=r"draws\.npz: damaged.*Run pkd-evaluate again"):
        read_resample_values(tmp_path)


def test_an_archive_without_the_description_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / FILE, values=np.ones(3))
    with pytest.raises(InputError, match="damaged"):
        read_resample_values(tmp_path)


def test_a_missing_file_names_the_command_that_makes_it(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no such file\. Run pkd-evaluate again"):
        read_resample_values(tmp_path)
