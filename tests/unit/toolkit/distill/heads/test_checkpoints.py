"""Heads of other trainers: every layout of arcface_torch on any number of ranks, and what can be wrong with files."""

from __future__ import annotations

import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pkd.toolkit.core.errors import BadHead
from pkd.toolkit.distill.heads.head import Head, class_means, read_head
from tests.support.head_data import Float, clusters, unit, write_shards

CLASSES, DIM = 37, 16
NAMES = tuple(f"p{i:02}" for i in range(CLASSES))
WEIGHT: Float = class_means(*clusters(CLASSES, 3, DIM), NAMES).centres.numpy() * 3.5  # type: ignore[assignment]  # trained rows are not unit


def read(path: Path | list[str], **more: Any) -> Head:
    return read_head([str(path)] if isinstance(path, Path) else path, NAMES, DIM, **more)


@pytest.mark.parametrize("layout", ["rank", "softmax_fc", "checkpoint"])
@pytest.mark.parametrize("world", [1, 2, 3, 4, 5, 6, 7, 8, 12])
def test_shards_of_any_world_size_equal_the_whole_head(tmp_path: Path, layout: str, world: int) -> None:
    paths = write_shards(tmp_path, WEIGHT, world, layout)
    for given in ([str(tmp_path)], [str(p) for p in reversed(paths)], [f"{tmp_path}/*gpu_*.pt"]):
        if layout == "rank" and "*" in given[0]:
            given = [f"{tmp_path}/rank_*"]  # matches the momentum, too
        head = read(given)
        np.testing.assert_allclose(head.centres, unit(WEIGHT), atol=1e-6)
        assert head.identities == NAMES and len(head.parts) == (world if world > 1 else 0)


def test_momentum_beside_the_shards_is_left_out_and_a_count_of_gpus_is_no_rank(tmp_path: Path) -> None:
    write_shards(tmp_path, WEIGHT, 3, "rank")
    np.testing.assert_allclose(read([str(p) for p in tmp_path.iterdir()]).centres, unit(WEIGHT), atol=1e-6)
    torch.save(LIKE, tmp_path / "ms1mv3_gpu8_head.pt")
    np.testing.assert_allclose(read(tmp_path / "ms1mv3_gpu8_head.pt").centres, unit(WEIGHT), atol=1e-6)


def test_a_label_map_goes_with_the_rows(tmp_path: Path) -> None:
    write_shards(tmp_path / "s", WEIGHT, 3)
    (tmp_path / "map.txt").write_text("\n".join(reversed(NAMES)))
    head = read(tmp_path / "s", labels=tmp_path / "map.txt")
    assert head.identities == NAMES[::-1]
    (tmp_path / "map.txt").write_text("\n".join(NAMES[:-1]))
    with pytest.raises(BadHead, match=r"map.txt: names 36 identities, .*37 class rows"):
        read(tmp_path / "s", labels=tmp_path / "map.txt")


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    for gone, message in ((1, "rank 1 is missing"), (0, "rank 0 is missing"), (3, "37 centres|28 centres")):
        folder = tmp_path / str(gone)
        write_shards(folder, WEIGHT, 4)[gone].unlink()
        with pytest.raises(BadHead, match=message):
            read(folder)
    alone = write_shards(tmp_path / "alone", WEIGHT, 4)
    with pytest.raises(BadHead, match=r"softmax_fc_gpu_2\.pt: is the shard of rank 2; rank 0 to 1 are missing"):
        read(alone[2])
    with pytest.raises(BadHead, match=r"softmax_fc_gpu_0\.pt: 10 centres, but the images show 37 .*all shards"):
        read(alone[0])


def test_a_shard_twice_and_a_shard_without_a_rank(tmp_path: Path) -> None:
    paths = write_shards(tmp_path, WEIGHT, 2)
    (tmp_path / "b").mkdir()
    copy = tmp_path / "b" / paths[1].name
    copy.write_bytes(paths[1].read_bytes())
    with pytest.raises(BadHead, match="rank 1 is given twice"):
        read([*map(str, paths), str(copy)])
    renamed = paths[1].rename(tmp_path / "second.pt")
    with pytest.raises(BadHead, match=r"second\.pt: its name holds no rank.*Rename"):
        read([str(paths[0]), str(renamed)])


def test_renamed_shards_of_unequal_size_break_the_split(tmp_path: Path) -> None:
    paths = write_shards(tmp_path, WEIGHT, 4)  # 10, 9, 9, 9
    first, last = paths[0].read_bytes(), paths[3].read_bytes()
    paths[0].write_bytes(last)
    paths[3].write_bytes(first)
    with pytest.raises(BadHead, match=r"softmax_fc_gpu_0\.pt: holds 9 classes, but rank 0 of 4 has 10 of 37"):
        read(tmp_path)


def test_rows_without_direction_are_named_by_file_and_row(tmp_path: Path) -> None:
    for value in (0.0, np.nan, np.inf):
        weight = WEIGHT.copy()
        weight[[20, 30]] = value
        write_shards(tmp_path, weight, 4)
        with pytest.raises(BadHead, match=r"2 of 37 .*first: row 1 of softmax_fc_gpu_2\.pt, p20"):
            read(tmp_path)


LIKE = torch.from_numpy(WEIGHT)


