"""Open everything that one server process needs, serve, and close it."""

from __future__ import annotations

import logging
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import cv2
from rich.console import Console

from pkd.serving.api.api_keys import ApiKeys
from pkd.serving.api.oidc import Oidc
from pkd.serving.api.tokens import Tokens
from pkd.serving.galleries.crypto import MasterKey
from pkd.serving.galleries.open import StoreUrl
from pkd.serving.galleries.store import GalleryStore
from pkd.serving.inference.registry import Encoders
from pkd.serving.matching.liveness import Liveness
from pkd.serving.matching.policies import Policies
from pkd.serving.matching.service import Service
from pkd.serving.observability import logs, telemetry
from pkd.serving.observability.drift import DriftLedger
from pkd.serving.server.config import Configuration
from pkd.serving.server.server import Link, serve
from pkd.toolkit.bundle.bundle import NOT_GATED
from pkd.toolkit.certificates.attack_detection import read_attack_certificate
from pkd.toolkit.certificates.certificate import Certificate, no_less, usefulness
from pkd.toolkit.certificates.signing import TrustedKeys
from pkd.toolkit.core.encoder_info import short
from pkd.toolkit.core.errors import InputError, UnsupportedFmr
from pkd.toolkit.core.malloc import return_freed_memory
from pkd.toolkit.encoders.attack_detector import AttackDetector
from pkd.toolkit.encoders.detector import open_detector
from pkd.toolkit.images.alignment import ALIGNED_TO


@dataclass(frozen=True)
class Opened:
    """Hold what a process has open."""

    service: Service
    keys: ApiKeys | None
    store: GalleryStore | None


@contextmanager
def opened(configuration: Configuration) -> Iterator[Opened]:
    """Open keys, bundles, detector and galleries; close them at the end. Raises the PkdError of what cannot be."""
    cv2.setNumThreads(1)  # every worker thread has a core of its own
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_FATAL)  # a stranger's broken image is no news
    settings = configuration.settings
    with ExitStack() as stack:
        keys = ApiKeys.read(configuration.api_keys) if configuration.api_keys else None
        trusted = TrustedKeys.read([Path(key) for key in configuration.trust_key]) if configuration.trust_key else None
        encoders = Encoders.open(configuration.bundles, trusted, settings.device)
        spec = configuration.detector
        detector = open_detector(spec, settings.detector_score) if spec else None
        store = open_store(configuration)
        if configuration.oidc:
            keys = keys or ApiKeys(())
            keys.access_tokens = Oidc.read(Path(configuration.oidc))
        if keys:
            keys.open_metrics = configuration.open_metrics
        if keys and configuration.master_key:
            keys.tokens = Tokens(MasterKey.read(Path(configuration.master_key)).derive("tokens"))
        if store:
            stack.callback(store.close)
        policies = Policies(Path(configuration.policies) if configuration.policies else None)
        liveness = Liveness.read(Path(configuration.liveness)) if configuration.liveness else None
        ledger = open_ledger(configuration)
        attack_detector = None
        if configuration.attack_detector and configuration.attack_certificate:
            certificate = read_attack_certificate(Path(configuration.attack_certificate), trusted)
            attack_detector = AttackDetector(Path(configuration.attack_detector), certificate)
        classes = Path(configuration.device_classes) if configuration.device_classes else None
        service = Service(
            encoders, settings, detector, store, policies, liveness, ledger,
            device_classes=classes, attack_detector=attack_detector,
        )  # fmt: skip
        stack.callback(service.close)
        if configuration.traces:
            stack.callback(telemetry.set_up())
        yield Opened(service, keys, store)


def run_alone(
    configuration: Configuration, listener: socket.socket, console: Console, ready: Callable[[], None]
) -> list[str]:
    """Serve in this process until it is told to stop; returns the ids of the encoders."""
    return_freed_memory()
    logs.set_up(configuration.log, configuration.log_requests)
    if hasattr(signal, "SIGHUP") and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until the server has a handler: what nobody takes ends a process
    with opened(configuration) as it:
        introduce(logs.announcer(configuration.log, console), it, configuration)
        serve(it.service, listener, it.keys, ready, swept_store=it.store, page=not configuration.no_page)
        return list(it.service.encoders.loaded)


