"""Define what an export format is: one ``Format`` a runtime, whose ``build`` makes the file that the runtime loads.

A format of your own is a module with such an object, named as ``pkd-export --format mypackage.mymodule:FORMAT``;
docs/export.md shows one.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from pkd.export.graph.precision_variants import GraphForm, Settings, Variant
from pkd.export.options import BuildOptions
from pkd.toolkit.images.codec import Rgb

Embed = Callable[[Rgb], NDArray[np.float32]]
"""A network: uint8 N×S×S×3 → float32 N×D rows as the runtime gives them."""
Tell = Callable[[str], None]
ORT = f"onnxruntime {onnxruntime.__version__}"


@dataclass(frozen=True)
class Built:
    """Hold what a runtime loads, what made it, and a way to run it here."""

    files: dict[str, bytes]
    """File name → content; the first is the one that the runtime opens."""
    made_with: str
    """Converter and version."""
    settings: Settings
    """Dependencies of the file, for the manifest."""
    checked_with: str
    """The runtime that ``embed`` runs in, and its version."""
    embed: Embed | None
    """The built file itself, run here; None where only a device that is not here can run it."""


@dataclass(frozen=True)
class Format:
    """Describe one export format: its runtime, the precisions that it has, and how its file is built."""

    runtime: str
    """Name of the runtime in manifests: letters, digits and underscores. With the precision it names the target."""
    precisions: tuple[str, ...]
    """Some of fp32, fp16, int8, w8a16 and bf16."""
    form: GraphForm
    """Form in which the graph is written for this runtime."""
    build: Callable[[Variant, str, BuildOptions, Tell], Built]
    """Graph, precision, options, a function that is told what is going on → files.

    Raises TargetUnavailable where this machine cannot build it, InputError where the runtime cannot compute the graph.
    """
    unavailable: Callable[[], str | None] = lambda: None
    """Says, before anything slow, why this machine cannot build the format; None where it can."""
    elsewhere: bool = False
    """True where pkd can never measure the runtime itself: the target is an encoder of its own, in the numeric mode
    ``<precision>-<runtime>``. No certificate of another one is claimed for it, and the gate leaves it out."""


def need_packages(extra: str, *packages: str) -> Callable[[], str | None]:
    """Make ``Format.unavailable`` for a runtime that needs Python packages, which ``pip install 'pkd[extra]'`` brings.

    The packages are looked for and not imported.
    """

    def unavailable() -> str | None:
        absent = [package for package in packages if importlib.util.find_spec(package) is None]
        return f"{absent[0]} is not installed (pip install 'pkd[{extra}]')" if absent else None

    return unavailable
