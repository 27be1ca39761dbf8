"""Share between the commands of pkd-gallery: which store they open, and what opens it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import model_validator

from pkd.toolkit.core.cli_options import Argument, Options
from pkd.toolkit.core.errors import InputError

if TYPE_CHECKING:
    from pkd.serving.galleries.store import GalleryStore


class StoreOptions(Options):
    """Name the store of galleries, and what opens it."""

    store: Annotated[str, Argument("DIR|milvus[+tls]://HOST:PORT", positional=True)]
    """Store that pkd-serve --gallery was given."""
    master_key: Annotated[Path, Argument("FILE")]
    """Master key of the store."""
    audit: Annotated[str | None, Argument("FILE")] = None
    """Audit log of this machine, beside Milvus."""
    milvus_token: Annotated[str | None, Argument("FILE")] = None
    """File that holds USER:PASSWORD of Milvus."""

    @model_validator(mode="after")
    def _check_url(self) -> StoreOptions:
        from pkd.serving.galleries.open import StoreUrl

        try:
            milvus = StoreUrl(self.store).milvus
        except InputError as error:
            raise InputError(f"{self.store}: {error}") from None
        for option, value in (("--audit", self.audit), ("--milvus-token", self.milvus_token)):
            if value and not milvus:
                raise InputError(f"{option} {value}: it is for a store milvus://HOST:PORT alone. Leave it out.")
        return self

    def open(self, *, create: bool = False) -> GalleryStore:
        """Open the store, without reading its templates into memory."""
        from pkd.serving.galleries.crypto import MasterKey
        from pkd.serving.galleries.open import StoreUrl

        url = StoreUrl(self.store, self.audit, self.milvus_token)
        return url.open(MasterKey.read(self.master_key), create=create, load=False)


class GalleryOptions(StoreOptions):
    """Name one gallery of a store."""

    gallery: Annotated[str, Argument("GALLERY", positional=True)]
    """Name of the gallery."""
