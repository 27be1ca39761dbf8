"""Replace the results in a folder as a whole: a command that fails leaves those of before as they were."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replaced(out: Path, owned: Sequence[str]) -> Iterator[Path]:
    """Give an empty folder to write results into; at the end they are put into ``out``, which is made if need be.

    ``owned``: patterns of the files that are results. Those of before go, and any other file in ``out`` stays. Until
    the block has ended without an error nothing in ``out`` changes: not on a full disk, nor for Ctrl-C.
    """
    out.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(prefix=".part-", dir=out))  # on the same disk, so that moving is renaming
    try:
        yield new
        made = sorted(path.relative_to(new) for path in new.rglob("*") if path.is_file())
        for pattern in owned:
            for old in out.glob(pattern):
                if old.relative_to(out) not in made:
                    old.unlink()
        for name in made:
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            (new / name).replace(out / name)
    finally:
        shutil.rmtree(new, ignore_errors=True)
