"""Define every error that pkd raises on purpose.

A message is one line that names the value and the remedy. The commands print it without a traceback and exit with the
class's ``exit_code``::

    PkdError                      1  failed while running
    ├── TrainingDiverged          1  the loss or the weights stopped being finite
    ├── RankLost                  1  another process of a training over several has ended
    ├── InputError                2  bad usage or input: a path, a file, an image, a vector, an option
    │   ├── BadImage                 an image that cannot be decoded
    │   │   ├── ImageTooLarge        an image of more pixels than allowed
    │   │   └── MissingDecoder       an image in a format that needs a package which is not installed
    │   ├── NoFace                   a photograph in which the detector found no face
    │   ├── BadVector                an embedding with a wrong size, dtype, norm, or NaN
    │   ├── BadHead                  class centres that are not the teacher's: zero rows, random, permuted
    │   ├── BundleError              a bundle with an unknown schema, a wrong hash, a missing or foreign file
    │   ├── SpaceMismatch            two encoders whose vectors must not be compared
    │   ├── NotCertified             no certificate joins this ordered pair of encoders
    │   ├── UnsupportedFmr           a false match rate that the impostor pairs cannot resolve
    │   └── MissingExtra             an optional package is not installed
    ├── TargetUnavailable         3  a runtime or a device that this machine lacks
    ├── GateFailed                4  the result is worse than what was asked for
    └── NotTrusted                4  a file that is unsigned, changed, or signed by a key that is not trusted
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, TypeVar

Raised = TypeVar("Raised", bound="PkdError")

CODE = re.compile(r"^Exception from |\.(cpp|cc|cu|h|hpp|py):\d+|::|^Check '|\bFile \"|https?://")
"""Marks of a line about code: a source file, a C++ name, a failed check, a traceback, a link to their manual."""
PREFIX = re.compile(r"^(\[\w+\]( : \d+ : \w+ :)?|[-\s]+)\s*")
"""Beginning of a line that names a log channel or an error code, or marks a list."""


class PkdError(Exception):
    """Carry the root of the tree. ``exit_code`` is what a command exits with.

    ``details``: the same for programs, for example what was ``expected``, what it ``got`` and what ``works``; values of
    JSON. A server sends them beside the message.
    """

    exit_code = 1

    def __init__(self, message: str = "", *, details: Mapping[str, Any] | None = None) -> None:
        super().__init__(message)
        self.details: dict[str, Any] = dict(details or {})

    def explain(self: Raised, **details: Any) -> Raised:
        """Add those ``details`` that the error lacks: whoever caught it may know more than who raised it."""
        self.details = {**details, **self.details}
        return self


class TrainingDiverged(PkdError):
    """The loss or the weights stopped being finite; the last good checkpoint is kept."""


class RankLost(PkdError):
    """Another process of a training over several has ended or is silent."""


class InputError(PkdError):
    """Refuse bad usage or input."""

    exit_code = 2


class BadImage(InputError):
    """An image that cannot be decoded, or is larger than allowed."""


class ImageTooLarge(BadImage):
    """An image of more pixels than allowed, refused before it is decoded."""


class MissingDecoder(BadImage):
    """An image in a format that needs a package which is not installed; the message names it."""


class NoFace(InputError):
    """The detector found no face."""


class BadVector(InputError):
    """Refuse an embedding with a wrong size, dtype or norm, or with NaN or infinity in it."""


class BadHead(InputError):
    """Class centres that are not the teacher's."""


class BundleError(InputError):
    """A bundle that must not be trusted or cannot be read."""


class SpaceMismatch(InputError):
    """Two encoders whose vectors must not be compared."""


class NotCertified(InputError):
    """No certificate joins this ordered pair of encoders."""


class UnsupportedFmr(InputError):
    """Refuse a false match rate below what the impostor pairs resolve."""


class MissingExtra(InputError):
    """An optional package is not installed."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"{package} is not installed. Install it with: pip install 'pkd[{extra}]'")


class TargetUnavailable(PkdError):
    """A runtime or device that this machine lacks."""

    exit_code = 3

    def __init__(self, message: str, done: Mapping[str, Any] | None = None) -> None:
        super().__init__(message)
        self.done = done
        """The result of what could be done nevertheless, where that is more than nothing."""


class GateFailed(PkdError):
    """The result is worse than the gate allows."""

    exit_code = 4


class NotTrusted(PkdError):
    """A file that is unsigned, changed, or signed by a key that is not trusted."""

    exit_code = 4


def plain_reason(error: BaseException) -> str:
    """Return what another library's exception says, as one sentence of at most 300 characters for an error message.

    Names of source files, C++ signatures, failed checks and links are left out; of the other lines the last says why.
    The exception's type stands for it where nothing else is left.
    """
    if isinstance(error, KeyError):  # whose text is the key alone
        return f"{error} is missing."
    lines = [PREFIX.sub("", line.split(" Status Message:")[0].strip()) for line in str(error).splitlines()]
    said = [line for line in lines if line and not CODE.search(line)] or [type(error).__name__]
    return said[-1][:300].rstrip(".: ") + "."
