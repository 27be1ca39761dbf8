"""Share what training, export and serving need: images, face sets, encoders, evidence, bundles.

``from pkd.toolkit import open_encoder, embed`` and the other names below are pkd's Python API (docs/python.md). They
are loaded when they are first used: importing ``pkd.toolkit`` costs nothing. Nothing here imports a web framework, and
only ``distill`` and the ExecuTorch encoder import torch.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pkd.toolkit.api import (
        Decision,
        FaceSet,
        align,
        compare,
        decide,
        embed,
        open_detector,
        open_encoder,
        read_certificate,
    )

__all__ = [
    "Decision",
    "FaceSet",
    "align",
    "compare",
    "decide",
    "embed",
    "open_detector",
    "open_encoder",
    "read_certificate",
]


def __getattr__(name: str) -> object:
    """Load a name of the API from ``pkd.toolkit.api`` when it is first used (PEP 562)."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from pkd.toolkit import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
