"""What ``--pairs`` may be, told apart by content: LFW's lists, CFP's protocol, InsightFace's ``.bin`` sets."""

from __future__ import annotations

from pathlib import Path

from pkd.toolkit.core.errors import InputError
from pkd.toolkit.evaluation.datasets.cfp import read_cfp
from pkd.toolkit.evaluation.datasets.insightface_bin import looks_pickled, read_bin
from pkd.toolkit.evaluation.datasets.lfw import read_lfw
from pkd.toolkit.evaluation.datasets.pair_list import PairList


def read_pairs(source: Path, faces: Path | None) -> PairList:
    """Read a pair list of any of the three layouts. ``faces``: the folder of its crops; a ``.bin`` holds its own.

    Raises InputError naming the file, the line or the missing images.
    """
    try:
        packed = not source.is_dir() and looks_pickled(source)
    except OSError as error:
        raise InputError(
            f"{source}: {error.strerror}. Give LFW's pairs.txt, CFP's Protocol/Split/FP or a .bin."
        ) from None
    if packed:
        if faces:
            raise InputError(f"{source}: holds its own images. Drop --faces {faces}.")
        return read_bin(source)
    if faces is None:
        raise InputError(
            f"{source}: names images that it does not hold. Pass the folder of its crops with --faces DIR."
        )
    return read_cfp(source, faces) if source.is_dir() else read_lfw(source, faces)
