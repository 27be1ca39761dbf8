"""Run pkd-pad: measure a model that detects presentation attacks, and write its certificate."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field
from rich.console import Console
from rich.table import Table

from pkd import __version__
from pkd.toolkit.certificates.attack_detection import AttackCertificate, Scoring
from pkd.toolkit.certificates.signing import SigningKey, write_signed
from pkd.toolkit.core.cli_options import Argument, Options, run_command
from pkd.toolkit.core.cli_support import Result
from pkd.toolkit.core.errors import InputError
from pkd.toolkit.core.preprocess import Preprocess
from pkd.toolkit.core.progress import ConsoleProgress
from pkd.toolkit.core.tables import show_table
from pkd.toolkit.data.face_set import FaceSet
from pkd.toolkit.encoders.attack_detector import AttackModel
from pkd.toolkit.encoders.base import batches
from pkd.toolkit.evaluation.metrics.attack_rates import Presentations, choose_threshold, rate_of, split_subjects

BATCH = 32
BONA_FIDE = "bona-fide"
EXAMPLES = """
  pkd-pad detector.onnx --preprocess mean=127.5,std=127.5 --output 1 --softmax --data presentations --out detector.json
  pkd-serve bundles/teacher --attack-detector detector.onnx --attack-certificate detector.json …
"""


class PadOptions(Options):
    """Hold what pkd-pad was asked for."""

    model: Annotated[Path, Argument("FILE.onnx", positional=True)]
    """Classifier of aligned crops, N×3×S×S → N×K."""
    preprocess: Annotated[str, Argument("P")]
    """Pixel scaling of the model, for example size=112,mean=127.5,std=127.5."""
    output: int = Field(0, ge=0, lt=1000)
    """Column of the model's output that stands for bona fide, from 0."""
    softmax: bool = False
    """The columns are logits: take the softmax of them."""
    data: Annotated[Path, Argument("DIR")]
    """Folder with bona-fide/SUBJECT/IMAGE and attack/SPECIES/SUBJECT/IMAGE, aligned crops (pkd-align)."""
    target_apcer: float = Field(0.05, ge=0, lt=1)
    """Largest APCER of any species where the threshold is chosen, a fraction."""
    seed: int = 0
    """Seed that draws the half of the people whom the threshold is chosen on."""
    name: Annotated[str | None, Argument("NAME")] = None
    """Name of the detector in the certificate, the file's by default."""
    sign: Annotated[Path | None, Argument("KEY.pem")] = None
    """ed25519 private key: sign the certificate."""
    out: Annotated[Path, Argument("FILE.json")]
    """Certificate to write."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``pkd-pad``; returns the exit code."""
    return run_command(
        "pkd-pad",
        "Measure a detector of presentation attacks by ISO/IEC 30107-3: APCER of each species of attack instrument and "
        "BPCER, at a threshold chosen on other people, and certify it for pkd-serve.",
        EXAMPLES,
        PadOptions,
        measure,
        argv,
    )


def measure(options: PadOptions, console: Console) -> Result:
    """Score all presentations, choose the threshold, measure, and write the certificate."""
    key = SigningKey.read(options.sign) if options.sign else None
    if not options.out.absolute().parent.is_dir():
        raise InputError(f"--out {options.out}: its folder does not exist. Make it first.")
    scoring = Scoring(preprocess=Preprocess.parse(options.preprocess), output=options.output, softmax=options.softmax)
    model = AttackModel(options.model, scoring)
    folders = _kinds(options.data)
    sets = {name: FaceSet.read(folder) for name, folder in folders.items()}
    progress = ConsoleProgress(console)
    kinds: dict[str, Presentations] = {}
    with progress("scoring", sum(map(len, sets.values()))) as advance:
        for name, faces in sets.items():
            scores = np.empty(len(faces), np.float32)
            for part in batches(len(faces), BATCH):
                scores[part.start : part.stop] = model.score(faces.load(part, scoring.preprocess.size))
                advance(len(part))
            kinds[name] = Presentations(scores, np.array(faces.identities)[faces.labels])
    choosing, measured = split_subjects(kinds, options.seed)
    species = [name for name in kinds if name != BONA_FIDE]
    threshold = choose_threshold({name: kinds[name].of(choosing) for name in species}, options.target_apcer)
    if not np.isfinite(threshold):
        raise InputError(f"{options.model}: gives attacks infinite scores, so no threshold parts them. Train it anew.")
    there = {name: kind.of(measured) for name, kind in kinds.items()}
    try:
        certificate = AttackCertificate(
            detector=options.name or options.model.stem,
            model_sha256=model.sha256,
            scoring=scoring,
            threshold=threshold,
            target_apcer=options.target_apcer,
            chosen_on=len(choosing),
            attacks={name: rate_of(there[name].scores >= threshold, there[name].subjects) for name in species},
            bona_fide=rate_of(there[BONA_FIDE].scores < threshold, there[BONA_FIDE].subjects),
            data_name=options.data.resolve().name,
            data_digest=_digest(sets),
            seed=options.seed,
            created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            pkd_version=__version__,
        )
    except ValueError as error:
        said = str(error).split("Value error, ")[-1].split(" [type=")[0]
        raise InputError(f"{options.model}: {said}.") from None
    write_signed(options.out, (certificate.model_dump_json(indent=2) + "\n").encode(), key)
    _show(certificate, console)
    console.print(f"wrote {options.out}", markup=False, soft_wrap=True)
    return {"out": str(options.out), "worst": certificate.worst, **certificate.model_dump(mode="json")}


def _kinds(data: Path) -> dict[str, Path]:
    """Find the folders of presentations. Raises InputError that shows the layout."""
    attacks = sorted(one for one in (data / "attack").iterdir() if one.is_dir()) if (data / "attack").is_dir() else []
    if not (data / BONA_FIDE).is_dir() or not attacks:
        raise InputError(f"--data {data}: expected bona-fide/SUBJECT/IMAGE and attack/SPECIES/SUBJECT/IMAGE there.")
    return {BONA_FIDE: data / BONA_FIDE} | {one.name: one for one in attacks if one.name != BONA_FIDE}


def _digest(sets: dict[str, FaceSet]) -> str:
    parts = [f"{name} {faces.digest()}\n" for name, faces in sorted(sets.items())]
    return hashlib.sha256("".join(parts).encode()).hexdigest()


def _show(certificate: AttackCertificate, console: Console) -> None:
    table = Table("presentations", "rate", "95 % interval", "images", "subjects")
    rows = [(f"{name}: APCER", one) for name, one in certificate.attacks.items()]
    for name, one in [*rows, ("bona fide: BPCER", certificate.bona_fide)]:
        low, high = one.ci95
        span = f"{100 * low:.1f}–{100 * high:.1f} %"
        table.add_row(name, f"{100 * one.rate:.1f} %", span, f"{one.presentations:,}", f"{one.subjects:,}")
    show_table(console, table)
    console.print(
        f"Threshold {certificate.threshold:.4f}, chosen on {certificate.chosen_on:,} other people. The model's figure "
        f"is the worst species': APCER {100 * certificate.apcer:.1f} % ({certificate.worst}).",
        markup=False,
    )
