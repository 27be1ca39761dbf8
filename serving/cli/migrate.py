"""Run pkd-gallery migrate and mapped: bring a gallery to a new teacher without photographs, and list who needs one."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, ValidationError
from rich.console import Console

from pkd.serving.cli.gallery_store import GalleryOptions
from pkd.toolkit.core.cli_options import Argument
from pkd.toolkit.core.cli_support import Result
from pkd.toolkit.core.encoder_info import short
from pkd.toolkit.core.errors import GateFailed, InputError, NotCertified
from pkd.toolkit.core.progress import ConsoleProgress

if TYPE_CHECKING:
    from pkd.serving.galleries.store import MappingState
    from pkd.toolkit.certificates.certificate import Certificate
    from pkd.toolkit.encoders.space_map import SpaceMap
    from pkd.toolkit.evaluation.results.schema import MappingCost

PROMISED = 1e-3
"""False match rate that a gallery promises unless --fmr or --policies says another: the one of /verify by default."""
_Maps = Annotated[tuple[Path, ...], Argument("MAP.npz", repeatable=True)]


class MigrateOptions(GalleryOptions):
    """Hold what ``pkd-gallery migrate`` was asked for."""

    map: _Maps
    """Map that pkd-map wrote, one for each old encoder of the gallery; repeatable."""
    evaluation: Annotated[tuple[Path, ...], Argument("EVAL", repeatable=True)]
    """Folder that pkd-evaluate --mapped wrote, on people whom no map was fitted on; repeatable."""
    trust_key: Annotated[tuple[Path, ...], Argument("PUB.pem", repeatable=True)] = ()
    """Public key that must have signed the certificates and report.json; repeatable."""
    fmr: float | None = Field(default=None, gt=0, lt=1)
    """False match rate that the certificates must resolve (default: promised_fmr of --policies, or 0.001)."""
    policies: Annotated[Path | None, Argument("FILE")] = None
    """JSON of what each gallery demands, as pkd-serve --policies has it."""
    finish: bool = False
    """Delete the templates of the old space then; without it both spaces answer."""


class MappedOptions(GalleryOptions):
    """Hold what ``pkd-gallery mapped`` was asked for."""

    map: _Maps
    """Map that the templates were mapped by; repeatable."""
    limit: int = Field(default=50, ge=1)
    """Subjects that are printed; --json has all."""


def migrate(options: MigrateOptions, console: Console) -> Result:
    """Check the evidence, print what mapping costs, and map; returns what ``--json`` prints."""
    from pkd.serving.galleries.mapping import check_spaces, map_gallery
    from pkd.serving.matching.policies import Policies

    maps = _read_maps(options.map)
    with closing(options.open()) as store:
        gallery = store.get(options.gallery)
        check_spaces(gallery, maps)
        fmr = options.fmr or Policies(options.policies).of(options.gallery).promised_fmr or PROMISED
        certificates, costs = _evidence(options, maps)
        require_evidence(maps, certificates, fmr)
        for cost in costs:
            low, high = (100 * end for end in cost.difference.ci95)
            console.print(
                f"{cost.pair} at FMR {cost.fmr:g}: TAR {100 * cost.mapped_tar_balanced:.1f} % with mapped templates, "
                f"{100 * cost.native_tar_balanced:.1f} % with native ones: {100 * cost.difference.difference:+.1f} "
                f"points ({low:+.1f} to {high:+.1f})",
                soft_wrap=True,
            )
        with ConsoleProgress(console)("mapping", gallery.subjects) as advance:
            done = map_gallery(store, options.gallery, maps, "pkd-gallery", advance)
        now = store.get(options.gallery)
        left = {one: n for one, n in now.templates.items() if _left(one, now.mapping, maps)}
        ended = None
        if options.finish and now.moving_to is not None:
            ended = store.end_migration(options.gallery, "pkd-gallery")
            now = store.get(options.gallery)
    console.print(
        f"{options.gallery}: {done.templates:,} templates of {done.subjects:,} subjects mapped, {done.there_already:,} "
        f"were there already. {_state(done.unmoved, ended is not None)}",
        markup=False,
        soft_wrap=True,
    )
    for encoder, count in left.items():
        console.print(f"{count:,} templates of {short(encoder)} were not mapped: no map is for it.", soft_wrap=True)
    return {
        "gallery": options.gallery,
        **vars(done),
        "fmr": fmr,
        "costs": [cost.model_dump(mode="json") for cost in costs],
        "certificates": [f"{c.query} against {c.gallery}" for c in certificates],
        "not_mapped": left,
        "space": now.space.id,
        "moving_to": now.moving_to and now.moving_to.id,
        "deleted": ended.templates if ended else 0,
    }


def list_mapped(options: MappedOptions, console: Console) -> Result:
    """Print whom only mapped templates stand for, worst first."""
    from pkd.serving.galleries.mapping import worst_first

    with closing(options.open()) as store:
        found = list(worst_first(store, options.gallery, _read_maps(options.map)))
    console.print(f"{len(found):,} subjects have mapped templates alone; expected cosine to a native one, worst first:")
    for subject, _, cosine in found[: options.limit]:
        console.print(f"{cosine:.3f}  {subject}", markup=False)
    named = [{"subject": subject, "template": id, "expected_cosine": cosine} for subject, id, cosine in found]
    return {"gallery": options.gallery, "subjects": named}


def require_evidence(maps: Sequence[SpaceMap], certificates: Sequence[Certificate], fmr: float) -> None:
    """Refuse maps whose pair with the new teacher no certificate covers, or not down to ``fmr``.

    Raises NotCertified or GateFailed.
    """
    for one in maps:
        pair = next((c for c in certificates if (c.query, c.gallery) == (one.new.id, one.info.id)), None)
        if pair is None:
            raise NotCertified(
                f"no certificate covers queries of {short(one.new.id)} against {short(one.info.id)}. Run pkd-evaluate "
                "--mapped on people whom the map was not fitted on."
            )
    for c in certificates:
        if not c.points[-1].fmr <= fmr * (1 + 1e-9):
            raise GateFailed(
                f"the gallery promises FMR {fmr:g}; the certificate of {short(c.query)} against {short(c.gallery)} "
                f"resolves {c.points[-1].fmr:g} at best, on {c.identities:,} people. Evaluate on more people, or "
                "promise less with --fmr."
            )


def _evidence(options: MigrateOptions, maps: Sequence[SpaceMap]) -> tuple[list[Certificate], list[MappingCost]]:
    from pkd.toolkit.certificates.certificate import CertificateFile
    from pkd.toolkit.certificates.signing import TrustedKeys, signature_beside
    from pkd.toolkit.evaluation.results.schema import Evaluation

    keys = TrustedKeys.read(options.trust_key) if options.trust_key else None
    ids = {one.info.id for one in maps}
    certificates: list[Certificate] = []
    costs: list[MappingCost] = []
    for folder in options.evaluation:
        report = folder / "report.json"
        try:
            data = report.read_bytes()
            evaluation = Evaluation.model_validate_json(data)
        except (OSError, ValidationError):
            raise InputError(f"{report}: not a report. Give the --out folder of pkd-evaluate --mapped.") from None
        if keys:
            keys.require(data, signature_beside(report), report)
        if evaluation.mapped is None or evaluation.mapped.id not in ids:
            raise InputError(f"{folder}: is no evaluation of these maps. Run pkd-evaluate --mapped with them.")
        costs += evaluation.costs
        for path in sorted((folder / "certificates").glob("*.json")):
            file = CertificateFile.read(path)
            if file.certificate.gallery in ids:
                if keys:
                    keys.require(file.data, file.signature, path)
                certificates.append(file.certificate)
    return certificates, costs


def _read_maps(paths: Sequence[Path]) -> list[SpaceMap]:
    from pkd.toolkit.encoders.space_map import SpaceMap

    return [SpaceMap.read(path) for path in paths]


def _left(encoder: str, state: MappingState, maps: Sequence[SpaceMap]) -> bool:
    known: set[Any] = {one.old.id for one in maps} | {one.new.id for one in maps} | set(state.maps)
    return encoder not in known


def _state(unmoved: int, ended: bool) -> str:
    if ended:
        return "The old space is gone."
    if unmoved:
        return f"{unmoved:,} subjects have no template in the new space yet: enrol or delete them."
    return "Both spaces answer; --finish deletes the old one's templates."
