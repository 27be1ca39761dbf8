"""Define what a server refuses, apart from HTTP. ``serving/api/problems.py`` says how each error is answered.

Errors of the toolkit are raised where the concept is the same: BadImage, ImageTooLarge, NoFace, BadVector,
SpaceMismatch, NotCertified, UnsupportedFmr. The others are::

    ServingError                  2  a request that this server cannot fulfil
    ├── InvalidRequest               a request that is not of the form it must have
    ├── TooLarge                     more bytes or templates than are taken at once
    ├── UnsupportedMedia             a kind of file or body that is not read
    ├── UnknownEncoder               no loaded encoder of this name, or several
    ├── UnknownFile                  a bundle has no such file or target
    ├── MultipleFaces                a photograph shows several faces, one was asked for
    ├── TooManyFaces                 a photograph shows more faces than are embedded at once
    ├── NotAligned                   an image is not of the size of an aligned crop
    ├── NoDetector                   a photograph, where only aligned crops can be taken
    ├── LowQuality                   a face that is not good enough to enrol
    ├── NotLive                      no proof that a living person is shown, where it is asked for
    ├── BadToken                     a signed token that proves nothing
    ├── NoGalleries                  the server was started without a store of galleries
    ├── UnknownGallery               no gallery of this name
    ├── UnknownSubject               no subject of this id in a gallery
    ├── UnknownTemplate              a subject has no template of this id
    ├── DuplicateFace                a face matches another subject of the gallery
    ├── UnlikeSubject                a face does not match its subject's own templates
    ├── GalleryConflict              a gallery is not in a state that allows this
    ├── IdempotencyConflict          an idempotency key was used for another request
    ├── Overloaded                1  too much is waiting already
    ├── NotReady                  1  the self-test is not passed
    ├── Draining                  1  the server is shutting down
    ├── StoreUnavailable          1  galleries cannot be read or written
    └── ServerFault               1  the server cannot do what it should be able to do
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
