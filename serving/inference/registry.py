"""Hold the loaded bundles and every certificate in them: who may be compared with whom, and why not."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pkd.serving.core.errors import UnknownEncoder
from pkd.toolkit.bundle.bundle import Bundle, self_test
from pkd.toolkit.bundle.target import Target
from pkd.toolkit.certificates.certificate import Certificate, CertificateFile
from pkd.toolkit.certificates.signing import TrustedKeys
from pkd.toolkit.core.encoder_info import short
from pkd.toolkit.core.errors import BundleError, NotCertified, SpaceMismatch, TargetUnavailable
from pkd.toolkit.core.gpu import Device
from pkd.toolkit.encoders.base import Encoder, open_bundle
from pkd.toolkit.encoders.registry import open_target, target_of

GPU_RUNTIMES = frozenset({"tensorrt", "tensorrt_rtx"})


@dataclass(frozen=True)
class Loaded:
    """Hold one bundle and its encoder, shared by all worker threads (every runtime's may be)."""

    bundle: Bundle
    encoder: Encoder
    target: Target | None = None
    """Form of the bundle's encoder, where one was asked for."""
    device: Device = "cpu"
    """Device that it runs on."""

    @classmethod
    def open(cls, path: Path, keys: TrustedKeys | None = None, device: Device = "cpu") -> Loaded:
        """Open a bundle, or BUNDLE/targets/NAME; who signed it is checked before any of it reaches a runtime.

        ``device``: of a bundle; a target runs on the one that it was made for.
        Raises BundleError, NotTrusted, MissingExtra, or TargetUnavailable.
        """
        named = target_of(path)
        if named is None:
            bundle = Bundle.open(path, keys)
            return cls(bundle, open_bundle(bundle, device=device), device=device)
        bundle = Bundle.open(named[0], keys)
        target = bundle.manifest.target(named[1])
        if target is not None and target.runtime == "executorch":
            raise TargetUnavailable(
                f"{path}: an ExecuTorch target is for devices; in Python it needs torch, which no server loads. "
                f"Serve {named[0]} itself, or an onnxruntime or OpenVINO target of it."
            )
        on_gpu = target is not None and target.runtime in GPU_RUNTIMES
        return cls(bundle, open_target(bundle, named[1]), target, "cuda" if on_gpu else "cpu")

    @cached_property
    def described(self) -> Mapping[str, Any]:
        """Describe ``space`` and ``encoder`` for an answer."""
        info = self.encoder.info
        named = {"id": info.id, "role": info.role, "preprocess": info.preprocess.name}
        return {"space": info.space.model_dump(), "encoder": named}

    def self_test(self) -> float:
        """Measure the largest 1 − cosine over the golden crops.

        Raises BundleError above the tolerance of bundle or target.
        """
        return self_test(self.bundle, self.encoder.embed, self.target)


class Encoders:
    """Hold what this server can embed with (loaded bundles) and decide about (certificates)."""

    def __init__(self, loaded: Sequence[Loaded], keys: TrustedKeys | None = None) -> None:
        self.loaded = {item.encoder.info.id: item for item in loaded}
        teachers = [item for item in loaded if item.encoder.info.role == "teacher"]
        self.default = (teachers or list(loaded))[0]
        """The first teacher on the command line; without one, the first bundle."""
        self.files = _strongest(file for item in loaded for file in item.bundle.certificate_files())
        """Ordered pair of encoder ids → its certificate, with the signature beside it."""
        self.keys = keys
        """Keys whose signatures are believed; None: no signature is checked."""
        self._spaces = {id: item.encoder.info.space.id for id, item in self.loaded.items()}
        self._dims = {item.encoder.info.space.id: item.encoder.info.space.dim for item in loaded}
        for certificate in self.certificates:
            for id in (certificate.query, certificate.gallery):
                self._spaces.setdefault(id, certificate.space)

    @classmethod
    def open(cls, paths: Sequence[str | Path], keys: TrustedKeys | None = None, device: Device = "cpu") -> Encoders:
        """Open bundles or targets of them, each on one intra-op thread. Raises BundleError for two of one encoder.

        With ``keys`` every manifest must be signed by one of them, and so must every certificate that has a signature
        of its own. Raises NotTrusted naming the file.
        """
        owners: dict[str, Path] = {}
        spaces: dict[str, int] = {}
        loaded = []
        for path in paths:
            item = Loaded.open(Path(path), keys, device)
            bundle, info = item.bundle, item.encoder.info
            if info.id in owners:
                raise BundleError(f"{path}: holds {short(info.id)}, as does {owners[info.id]}. Pass one of them.")
            if spaces.setdefault(info.space.id, info.space.dim) != info.space.dim:
                raise BundleError(f"{path}: gives {info.space.dim} numbers, other bundles of its space do not.")
            if keys:
                for file in bundle.certificate_files():
                    bundle.require_evidence(keys, file)
            owners[info.id] = Path(path)
            loaded.append(item)
        if not loaded:
            raise BundleError("no bundle to serve. Make one with pkd-export.")
        return cls(loaded, keys)

    @property
    def certificates(self) -> list[Certificate]:
        """List the certificates, one per ordered pair of encoders."""
        return [file.certificate for file in self.files.values()]

    def get(self, spec: str | None) -> Loaded:
        """Find the loaded encoder with this id, short id or name; the default one for None.

        A name that a bundle's own encoder shares with its targets means the bundle's own. Raises UnknownEncoder where
        it is none's, or that of several bundles.
        """
        if spec is None:
            return self.default
        own = {id for id, item in self.loaded.items() if item.target is None and id.partition("@")[0] == spec}
        id = own.pop() if len(own) == 1 else find_id(spec, self.loaded)
        if id is None:
            raise UnknownEncoder(
                f"encoder {spec!r} is not loaded. Use one of those in `encoders`.",
                details={"got": spec, "encoders": list(self.loaded)},
            )
        return self.loaded[id]

    def resolve(self, spec: str) -> str:
        """Resolve a short id or a name to a full id; returns ``spec`` as it is where no encoder here is called so.

        Raises UnknownEncoder where several are: it says what made an embedding, and must not be guessed.
        """
        return find_id(spec, self._spaces) or spec

    def space_of(self, id: str) -> str | None:
        """Return the id of an encoder's space, from its bundle or from a certificate that names it."""
        return self._spaces.get(id)

    def require_space(self, id: str, stated: str | None) -> None:
        """Raise SpaceMismatch where the client says that an encoder embeds into another space than it does."""
        known = self.space_of(id)
        if stated is not None and known is not None and stated != known:
            raise SpaceMismatch(
                f"{short(id)} embeds into {short(known)}, not into {short(stated)} as `space` states. "
                "Name the encoder that made the embedding; `space` may be left out.",
                details={
                    "expected": {"space": known},
                    "got": {"encoder": id, "space": stated},
                    "works": {"space": known, "encoders": [one for one in self.loaded if self.space_of(one) == stated]},
                },
            )

    def dim_of(self, space: str | None) -> int | None:
        """Return the dimension of a space, known where a bundle of it is loaded."""
        return self._dims.get(space) if space else None

    def certificate_file(self, query: str, gallery: str) -> CertificateFile:
        """Find the certificate of this ordered pair. Raises SpaceMismatch or NotCertified, naming what would work."""
        found = self.files.get((query, gallery))
        if found:
            return found
        spaces = self.space_of(query), self.space_of(gallery)
        works = {
            "queries": sorted(q for q, g in self.files if g == gallery),
            "galleries": sorted(g for q, g in self.files if q == query),
        }
        got = {"query": query, "gallery": gallery}
        if None not in spaces and spaces[0] != spaces[1]:
            raise SpaceMismatch(
                f"{short(query)} embeds into another space than {short(gallery)}; their vectors cannot be compared.",
                details={"expected": {"space": spaces[1]}, "got": {**got, "space": spaces[0]}, "works": works},
            )
        raise NotCertified(
            f"no certificate covers queries of {short(query)} against a gallery of {short(gallery)}; the order counts. "
            "Measure the pair with pkd-evaluate and export it into a bundle, or use an encoder in `works`.",
            details={"expected": [{"query": q, "gallery": g} for q, g in self.files], "got": got, "works": works},
        )


def find_id(spec: str, ids: Collection[str]) -> str | None:
    """Find the one of these ids that a full id, a short id or a name means. Raises UnknownEncoder where several are."""
    if spec in ids:
        return spec
    bearers = [id for id in ids if spec in (short(id), id.partition("@")[0])]
    if len(bearers) > 1:
        raise UnknownEncoder(
            f"{len(bearers)} encoders are called {spec!r}. Use a short id: {', '.join(map(short, bearers))}.",
            details={"got": spec, "encoders": bearers},
        )
    return bearers[0] if bearers else None


def _strongest(files: Iterable[CertificateFile]) -> dict[tuple[str, str], CertificateFile]:
    """Keep one certificate per ordered pair.

    Measured on people before synthetic, then most impostor pairs, then newest.
    """

    def rank(c: Certificate) -> tuple[bool, int, str]:
        return not c.synthetic, c.impostor_pairs, c.created

    kept: dict[tuple[str, str], CertificateFile] = {}
    for file in files:
        pair = (file.certificate.query, file.certificate.gallery)
        if pair not in kept or rank(file.certificate) > rank(kept[pair].certificate):
            kept[pair] = file
    return kept
