"""Import what a user wrote and named on the command line as ``MODULE:NAME``: a loss, an export format, a protocol."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

from pkd.toolkit.core.errors import InputError


def load_object(spec: str, option: str, known: str) -> Any:
    """Import ``MODULE:NAME`` from the working directory, PYTHONPATH or what is installed; return the object.

    ``option`` and ``known`` (what the option takes by name) are for the message of the InputError that is raised where
    ``spec`` has another form, the module cannot be imported, or it has no such name.
    """
    module, _, name = spec.partition(":")
    if not all(part.isidentifier() for part in module.split(".")) or not name.isidentifier():
        raise InputError(f"{option} {spec}: unknown. Choose of {known}, or name one of your own as MODULE:NAME.")
    if str(Path.cwd()) not in sys.path:  # a command that is installed does not look there by itself
        sys.path.append(str(Path.cwd()))
    try:
        imported = importlib.import_module(module)
    except Exception as error:  # whatever the module does when it is imported
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise InputError(
            f"{option} {spec}: {module} cannot be imported ({reason}). Install it, or set PYTHONPATH."
        ) from None
    if not hasattr(imported, name):
        raise InputError(f"{option} {spec}: {imported.__file__ or module} has no {name}. Name what it defines.")
    return getattr(imported, name)