def run_worker(
    configuration: Configuration, listener: socket.socket, index: int, link: Link, folder: Path, quiet: bool
) -> None:
    """Serve as one of several processes. The one with ``index`` 0 introduces the server and sweeps its galleries."""
    return_freed_memory()
    logs.set_up(configuration.log, configuration.log_requests)
    with opened(configuration) as it:
        if it.keys:
            it.keys.shared = folder
        if it.service.liveness:
            it.service.liveness.shared = folder
        if index == 0:
            console = Console(stderr=True, quiet=quiet, highlight=False)
            introduce(logs.announcer(configuration.log, console), it, configuration)
        swept = it.store if index == 0 else None
        page = not configuration.no_page
        serve(it.service, listener, it.keys, lambda: None, swept_store=swept, link=link, page=page)


def open_ledger(configuration: Configuration) -> DriftLedger:
    """Open the file in which processes add up what they see of certificates: beside galleries, or their audit log.

    Without galleries, and where the disk is full or read-only, it is in memory: a server that can search does so.
    """
    if configuration.gallery is None:
        return DriftLedger()
    beside = Path(configuration.audit) if configuration.audit else Path(configuration.gallery) / "drift.db"
    try:
        return DriftLedger(beside.with_name("drift.db"))
    except InputError as error:
        logging.getLogger("pkd.serving").warning("%s Until the next start drift is watched in memory.", error)
        return DriftLedger()


def open_store(configuration: Configuration) -> GalleryStore | None:
    """Open the galleries, of which every process has a view of its own. Raises InputError or StoreUnavailable."""
    if configuration.gallery is None or configuration.master_key is None:
        return None

    url = StoreUrl(configuration.gallery, configuration.audit, configuration.milvus_token, configuration.milvus_shards)
    return url.open(MasterKey.read(Path(configuration.master_key)))


def introduce(say: Callable[[str], None], it: Opened, configuration: Configuration) -> None:
    """Say what is served, and what is not and why."""
    encoders, fmr = it.service.encoders, configuration.settings.target_fmr
    assurance = configuration.settings.assurance

    for loaded in encoders.loaded.values():
        info = loaded.encoder.info
        state = f"{info.space.dim}-d, {info.preprocess.name}{', default' if loaded is encoders.default else ''}"
        gated = f", {NOT_GATED}" if loaded.bundle.manifest.gate == NOT_GATED else ""
        say(f"{info.role} {short(info.id)}: {state}{gated}")
        if info.preprocess.template != ALIGNED_TO:
            say(f"{short(info.id)} takes crops of {info.preprocess.template}: no alignment here, aligned=true only")
    for file in encoders.files.values():
        certificate = file.certificate
        try:
            found = certificate.threshold(fmr, assurance)
            state = f"threshold {found:.4f} at FMR {fmr:g} as a {assurance}{_accuracy(certificate, fmr)}"
        except UnsupportedFmr:
            smallest, largest = certificate.smallest(assurance), certificate.points[0].fmr
            covered = f"{no_less(smallest)} to {largest:g}"
            state = f"FMR {fmr:g} as a {assurance} not covered, requests must state one of {covered}"
        signature = file.signature or file.bundle
        signed = f", signed by {signature.key[:17]}…" if signature and encoders.keys else ""
        synthetic = " (synthetic faces)" if certificate.synthetic else ""
        say(f"certified {short(certificate.query)} → {short(certificate.gallery)}: {state}{synthetic}{signed}")
    if not encoders.keys:
        say("no --trust-key: bundles and certificates may come from anyone")
    if not encoders.files:
        say("no certificate in these bundles: /verify will refuse every pair")
    if not configuration.detector:
        say("no --detector: only aligned crops are taken (aligned=true)")
    if it.service.attack_detector:
        measured = it.service.attack_detector.certificate
        apcer, most, bpcer = (
            f"{100 * rate:.1f} %" for rate in (measured.apcer, measured.apcer_at_most, measured.bona_fide.rate)
        )
        worst = f"APCER {apcer} ({measured.worst}, at most {most}), BPCER {bpcer}"
        say(f"attack detector {measured.detector}, for galleries that demand proof: {worst}")
    if it.keys is None:
        say("no --api-keys: requests need no key")
    if it.store is None:
        say("no --gallery: nobody can be enrolled")


def _accuracy(certificate: Certificate, fmr: float) -> str:
    """Say how many of the people whom it should accept a pair does, where that was measured at this very rate."""
    point = next((one for one in certificate.points if one.fmr == fmr), None)
    if point is None:
        return ""
    verdict = usefulness(point)
    return f", TAR {100 * point.tar_balanced:.1f} %{f': {verdict}' if verdict else ''}"
