"""Define what a server refuses, apart from HTTP. ``serving/api/problems.py`` says how each error is answered.

Errors of the toolkit are raised where the concept is the same: BadImage, ImageTooLarge, NoFace, BadVector,
SpaceMismatch, NotCertified, UnsupportedFmr.
"""

from __future__ import annotations

from pkd.toolkit.core.errors import BadVector, PkdError, SpaceMismatch


class ServingError(PkdError):
    """A request that this server cannot fulfil."""

    exit_code = 2


class InvalidRequest(ServingError):
    """A request that is not of the form it must have."""


class TooLarge(ServingError):
    """More bytes or templates than are taken at once."""


class UnsupportedMedia(ServingError):
    """A kind of file or body that is not read."""


class UnknownEncoder(ServingError):
    """No loaded encoder has this name, or several have."""


class UnknownFile(ServingError):
    """A bundle has no such file or target."""


class MultipleFaces(ServingError):
    """A photograph shows several faces where exactly one was asked for."""


class TooManyFaces(ServingError):
    """A photograph shows more faces than are embedded at once."""


class NotAligned(ServingError):
    """An image is not of the size of an aligned crop."""


class NoDetector(ServingError):
    """A photograph was sent where only aligned crops can be taken."""


class LowQuality(ServingError):
    """A face is not good enough to enrol."""


class NotLive(ServingError):
    """There is no proof that a picture shows a living person, where a gallery asks for it or a request claims it."""


class BadToken(ServingError):
    """A signed token proves nothing; the message says why, for whoever sent it, and never repeats it."""


class NoGalleries(ServingError):
    """The server was started without a store of galleries."""


class UnknownGallery(ServingError):
    """No gallery has this name."""


class UnknownSubject(ServingError):
    """A gallery has no subject of this id."""


class UnknownTemplate(ServingError):
    """A subject has no template of this id."""


class DuplicateFace(ServingError):
    """A face matches another subject of the gallery."""


class UnlikeSubject(ServingError):
    """A face does not match the templates that its subject has."""


class GalleryConflict(ServingError):
    """A gallery is not in a state that allows this."""


class IdempotencyConflict(ServingError):
    """An idempotency key was used for another request."""


class Overloaded(ServingError):
    """Too much is waiting already."""

    exit_code = 1


class NotReady(ServingError):
    """The self-test is not passed, or not yet."""

    exit_code = 1


class Draining(ServingError):
    """The server is shutting down."""

    exit_code = 1


class StoreUnavailable(ServingError):
    """Galleries cannot be read or written."""

    exit_code = 1


class ServerFault(ServingError):
    """The server cannot do what it should be able to do; its log says why."""

    exit_code = 1


REFUSED_ENROLMENT = (ServingError, BadVector, SpaceMismatch)
"""Errors that a store gives back in the place of an enrolment that it refuses; the others are stored all the same."""
