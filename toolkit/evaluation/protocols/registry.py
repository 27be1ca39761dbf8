"""List what ``pkd-evaluate --protocol`` runs on a set of faces; a new protocol is a function and a line here."""

from __future__ import annotations

from collections.abc import Callable

from pkd.toolkit.core.errors import InputError
from pkd.toolkit.core.extensions import load_object
from pkd.toolkit.core.progress import Progress
from pkd.toolkit.data.face_set import FaceSet
from pkd.toolkit.evaluation.protocols.all_pairs import cross_matrix
from pkd.toolkit.evaluation.protocols.common import EncoderSet, EvaluationOptions, ProtocolResult
from pkd.toolkit.evaluation.protocols.discard import discard_curves

Protocol = Callable[[FaceSet, str, EncoderSet, EvaluationOptions, Progress], ProtocolResult]
"""Faces, their name for the report, the encoders to compare, options, progress → what the report shows."""
PROTOCOLS: dict[str, Protocol] = {"all-pairs": cross_matrix, "reject": discard_curves}


def find_protocol(name: str) -> Protocol:
    """Return the protocol of a name in PROTOCOLS, or the function that ``MODULE:NAME`` names. Raises InputError."""
    if name in PROTOCOLS:
        return PROTOCOLS[name]
    found: Protocol = load_object(name, "--protocol", ", ".join(PROTOCOLS))
    if not callable(found):
        raise InputError(f"--protocol {name}: is a {type(found).__name__} and no function. Name a function.")
    return found
