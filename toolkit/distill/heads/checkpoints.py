"""Read class centres from other trainers' checkpoints: arcface_torch of every version, PartialFC, plain classifiers.

The files that arcface_torch writes, one per rank, are ``rank:R_softmax_weight.pt`` (2021, a bare tensor, its momentum
beside it), ``softmax_fc_gpu_R.pt`` (2022, ``weight`` and optimiser buffers), ``checkpoint_gpu_R.pt`` (since 2022,
``state_dict_softmax_fc``). Of C classes, rank R of W holds C // W, and one more if R < C % W, in order of the classes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pkd.toolkit.core.errors import BadHead
from pkd.toolkit.distill.heads.rows import CHUNK, Float
from pkd.toolkit.distill.models.student import unreadable

PATTERNS = ("head.npz", "checkpoint_gpu_*.pt", "softmax_fc_gpu_*.pt", "rank[_:]*_softmax_weight.pt")
"""File names that a folder is searched for: the head of a run of pkd-distill, then shards, newest layout first."""
NESTED_KEYS = ("state_dict_softmax_fc", "state_dict_head", "head", "state_dict")
CENTRE_NAMES = ("weight", "kernel", "head.weight", "head.kernel")
"""Names of the centres in a state dict. ``weight`` is C×D, ``kernel`` D×C, as is the custom."""


@dataclass(frozen=True)
class Shard:
    """Hold consecutive class rows of one file: ``weight`` n×D (a view of the file where torch can map it)."""

    path: Path
    weight: Tensor

    def chunks(self) -> Iterator[Float]:
        """Yield float32 rows, CHUNK at a time."""
        for start in range(0, len(self.weight), CHUNK):
            yield self.weight[start : start + CHUNK].float().contiguous().numpy()


def expand(specs: Sequence[str]) -> list[Path]:
    """Expand files, folders of shards and glob patterns to files. Raises BadHead for a name that fits no file."""
    found: list[Path] = []
    for spec in map(Path, specs):
        if spec.is_dir():
            matches = next((m for pattern in PATTERNS if (m := sorted(spec.glob(pattern)))), [])
        else:
            matches = sorted(spec.parent.glob(spec.name)) if any(c in spec.name for c in "*?[") else [spec]
        if not matches:
            what = "holds none of " + ", ".join(PATTERNS) if spec.is_dir() else "matches no file"
            raise BadHead(f"{spec}: {what}. Name the files of the head, or pass --head means.")
        found += matches
    return found if len(found) == 1 else [path for path in found if not path.stem.endswith("_mom")]


def read_shards(paths: Sequence[Path], dim: int) -> list[Shard]:
    """Read all shards of one head, in order of their ranks whatever the order of the paths. Raises BadHead.

    Refuses a missing or repeated rank, files of another dimension, and row counts that are not PartialFC's split.
    """
    if len(paths) == 1:
        _require_rank_zero(paths[0])
        return [Shard(paths[0], _weight(paths[0], dim))]
    ranks: dict[int, Path] = {}
    for path in paths:
        rank = _rank(path)
        if rank is None:
            raise BadHead(
                f"{path}: its name holds no rank, so its place among {len(paths)} shards is unknown. Rename the files "
                "softmax_fc_gpu_0.pt, softmax_fc_gpu_1.pt, … in order of their classes."
            )
        if rank in ranks:
            raise BadHead(
                f"{path}: rank {rank} is given twice, also by {ranks[rank]}. Name the shards of one training."
            )
        ranks[rank] = path
    if missing := sorted(set(range(max(ranks) + 1)) - set(ranks)):
        raise BadHead(
            f"{ranks[max(ranks)].parent}: of ranks 0 to {max(ranks)} the shard of rank "
            f"{', '.join(map(str, missing))} is missing. Its classes are nowhere else: find it, or pass --head means."
        )
    shards = [Shard(ranks[rank], _weight(ranks[rank], dim)) for rank in sorted(ranks)]
    total = sum(len(s.weight) for s in shards)
    for rank, shard in enumerate(shards):
        share = total // len(shards) + (rank < total % len(shards))
        if len(shard.weight) != share:
            raise BadHead(
                f"{shard.path}: holds {len(shard.weight):,} classes, but rank {rank} of {len(shards)} has {share:,} of "
                f"{total:,}. The files are of different trainings, renamed out of order, or not all there."
            )
    return shards


def starts(shards: Sequence[Shard]) -> list[int]:
    """Return the first class row of every shard."""
    return [0, *accumulate(len(s.weight) for s in shards)][:-1]


def _rank(path: Path) -> int | None:
    found = re.search(r"(?:^|_)(?:gpu|rank)[_:](\d+)(?:_|$)", path.stem)
    return int(found[1]) if found else None


def _require_rank_zero(path: Path) -> None:
    if rank := _rank(path):
        raise BadHead(f"{path}: is the shard of rank {rank}; rank 0 to {rank - 1} are missing. Pass --head its folder.")


def _weight(path: Path, dim: int) -> Tensor:
    if path.stem.endswith("_mom"):
        raise BadHead(f"{path}: holds the optimiser's momentum, not class centres. Leave it out.")
    content = _load(path)
    name, found = ("tensor", content) if isinstance(content, Tensor) else _pick(content, path)
    found = found.detach() if found.layout == torch.strided else found.detach().to_dense()
    if found.ndim == 2 and found.is_floating_point():
        if name.endswith("kernel") and found.shape[0] == dim:
            return found.T
        if found.shape[1] == dim:
            return found
    shape = "×".join(map(str, found.shape))
    hint = " It looks transposed (D×C): save it as C×D." if found.ndim == 2 and found.shape[0] == dim else ""
    raise BadHead(f"{path}: {name} is {shape} of {found.dtype}, the teacher's space has {dim} dimensions.{hint}")


def _pick(content: Any, path: Path) -> tuple[str, Tensor]:
    """Pick the classifier among the tensors of a state dict."""
    state = content
    for key in NESTED_KEYS:
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping | Tensor):
            state = state[key]
    if isinstance(state, Tensor):
        return "head", state
    tensors = (
        {str(k).removeprefix("module."): v for k, v in state.items() if isinstance(v, Tensor)}
        if isinstance(state, Mapping)
        else {}
    )
    for name in CENTRE_NAMES:
        if name in tensors:
            return name, tensors[name]
    plain = [k for k, v in tensors.items() if v.ndim == 2 and k.rpartition(".")[2] in {"weight", "kernel"}]
    if len(plain) == 1 and all(v.ndim <= 2 for v in tensors.values()):
        return plain[0], tensors[plain[0]]
    what = "a backbone" if any(v.ndim == 4 for v in tensors.values()) else "no classifier that is known"
    raise BadHead(
        f"{path}: holds {what} ({len(tensors):,} tensors, first: {next(iter(tensors), 'none')}), class centres under "
        f"none of {', '.join(CENTRE_NAMES)}. Give softmax_fc_gpu_N.pt or checkpoint_gpu_N.pt, or pass --head means."
    )


def _load(path: Path) -> Any:
    """Load tensors and plain values; nothing in the file is executed."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
        raise BadHead(f"{path}: {error.strerror}. Pass --head means, or the files of a head.") from None
    except Exception:  # torch raises many kinds; files of torch < 1.6 cannot be mapped
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise BadHead(f"{path}: {unreadable(error)}") from None
