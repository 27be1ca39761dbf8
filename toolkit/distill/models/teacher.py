"""Open torch checkpoints as encoders: arcface_torch IResNets, and state_dicts of the zoo's backbones."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from pkd.toolkit.core.encoder_info import describe, name_of
from pkd.toolkit.core.errors import InputError
from pkd.toolkit.core.preprocess import Preprocess
from pkd.toolkit.distill.models.arcface_torch import ArcFaceTorch, tensors_of
from pkd.toolkit.distill.models.backbones import BACKBONES, build
from pkd.toolkit.distill.models.layers import reduced, scaled
from pkd.toolkit.distill.models.student import TorchEncoder, load_weights

STEMS = {"mobilefacenet": 64, "mobilefacenet-relu": 64, "repvit": 24}
"""Channels of the first convolution at width 1, of the backbones that have widths."""
WIDTHS = [k / 80 for k in range(4, 321)]


def open_checkpoint(path: str | Path, preprocess: Preprocess, *, name: str | None = None) -> TorchEncoder:
    """Open a torch checkpoint as an encoder; backbone and dimension follow from its tensors.

    That is an arcface_torch backbone (``backbone.pth``), or the state_dict of a backbone of the zoo. Raises InputError
    if the tensors are neither, naming the first that is missing or foreign, or if it was trained on crops of another
    size.
    """
    path = Path(path)
    known = _of_zoo(tensors_of(load_weights(path), path), preprocess.size)
    backbone, module = known or _iresnet(path, preprocess)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    dim = next(m.out_features for m in reversed(list(module.modules())) if isinstance(m, nn.Linear))
    info = describe(name or name_of(path), "teacher", digest, preprocess, dim)
    return TorchEncoder(info, module, {"source": path.name, "backbone": backbone})


def _iresnet(path: Path, preprocess: Preprocess) -> tuple[str, nn.Module]:
    found = ArcFaceTorch.read(path)
    side = reduced(preprocess.size)
    if side != found.side:
        raise InputError(
            f"{path}: its last features are {found.side}×{found.side}, but a crop of {preprocess.size} pixels gives "
            f"{side}×{side}. State size={16 * found.side} with its preprocessing."
        )
    module = build(found.backbone, found.dim, preprocess.size)
    found.load_into(module)
    return found.backbone, module


def _of_zoo(tensors: Mapping[str, Tensor], size: int) -> tuple[str, nn.Module] | None:
    """Find the backbone, and its width, whose tensors have these names and shapes; None where there is none."""
    stem, tops = tensors.get("stem.0.weight"), [t for t in tensors.values() if t.ndim == 2]
    if stem is None or not tops:
        return None
    shapes = {key: value.shape for key, value in tensors.items()}
    for name, channels in STEMS.items():
        for width in [stem.shape[0] / channels, *WIDTHS]:
            if scaled(channels, width) != stem.shape[0]:
                continue
            with torch.device("meta"):
                module = BACKBONES[name](tops[-1].shape[0], width, size)
            if {key: value.shape for key, value in module.state_dict().items()} == shapes:
                made = BACKBONES[name](tops[-1].shape[0], width, size)
                made.load_state_dict(dict(tensors))
                return f"{name}:{width:g}", made
    return None
