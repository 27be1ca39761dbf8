"""Backbones trained by arcface_torch: which IResNet a file holds, and its tensors, whose names are ours as well."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pkd.toolkit.core.errors import InputError
from pkd.toolkit.distill.models.student import load_weights

_BLOCKS_OF_LAYER3 = {2: "iresnet18", 6: "iresnet34", 14: "iresnet50", 30: "iresnet100", 60: "iresnet200"}
_ANCHORS = ("layer3.0.conv1.weight", "stem.0.weight")
"""A tensor that every network of a kind has: whatever stands before its name is a wrapper's."""
_DEPTH = 4
"""Dictionaries inside one another that are looked through."""


@dataclass(frozen=True)
class ArcFaceTorch:
    """Hold a network of arcface_torch. ``backbone``: name in BACKBONES. ``dim``: of the embedding. ``side``: of its
    last features, 7 for 112 pixels.
    """

    path: Path
    backbone: str
    dim: int
    side: int
    tensors: Mapping[str, Tensor]

    @classmethod
    def read(cls, path: str | Path) -> ArcFaceTorch:
        """Read ``backbone.pth``, ``model.pt`` or ``checkpoint_gpu_0.pt``, in fp32 or fp16, with or without ``module.``.

        The layout is that of insightface, recognition/arcface_torch/backbones/iresnet.py. Its dropout has no weights.
        Raises InputError for anything else.
        """
        tensors = tensors_of(load_weights(path), path)
        blocks = {int(found[1]) for key in tensors if (found := re.match(r"layer3\.(\d+)\.", key))}
        backbone, fc = _BLOCKS_OF_LAYER3.get(len(blocks)), tensors.get("fc.weight")
        if backbone is None or fc is None or fc.ndim != 2:
            raise InputError(
                f"{path}: not an arcface_torch IResNet: layer3 has {len(blocks)} blocks, "
                f"{'no fc.weight' if fc is None else f'fc.weight is {tuple(fc.shape)}'}. Export it to ONNX instead."
            )
        dim, features = fc.shape
        return cls(Path(path), backbone, dim, math.isqrt(features // 512), tensors)

    def load_into(self, network: nn.Module) -> None:
        """Copy the weights, as float32. Raises InputError naming the tensors that are missing, foreign or misshapen.

        Files of before batch normalisation counted its batches (``num_batches_tracked``) load as well.
        """
        try:
            network.load_state_dict(self.tensors)
        except RuntimeError as error:
            raise InputError(f"{self.path}: not {self.backbone}: {' '.join(str(error).split())[:300]}") from None


def tensors_of(content: Mapping[str, Any], source: str | Path) -> dict[str, Tensor]:
    """Return the tensors of the one network in a checkpoint, under their own names.

    They may lie in further dictionaries (``state_dict``, ``model``) and carry what wrapped the network before their
    names (``module.``, ``_orig_mod.``, ``backbone.``). Raises InputError where several networks are in the file.
    """
    every = dict(_flat(content))
    found = {key.removesuffix(anchor) for anchor in _ANCHORS for key in every if key.endswith(anchor)}
    prefixes = sorted(prefix for prefix in found if not prefix or prefix.endswith("."))
    if len(prefixes) > 1:
        names = " and ".join(repr(prefix.rstrip(".")) for prefix in prefixes[:3])
        raise InputError(
            f"{source}: holds {len(prefixes)} networks ({names}), and pkd does not guess. Save the state_dict of "
            "one of them alone, with torch.save."
        )
    prefix = prefixes[0] if prefixes else ""
    return {key.removeprefix(prefix): value for key, value in every.items() if key.startswith(prefix)}


def _flat(content: Mapping[Any, Any], above: str = "", depth: int = 0) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor under the keys that lead to it, joined by dots."""
    for key, value in content.items():
        if torch.is_tensor(value):
            yield f"{above}{key}", value
        elif isinstance(value, Mapping) and depth < _DEPTH:
            yield from _flat(value, f"{above}{key}.", depth + 1)
