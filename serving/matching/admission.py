"""Decide which encoders' vectors a gallery takes: what no certificate covers could never be searched."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from pkd.serving.galleries.store import Gallery, Space
from pkd.serving.inference.registry import Encoders, Loaded
from pkd.toolkit.core.encoder_info import short
from pkd.toolkit.core.errors import NotCertified, SpaceMismatch


def searchable(encoders: Encoders, spaces: Iterable[str]) -> list[str]:
    """List the ids of encoders that some certificate has on the gallery side, in one of ``spaces``."""
    return sorted({g for _, g in encoders.files if encoders.space_of(g) in set(spaces)})


def check_encoder_allowed(encoders: Encoders, gallery: Gallery, encoder: str, space: str | None = None) -> str:
    """Return the space in which a template of ``encoder`` (a full id) is enrolled. ``space``: as the client states it.

    Raises SpaceMismatch, or NotCertified where no query could ever be compared with it.
    """
    encoders.require_space(encoder, space)
    spaces = [one.id for one in gallery.spaces]
    known = encoders.space_of(encoder)
    works = {"galleries": searchable(encoders, spaces)}
    got = {"encoder": encoder, "space": space or known}
    into = known or space
    if into is not None and into not in spaces:
        raise another_space(gallery, encoder, into, got, works)
    if encoder not in works["galleries"] or known is None:
        raise NotCertified(
            f"no certificate has {short(encoder)} on the gallery side, so no query could be compared with such a "
            "template. Measure it with pkd-evaluate, or use an encoder in `works`.",
            details={"expected": {"galleries": works["galleries"]}, "got": got, "works": works},
        )
    return known


def another_space(
    gallery: Gallery, encoder: str, space: str, got: Mapping[str, object], works: Mapping[str, object]
) -> SpaceMismatch:
    """Make the error of an encoder whose vectors the gallery neither takes nor is searched by."""
    spaces = [one.id for one in gallery.spaces]
    return SpaceMismatch(
        f"{short(encoder)} embeds into {short(space)}; the gallery {gallery.name!r} holds vectors of "
        f"{' and '.join(map(short, spaces))}. Use an encoder in `works`.",
        details={"expected": {"spaces": spaces}, "got": got, "works": works},
    )


def encoder_to_enrol(encoders: Encoders, gallery: Gallery, spec: str | None) -> Loaded:
    """Find the loaded encoder ``spec``; without one the first that the gallery's newest space takes.

    The default comes before others; where nothing fits it is the default, which ``check_encoder_allowed`` then
    refuses. Raises UnknownEncoder.
    """
    if spec is not None:
        return encoders.get(spec)
    newest = (gallery.moving_to or gallery.space).id
    fits = searchable(encoders, [newest])
    return next((item for item in _default_first(encoders) if item.encoder.info.id in fits), encoders.default)


def encoder_to_search(encoders: Encoders, gallery: Gallery, spec: str | None) -> Loaded:
    """Find the loaded encoder ``spec``.

    Without one the first whose space is the gallery's, the default before others.
    """
    if spec is not None:
        return encoders.get(spec)
    here = (item for item in _default_first(encoders) if item.encoder.info.space.id == gallery.space.id)
    return next(here, encoders.default)


def find_space(encoders: Encoders, id: str | None) -> Space:
    """Find a space that some loaded encoder embeds into; the default encoder's for None. Raises SpaceMismatch."""
    spaces = spaces_of(encoders)
    id = encoders.default.encoder.info.space.id if id is None else id
    if id not in spaces:
        raise SpaceMismatch(
            f"no loaded encoder embeds into the space {short(id)!r}. Use one of `works`, or serve a bundle of it.",
            details={"expected": {"spaces": list(spaces)}, "got": {"space": id}, "works": {"spaces": list(spaces)}},
        )
    return Space(id, spaces[id])


def spaces_of(encoders: Encoders) -> dict[str, int]:
    """Map the id of every space that some loaded encoder embeds into to its dimension."""
    return {item.encoder.info.space.id: item.encoder.info.space.dim for item in encoders.loaded.values()}


def _default_first(encoders: Encoders) -> list[Loaded]:
    return [encoders.default, *(item for item in encoders.loaded.values() if item is not encoders.default)]