@pytest.mark.parametrize(
    "content",
    [
        {"weight": LIKE},
        {"kernel": LIKE.T.contiguous(), "t": torch.zeros(1)},
        {"module.weight": LIKE},
        {"state_dict": {"head.kernel": LIKE.T.contiguous(), "model.conv.weight": torch.zeros(4, 3, 3, 3)}},
        {"head": {"weight": LIKE}},
        {"head": LIKE},
        OrderedDict([("0.weight", LIKE), ("0.bias", torch.zeros(CLASSES))]),
        {"state_dict_softmax_fc": {"weight": LIKE.half()}},
        {"weight": LIKE, "weight_mom": LIKE * 0, "weight_index": torch.arange(3), "weight_activated": LIKE[:3]},
        LIKE,
        torch.nn.Parameter(LIKE),
    ],
)
def test_names_and_nestings_in_use(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "head.pt")
    np.testing.assert_allclose(read(tmp_path / "head.pt").centres, unit(WEIGHT), atol=2e-3)


def test_files_from_before_torch_1_6(tmp_path: Path) -> None:
    torch.save({"weight": LIKE}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    np.testing.assert_allclose(read(tmp_path / "old.pt").centres, unit(WEIGHT), atol=1e-6)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"weight": LIKE.T.contiguous()}, "weight is 16×37 .*transposed"),
        ({"weight": torch.ones(CLASSES, DIM + 1)}, "weight is 37×17 .*has 16 dimensions"),
        ({"weight": torch.ones(CLASSES)}, "weight is 37 of"),
        ({"weight": torch.ones(CLASSES, DIM, dtype=torch.int64)}, "torch.int64"),
        ({"conv1.weight": torch.zeros(4, 3, 3, 3), "fc.weight": torch.zeros(DIM, 90)}, "holds a backbone.*softmax_fc"),
        ({"a.weight": LIKE, "b.weight": LIKE}, "no classifier that is known"),
        ({}, "no classifier that is known"),
        ([LIKE], "no classifier that is known"),
        ({"weight": torch.ones(0, DIM)}, "0 centres"),
    ],
)
def test_what_holds_no_head_is_refused_by_name(tmp_path: Path, content: Any, message: str) -> None:
    torch.save(content, tmp_path / "bad.pt")
    with pytest.raises(BadHead, match=rf"bad\.pt: .*{message}"):
        read(tmp_path / "bad.pt")


def test_momentum_is_no_head(tmp_path: Path) -> None:
    write_shards(tmp_path, WEIGHT, 2, "rank")
    with pytest.raises(BadHead, match="momentum"):
        read(tmp_path / "rank_0_softmax_weight_mom.pt")


class Dangerous:
    """Write a file when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("ran"),)


def test_nothing_in_a_file_is_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"weight": LIKE, "x": Dangerous()}, "a.pt")
    Path("b.pt").write_bytes(pickle.dumps(Dangerous()))
    for name in ("a.pt", "b.pt"):
        with pytest.raises(
            BadHead, match=rf"{name}: (holds an object besides tensors|is no checkpoint that torch reads)"
        ):
            read([name])
    assert not Path("ran").exists()


def test_paths_that_lead_nowhere(tmp_path: Path) -> None:
    (tmp_path / "noise.pt").write_bytes(b"noise")
    (tmp_path / "cut.pt").write_bytes(write_shards(tmp_path / "s", WEIGHT, 1)[0].read_bytes()[:-500])
    for given, message in (
        ("nowhere.pt", "No such file"),
        ("nothing*.pt", "matches no file"),
        (".", "holds none of"),
        ("noise.pt", "no checkpoint"),
        ("cut.pt", "no checkpoint"),
    ):
        with pytest.raises(BadHead, match=message):
            read([str(tmp_path / given)])


def test_shards_named_with_a_colon_are_found_and_ordered(tmp_path: Path) -> None:
    """arcface_torch of 2021 wrote rank:0_softmax_weight.pt, its momentum beside it."""
    for path in write_shards(tmp_path, WEIGHT, 3, "rank"):
        path.rename(path.with_name(path.name.replace("rank_", "rank:")))
    for path in tmp_path.glob("rank_*_mom.pt"):
        path.rename(path.with_name(path.name.replace("rank_", "rank:")))
    assert len(list(tmp_path.glob("rank:*"))) >= 3
    for given in ([str(tmp_path)], [f"{tmp_path}/rank:*"]):
        np.testing.assert_allclose(read(given).centres, unit(WEIGHT), atol=1e-6)
    with pytest.raises(BadHead, match=r"rank:2_softmax_weight\.pt: is the shard of rank 2"):
        read(tmp_path / "rank:2_softmax_weight.pt")


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
@pytest.mark.parametrize("layout", ["coo", "csr"])
def test_a_sparse_head_is_read_and_its_empty_rows_are_refused(tmp_path: Path, layout: str) -> None:
    dense = torch.from_numpy(WEIGHT)
    sparse = dense.to_sparse() if layout == "coo" else dense.to_sparse_csr()
    torch.save({"weight": sparse}, tmp_path / "head.pt")
    np.testing.assert_allclose(read(tmp_path / "head.pt").centres, unit(WEIGHT), atol=1e-6)
    dense = dense.clone()
    dense[5] = 0
    torch.save(dense.to_sparse() if layout == "coo" else dense.to_sparse_csr(), tmp_path / "head.pt")
    with pytest.raises(BadHead, match=r"1 of 37 centres are zero.*row 5 of head.pt, p05"):
        read(tmp_path / "head.pt")
